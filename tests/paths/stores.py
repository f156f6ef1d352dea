# SPDX-License-Identifier: Apache-2.0
"""Stores on media in RAM, and torch's idea of what a store holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from dualblade.bench.tensors import RawPath
from dualblade.device import CpuDevice
from dualblade.layout import choose_layout
from dualblade.paths.base import StoragePath
from dualblade.pipeline import Mode
from dualblade.planner import make_specs
from dualblade.scheduler import Scheduler
from dualblade.staging import Slot
from dualblade.store import KVStore
from dualblade.tensors import PathKind, Placement, TensorKey, TensorSpec
from dualblade.units import GIB
from spdk_glue import PAGE, MemOptions, Queue, QueueOptions, Region

SHUFFLED = MemOptions(latency_us=20, reorder_seed=11)


class MemPath(RawPath):
    """A medium in RAM as one of the two paths; close() closes its queue, as the real ones do."""

    def __init__(
        self,
        options: QueueOptions = QueueOptions(),
        script: MemOptions = SHUFFLED,
        kind: PathKind = PathKind.DIRECT,
        timeout_s: float = 30.0,
    ):
        super().__init__(Queue.memory(2 * GIB, options, script))
        self.kind = kind
        self.timeout_s = timeout_s

    def register(self, region: Region) -> int:
        return self.queue.register(region)

    def close(self) -> int:
        return self.queue.close()


@dataclass(frozen=True)
class Shape:
    """layers, batch, heads, head_dim: of the model. tokens: what it will hold. tail_bytes: see
    choose_layout. group: of few blocks, so that short tensors have several. depth, spare: layers fetched
    ahead, and slots beyond what that takes: -1 as for layers that read one tensor at most."""

    layers: int = 2
    batch: int = 1
    heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    tokens: int = 64
    tail_bytes: int | None = None
    group: int = 3
    depth: int = 0
    spare: int = 0
    capacity: int = 64
    checksum: bool = False
    mode: Mode = Mode.CROSS_LAYER

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return make_specs(
            self.layers, self.batch, self.heads, self.head_dim, self.dtype.itemsize, self.tokens
        )


def change_pace(store: KVStore, depth: int, queue_depth: int, pages: int) -> None:
    """What the adaptive mode may do after any step."""
    store.scheduler.depth = min(depth, store.scheduler.limit)
    for path in store.paths.values():
        limits = path.queue.limits
        path.tune(min(queue_depth, limits.queue_depth), min(pages * PAGE, limits.command_bytes))


class Alternating:
    """Places each tensor's segments on path after path; its neighbours begin with another."""

    def __init__(self, kinds: Sequence[PathKind]):
        self.kinds = list(kinds)
        self.placed: Counter[TensorKey] = Counter()

    def __call__(self, key: TensorKey, nbytes: int) -> Placement:
        number = self.placed[key] + key.layer + (key.kind == "V")
        self.placed[key] += 1
        return Placement(key, self.kinds[number % len(self.kinds)], nbytes, "in turn")


def make_store(
    shape: Shape,
    paths: Mapping[PathKind, StoragePath],
    placed: bool = False,
    device: CpuDevice | None = None,
    kind: type[KVStore] = KVStore,
) -> KVStore:
    """placed: every tensor has its room from the start, on the paths in turn."""
    specs = shape.specs
    layouts = {spec.key: replace(choose_layout(spec, shape.tail_bytes), group=shape.group) for spec in specs}
    placer = Alternating(list(paths))
    store = kind(
        specs,
        layouts,
        device or CpuDevice(shape.dtype),
        paths,
        placer,
        slots=2 * (shape.depth + 1) + shape.spare,
        capacity=shape.capacity,
        scheduler=Scheduler(shape.mode, shape.depth),
        checksum=shape.checksum,
    )
    if placed:
        store.place([placer(spec.key, layouts[spec.key].bytes_for(spec.tokens)) for spec in specs])
    return store


@dataclass
class Checked:
    """Every load is compared, bit by bit, with all that was appended."""

    store: KVStore
    shape: Shape
    seed: int = 0
    rows: dict[TensorKey, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.device = CpuDevice(self.shape.dtype)
        self.forget()

    def forget(self) -> None:
        self.rows = {spec.key: self.new_rows(spec, 0) for spec in self.shape.specs}

    def new_rows(self, spec: TensorSpec, count: int) -> torch.Tensor:
        size = (spec.batch, spec.heads, count, spec.head_dim)
        return torch.randint(0, 250, size, generator=self.random).to(self.shape.dtype)

    def load(self, key: TensorKey, extra: int = 0) -> Slot:
        slot = self.store.load(key, extra)
        self.compare(key, slot)
        return slot

    def compare(self, key: TensorKey, slot: Slot) -> None:
        rows = self.rows[key]
        tokens = rows.shape[2]
        assert self.store.tensors[key].tokens == tokens
        got = slot.view.view(*rows.shape[:2], -1, rows.shape[3])[:, :, :tokens]
        assert torch.equal(got, rows), f"{key}: token {self._first_wrong(got, rows)} of {tokens} is wrong"

    @staticmethod
    def _first_wrong(got: torch.Tensor, rows: torch.Tensor) -> int:
        return int((got != rows).any(3).any(0).any(0).nonzero()[0])

    def append(self, key: TensorKey, count: int) -> Slot:
        slot = self.load(key, count)
        self.write(key, slot, count)
        return slot

    def write(self, key: TensorKey, slot: Slot, count: int) -> None:
        """Behind a load with room for them."""
        new = self.new_rows(self.store.tensors[key].spec, count)
        self.device.write_rows(new, slot.view, self.rows[key].shape[2])
        self.store.append(key, slot, count)
        self.rows[key] = torch.cat([self.rows[key], new], 2)
        self.compare(key, slot)

    def step(self, count: int) -> None:
        """One forward pass."""
        for layer in range(self.shape.layers):
            for kind in ("K", "V"):
                self.append(TensorKey(layer, kind), count)

    def crop(self, key: TensorKey, tokens: int) -> None:
        self.store.crop(key, tokens)
        self.rows[key] = self.rows[key][:, :, :tokens]

    def flip(self, key: TensorKey) -> None:
        """The sequences of the batch in reverse order."""

        def change(view: torch.Tensor, tokens: int) -> None:
            rows = view.view(self.shape.batch, -1, *view.shape[1:])[:, :, :tokens]
            rows.copy_(rows.flip(0))

        self.store.rewrite(key, change)
        self.rows[key] = self.rows[key].flip(0)

    def reset(self) -> None:
        self.store.reset()
        self.forget()
