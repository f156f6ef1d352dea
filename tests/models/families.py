# SPDX-License-Identifier: Apache-2.0
"""Small random models of the families whose exactness is proven."""

from __future__ import annotations

import functools

import torch
from transformers import LlamaConfig, OPTConfig, PreTrainedModel, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

CONFIGS = {
    "llama": lambda: LlamaConfig(
        vocab_size=199,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=199,
        hidden_size=64,
        ffn_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        word_embed_proj_dim=64,
        do_layer_norm_before=True,
    ),
    "qwen2": lambda: Qwen2Config(
        vocab_size=199,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        use_sliding_window=False,
    ),
}


@functools.cache
def model_of(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(7)
    config = CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model
