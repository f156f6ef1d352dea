# SPDX-License-Identifier: Apache-2.0
"""A store over a raw queue, full of tensors of 128 MiB, for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from dualblade.layout import choose_layout
from dualblade.paths.base import Room, StoragePath
from dualblade.planner import make_specs
from dualblade.scheduler import Scheduler
from dualblade.store import KVStore
from dualblade.store_parts import Device
from dualblade.tensors import PathKind, Placement, TensorKey
from spdk_glue import Queue, Region

# Llama-3-8B: 8 KV heads of 128, bfloat16; 64K tokens are 128 MiB a tensor.
HEADS, HEAD_DIM, ITEMSIZE, TOKENS = 8, 128, 2, 65536


class RawPath(StoragePath):
    """The medium from `start` on, one tensor behind the other; the queue stays the caller's."""

    kind = PathKind.DIRECT

    def __init__(self, queue: Queue, start: int = 0):
        super().__init__(queue, timeout_s=60.0)
        self._end = start

    @property
    def target(self) -> str:
        return self.queue.engine

    def allocate(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        rooms = []
        for key, nbytes in wanted:
            rooms.append(Room(key, self.kind, 0, self._end, nbytes))
            self._end += nbytes
        return rooms

    def release(self, rooms: Sequence[Room]) -> None:
        self._end -= sum(room.nbytes for room in rooms)

    def register(self, region: Region) -> int:
        """Scattered runs gain nothing from it, and it would outlast the store."""
        return 0

    def close(self) -> int:
        return 0


def no_growth(key: TensorKey, nbytes: int) -> Placement:
    """For a store whose tensors have room for all their tokens."""
    raise AssertionError(f"{key} was given room for all its tokens")


def kv_store(
    queue: Queue, device: Device, num_layers: int, tokens: int = TOKENS, path: StoragePath | None = None
) -> KVStore:
    """Every tensor is full: what lies on the medium is taken for its rows. path: None for a RawPath."""
    path = path or RawPath(queue)
    specs = make_specs(num_layers, 1, HEADS, HEAD_DIM, ITEMSIZE, tokens)
    layouts = {spec.key: choose_layout(spec) for spec in specs}
    placements = [
        Placement(spec.key, path.kind, layouts[spec.key].bytes_for(tokens), "benchmark") for spec in specs
    ]

    store = KVStore(specs, layouts, device, {path.kind: path}, no_growth, 2, tokens, Scheduler())
    store.place(placements)
    for tensor in store.tensors.values():
        tensor.tokens = tokens
    return store
