# SPDX-License-Identifier: Apache-2.0
"""Which model is meant, what it weighs, and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dualblade.errors import ConfigError, ModelError, UsageError
from dualblade.planner import make_specs
from dualblade.tensors import TensorSpec

TINY = Path(__file__).parent / "data" / "tiny"
ALIASES = {
    "tiny": str(TINY),
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "opt-125m": "facebook/opt-125m",
    "opt-1.3b": "facebook/opt-1.3b",
    "opt-6.7b": "facebook/opt-6.7b",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class ModelRef:
    """name: as the user wrote it. source: a folder or a hub id."""

    name: str
    source: str

    @property
    def folder(self) -> Path | None:
        path = Path(self.source)
        return path if path.is_dir() else None


def quiet_libraries() -> None:
    """transformers' progress bars and advice are about its own use, not ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def resolve(name: str) -> ModelRef:
    """Raises ModelError for what is neither an alias, nor a folder, nor a hub id."""
    if name in ALIASES:
        return ModelRef(name, ALIASES[name])
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelRef(name, str(path))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return ModelRef(name, name)
    raise ModelError(
        f"unknown model {name!r}: no alias, no folder and no hub id",
        f"aliases: {', '.join(ALIASES)}; or pass a local folder, or a hub id such as facebook/opt-125m",
    )


def load_config(ref: ModelRef) -> PreTrainedConfig:
    return _load(ref, lambda: AutoConfig.from_pretrained(ref.source))


def load_tokenizer(ref: ModelRef) -> Any:
    tokenizer = _load(ref, lambda: AutoTokenizer.from_pretrained(ref.source, padding_side="left"))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(ref: ModelRef, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Raises ModelError naming the file that is damaged or what is missing."""
    model = _load(
        ref,
        lambda: AutoModelForCausalLM.from_pretrained(ref.source, dtype=dtype, attn_implementation=attention),
    )
    return model.eval()


def check_weights(folder: Path) -> None:
    """Every safetensors file is as long as its own header says. Raises ModelError."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no .safetensors file", "pass a folder made by save_pretrained()")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file} is damaged or cut short: {error}", "copy or download it again"
            ) from error


def _load(ref: ModelRef, loader: Any) -> Any:
    try:
        return loader()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        what = "read from its folder" if ref.folder else "loaded from the hub or its local copy"
        raise ModelError(
            f"model {ref.name!r} cannot be {what}: {first}",
            "pass a local folder made by save_pretrained(); `--model tiny` needs no network",
        ) from error


# sizes --------------------------------------------------------------------------------------


def text_config(config: PreTrainedConfig) -> Any:
    return config.get_text_config(decoder=True)


def pick_dtype(config: PreTrainedConfig, name: str | None) -> torch.dtype:
    """The dtype asked for, else the one the weights are stored in. Raises UsageError."""
    if name is not None:
        if name not in DTYPES:
            raise UsageError(f"dtype {name!r} is none of {', '.join(DTYPES)}")
        return DTYPES[name]
    stored = getattr(config, "dtype", None)
    return stored if isinstance(stored, torch.dtype) else torch.float32


def check_context(config: PreTrainedConfig, tokens: int) -> None:
    """Raises ConfigError where the model has no positions for so many tokens."""
    limit = getattr(text_config(config), "max_position_embeddings", None)
    if limit and tokens > limit:
        raise ConfigError(
            f"prompt and new tokens are {tokens} together, and this model ends at {limit}",
            "shorten the prompt or lower --max-new-tokens",
        )


def kv_specs(config: PreTrainedConfig, batch: int, tokens: int, itemsize: int) -> tuple[TensorSpec, ...]:
    """Every K and V of the model, by its configuration."""
    text = text_config(config)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return make_specs(text.num_hidden_layers, batch, heads, head_dim, itemsize, tokens)


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of all weights, from shapes alone: nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def activation_bytes(config: PreTrainedConfig, batch: int, chunk: int, context: int, itemsize: int) -> int:
    """An upper estimate of what one forward pass holds beside weights and KV, in bytes.

    The widest moments of a pre-norm decoder: the MLP's inner rows, or attention with its mask and
    with K and V repeated for every query head (what scaled_dot_product_attention is given
    when there is a mask); and the logits of the last position.
    """
    text = text_config(config)
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    rows = batch * chunk
    mlp = rows * (4 * hidden + 3 * inner) * itemsize
    repeated = 2 * batch * heads * head_dim * context * itemsize
    attention = rows * (4 * hidden + 2 * heads * head_dim) * itemsize + repeated + rows * context * 5
    logits = batch * text.vocab_size * (itemsize + 8)
    return max(mlp, attention) + logits + 32 * 1024 * 1024
