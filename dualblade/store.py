# SPDX-License-Identifier: Apache-2.0
"""KVStore: append new rows, load a whole tensor, with the next layers already on their way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

from dualblade.errors import CapacityError, ConfigError, DualBladeError, StorageError
from dualblade.in_place import InPlace, populate
from dualblade.integrity import Checksums
from dualblade.kv_tensor import Segment, Tensor
from dualblade.layout import Layout
from dualblade.paths.base import Room, StoragePath, Ticket
from dualblade.pipeline import layers_ahead
from dualblade.scheduler import Scheduler
from dualblade.staging import Slot, SlotPool
from dualblade.tensors import PathKind, Placement, TensorKey, TensorSpec
from dualblade.trace import Trace
from dualblade.traffic import reads_of_layers, traffic
from dualblade.units import MIB
from spdk_glue import PAGE, READ, WRITE, FileRegion, Piece, Region

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
    closed with the store. spare: give up direct rooms that nothing lies in; whether there were any."""

    @property
    def region(self) -> Region: ...
    def reached(self, key: TensorKey) -> None: ...
    def grown(self, tensor: Tensor) -> None: ...
    def spare(self) -> bool: ...


class KVStore:
    """The tensors of one generation.

    `load(key, room)` gives the slot that holds all rows of a tensor, with place for `room` more;
    `append(key, slot, count)` takes rows that were written to the slot behind them. One layer's
    slots stay valid until another layer is loaded, or one of its tensors outgrows them. After an
    error, or an interrupt half-way, nothing is served any more. checksum: remember a checksum of
    every block that is written, and verify each one that is read.
    """

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
        self.failure: DualBladeError | None = None
        self.trace: Trace | None = None
        self.mover: Mover | None = None
        self._layers = sorted({spec.key.layer for spec in specs})
        self._slots = slots
        self._of_env = any(path.queue.needs_env_memory for path in paths.values())
        self._layer: int | None = None
        self._entered_at = 0.0
        self._in_use: dict[TensorKey, Slot] = {}
        self._fetched: dict[TensorKey, Slot] = {}
        in_place = self.reads_in_place and device.reads_in_place
        self.in_place = InPlace(device, paths, in_place and not checksum)
        self._tails, self.tensors = self._make_tensors(specs, layouts)
        self._make_pool(capacity)

    # set-up ---------------------------------------------------------------------------------

    def _make_tensors(
        self, specs: Sequence[TensorSpec], layouts: Mapping[TensorKey, Layout]
    ) -> tuple[Region, dict[TensorKey, Tensor]]:
        nbytes = max(PAGE, sum(layouts[spec.key].block_bytes for spec in specs))
        region = Region(nbytes, hugepages=False, of_env=self._of_env)
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
        for kind in (
            kind for kind in PathKind if kind in self.paths
        ):  # what is cached of a tensor comes first
            path = self.paths[kind]
            chosen = [placement for placement in placements if placement.path is kind]
            rooms = path.allocate([(placement.key, placement.bytes) for placement in chosen])
            for room in rooms:
                tensor = self.tensors[room.key]
                blocks = room.nbytes // tensor.layout.block_bytes
                tensor.add(self.in_place.segment(tensor, tensor.blocks, blocks, room))
        for tensor in self.tensors.values():
            self.in_place.map(tensor)
        self.placements += placements

    # load -----------------------------------------------------------------------------------

    def load(self, key: TensorKey, extra: int = 0) -> Slot:
        """The slot with all rows of the tensor in place and room for `extra` more tokens.

        Raises StorageError; from then on every call raises the same.
        """
        tensor = self.tensors[key]
        with self.failing():
            self._tell_mover(key)
            self._enter_layer(key.layer, tensor.tokens + extra)
            slot = self._in_use[key]
            self._await(tensor, slot)
            self._restore_tail(tensor, slot)
        return slot

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

    def _enter_layer(self, layer: int, tokens: int) -> None:
        """Let the last layer's slots go, and start what this layer and the next ones need."""
        if layer == self._layer and self._fits(layer, tokens):
            return
        self._leave_layer()
        self._entered_at = time.monotonic()
        self._begin_layer(layer)
        if not self._fits(layer, tokens):
            self._outgrow(layer, tokens)
        self._layer = layer
        for key in self._keys(layer):
            self._in_use[key] = self._slot_of(key)
            self.tensors[key].in_use = True
        self.prefetch(layer)

    def _fits(self, layer: int, tokens: int) -> bool:
        kept = (self.tensors[key].mapped for key in self._keys(layer))
        return all(tokens <= (mapped.capacity if mapped else self.capacity) for mapped in kept)

    def _slot_of(self, key: TensorKey) -> Slot:
        """With the tensor in it, or on its way."""
        mapped, fetched = self.tensors[key].mapped, self._fetched.pop(key, None)
        if mapped and fetched:
            self.pool.give_back(fetched)
        slot = mapped.slot if mapped else fetched or self._fetch(key, wait=True)
        if slot is None:
            raise ConfigError(f"the staging pool has too few slots for {key}")
        return slot

    def _outgrow(self, layer: int, tokens: int) -> None:
        """More tokens than were foreseen: longer slots, and tensors that cannot stay in one place."""
        if tokens > self.capacity:
            self._grow_pool(tokens)
        for key in self._keys(layer):
            self.in_place.unmap(self.tensors[key])

    def _begin_layer(self, layer: int) -> None:
        """What a step took may change how the next one is fetched."""
        if not self.scheduler.enter(layer, self.stall_s):
            return
        self.scheduler.step_ended(traffic(self.paths), partial(reads_of_layers, self._layers, self.tensors))
        direct, drive = self.paths.get(PathKind.DIRECT), self.scheduler.drive
        if direct and drive:
            direct.tune(drive.queue_depth, drive.command_bytes)

    def _leave_layer(self) -> None:
        for key, slot in self._in_use.items():
            tensor = self.tensors[key]
            tensor.in_use, mapped = False, tensor.mapped
            if mapped is None or slot is not mapped.slot:
                self.pool.give_back(slot)
            elif key.kind == "K" or self.tensors[TensorKey(key.layer, "K")].mapped is None:
                mapped.path.in_place_s += time.monotonic() - self._entered_at
        self._in_use.clear()
        self._layer = None

    def _drop_prefetched(self) -> None:
        for slot in self._fetched.values():
            self.pool.give_back(slot)
        self._fetched.clear()

    def prefetch(self, layer: int) -> None:
        """Start reading the layers after `layer` into the slots that are free."""
        for ahead in layers_ahead(self._layers.index(layer), len(self._layers), self.scheduler.depth):
            for key in self._keys(self._layers[ahead]):
                if key in self._fetched or self.tensors[key].mapped or not self.tensors[key].full:
                    continue
                slot = self._fetch(key, wait=False)
                if slot is None:
                    return
                self._fetched[key] = slot

    def _keys(self, layer: int) -> tuple[TensorKey, TensorKey]:
        return TensorKey(layer, "K"), TensorKey(layer, "V")

    def _fetch(self, key: TensorKey, wait: bool) -> Slot | None:
        """Lease a slot and start reading the tensor's full blocks into it."""
        slot = self.pool.lease(key, wait) or (self._drop_fetched(key, wait) if wait else None)
        if slot is None:
            return None
        tensor = self.tensors[key]
        self._open_slot(slot, tensor.spec)
        slot.fills = self._transfers(READ, tensor, slot, 0, tensor.full)
        return slot

    def _open_slot(self, slot: Slot, spec: TensorSpec) -> None:
        """A slot keeps its view as long as tensors of one shape take it: to open it anew would be a fifth of
        what the scheduler costs."""
        shape = (spec.runs, spec.head_dim)
        if slot.shape != shape:
            slot.shape = shape
            slot.view = self.device.open(
                self.pool.region, slot.offset, spec.runs, self.capacity, spec.head_dim
            )

    def _drop_fetched(self, key: TensorKey, wait: bool) -> Slot | None:
        """A layer out of the usual order takes the slot that would be needed last."""
        while self._fetched:
            _, slot = self._fetched.popitem()
            self.pool.give_back(slot)
            leased = self.pool.lease(key, wait)
            if leased:
                return leased
        return None

    def _transfers(self, op: int, tensor: Tensor, slot: Slot, first: int, end: int) -> list[Ticket]:
        """Move blocks [first, end) between the slot and their rooms: one transfer a path."""
        return self._start(op, tensor, tensor.pieces(slot.address, self.capacity, first, end), slot)

    def _start(
        self, op: int, tensor: Tensor, pieces: Mapping[PathKind, Sequence[Piece]], slot: Slot
    ) -> list[Ticket]:
        move, key = self.device.move, tensor.spec.key
        tickets = [move(self.paths[kind], op, key, parts, slot) for kind, parts in pieces.items()]
        if self.mover is not None:
            tensor.transfers = [ticket for ticket in tensor.transfers if not ticket.done()] + tickets
        return tickets

    def _tell_mover(self, key: TensorKey) -> None:
        """Between two tensors a migration may go on, and between two passes be decided on."""
        if self.mover is not None:
            self.mover.reached(key)

    def _await(self, tensor: Tensor, slot: Slot) -> None:
        """The slot is filled, and everything written before it really reached the medium."""
        begun = time.monotonic()
        filled, slot.fills = slot.fills, []
        for ticket in filled:
            ticket.wait()
        if tensor.full or tensor.mapped:  # rows are about to be written where an old write may still go
            self._await_writes(tensor)
        if tensor.mapped:
            populate(tensor, tensor.mapped)
        ended = time.monotonic()
        self.stall_s += ended - begun
        if self.trace is not None:
            self.trace.add("waits", str(tensor.spec.key), begun, ended)
        if filled and tensor.checksums:
            self._verify(tensor, slot)

    def _verify(self, tensor: Tensor, slot: Slot) -> None:
        assert tensor.checksums is not None
        begun = time.perf_counter()
        stride = tensor.head_stride(self.capacity)
        tensor.checksums.verify(self.pool.rows(slot), stride, tensor.full, tensor.offset_of)
        self.checksum_s += time.perf_counter() - begun

    def _await_writes(self, tensor: Tensor) -> None:
        for ticket in tensor.writes:
            ticket.wait()
        tensor.writes = []

    def _restore_tail(self, tensor: Tensor, slot: Slot) -> None:
        begin = tensor.full * tensor.layout.block_tokens
        if tensor.tokens > begin and tensor.mapped is None:
            self.device.copy_rows(tensor.tail, 0, slot.view, begin, tensor.tokens - begin)

    # append ---------------------------------------------------------------------------------

    def append(self, key: TensorKey, slot: Slot, count: int) -> None:
        """`count` new tokens are in the slot behind the old ones. Whole blocks are written behind
        the caller's back; the rest stays in memory. Raises StorageError, CapacityError."""
        tensor = self.tensors[key]
        if self._in_use.get(key) is not slot or not self._fits(key.layer, tensor.tokens + count):
            raise ValueError(f"{slot} was not loaded for {key} and {count} more tokens")
        with self.failing():
            old = tensor.full
            tensor.tokens += count
            if tensor.mapped:
                tensor.mapped.path.wrote_in_place(count * tensor.spec.token_bytes)
                return
            if tensor.full > old:
                self._make_room(tensor)
                self._write(tensor, slot, old, tensor.full)
            self._keep_tail(tensor, slot, count)

    def _write(self, tensor: Tensor, slot: Slot, first: int, end: int) -> None:
        if tensor.checksums:
            self._bring(tensor, slot.address, first, end)
            tensor.checksums.remember(self.pool.rows(slot), tensor.head_stride(self.capacity), first, end)
        tickets = self._transfers(WRITE, tensor, slot, first, end)
        slot.drains += tickets
        tensor.writes += tickets

    def _bring(self, tensor: Tensor, address: int, first: int, end: int) -> None:
        """Blocks [first, end) are in host memory afterwards."""
        for pieces in tensor.pieces(address, self.capacity, first, end).values():
            self.device.bring(pieces)

    def _keep_tail(self, tensor: Tensor, slot: Slot, count: int) -> None:
        block = tensor.full * tensor.layout.block_tokens
        begin = max(block, tensor.tokens - count)
        if tensor.tokens > begin:
            self.device.copy_rows(slot.view, begin, tensor.tail, begin - block, tensor.tokens - begin)

    def _make_room(self, tensor: Tensor) -> None:
        """A tensor that outgrew its room gets another contiguous segment, twice as large up to a limit."""
        missing = tensor.full - tensor.blocks
        if missing <= 0:
            return
        block = tensor.layout.block_bytes
        blocks = max(missing, min(max(tensor.blocks, 1), max(1, LARGEST_STEP // block)))
        placement = self.placer(tensor.spec.key, blocks * block)
        room = self._allocate(placement)
        tensor.add(Segment(tensor.blocks, blocks, room))
        self.placements.append(placement)
        if self.mover is not None:
            self.mover.grown(tensor)

    def _allocate(self, placement: Placement) -> Room:
        wanted = [(placement.key, placement.bytes)]
        try:
            return self.paths[placement.path].allocate(wanted)[0]
        except CapacityError:
            if self.mover is None or placement.path is not PathKind.DIRECT or not self.mover.spare():
                raise
        return self.paths[placement.path].allocate(wanted)[0]

    def _grow_pool(self, tokens: int) -> None:
        """Slots for a longer context than was foreseen. Nothing is in use at this point."""
        self._drop_prefetched()
        self.pool.drain()
        for path in self.paths.values():
            path.queue.unregister(self.pool.region)
        self.device.forget(self.pool.region)
        self.pool.region.close()
        self._make_pool(max(tokens, 2 * self.capacity))

    # change ---------------------------------------------------------------------------------

    def crop(self, key: TensorKey, tokens: int) -> None:
        """Keep the first `tokens` tokens. A block that becomes unfinished comes back to memory.

        Raises StorageError.
        """
        tensor = self.tensors[key]
        full = tensor.layout.full_blocks(tokens)
        with self.failing():
            if tensor.mapped is None and full < tensor.full and tokens % tensor.layout.block_tokens:
                self._await_writes(tensor)
                self._read_tail(tensor, full)
            tensor.changed(full)
            tensor.tokens = tokens

    def _read_tail(self, tensor: Tensor, block: int) -> None:
        path = self.paths[tensor.segment_of(block).room.path]
        pieces = tensor.tail_pieces(block, self._tails.address)
        self.device.move(path, READ, tensor.spec.key, pieces, None).wait()
        if tensor.checksums:
            rows = self._tails.buffer(tensor.tail_offset, tensor.layout.block_bytes)
            tensor.checksums.verify(rows, tensor.layout.run_bytes, 1, tensor.offset_of, first=block)

    def rewrite(self, key: TensorKey, change: Callable[[Any, int], None]) -> None:
        """Let `change(view, tokens)` alter the rows of a tensor in place. Raises StorageError."""
        tensor = self.tensors[key]
        if not tensor.tokens:
            return
        slot = self.load(key)
        with self.failing():
            change(slot.view, tensor.tokens)
            tensor.changed(0)
            if tensor.mapped:
                return
            self._write(tensor, slot, 0, tensor.full)
            self._keep_tail(tensor, slot, tensor.tokens)

    # state ----------------------------------------------------------------------------------

    def tokens(self, layer: int) -> int:
        return self.tensors[TensorKey(layer, "K")].tokens

    @property
    def staging_bytes(self) -> int:
        return self.pool.region.held

    @property
    def tail_bytes(self) -> int:
        return self._tails.held

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.tokens * tensor.spec.token_bytes for tensor in self.tensors.values())

    def flush(self) -> None:
        """Wait for everything under way. Raises StorageError."""
        with self.failing():
            self._leave_layer()
            self._drop_prefetched()
            self.pool.drain()

    def reset(self) -> None:
        """Forget every row; the rooms stay, to be written anew. Raises StorageError."""
        self.flush()
        for tensor in self.tensors.values():
            tensor.changed(0)
            tensor.tokens = 0
            tensor.writes = []

    def close(self) -> None:
        """Close both paths. Memory that a transfer may still write to is kept for ever.

        Raises StorageError where tidying up failed and nothing had failed before.
        """
        given_up, trouble = 0, self.failure
        self._leave_layer()
        for tensor in self.tensors.values():
            if tensor.mapped:
                tensor.mapped.close()
                tensor.mapped = None
        for path in self.paths.values():
            try:
                given_up += path.close()
            except DualBladeError as error:
                given_up += 1
                self.failure = self.failure or error
        given_up += not self.device.close()
        for region in (self.pool.region, self._tails, *([self.mover.region] if self.mover else [])):
            region.abandon() if given_up else region.close()
        if self.failure is not trouble:
            assert self.failure is not None
            raise self.failure
