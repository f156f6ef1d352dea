# SPDX-License-Identifier: Apache-2.0
"""Masked prefill without copies of K and V: the same bits as transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import CONFIGS
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache

from dualblade.attention import GROUPED, implementation
from dualblade.models import attention_of, empty_model

BATCH, PROMPT, CHUNK = 2, 320, 40


def model_with(family: str, attention: str) -> Any:
    torch.manual_seed(4)
    config = CONFIGS[family]()
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation=attention
    ).eval()


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made anew."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
        return out


def prefill(model: Any, padded: bool = False) -> list[torch.Tensor]:
    """Logits of every chunk."""
    ids = torch.arange(BATCH * PROMPT).reshape(BATCH, PROMPT) % 190 + 2
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :33] = 0
    cache = DynamicCache(config=model.config)
    return [
        model(
            input_ids=ids[:, at : at + CHUNK], attention_mask=mask[:, : at + CHUNK], past_key_values=cache
        ).logits
        for at in range(0, PROMPT, CHUNK)
    ]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "opt"])
@torch.inference_mode()
def test_same_bits(family: str, padded: bool) -> None:
    expected = prefill(model_with(family, "sdpa"), padded)
    got = prefill(model_with(family, implementation("sdpa")), padded)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


@torch.no_grad()
def test_no_copy_for_every_query_head() -> None:
    config = CONFIGS["llama"]()
    repeated = BATCH * config.num_attention_heads * PROMPT * config.head_dim * 2
    seen = []
    for attention in ("sdpa", implementation("sdpa")):
        with Largest() as largest:
            prefill(model_with("llama", attention))
        seen.append(largest.nbytes)
    assert seen[0] >= repeated > seen[1]  # the cache's own growth is a third of it here


def test_families_without_sdpa_fall_back() -> None:
    assert attention_of(empty_model(CONFIGS["gemma2"](), torch.bfloat16)) == "eager"
    assert attention_of(empty_model(CONFIGS["llama"](), torch.bfloat16)) == GROUPED
    assert attention_of(empty_model(CONFIGS["llama"](), torch.bfloat16, "eager")) == "eager"
