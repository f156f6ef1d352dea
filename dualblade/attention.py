# SPDX-License-Identifier: Apache-2.0
"""Attention that does not copy K and V for every query head.

With a mask, transformers repeats K and V to the number of query heads before it calls
scaled_dot_product_attention. On the CPU the fused kernel takes the shared heads as they are, gives the
same bits, and needs no memory for copies of the whole context.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import SDPBackend
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

GROUPED = "dualblade_sdpa"


def implementation(name: str) -> str:
    """The name under which transformers finds what the user calls `sdpa` or `eager`."""
    if name != "sdpa":
        return name
    AttentionInterface.register(GROUPED, grouped_sdpa)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    return GROUPED


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
