# SPDX-License-Identifier: Apache-2.0
"""The parts of a store: tensors, slots and rooms, how they are made and how they grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from dualblade.errors import CapacityError, DualBladeError, StorageError
from dualblade.in_place import InPlace, take_pages
from dualblade.integrity import Checksums
from dualblade.kv_tensor import Tensor
from dualblade.layout import Layout
from dualblade.paths.base import Room, StoragePath, Ticket
from dualblade.scheduler import Scheduler
from dualblade.staging import Slot, SlotPool
from dualblade.tensors import PathKind, Placement, TensorKey, TensorSpec
from dualblade.trace import Trace
from dualblade.units import MIB
from spdk_glue import PAGE, FileRegion, Piece, Region

Pieces = Mapping[PathKind, Sequence[Piece]]
LARGEST_STEP = 64 * MIB  # a tensor whose end is unknown grows by at least this, once it is that large


class Device(Protocol):
    """What the store, and who measures it, ask of a device (see device.py); one store closes it. where: as
    torch names it."""

    where: Any
    reads_in_place: bool

    def adopt(self, region: Region, unit: int) -> None: ...
    def forget(self, region: Region) -> None: ...
    def close(self) -> bool: ...
    def move(
        self, path: StoragePath, op: int, key: TensorKey, pieces: Sequence[Piece], slot: Slot | None
    ) -> Ticket: ...
    def bring(self, pieces: Sequence[Piece]) -> None: ...
    def synchronize(self) -> None: ...
    def copy_seconds(self, pieces: Sequence[Piece]) -> float: ...
    def open(
        self, region: Region | FileRegion, offset: int, runs: int, capacity: int, head_dim: int
    ) -> Any: ...
    def copy_rows(self, source: Any, start: int, out: Any, at: int, count: int) -> None: ...
    def write_rows(self, rows: Any, out: Any, at: int, start: int = 0, count: int | None = None) -> None: ...


class Placer(Protocol):
    """Decides where the next segment of a tensor goes."""

    def __call__(self, key: TensorKey, nbytes: int) -> Placement: ...


class Mover(Protocol):
    """Moves blocks from path to path while the store is used (see live.py). region: what it moves through;
    closed with the store. spare: give up direct rooms that nothing lies in; whether there were any. opens: a
    path that was not needed so far; whether it is there now."""

    @property
    def region(self) -> Region: ...
    def reached(self, key: TensorKey) -> None: ...
    def grown(self, tensor: Tensor) -> None: ...
    def spare(self) -> bool: ...
    def opens(self, kind: PathKind, grows: bool = False) -> bool: ...


class StoreParts:
    """See KVStore. Raises GlueError where there is no memory."""

    reads_in_place = True  # tensors that the page cache holds

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        layouts: Mapping[TensorKey, Layout],
        device: Device,
        paths: Mapping[PathKind, StoragePath],
        placer: Placer,
        slots: int,
        capacity: int,
        scheduler: Scheduler,
        checksum: bool = False,
    ):
        self.device = device
        self.paths = paths
        self.placer = placer
        self.placements: list[Placement] = []
        self.scheduler = scheduler
        self.checksum = checksum
        self.stall_s = 0.0
        self.checksum_s = 0.0
        self.read_through = 0  # bytes that no row was in (see Tensor.end_to_read)
        self.failure: DualBladeError | None = None
        self.trace: Trace | None = None
        self.mover: Mover | None = None
        self._layers = sorted({spec.key.layer for spec in specs})
        self._keys_of = {layer: (TensorKey(layer, "K"), TensorKey(layer, "V")) for layer in self._layers}
        self._slots = slots
        self._of_env = any(path.queue.needs_env_memory for path in paths.values())
        self._layer: int | None = None
        self._step_tokens = 0  # when the step began
        self._entered_at = 0.0
        self._in_use: dict[TensorKey, Slot] = {}
        self._fetched: dict[TensorKey, Slot] = {}
        self._short = False  # of slots, when the next layers were fetched
        # a layer's rows are in host memory as a whole, and attention reads them there
        self.whole_on_host = self.reads_in_place and device.reads_in_place
        self.in_place = InPlace(device, paths, self.whole_on_host and not checksum)
        self._tails, self.tensors = self._make_tensors(specs, layouts)
        self._make_pool(capacity)

    # set-up ---------------------------------------------------------------------------------

    def _make_tensors(
        self, specs: Sequence[TensorSpec], layouts: Mapping[TensorKey, Layout]
    ) -> tuple[Region, dict[TensorKey, Tensor]]:
        nbytes = max(PAGE, sum(layouts[spec.key].block_bytes for spec in specs))
        # a tensor that is read in place never touches its own, and shares no hugepage with one that does
        region = Region(nbytes, best="plain", of_env=self._of_env)
        self.device.adopt(region, region.size)
        tensors, offset = {}, 0
        for spec in specs:
            layout = layouts[spec.key]
            tail = self.device.open(region, offset, spec.runs, layout.block_tokens, spec.head_dim)
            checksums = Checksums(spec.key, layout) if self.checksum else None
            tensors[spec.key] = Tensor(spec, layout, tail, offset, checksums)
            offset += layout.block_bytes
        return region, tensors

    def _make_pool(self, capacity: int) -> None:
        layouts = [tensor.layout for tensor in self.tensors.values()]
        self.capacity = max((layout.capacity_for(capacity) for layout in layouts), default=0)
        slot_bytes = max((layout.slot_bytes(self.capacity) for layout in layouts), default=0)
        self.pool = SlotPool(self._slots, slot_bytes, self._of_env)
        self.device.adopt(self.pool.region, max(PAGE, self.pool.slot_bytes))
        for path in self.paths.values():
            path.register(self.pool.region)

    def place(self, placements: Sequence[Placement]) -> None:
        """Take the room that the governor decided on, before the first token. Raises CapacityError."""
        rest = []
        for placement in placements:
            if not self._place_part(placement):
                rest.append(placement)
        kinds = [kind for kind in PathKind if kind in self.paths]  # what is cached of a tensor comes first
        for kind in kinds:
            chosen = [each for each in rest if each.path is kind]
            rooms = self.paths[kind].allocate([(placement.key, placement.bytes) for placement in chosen])
            for room in rooms:
                tensor = self.tensors[room.key]
                blocks = room.nbytes // tensor.layout.block_bytes
                tensor.add(self.in_place.segment(tensor, tensor.blocks, blocks, room))
        for tensor in self.tensors.values():
            self.in_place.map(tensor)
        take_pages(self.tensors.values())
        self.placements += placements

    def _place_part(self, placement: Placement) -> bool:
        """What the page cache holds of a tensor in part goes where all of it has room; False for another."""
        tensor = self.tensors[placement.key]
        blocks = placement.bytes // tensor.layout.block_bytes
        return placement.path is PathKind.PAGE_CACHE and self.in_place.place_part(tensor, blocks)

    # rooms ----------------------------------------------------------------------------------

    def _make_room(self, tensor: Tensor) -> None:
        """A tensor that outgrew its room gets another contiguous segment, twice as large up to a limit."""
        missing = tensor.full - tensor.blocks
        if missing <= 0:
            return
        block = tensor.layout.block_bytes
        blocks = max(missing, min(max(tensor.blocks, 1), max(1, LARGEST_STEP // block)))
        placement = self.placer(tensor.spec.key, blocks * block)
        room = self._allocate(placement)
        tensor.add(tensor.segment(tensor.blocks, blocks, room))
        self.placements.append(placement)
        if self.mover is not None:
            self.mover.grown(tensor)

    def _allocate(self, placement: Placement) -> Room:
        wanted = [(placement.key, placement.bytes)]
        if placement.path not in self.paths and not (
            self.mover and self.mover.opens(placement.path, grows=True)
        ):
            raise CapacityError(
                f"{placement.key} outgrew what was planned, and there is no {placement.path.value} path",
                "name the prompt and all new tokens: max_tokens",
            )
        try:
            return self.paths[placement.path].allocate(wanted)[0]
        except CapacityError:
            if self.mover is None or placement.path is not PathKind.DIRECT or not self.mover.spare():
                raise
        return self.paths[placement.path].allocate(wanted)[0]

    # what both directions need --------------------------------------------------------------

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Whatever fails here fails the store for good: what it holds may be incomplete."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except DualBladeError as error:
            self.failure = error
            raise
        except OSError as error:
            self.failure = StorageError(f"the KV cache cannot go on: {error}", errno=error.errno or 5)
            raise self.failure from error
        except BaseException as error:
            reason = f"the KV cache was left half-way by {type(error).__name__}"
            self.failure = StorageError(reason, "make a new cache")
            raise

    def _pieces(self, tensor: Tensor, slot: Slot, first: int, end: int, origin: int = 0) -> Pieces:
        """What moves blocks [first, end) between a slot that begins with block `origin` and their rooms."""
        address = slot.address - origin * tensor.layout.run_bytes
        return tensor.pieces(address, self.capacity, first, end)

    def _bring(self, pieces: Pieces) -> None:
        """What they move is in host memory afterwards."""
        for parts in pieces.values():
            self.device.bring(parts)

    def _start(self, op: int, tensor: Tensor, pieces: Pieces, slot: Slot) -> list[Ticket]:
        """One transfer a path."""
        move, key = self.device.move, tensor.spec.key
        return self._noted(
            tensor, [move(self.paths[kind], op, key, parts, slot) for kind, parts in pieces.items()]
        )

    def _noted(self, tensor: Tensor, tickets: list[Ticket]) -> list[Ticket]:
        """What they use is not given back before they are done."""
        if self.mover is not None:
            tensor.transfers = [ticket for ticket in tensor.transfers if not ticket.done()] + tickets
        return tickets

    def _write_back(self, tensor: Tensor, pieces: Pieces) -> list[Ticket]:
        """Where the drive is read for every token, what is cached goes there while the prompt computes. The
        kernel would begin it half a minute later, beside those reads."""
        if all(placement.path is PathKind.PAGE_CACHE for placement in self.placements):
            return []
        key = tensor.spec.key
        begun = [self.paths[kind].write_back(key, parts) for kind, parts in pieces.items()]
        return self._noted(tensor, [ticket for tickets in begun for ticket in tickets])

    def _keys(self, layer: int) -> tuple[TensorKey, TensorKey]:
        return self._keys_of[layer]

    # state ----------------------------------------------------------------------------------

    def tokens(self, layer: int) -> int:
        return self.tensors[TensorKey(layer, "K")].tokens

    @property
    def regions(self) -> tuple[Region, Region]:
        """The slots' memory and the unfinished blocks'."""
        return self.pool.region, self._tails

    @property
    def staging_bytes(self) -> int:
        return self.pool.region.held

    @property
    def tail_bytes(self) -> int:
        return self._tails.held

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.tokens * tensor.spec.token_bytes for tensor in self.tensors.values())
