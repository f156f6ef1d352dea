# SPDX-License-Identifier: Apache-2.0
"""Configuration, tokenizer and weights of a model, each from where the user's words lead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dualblade import hub
from dualblade.checkpoint import Checkpoint
from dualblade.errors import DualBladeError, ModelError
from dualblade.hub import first_line
from dualblade.models import Weight, attention_of, empty_model, smooth_head, weights_of
from dualblade.zoo import ModelRef

Result = TypeVar("Result")
# Left behind in old checkpoints: values that the model computes itself.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"decoder\.version$", r"masked_bias$")


def load_config(ref: ModelRef, shapes_only: bool) -> PreTrainedConfig:
    """shapes_only: an alias is answered by the package alone. Raises ModelError."""
    shapes = ref.shapes
    if shapes_only and shapes:
        return AutoConfig.for_model(**shapes)
    folder = ref.folder or hub.small_files(ref.source)
    return _load(ref, lambda: AutoConfig.from_pretrained(folder, local_files_only=True))


def load_tokenizer(ref: ModelRef) -> Any:
    """Raises ModelError."""
    folder = ref.folder or hub.small_files(ref.source)
    tokenizer = _load(
        ref, lambda: AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_tokenizer(ref: ModelRef) -> bool:
    """Without the network: does a local folder hold one?"""
    return ref.folder is not None and any(ref.folder.glob("tokenizer*"))


def weight_folder(ref: ModelRef) -> Path:
    """Where all weight files lie, looked at; hub models are downloaded here. Raises ModelError."""
    folder = ref.folder or hub.weight_folder(ref.source)
    files = hub.weight_files(folder)
    if not files:
        raise ModelError(
            f"{folder} holds no .safetensors file, or not all that its index names",
            "pass a folder made by save_pretrained(), or --weights dummy",
        )
    Checkpoint(files).close()
    return folder


def _load(ref: ModelRef, loader: Callable[[], Result]) -> Result:
    try:
        return loader()
    except DualBladeError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"model {ref.name!r} cannot be read: {first_line(error)}",
            "pass a local folder made by save_pretrained(); `--model tiny` needs no network",
        ) from error


# weights ------------------------------------------------------------------------------------


def load_model(
    ref: ModelRef,
    folder: Path,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str,
    device: str = "cpu",
) -> PreTrainedModel:
    """The real weights, tensor by tensor, each on the device before the next is read.

    Raises ModelError naming what is damaged or missing.
    """
    model = empty_model(config, dtype, attention)
    with Checkpoint(hub.weight_files(folder)) as checkpoint:
        found, problems = _match(model, checkpoint)
        if not problems:
            _read_weights(model, checkpoint, found, device)
    if problems:
        model = _load(ref, lambda: _convert(folder, config, dtype, attention_of(model), problems))
    if (folder / "generation_config.json").exists():
        model.generation_config = _load(
            ref, lambda: GenerationConfig.from_pretrained(folder, local_files_only=True)
        )
    smooth_head(model)
    return model.to(device).eval()  # type: ignore[arg-type]  # buffers, and what was converted


def _match(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[dict[str, str], list[str]]:
    """Which stored tensor each weight and buffer is, by its first name; and what does not fit.

    Raises ModelError where a tensor has another shape than its namesake.
    """
    found: dict[str, str] = {}
    unused, problems = set(checkpoint.shapes), []
    if getattr(model.config, "quantization_config", None) or getattr(model, "_keep_in_fp32_modules", None):
        problems.append("it wants dtypes of its own")
    for names, shape in _wanted(model):
        stored = [name for name in _spellings(names, model.base_model_prefix) if name in checkpoint.shapes]
        unused.difference_update(stored)
        if stored:
            found[names[0]] = stored[0]
            _check_shape(stored[0], checkpoint.shapes[stored[0]], shape)
        else:
            problems.append(f"{names[0]} is missing")
    return found, problems + [f"{name} has no place" for name in sorted(unused) if not _computed(name, model)]


def _wanted(model: PreTrainedModel) -> Iterable[tuple[tuple[str, ...], tuple[int, ...]]]:
    weights = weights_of(model)
    named = {name for weight in weights for name in weight.names}
    yield from ((weight.names, tuple(weight.empty.shape)) for weight in weights)
    yield from (
        ((name,), tuple(value.shape)) for name, value in model.state_dict().items() if name not in named
    )


def _spellings(names: Iterable[str], prefix: str) -> Iterable[str]:
    """A checkpoint of the bare model lacks the prefix that the model with its head has."""
    for name in names:
        yield from (name, name.removeprefix(f"{prefix}."))


def _computed(name: str, model: PreTrainedModel) -> bool:
    patterns = [*_COMPUTED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    return any(re.search(pattern, name) for pattern in patterns)


def _check_shape(name: str, stored: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if stored != wanted:
        raise ModelError(
            f"{name} is stored as {list(stored)}, and the model's configuration says {list(wanted)}",
            "config.json and the weights are not of one model: copy or download it again",
        )


def _read_weights(model: PreTrainedModel, checkpoint: Checkpoint, found: dict[str, str], device: str) -> None:
    weights: dict[str, Weight] = {found[weight.names[0]]: weight for weight in weights_of(model)}
    buffers = {found[name]: value for name, value in model.state_dict().items() if name in found}
    for stored in checkpoint.in_order([*found.values()]):
        weight = weights.get(stored)
        if weight is None:
            checkpoint.read(stored, buffers[stored])
            continue
        tensor = torch.empty(weight.empty.shape, dtype=weight.empty.dtype)
        checkpoint.read(stored, tensor)
        weight.put(tensor.to(device))


def _convert(
    folder: Path, config: PreTrainedConfig, dtype: torch.dtype, attention: str, problems: list[str]
) -> PreTrainedModel:
    """transformers knows how to rename and fuse the tensors of some families; what it cannot fill,
    it would fill with random values."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    wrong = [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[kind]]
    if wrong:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ModelError(
            f"the weights in {folder} are not those of a {config.model_type} model: "
            f"{', '.join(problems[:3])}{more}",
            "copy or download it again",
        )
    assert isinstance(model, PreTrainedModel)
    return model


def dummy_model(
    config: PreTrainedConfig, dtype: torch.dtype, attention: str, seed: int, device: str = "cpu"
) -> PreTrainedModel:
    """Every shape of the real model with random values, one decoder layer shared by all layers."""
    model = empty_model(config, dtype, attention, shared=True)
    random = torch.Generator().manual_seed(seed)
    for weight in weights_of(model):
        tensor = torch.empty(weight.empty.shape, dtype=weight.empty.dtype)
        tensor.normal_(0.0, 0.02, generator=random)
        # Norms scale by about one, as trained ones do; else everything would vanish layer by layer.
        if tensor.dim() == 1 and weight.names[0].endswith("weight"):
            tensor.add_(1.0)
        weight.put(tensor.to(device))
    smooth_head(model)
    return model.to(device)  # type: ignore[arg-type]  # its buffers
