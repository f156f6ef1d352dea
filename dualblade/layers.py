# SPDX-License-Identifier: Apache-2.0
"""Which layers of a model keep all rows, and so are offloaded, and which keep something smaller.

Full attention keeps every row. Sliding windows, linear attention and layers that share another's
rows keep their own transformers cache class, in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, get_layer_types_and_kwargs

from dualblade.errors import ModelError
from dualblade.tensors import TensorKey, TensorSpec

OFFLOADED = "full_attention"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer. kind: transformers' name of its attention; window: tokens a sliding window keeps, or
    None; options: what its own cache class is made with."""

    index: int
    kind: str
    heads: int
    head_dim: int
    window: int | None
    options: dict[str, Any]

    @property
    def offloaded(self) -> bool:
        return self.kind == OFFLOADED

    def kept_bytes(self, batch: int, tokens: int, itemsize: int) -> int:
        """Host memory of a layer that is not offloaded. A sliding window is copied at each step, so
        it is there twice; states of fixed size are small and count nothing."""
        if self.offloaded or self.window is None:
            return 0
        return 2 * 2 * batch * self.heads * min(self.window, tokens) * self.head_dim * itemsize

    def own_cache_layer(self) -> Any:
        """transformers' cache for this layer."""
        return DYNAMIC_LAYER_TYPE_MAPPING[self.kind](**self.options)


def layer_shapes(config: Any) -> tuple[LayerShape, ...]:
    """Every layer of a model, from its configuration. Raises ModelError for attention that
    transformers itself keeps in a way that is not known here."""
    text = config.get_text_config(decoder=True)
    kinds, options = get_layer_types_and_kwargs(text)
    shapes = tuple(
        LayerShape(index, kind, *_heads(layer), kwargs.get("sliding_window"), kwargs)
        for index, (kind, kwargs, layer) in enumerate(zip(kinds, options, text.per_layer_config, strict=True))
    )
    unknown = sorted({shape.kind for shape in shapes} - set(DYNAMIC_LAYER_TYPE_MAPPING))
    if unknown:
        raise ModelError(f"this model has layers of a type that is not known here: {', '.join(unknown)}")
    return shapes


def _heads(layer: Any) -> tuple[int, int]:
    """(KV heads, head_dim)"""
    heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
    head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return heads, head_dim


def kv_specs(config: Any, batch: int, tokens: int, itemsize: int) -> tuple[TensorSpec, ...]:
    """Every K and V that is offloaded, in the order of decoding."""
    return tuple(
        TensorSpec(TensorKey(shape.index, kind), batch, shape.heads, shape.head_dim, itemsize, tokens)
        for shape in layer_shapes(config)
        if shape.offloaded
        for kind in ("K", "V")
    )


def kept_in_memory(config: Any) -> dict[str, int]:
    """How many layers of each kind stay in memory."""
    kinds = [shape.kind for shape in layer_shapes(config) if not shape.offloaded]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def kept_bytes(config: Any, batch: int, tokens: int, itemsize: int) -> int:
    """Host memory of the layers that stay in memory, in bytes."""
    return sum(shape.kept_bytes(batch, tokens, itemsize) for shape in layer_shapes(config))
