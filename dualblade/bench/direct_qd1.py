# SPDX-License-Identifier: Apache-2.0
"""Past the page cache in the simplest way: the baseline `direct-qd1`.

Two slots, for K and V of the layer that is computed; nothing is fetched ahead. A tensor is one extent, token
after token, read a block of 1 MiB at a time, each waited for before the next is asked for. Whole pages are
written at once, the bytes behind the last of them stay in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from dualblade.bench.token_major import RowsCache, as_heads, as_tokens
from dualblade.paths.direct import DirectPath
from dualblade.superblock import capacity_for
from dualblade.targets import open_target, open_volume
from dualblade.tensors import TensorKey, TensorSpec
from dualblade.units import MIB, round_up
from spdk_glue import PAGE, READ, WRITE, QueueOptions, Region, plain

BLOCK = MIB


class DirectQd1Cache(RowsCache):
    """nvme: a TARGET with a volume of ours, None for a file of this process. Raises TargetError,
    CapacityError, StorageError."""

    def __init__(
        self,
        config: PreTrainedConfig,
        specs: Sequence[TensorSpec],
        dtype: torch.dtype,
        folder: Path,
        nvme: str | None,
    ):
        super().__init__(config, specs, dtype)
        sizes = {spec.key: round_up(spec.nbytes, BLOCK) for spec in specs}
        options = QueueOptions(queue_depth=1, command_bytes=BLOCK)
        target = open_target(
            nvme, capacity=capacity_for(sum(sizes.values()), len(specs)), cache_dir=folder, options=options,
            memory=2 * max(sizes.values()),
        )  # fmt: skip
        try:
            self.path = DirectPath(target, open_volume(target))
        except BaseException:
            target.close()
            raise
        self._rooms = {room.key: room for room in self.path.allocate(list(sizes.items()))}
        self._slot_bytes = max(sizes.values())
        self._region = Region(2 * self._slot_bytes, of_env=self.path.queue.needs_env_memory)
        self._tails = dict.fromkeys(sizes, b"")
        self._layer: int | None = None

    def exchange(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer != self._layer:
            self._load(layer)
        before = self.tokens.get(layer, 0)
        self.tokens[layer] = before + keys.shape[2]
        k, v = (
            self._append(TensorKey(layer, kind), rows, before) for kind, rows in (("K", keys), ("V", values))
        )
        return k, v

    def _load(self, layer: int) -> None:
        self._layer = layer
        for kind in "KV":
            key = TensorKey(layer, kind)
            tail = self._tails[key]
            whole = self.tokens.get(layer, 0) * self.specs[key].token_bytes - len(tail)
            self._move(READ, key, 0, whole)
            self._slot(key)[whole : whole + len(tail)] = tail

    def _append(self, key: TensorKey, rows: torch.Tensor, before: int) -> torch.Tensor:
        spec, end = self.specs[key], before + rows.shape[2]
        view = torch.frombuffer(self._slot(key), dtype=self.dtype, count=end * spec.runs * spec.head_dim)
        view = view.view(end, spec.runs, spec.head_dim)
        view[before:].view(-1, spec.batch, spec.heads, spec.head_dim).copy_(as_tokens(rows))
        first, stop = (tokens * spec.token_bytes // PAGE * PAGE for tokens in (before, end))
        self._move(WRITE, key, first, stop)
        self._tails[key] = bytes(self._slot(key)[stop : end * spec.token_bytes])
        return as_heads(view, spec.batch)

    def _move(self, op: int, key: TensorKey, begin: int, end: int) -> None:
        """Bytes [begin, end) of the tensor, block after block."""
        room, address = self._rooms[key], self._region.address + self._offset(key)
        for at in range(begin, end, BLOCK):
            piece = plain(room.offset + at, address + at, min(BLOCK, end - at), room.file)
            self.path.transfer(op, key, [piece]).wait()

    def _offset(self, key: TensorKey) -> int:
        return self._slot_bytes * "KV".index(key.kind)

    def _slot(self, key: TensorKey) -> memoryview:
        return self._region.buffer(self._offset(key), self._slot_bytes)

    def rows(self, key: TensorKey) -> torch.Tensor:
        """All rows of one tensor, read again, [batch, KV head, tokens, head_dim]."""
        self._load(key.layer)
        spec, tokens = self.specs[key], self.tokens[key.layer]
        view = torch.frombuffer(self._slot(key), dtype=self.dtype, count=tokens * spec.runs * spec.head_dim)
        return as_heads(view.view(tokens, spec.runs, spec.head_dim), spec.batch)

    def close(self) -> None:
        self._region.abandon() if self.path.close() else self._region.close()
