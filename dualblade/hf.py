# SPDX-License-Identifier: Apache-2.0
"""DualBladeCache: a transformers cache whose rows live on two paths."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, get_layer_types_and_kwargs

from dualblade.device import CpuDevice
from dualblade.errors import ConfigError, DualBladeError, ModelError
from dualblade.offload import Offload
from dualblade.planner import make_specs
from dualblade.settings import CacheSettings
from dualblade.tensors import TensorKey, TensorSpec

FIRST_TOKENS = 1024  # where a run of unknown length begins


class OffloadedLayer(CacheLayerMixin):
    """One attention layer. What `update` returns is valid until another layer's update."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: DualBladeCache, index: int):
        super().__init__()
        self._cache = cache
        self._index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._cache.prepare(key_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the rows [batch, KV head, tokens, head_dim] and return all of K and of V.

        Raises StorageError, CapacityError, ModelError.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self._cache.exchange(TensorKey(self._index, "K"), key_states)
        values = self._cache.exchange(TensorKey(self._index, "V"), value_states)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.tokens(self._index)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """All layers are reset together, by the cache."""

    def _refuse(self, what: str) -> None:
        raise DualBladeError(f"DualBladeCache cannot {what} in this version", "use greedy search or sampling")

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._refuse("reorder rows (beam search)")

    def crop(self, tokens_to_remove: int) -> None:
        self._refuse("drop its last tokens (assisted decoding)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._refuse("repeat rows of the batch")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._refuse("select rows of the batch")


class DualBladeCache(Cache):
    """A KV cache larger than its memory, for any `generate()`.

    nvme: where the direct path lives (see the README's TARGET); None: a file of this process alone.
    mem_budget: host memory of the whole process. max_tokens and batch_size let everything be
    placed before the first token; without them tensors grow by contiguous segments. settings:
    all of these at once, already checked.

    Raises UsageError, ConfigError, BudgetError, TargetError, CapacityError.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        nvme: str | None = None,
        mem_budget: str | int = "6G",
        page_cache_budget: str | int | None = None,
        kv_path: str = "auto",
        max_tokens: int | None = None,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        policy: str | None = None,
        cache_dir: str | Path | None = None,
        capacity: str | int | None = None,
        weights_bytes: int = 0,
        activation_bytes: int | None = None,
        prefetch_depth: int | None = None,
        settings: CacheSettings | None = None,
    ):
        self.settings = settings or CacheSettings.checked(
            nvme=nvme,
            mem_budget=mem_budget,
            page_cache_budget=page_cache_budget,
            kv_path=kv_path,
            policy=policy,
            cache_dir=cache_dir,
            capacity=capacity,
            weights_bytes=weights_bytes,
            activation_bytes=activation_bytes,
            prefetch_depth=prefetch_depth,
        )
        text = config.get_text_config(decoder=True)
        self._num_layers = _check_layers(text)
        self._max_tokens = max_tokens
        self._storage: Offload | None = None
        self._device: CpuDevice | None = None
        self.update_s = 0.0
        super().__init__(layers=[OffloadedLayer(self, index) for index in range(self._num_layers)])
        known = dtype or getattr(text, "dtype", None)
        if max_tokens and batch_size and isinstance(known, torch.dtype):
            heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            self._open(
                make_specs(self._num_layers, batch_size, heads, head_dim, known.itemsize, max_tokens), known
            )

    # set-up ---------------------------------------------------------------------------------

    def prepare(self, rows: torch.Tensor) -> None:
        """Take rooms for tensors like `rows` [batch, KV head, tokens, head_dim], or check that they fit."""
        if rows.device.type != "cpu":
            raise ConfigError(
                f"this version keeps KV for models on the CPU, and this one is on {rows.device}"
            )
        if rows.requires_grad:
            raise ConfigError("DualBladeCache is for inference", "call the model under torch.no_grad()")
        batch, heads, tokens, head_dim = rows.shape
        if self._storage is None:
            expected = self._max_tokens or max(FIRST_TOKENS, 2 * tokens)
            specs = make_specs(self._num_layers, batch, heads, head_dim, rows.dtype.itemsize, expected)
            self._open(specs, rows.dtype)

    def _open(self, specs: tuple[TensorSpec, ...], dtype: torch.dtype) -> None:
        self._device = CpuDevice(dtype)
        self._storage = Offload(specs, self.settings, self._device, grows=not self._max_tokens)

    @property
    def storage(self) -> Offload:
        if self._storage is None:
            raise ConfigError("the cache is empty: nothing was generated with it yet")
        return self._storage

    # the life of a token --------------------------------------------------------------------

    def exchange(self, key: TensorKey, rows: torch.Tensor) -> torch.Tensor:
        """Append `rows` to one tensor and return all of it, [batch, KV head, tokens, head_dim]."""
        begun = time.perf_counter()
        store, device = self.storage.store, self._device
        self._check_rows(key, rows)
        assert device is not None
        count = rows.shape[-2]
        before = store.tensors[key].tokens
        slot = store.load(key, count)
        device.write_rows(rows, slot.view, before)
        store.append(key, slot, count)
        self.update_s += time.perf_counter() - begun
        return device.rows(slot.view, rows.shape[0], before + count)

    def _check_rows(self, key: TensorKey, rows: torch.Tensor) -> None:
        spec = self.storage.store.tensors[key].spec
        expected = (spec.batch, spec.heads, spec.head_dim)
        got = (rows.shape[0], rows.shape[1], rows.shape[3])
        if got != expected or (self._device and rows.dtype != self._device.dtype):
            raise ModelError(
                f"{key}: rows of batch, KV heads, head_dim {got} and {rows.dtype} arrived where "
                f"{expected} and {self._device.dtype if self._device else '?'} were expected",
                "one cache serves one batch of one model; make a new one",
            )

    def tokens(self, layer: int) -> int:
        return self._storage.store.tokens(layer) if self._storage else 0

    def reset(self) -> None:
        """Forget every token; the rooms are kept for the next prompt of the same batch."""
        if self._storage:
            self._storage.store.reset()

    def report(self) -> dict[str, Any]:
        """The parts "memory", "paths", "placements" and "pipeline" of `run --json`."""
        return self.storage.report()

    def close(self) -> None:
        """Leave nothing behind: no file, no extent, no memory."""
        storage, self._storage = self._storage, None
        if storage:
            storage.close()

    def __enter__(self) -> DualBladeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_layers(config: PreTrainedConfig) -> int:
    """Number of layers. Raises ModelError for attention that keeps something else than all rows."""
    types, _ = get_layer_types_and_kwargs(config)
    other = sorted({name for name in types if name != "full_attention"})
    if other:
        raise ModelError(
            f"this model has layers of type {', '.join(other)}; this version offloads full attention only",
            "use a model with full attention in every layer, such as Llama, OPT or Qwen2",
        )
    return len(types)
