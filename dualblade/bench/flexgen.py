# SPDX-License-Identifier: Apache-2.0
"""FlexGen's offloading to disk, as a transformers cache: the baseline `flexgen`.

Every K and every V is a memory-mapped .npy array, [tokens, batch x KV head, head_dim], reopened at each copy.
Four threads copy, each through a relay of its own. While a layer computes, the next one is loaded and the
rows of this one are stored, and all of it has ended before the next layer begins. A decoded token stores its
own rows alone.

Kinder than the original: the relay is small (there 2 GiB of pinned memory a thread, which no budget here
could hold) and so stays in the CPU's caches, the disk space is allocated beforehand, and a whole decoder
layer's compute hides a load, where the original has its MLP alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import posix_fallocate
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from dualblade.bench.spans import union_seconds
from dualblade.bench.token_major import RowsCache, as_heads, as_tokens
from dualblade.tensors import TensorKey, TensorSpec
from dualblade.units import MIB

COPY_THREADS = 4
RELAY = 16 * MIB
# torch's integers of the same size: NumPy has no bfloat16, and a copy is a copy
_RAW = {2: torch.int16, 4: torch.int32}


class FlexGenCache(RowsCache):
    """folder: where the arrays lie; the caller removes it. Raises OSError."""

    def __init__(
        self, config: PreTrainedConfig, specs: Sequence[TensorSpec], dtype: torch.dtype, folder: Path
    ):
        super().__init__(config, specs, dtype)
        self._raw = _RAW[dtype.itemsize]
        self.files = {key: self._make_file(spec, folder) for key, spec in self.specs.items()}
        self._copiers = ThreadPoolExecutor(COPY_THREADS, "copy")
        self._thread = threading.local()
        self._opening = threading.Lock()
        self._working = [self._buffers() for _ in range(2)]  # this layer's and the next one's
        self._jobs: list[Future[None]] = []
        self._spans: list[tuple[float, float]] = []
        self._layer: int | None = None
        self._loaded: dict[int, int] = {}  # layer -> which of the working buffers

    def _make_file(self, spec: TensorSpec, folder: Path) -> Path:
        path = folder / f"{spec.key.layer}-{spec.key.kind}.npy"
        shape = (spec.tokens, spec.runs, spec.head_dim)
        made = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(f"i{spec.itemsize}"), shape=shape)
        del made
        with path.open("r+b") as file:  # a mapped write that finds no space would kill the process
            posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return path

    def _buffers(self) -> dict[str, torch.Tensor]:
        largest = max(self.specs.values(), key=lambda spec: spec.nbytes)
        shape = (largest.tokens * largest.runs * largest.head_dim,)
        return {kind: torch.empty(shape, dtype=self._raw) for kind in "KV"}

    @property
    def relay_bytes(self) -> int:
        """Of one thread."""
        return min(RELAY, max(spec.nbytes for spec in self.specs.values()))

    @property
    def load_seconds(self) -> float:
        """Time with a load under way."""
        return union_seconds(self._spans)

    # the life of a token --------------------------------------------------------------------

    def exchange(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._enter(layer)
        before, count = self.tokens.get(layer, 0), keys.shape[2]
        k, v = (
            self._append(TensorKey(layer, kind), rows, before) for kind, rows in (("K", keys), ("V", values))
        )
        self.tokens[layer] = before + count
        return k, v

    def _enter(self, layer: int) -> None:
        """The barrier between two layers, and the load of the one after."""
        if layer == self._layer:
            return
        self.sync()
        if layer not in self._loaded:  # the first of all, or out of order
            self._load(layer, 0)
            self.sync()
        current = self._loaded[layer]
        self._loaded = {layer: current}
        self._layer = layer
        following = self.next_layer(layer)
        if following != layer:
            self._load(following, 1 - current)

    def sync(self) -> None:
        """Wait for all copies under way. Raises what a copy raised."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def _load(self, layer: int, buffer: int) -> None:
        self._loaded[layer] = buffer
        tokens = self.tokens.get(layer, 0)
        for kind in "KV" if tokens else "":
            key = TensorKey(layer, kind)
            out = self._view(key, buffer)[:tokens]
            self._jobs.append(self._copiers.submit(self._copy_in, self.files[key], out))

    def _append(self, key: TensorKey, rows: torch.Tensor, before: int) -> torch.Tensor:
        """The new rows behind the old ones, in memory at once and on the disk by a copy thread."""
        spec, end = self.specs[key], before + rows.shape[2]
        view = self._view(key, self._loaded[key.layer])
        typed = view.view(self.dtype)
        typed[before:end].view(end - before, spec.batch, spec.heads, spec.head_dim).copy_(as_tokens(rows))
        self._jobs.append(self._copiers.submit(self._copy_out, self.files[key], view[before:end], before))
        return as_heads(typed[:end], spec.batch)

    def _view(self, key: TensorKey, buffer: int) -> torch.Tensor:
        spec = self.specs[key]
        flat = self._working[buffer][key.kind][: spec.tokens * spec.runs * spec.head_dim]
        return flat.view(spec.tokens, spec.runs, spec.head_dim)

    # in the copy threads --------------------------------------------------------------------

    def _copy_in(self, file: Path, out: torch.Tensor) -> None:
        begun = time.perf_counter()
        mapped = self._open(file)
        self._relayed(mapped[: len(out)], out)
        self._spans.append((begun, time.perf_counter()))

    def _copy_out(self, file: Path, rows: torch.Tensor, at: int) -> None:
        mapped = self._open(file)
        self._relayed(rows, mapped[at : at + len(rows)])

    def _open(self, file: Path) -> torch.Tensor:
        """One at a time: NumPy parses the header with ast, which fails at random when threads of a Python
        3.11 do so at once (SystemError: AST constructor recursion depth mismatch)."""
        with self._opening:
            return torch.from_numpy(np.lib.format.open_memmap(file, mode="r+"))

    @torch.inference_mode()
    def _relayed(self, source: torch.Tensor, out: torch.Tensor) -> None:
        relay = self._relay()
        step = max(1, relay.numel() // source[0].numel())
        for at in range(0, len(source), step):
            part = source[at : at + step]
            passing = relay[: part.numel()].view(part.shape)
            passing.copy_(part)
            out[at : at + step].copy_(passing)

    def _relay(self) -> torch.Tensor:
        if not hasattr(self._thread, "relay"):
            token = max(spec.token_bytes for spec in self.specs.values())
            self._thread.relay = torch.empty(
                max(token, self.relay_bytes) // self.dtype.itemsize, dtype=self._raw
            )
        relay: torch.Tensor = self._thread.relay
        return relay

    # afterwards -----------------------------------------------------------------------------

    def rows(self, key: TensorKey) -> torch.Tensor:
        """All rows of one tensor as they are on the disk, [batch, KV head, tokens, head_dim]."""
        self.sync()
        spec = self.specs[key]
        mapped = self._open(self.files[key])
        return as_heads(mapped[: self.tokens[key.layer]].view(self.dtype), spec.batch)

    def close(self) -> None:
        self._copiers.shutdown()
