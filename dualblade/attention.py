# SPDX-License-Identifier: Apache-2.0
"""Attention that does not copy K and V for every query head or that streams them, and masks that come and go.

With a mask, transformers repeats K and V to the number of query heads before it calls
scaled_dot_product_attention. On the CPU the fused kernel takes the shared heads as they are, gives the
same bits, and needs no memory for copies of the whole context.

`dualblade` is the attention of models whose cache may stream a layer: see handles.py and streaming.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dualblade.errors import ModelError
from dualblade.handles import NO_STREAM, STREAMED, Handle, Source
from dualblade.streaming import Piece, Visible, attend

GROUPED = "dualblade_sdpa"


class Mask:
    """A mask whose memory can be given back while nobody looks at it. Whoever holds the tensor, or a view
    of it, finds the same bits there afterwards."""

    def __init__(self, make: Callable[[], torch.Tensor | None], tensor: torch.Tensor):
        self._make = make
        self._storage = tensor.untyped_storage()
        self.nbytes = self._storage.nbytes()

    def drop(self) -> None:
        self._storage.resize_(0)

    def restore(self) -> None:
        again = self._make()
        assert again is not None, "the same arguments gave a mask before"
        self._storage.resize_(self.nbytes)
        self._storage.copy_(again.untyped_storage())


# What a forward pass that pauses now and then has made; None in any other pass.
masks_made: ContextVar[list[Mask] | None] = ContextVar("masks_made", default=None)


def implementation(name: str) -> str:
    """The name under which transformers finds what the user calls `sdpa` or `eager`."""
    if name != "sdpa":
        return name
    AttentionInterface.register(GROUPED, grouped_sdpa)
    AttentionMaskInterface.register(GROUPED, noted_mask)
    return GROUPED


def streams(config: Any) -> bool:
    """Does a model of this configuration take K and V that are streamed?"""
    name = getattr(config.get_text_config(decoder=True), "_attn_implementation", None)
    return bool(name == STREAMED)


def register_streamed() -> None:
    """Let transformers find the attention `dualblade`."""
    AttentionInterface.register(STREAMED, streamed_attention)
    AttentionMaskInterface.register(STREAMED, noted_mask)


def noted_mask(*args: Any, **options: Any) -> torch.Tensor | None:
    """transformers' own mask, entered in `masks_made`."""
    make = partial(sdpa_mask, *args, **options)
    mask = make()
    made = masks_made.get()
    if made is not None and mask is not None:
        made.append(Mask(make, mask))
    return mask


def grouped_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' own `sdpa`; only masked prefill on the CPU goes another way."""
    if attention_mask is None or not _fused(query, key, value, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    out = torch.nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=True,
    )
    return out.transpose(1, 2).contiguous(), None


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> bool:
    """Would the kernel that needs no copies be taken? For one query token transformers' way is as good."""
    plain = options.get("position_bias") is None and options.get("softcap") is None
    if query.device.type != "cpu" or query.shape[2] == 1 or query.shape[1] == key.shape[1] or not plain:
        return False
    chosen = torch._fused_sdp_choice(query, key, value, mask, enable_gqa=True)
    return bool(chosen == SDPBackend.FLASH_ATTENTION.value)


def streamed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over the pieces of a layer that is streamed. K and V that are whole go the way of `sdpa`,
    unless their scores are capped or have sinks, which that cannot.

    Raises ModelError for options that it does not know.
    """
    more = {"softcap": options.get("softcap"), "sinks": options.get("s_aux")}
    if not isinstance(key, Handle) and all(option is None for option in more.values()):
        return grouped_sdpa(module, query, key, value, attention_mask, **options)
    _check(key, value, options)
    source: Source = key.source if isinstance(key, Handle) else _Whole(key, value)
    visible = Visible(attention_mask, _offset(module, query, key, attention_mask, options.get("is_causal")))
    out = attend(
        query,
        source.pieces(),
        visible,
        kv_heads=key.shape[1],
        value_dim=value.shape[3],
        scale=options.get("scaling"),
        **more,
    )
    return out.transpose(1, 2).contiguous(), None


class _Whole:
    """K and V that are in memory, as one piece."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self._piece = (0, keys, values)
        self.tokens = keys.shape[2]

    def pieces(self) -> Iterator[Piece]:
        yield self._piece


def _check(key: torch.Tensor, value: torch.Tensor, options: dict[str, Any]) -> None:
    if isinstance(key, Handle) != isinstance(value, Handle):
        raise ModelError("of K and V only one is streamed: this model does not pass on what its cache gives")
    if options.get("position_bias") is not None or options.get("dropout"):
        raise ModelError("streamed attention knows no position bias and no dropout", NO_STREAM)


def _offset(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool | None,
) -> int | None:
    """Of causal attention without a mask, as `sdpa` decides it: the last query is the last key's."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is not None or query.shape[2] == 1 or not causal:
        return None
    return key.shape[2] - query.shape[2]


register_streamed()
