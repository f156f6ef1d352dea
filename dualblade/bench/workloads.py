# SPDX-License-Identifier: Apache-2.0
"""What a sweep runs: a model, a prompt of random tokens, and the memory that both take without KV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from dualblade import loading, models
from dualblade.attention import implementation
from dualblade.errors import ConfigError, UsageError
from dualblade.layers import kept_bytes, kv_specs
from dualblade.layout import PAGE, chunk_bytes
from dualblade.live import KERNEL_PART
from dualblade.runner import Prompt, random_prompt
from dualblade.tensors import TensorSpec
from dualblade.units import MIB, parse_size, round_up
from dualblade.zoo import resolve

# Many KV heads on a narrow residual: little is computed for a byte of KV, so storage decides. Of 64 elements:
# torch's attention on a CPU goes through a GiB of such KV in two thirds of the time that heads of 128 take.
SHAPES: dict[str, dict[str, Any]] = {
    "kv-heavy": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
        "max_position_embeddings": 1 << 20,
        "dtype": "float32",
    }
}
ROWS = 1024  # of a matrix product in prefill
STAGED_LAYERS = 2  # K and V of the layer that is computed and of the one that comes
# Thread stacks, page tables, what the allocator keeps, code of the libraries that computing first touches: a
# run with 2 GiB of KV took 98 MiB more than its other parts.
HEAP_SLACK = 112 * MIB
# Of what the page cache holds, the kernel takes up to a 32nd beside it (see live.KERNEL_PART), charged to the
# cgroup: a budget without it could not hold the part of the KV that it is named after.
HELD = 1 + 1 / KERNEL_PART


@dataclass(frozen=True, slots=True)
class Workload:
    """model: of SHAPES, an alias or a local folder. context: prompt tokens of each sequence."""

    model: str = "kv-heavy"
    context: int = 8192
    new_tokens: int = 8
    batch: int = 1
    dtype: str | None = "float32"
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Rows of each tensor at the end."""
        return self.context + self.new_tokens

    @property
    def chunk(self) -> int:
        """Prompt tokens of one forward pass. All chunks pass a layer before the next one is begun."""
        return max(1, min(self.context, ROWS // self.batch))


@dataclass(frozen=True, slots=True)
class Need:
    """Host memory without cached KV, in bytes. staging: K and V of two layers. moving: what blocks of `dual`
    change paths through. kv: the whole cache."""

    weights: int
    runtime: int
    activations: int
    staging: int
    moving: int
    kv: int

    @property
    def base(self) -> int:
        return self.weights + self.runtime + self.activations + self.staging + self.moving


@dataclass(frozen=True, slots=True)
class Budget:
    """fraction: of the KV bytes that the budget can hold beside the base, with what the kernel takes for it;
    bytes: of the whole process."""

    fraction: float
    bytes: int


def load_config(workload: Workload) -> tuple[PreTrainedConfig, torch.dtype]:
    """Raises ModelError, ConfigError, UsageError."""
    shape = SHAPES.get(workload.model)
    config = (
        AutoConfig.for_model(**shape)
        if shape
        else loading.load_config(resolve(workload.model), shapes_only=True)
    )
    models.check_context(config, workload.tokens)
    return config, models.pick_dtype(config, workload.dtype)


def make_model(workload: Workload, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Random weights, the same in every process."""
    return loading.dummy_model(config, dtype, "sdpa", workload.seed)


def make_prompt(workload: Workload, config: PreTrainedConfig) -> Prompt:
    vocabulary = models.text_config(config).vocab_size
    return random_prompt(workload.batch, workload.context, vocabulary, workload.seed)


def make_specs(workload: Workload, config: PreTrainedConfig, dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    """Every K and V that grows with the context. Raises ConfigError where there is none."""
    specs = kv_specs(config, workload.batch, workload.tokens, dtype.itemsize)
    if not specs:
        raise ConfigError(f"{workload.model} keeps no KV that grows with the context", "take another model")
    return specs


def measure_need(workload: Workload, runtime: int) -> Need:
    """runtime: memory of a process that has loaded the libraries, anonymous and mapped."""
    config, dtype = load_config(workload)
    empty = models.empty_model(config, dtype, "sdpa", shared=True)
    specs = make_specs(workload, config, dtype)
    kv = sum(spec.nbytes for spec in specs)
    largest = max(spec.nbytes for spec in specs)
    return Need(
        weights=models.weight_bytes(empty),
        runtime=round_up(runtime + HEAP_SLACK, MIB),
        activations=_activations(workload, config, dtype, empty),
        staging=STAGED_LAYERS * 2 * largest,
        moving=chunk_bytes([PAGE], kv),
        kv=kv,
    )


def _activations(workload: Workload, config: PreTrainedConfig, dtype: torch.dtype, empty: Any) -> int:
    """Of the prompt going through layer by layer; decoding takes less."""
    passing = models.activation_bytes(
        config, workload.batch, workload.chunk, workload.tokens, dtype.itemsize,
        all_logits=not models.last_position_only(empty),
    )  # fmt: skip
    paused = models.paused_bytes(
        config, workload.batch, workload.tokens, dtype.itemsize, implementation("sdpa")
    )
    kept = kept_bytes(config, workload.batch, workload.tokens, dtype.itemsize)
    return passing + workload.context * paused + kept + models.HEAP_KEPT


def decode_activations(config: PreTrainedConfig, batch: int, tokens: int, dtype: torch.dtype) -> int:
    """Of one token a sequence going through."""
    passing = models.activation_bytes(config, batch, 1, tokens, dtype.itemsize, slack=models.DECODE_SLACK)
    return passing + kept_bytes(config, batch, tokens, dtype.itemsize)


def read_budgets(text: str, need: Need) -> list[Budget]:
    """Fractions of the KV bytes, or sizes of the whole process: "0.25,0.5,6G". Raises UsageError."""
    return [_budget(part.strip(), need) for part in text.split(",")]


def _budget(text: str, need: Need) -> Budget:
    try:
        fraction = float(text)
    except ValueError:
        nbytes = parse_size(text, "budget")
        return Budget((nbytes - need.base) / (HELD * need.kv), nbytes)
    if not 0 <= fraction <= 100:
        raise UsageError(f"a budget of {text} times the KV bytes makes no sense", "write e.g. 0.5, or 6G")
    return Budget(fraction, need.base + int(fraction * HELD * need.kv))
