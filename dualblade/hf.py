# SPDX-License-Identifier: Apache-2.0
"""DualBladeCache: a transformers cache whose rows live on two paths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from dualblade.attention import streams
from dualblade.device import CpuDevice, leave_a_cpu
from dualblade.device_cuda import device_for, free_for_ring
from dualblade.errors import ConfigError, EnforcementError, ModelError
from dualblade.handles import StreamedRows
from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.layers import kv_specs, layer_shapes
from dualblade.offload import Offload
from dualblade.settings import CacheSettings
from dualblade.stream_choice import FASTER, Choice
from dualblade.stream_plans import settings_for_cache
from dualblade.streamed_store import StreamedStore
from dualblade.streaming import Piece
from dualblade.tensors import TensorKey, TensorSpec

FIRST_TOKENS = 1024  # where a run of unknown length begins


class OffloadedLayer(CacheLayerMixin):
    """One attention layer. What `update` returns is valid until another layer's update."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, cache: DualBladeCache, index: int):
        super().__init__()
        self._cache = cache
        self._index = index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self._cache.prepare(key_states)
        self.is_initialized = True

    @torch.compiler.disable(reason="moving bytes between memory and a drive is nothing to trace")
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the rows [batch, KV head, tokens, head_dim] and return all of K and of V.

        Raises StorageError, CapacityError, ModelError.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._cache.exchange_both(self._index, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self._cache.tokens(self._index)

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """All layers are reset together, by the cache."""

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last -tokens_to_remove tokens; a positive number is the length to keep, as in
        transformers' older releases. Raises StorageError."""
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        self._cache.crop_layer(self._index, max(0, min(keep, length)))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was. Every row is read and written once more,
        so beam search costs the drive a whole cache a step. Raises StorageError."""
        self._cache.select_layer(self._index, beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep only these sequences, in this order. Raises StorageError, ConfigError."""
        self._cache.select_layer(self._index, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Raises ConfigError: the rooms were taken for the batch as it was."""
        raise ConfigError(
            "DualBladeCache cannot grow its batch", "repeat the prompt's rows before the first forward pass"
        )


def with_ring(settings: CacheSettings, where: torch.device) -> CacheSettings:
    """What is free now on a device with memory of its own holds the K and V that are under way."""
    if settings.ring is not None or (free := free_for_ring(where)) is None:
        return settings
    return replace(settings, ring=free)


class DualBladeCache(Cache):
    """A KV cache larger than its memory, for any `generate()`.

    nvme: where the direct path lives (see the README's TARGET); None: a file of this process alone.
    mem_budget: host memory of the whole process. max_tokens and batch_size let everything be placed before
    the first token; without them tensors grow by contiguous segments. stream: "auto" where one layer's K and
    V do not fit the budget, "faster" also where a token is predicted to take less time, "never" or "always";
    it takes a model that was built with attn_implementation="dualblade", and "auto" and "faster" are "never"
    for any other. enforce: put the process in a memory cgroup of mem_budget until the cache is closed; where
    that cannot be, a RuntimeWarning says why, and the budget is kept by planning. live: tensors change paths
    as the memory changes; None: as the policy has it. device: the model's; without it rooms are taken at the
    first forward pass where there is a CUDA device. settings: all of these at once, already checked.

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
        checksum: bool = False,
        stream: str = "auto",
        enforce: bool = False,
        pipeline: str = "adaptive",
        live: bool | None = None,
        device: str | torch.device | None = None,
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
            checksum=checksum,
            stream=stream if streams(config) or stream != "auto" else "never",
            pipeline=pipeline,
            live=live,
        )
        self.config = config
        self._max_tokens = max_tokens
        self._storage: Offload | None = None
        self._choice: Choice | None = None
        self._spared = ExitStack()
        self._cgroup = self._enforced() if enforce else None
        self._device: CpuDevice | None = None
        self._where = None if device is None else torch.device(device)
        self._batch = 0
        shapes = layer_shapes(config)
        super().__init__(
            layers=[
                OffloadedLayer(self, shape.index) if shape.offloaded else shape.own_cache_layer()
                for shape in shapes
            ]
        )
        known = dtype or getattr(config.get_text_config(decoder=True), "dtype", None)
        where = self._where or (None if torch.cuda.is_available() else torch.device("cpu"))
        if max_tokens and batch_size and isinstance(known, torch.dtype) and where is not None:
            try:
                self._open(kv_specs(config, batch_size, max_tokens, known.itemsize), known, where)
            except BaseException:
                self._leave_cgroup()
                raise

    # set-up ---------------------------------------------------------------------------------

    def _enforced(self) -> BudgetCgroup | None:
        """The cgroup that the process is in from now on; None where there is none, which a warning says."""
        try:
            cgroup = BudgetCgroup.held_to(self.settings.budget)
        except EnforcementError as error:
            hint = f" ({error.hint})" if error.hint else ""
            warnings.warn(f"the memory budget is not enforced: {error}{hint}", RuntimeWarning, stacklevel=3)
            return None
        self.settings = replace(self.settings, cgroup=cgroup)
        return cgroup

    def _leave_cgroup(self) -> None:
        cgroup, self._cgroup = self._cgroup, None
        if cgroup:
            cgroup.leave()
            self.settings = replace(self.settings, cgroup=None)

    def prepare(self, rows: torch.Tensor) -> None:
        """Take rooms for tensors like `rows` [batch, KV head, tokens, head_dim], or check that they fit."""
        if rows.requires_grad:
            raise ConfigError("DualBladeCache is for inference", "call the model under torch.no_grad()")
        batch, _, tokens, _ = rows.shape
        if self._storage is None:
            expected = self._max_tokens or max(FIRST_TOKENS, 2 * tokens)
            specs = kv_specs(self.config, batch, expected, rows.dtype.itemsize)
            self._open(specs, rows.dtype, rows.device)

    def _open(self, specs: tuple[TensorSpec, ...], dtype: torch.dtype, where: torch.device) -> None:
        settings = with_ring(self.settings, where)
        if settings.stream == FASTER:
            settings, self._choice = settings_for_cache(
                self.config, specs, dtype, settings, grows=self._max_tokens is None
            )
        self._device = device_for(where, dtype)
        self._batch = specs[0].batch if specs else 0
        grows = bool(specs) and not self._max_tokens
        self._storage = Offload(specs, settings, self._device, grows)
        if self._choice:
            self._choice = self._choice.carried_out(self._storage.chunks is not None)
        self._spared.enter_context(leave_a_cpu(self._storage.polling_threads > 0))

    @property
    def storage(self) -> Offload:
        if self._storage is None:
            raise ConfigError("the cache is empty: nothing was generated with it yet")
        return self._storage

    @property
    def dtype(self) -> torch.dtype:
        assert self._device is not None, "it is empty"
        return self._device.dtype

    # the life of a token --------------------------------------------------------------------

    def exchange_both(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to K and V of a layer and return all of both."""
        both = ((TensorKey(layer, "K"), keys), (TensorKey(layer, "V"), values))
        for key, rows in both:
            self._check_rows(key, rows)
        if isinstance(self.storage.store, StreamedStore):
            return self._exchange_streamed(self.storage.store, layer, keys, values)
        with self.storage.store.failing():  # an interrupt between the two leaves K longer than V
            all_keys, all_values = (self._exchange(key, rows) for key, rows in both)
        return all_keys, all_values

    def _exchange(self, key: TensorKey, rows: torch.Tensor) -> torch.Tensor:
        """Append `rows` to one tensor and return all of it, [batch, KV head, tokens, head_dim]."""
        store, device = self.storage.store, self._device
        assert device is not None
        count = rows.shape[-2]
        before = store.tensors[key].tokens
        slot = store.load(key, count)
        device.write_rows(rows, slot.view, before)
        store.append(key, slot, count)
        return device.rows(slot.view, rows.shape[0], rows.shape[1], before + count)

    def _exchange_streamed(
        self, store: StreamedStore, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the rows and return handles, which stream the older rows and pass these on."""
        older, count = store.tokens(layer), keys.shape[2]
        batch, heads = keys.shape[:2]
        device = self._device
        assert device is not None
        with store.failing():
            store.append_rows(TensorKey(layer, "K"), keys, count)
            store.append_rows(TensorKey(layer, "V"), values, count)

        def pieces() -> Iterator[Piece]:
            if store.tokens(layer) != older + count:
                raise ConfigError(f"the K and V of layer {layer} have changed since they were returned")
            for part in store.stream(layer, older):
                k, v = (device.rows(view, batch, heads, part.tokens) for view in (part.keys, part.values))
                yield part.begin, k, v

        return StreamedRows(older, pieces, keys, values).handles()

    def _check_rows(self, key: TensorKey, rows: torch.Tensor) -> None:
        spec = self.storage.store.tensors[key].spec
        expected = (self._batch, spec.heads, spec.head_dim)
        got = (rows.shape[0], rows.shape[1], rows.shape[3])
        if self._device is not None and rows.device.type != self._device.where.type:
            raise ConfigError(
                f"the cache was opened for {self._device.where}, and the model is on {rows.device}",
                "pass device=model.device to DualBladeCache",
            )
        if got != expected or (self._device and rows.dtype != self._device.dtype):
            raise ModelError(
                f"{key}: rows of batch, KV heads, head_dim {got} and {rows.dtype} arrived where "
                f"{expected} and {self._device.dtype if self._device else '?'} were expected",
                "one cache serves one batch of one model; make a new one",
            )

    def tokens(self, layer: int) -> int:
        return self._storage.store.tokens(layer) if self._storage else 0

    def crop_layer(self, layer: int, tokens: int) -> None:
        """Keep the first `tokens` tokens of a layer. Raises StorageError."""
        if self._storage:
            for kind in ("K", "V"):
                self._storage.store.crop(TensorKey(layer, kind), tokens)

    def select_layer(self, layer: int, indices: torch.Tensor) -> None:
        """Sequence b of a layer becomes what sequence indices[b] was. Raises StorageError, ConfigError."""
        if self._storage is None or self._device is None:
            return
        chosen = torch.arange(self._batch)[indices.cpu()]
        store, device = self._storage.store, self._device
        spec = store.tensors[TensorKey(layer, "K")].spec
        if len(chosen) > spec.batch:
            raise ConfigError(f"the cache holds {spec.batch} sequences, and {len(chosen)} were chosen")
        for kind in ("K", "V"):
            store.rewrite(
                TensorKey(layer, kind),
                lambda view, tokens: device.select(view, spec.batch, chosen, tokens),
            )
        if layer == max(key.layer for key in store.tensors):
            self._batch = len(chosen)

    def decode_begins(self, activation_bytes: int) -> None:
        """The prompt is done: until reset() a forward pass holds at most so many bytes. What a longer one
        had reserved may cache KV."""
        if self._storage and self._storage.governor:
            self._storage.governor.reserve(activation_bytes)

    def reset(self) -> None:
        """Forget every token; the rooms are kept for the next prompt of the same batch.

        Raises StorageError."""
        if self._storage:
            self._storage.store.reset()
            if self._storage.governor:
                self._storage.governor.reserve(None)
            self._batch = self._room
        for shape in layer_shapes(self.config):  # their states may be inference tensors, of a smaller batch
            if not shape.offloaded:
                self.layers[shape.index] = shape.own_cache_layer()

    def begin(self, batch: int) -> None:
        """Forget every token; the next prompt has `batch` sequences, at most as many as there is room for.
        Raises ConfigError, StorageError."""
        if self._storage and batch > self._room > 0:
            raise ConfigError(f"the cache has room for {self._room} sequences, and {batch} are to come")
        self.reset()
        self._batch = min(self._batch, batch)

    @property
    def _room(self) -> int:
        """Sequences there is room for; 0 where nothing is offloaded."""
        return max((spec.batch for spec in self.storage.plan.specs), default=0)

    def report(self) -> dict[str, Any]:
        """The parts "memory", "paths", "placements" and "pipeline" of `run --json`."""
        report = self.storage.report()
        report["pipeline"]["compute_threads"] = torch.get_num_threads()
        report["pipeline"]["stream_choice"] = self._choice.record() if self._choice else None
        return report

    def close(self) -> None:
        """Leave nothing behind: no file, no extent, no memory."""
        storage, self._storage = self._storage, None
        self._spared.close()
        try:
            if storage:
                storage.close()
        finally:
            self._leave_cgroup()

    def __enter__(self) -> DualBladeCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
