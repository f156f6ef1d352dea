# SPDX-License-Identifier: Apache-2.0
"""Small random models of the families whose exactness is proven."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

VOCABULARY = 199
WINDOW = 40
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def mixed(config: Callable[..., PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    """Sliding windows and full attention in turn."""
    options = COMMON | {
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": MIXED,
    }
    return config(**options, **more)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**COMMON | {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 16}),
    "llama3-rope": lambda: LlamaConfig(**COMMON, rope_parameters=LLAMA3_ROPE),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        word_embed_proj_dim=64,
    ),
    "qwen2": lambda: Qwen2Config(**COMMON, use_sliding_window=False),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=32, use_sliding_window=False),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "phi3": lambda: Phi3Config(**COMMON, pad_token_id=1, sliding_window=None),
    "gemma2": lambda: mixed(Gemma2Config, query_pre_attn_scalar=16),
    "gemma3": lambda: mixed(Gemma3TextConfig, query_pre_attn_scalar=16),
    "qwen3-next": lambda: Qwen3NextConfig(
        **COMMON | {"num_hidden_layers": 4},
        head_dim=16,
        layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=0,
        mlp_only_layers=[0, 1, 2, 3],
    ),
}

# Nothing of these grows with the context, so nothing of them is offloaded.
WINDOWS_ALONE: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral-window": lambda: MistralConfig(**COMMON, sliding_window=WINDOW),
}


@functools.cache
def model_of(family: str, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    """Random weights, the same every time. attention: None for what the family uses as a rule."""
    torch.manual_seed(7)
    # Gemma 2 caps its attention scores, which scaled_dot_product_attention cannot
    chosen = attention or ("eager" if family == "gemma2" else "sdpa")
    model = AutoModelForCausalLM.from_config(
        (CONFIGS | WINDOWS_ALONE)[family](), dtype=dtype, attn_implementation=chosen
    ).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model


def padded_prompt(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left."""
    random = torch.Generator().manual_seed(batch)
    ids = torch.randint(2, VOCABULARY, (batch, tokens), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 17 * row] = 0
        ids[row, : 17 * row] = 1
    return {"input_ids": ids, "attention_mask": mask}
