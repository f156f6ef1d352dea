# SPDX-License-Identifier: Apache-2.0
"""What the baselines that are not ours have in common: rows lie token after token, [tokens, batch x KV head,
head_dim], as in FlexGen, and a layer is whole in memory while it is computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from dualblade.layers import layer_shapes
from dualblade.tensors import TensorSpec


class RowsLayer(CacheLayerMixin):
    """Hands every update to its cache."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: RowsCache, index: int):
        super().__init__()
        self._cache = cache
        self._index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.is_initialized = True
        return self._cache.exchange(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.tokens.get(self._index, 0)

    def get_max_length(self) -> int:
        return -1


class RowsCache(Cache):
    """A cache whose full-attention layers are `exchange`'s affair; the others stay transformers' own.

    tokens: rows of each layer so far.
    """

    def __init__(self, config: PreTrainedConfig, specs: Sequence[TensorSpec], dtype: torch.dtype):
        self.specs = {spec.key: spec for spec in specs}
        self.order = sorted({spec.key.layer for spec in specs})
        self.dtype = dtype
        self.tokens: dict[int, int] = {}
        shapes = layer_shapes(config)
        super().__init__(
            layers=[RowsLayer(self, s.index) if s.offloaded else s.own_cache_layer() for s in shapes]
        )

    @abstractmethod
    def exchange(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append rows [batch, KV head, tokens, head_dim] to a layer and return all of K and of V."""

    def next_layer(self, layer: int) -> int:
        """In the cyclic order of decoding."""
        return self.order[(self.order.index(layer) + 1) % len(self.order)]


def as_heads(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """[tokens, batch x KV head, head_dim] as [batch, KV head, tokens, head_dim]; no copy."""
    tokens, runs, dim = rows.shape
    return rows.view(tokens, batch, runs // batch, dim).permute(1, 2, 0, 3)


def as_tokens(rows: torch.Tensor) -> torch.Tensor:
    """[batch, KV head, tokens, head_dim] as [tokens, batch, KV head, head_dim]; no copy."""
    return rows.permute(2, 0, 1, 3)


class OneLayerCache(RowsCache):
    """Compute alone: K and V of one layer in memory, which all layers write to and attend to. Shapes and
    work are those of a whole cache; nothing is moved, and the values mean nothing."""

    def __init__(self, config: PreTrainedConfig, specs: Sequence[TensorSpec], dtype: torch.dtype):
        super().__init__(config, specs, dtype)
        self._both = {kind: self._buffer(kind) for kind in "KV"}

    def _buffer(self, kind: str) -> torch.Tensor:
        largest = max(
            (spec for spec in self.specs.values() if spec.key.kind == kind), key=lambda spec: spec.token_bytes
        )
        return torch.randn(largest.batch, largest.heads, largest.tokens, largest.head_dim).to(self.dtype)

    def exchange(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before, count = self.tokens.get(layer, 0), keys.shape[2]
        self.tokens[layer] = before + count
        for kind, rows in (("K", keys), ("V", values)):
            self._both[kind][:, : rows.shape[1], before : before + count] = rows
        k, v = (
            self._both[kind][:, : rows.shape[1], : before + count]
            for kind, rows in (("K", keys), ("V", values))
        )
        return k, v
