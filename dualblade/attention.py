# SPDX-License-Identifier: Apache-2.0
"""Attention that does not copy K and V for every query head, and masks that come and go.

With a mask, transformers repeats K and V to the number of query heads before it calls
scaled_dot_product_attention. On the CPU the fused kernel takes the shared heads as they are, gives the
same bits, and needs no memory for copies of the whole context.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

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
