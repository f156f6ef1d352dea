# SPDX-License-Identifier: Apache-2.0
"""A model without its weights: what it is made of, and what it takes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from dualblade.attention import GROUPED, implementation
from dualblade.errors import ConfigError, ModelError, UsageError
from dualblade.handles import STREAMED
from dualblade.streaming import scratch_bytes
from dualblade.units import MIB

# What the C library's heap keeps between the tensors of a pass; with a quarter more of the tensors
# themselves, measured on passes of 0.1 to 1 GiB.
HEAP_SLACK = 48 * MIB
# Beside it, where the heap keeps what a prompt frees (see host/heap.py): small blocks cut large ones, which
# are then too short for the next tensor. Measured 40 to 140 MiB; beyond this the governor has it given back.
HEAP_KEPT = 96 * MIB
DECODE_SLACK = 16 * MIB  # the same, when one token passes: what a prompt left behind is seen by then
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def quiet_libraries() -> None:
    """transformers' progress bars and advice are about its own use, not ours."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


# an empty model -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter and every (module, name) that holds it: tied weights have several."""

    names: tuple[str, ...]
    places: tuple[tuple[nn.Module, str], ...]
    empty: torch.Tensor

    def put(self, tensor: torch.Tensor) -> None:
        """Give the model its values."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for module, name in self.places:
            setattr(module, name, parameter)


def empty_model(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str = "sdpa", shared: bool = False
) -> PreTrainedModel:
    """The model with parameters that take no memory; buffers hold their values. shared: all decoder
    layers have the parameters of one. Raises ModelError for what is no decoder-only language model."""
    try:
        model = _build(config, dtype, implementation(attention))
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be built: {str(error).splitlines()[0]}",
            "use a decoder-only language model, such as Llama, OPT or Qwen",
        ) from error
    model.tie_weights()
    if shared:
        _share_layers(model)
    return model.eval()


def _build(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """Some families have no attention but `eager`, and say so by a ValueError."""
    try:
        with _parameters_on_meta():
            own = copy.deepcopy(config)  # from_config notes the dtype in it
            return AutoModelForCausalLM.from_config(own, dtype=dtype, attn_implementation=attention)
    except ValueError:
        if attention == "eager":
            raise
        return _build(config, dtype, "eager")


def attention_of(model: PreTrainedModel) -> str:
    """transformers' name of the attention that a model was built with."""
    return str(model.config._attn_implementation)


def can_stream(model: PreTrainedModel) -> bool:
    """Does the model leave attention to the function that transformers was told of?"""
    return bool(model._supports_attention_backend)


def smooth_head(model: PreTrainedModel) -> None:
    """The last position of every sequence is a strided view, for which matmul would copy the head's
    weights once a sequence before it multiplies. contiguous() would not do: it returns a view whose
    odd strides belong to dimensions of one as it is."""
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(
            lambda _, args: (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        )


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """torch.device("meta") would take the buffers too, and nothing computes those anew."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        register(self, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Raises ModelError where there is no list of as many layers as the configuration says."""
    count = text_config(model.config).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"{type(model).__name__} has no list of {count} decoder layers")


def _share_layers(model: PreTrainedModel) -> None:
    """Layers of another kind (of other shapes) keep one of their own kind."""
    first: dict[tuple[str, torch.Size], nn.Parameter] = {}
    for layer in decoder_layers(model):
        for name, parameter in list(layer.named_parameters()):
            owner, _, last = name.rpartition(".")
            setattr(layer.get_submodule(owner), last, first.setdefault((name, parameter.shape), parameter))


def weights_of(model: nn.Module) -> list[Weight]:
    """Every parameter once."""
    names: dict[int, list[str]] = {}
    tensors: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        tensors[id(parameter)] = parameter
    return [
        Weight(tuple(names[key]), tuple(_place(model, name) for name in names[key]), tensors[key])
        for key in names
    ]


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, last = name.rpartition(".")
    return model.get_submodule(owner), last


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
    limit = context_limit(config)
    if limit and tokens > limit:
        raise ConfigError(
            f"a context of {tokens} tokens, prompt and new ones together, is more than this model's {limit}",
            "shorten the prompt, or ask for fewer new tokens",
        )


def context_limit(config: PreTrainedConfig) -> int | None:
    """Positions the model has, if it has an end."""
    return getattr(text_config(config), "max_position_embeddings", None)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights, each counted once; an empty model answers as well."""
    return sum(weight.empty.numel() * weight.empty.element_size() for weight in weights_of(model))


def last_position_only(model: nn.Module) -> dict[str, int]:
    """What to pass to a forward pass for the logits of the last position alone; nothing where the
    model cannot leave the others out."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def activation_bytes(
    config: PreTrainedConfig,
    batch: int,
    chunk: int,
    context: int,
    itemsize: int,
    attention: str = "sdpa",
    all_logits: bool = False,
    slack: int = HEAP_SLACK,
) -> int:
    """An upper estimate of what one forward pass holds beside weights and KV, in bytes. slack: of it, for
    what the allocator keeps.

    The widest moments of a pre-norm decoder: the MLP's inner rows, or attention with its mask;
    `eager` also has K and V repeated for every query head, and the scores; `dualblade` its accumulators.
    And the logits.
    """
    text = text_config(config)
    hidden, heads = text.hidden_size, text.num_attention_heads
    head_dim = _head_dim(text)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * hidden
    rows = batch * chunk
    mlp = rows * (4 * hidden + 3 * inner) * itemsize
    attending = rows * (4 * hidden + 2 * heads * head_dim) * itemsize + rows * context * 5
    if attention == "eager":
        attending += 2 * repeated_bytes(config, batch, context, itemsize)
        attending += rows * heads * context * (2 * itemsize + 4)
    if attention == STREAMED:
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        attending += scratch_bytes(batch, heads, kv_heads, head_dim, chunk)
    logits = (rows if all_logits else batch) * text.vocab_size * (itemsize + 8)
    return max(mlp, attending) * 5 // 4 + logits + slack


def _head_dim(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def repeated_bytes(config: PreTrainedConfig, batch: int, context: int, itemsize: int) -> int:
    """K or V of one layer, repeated for every query head, in bytes."""
    text = text_config(config)
    head_dim = _head_dim(text)
    return batch * int(text.num_attention_heads) * head_dim * context * itemsize


def paused_bytes(
    config: PreTrainedConfig, batch: int, context: int, itemsize: int, attention: str = "sdpa"
) -> int:
    """An upper estimate of what a prompt token takes in a forward pass that pauses between two layers, in
    bytes: its embedding, which the model's own code keeps to the end, its hidden state, a rotary table for
    every kind of layer or else its learned position, and its row of every mask that is not dropped meanwhile.
    What else a padded prompt has is in the heap's slack."""
    text = text_config(config)
    head_dim = _head_dim(text)
    masks = 0 if attention in (GROUPED, STREAMED) else 1 + bool(getattr(text, "sliding_window", None))
    kinds = len(set(getattr(text, "layer_types", None) or [None]))
    position = 2 * kinds * head_dim if hasattr(text, "rope_parameters") else text.hidden_size
    return batch * ((2 * text.hidden_size + position) * itemsize + 4 * masks * context + 16)
