# SPDX-License-Identifier: Apache-2.0
"""KVStore: append new rows, load a whole tensor, with the next layers already on their way."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from dualblade.errors import ConfigError, DualBladeError
from dualblade.in_place import LEAST_STAGED, populate, read_ahead
from dualblade.kv_tensor import Mapped, Tensor
from dualblade.staging import Slot
from dualblade.store_parts import StoreParts
from dualblade.tensors import PathKind, TensorKey, TensorSpec
from dualblade.traffic import reads_of_layers, traffic
from spdk_glue import READ, WRITE

LONGEST_DECODE = 32  # tokens of a pass, guessed ones included; more are a prompt's


class KVStore(StoreParts):
    """The tensors of one generation.

    `load(key, room)` gives the slot that holds all rows of a tensor, with place for `room` more;
    `append(key, slot, count)` takes rows that were written to the slot behind them. One layer's
    slots stay valid until another layer is loaded, or one of its tensors outgrows them. After an
    error, or an interrupt half-way, nothing is served any more. checksum: remember a checksum of
    every block that is written, and verify each one that is read.
    """

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
            if self._short:  # its writes may have given slots back meanwhile, and attention takes long
                self.prefetch(key.layer)
            self._restore_tail(tensor, slot)
        return slot

    def at_hand(self, key: TensorKey) -> tuple[Slot, int] | None:
        """The slot that has all rows of a tensor in host memory now, and bytes from head to head in it."""
        slot, tensor = self._in_use.get(key), self.tensors[key]
        if slot is None or slot.fills or tensor.mapped:
            return None
        return slot, tensor.head_stride(self.capacity)

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
            self._in_use[key] = self._slot_of(key, tokens)
            self.tensors[key].in_use = True
        self.prefetch(layer)

    def _fits(self, layer: int, tokens: int) -> bool:
        for key in self._keys(layer):
            mapped = self.tensors[key].mapped
            if tokens > (mapped.capacity if mapped else self.capacity):
                return False
        return True

    def _slot_of(self, key: TensorKey, tokens: int) -> Slot:
        """With the tensor in it, or on its way."""
        mapped, fetched = self.tensors[key].mapped, self._fetched.pop(key, None)
        if mapped:
            if fetched:
                self.pool.give_back(fetched)
            return self._slot_for_first(self.tensors[key], mapped, tokens) or mapped.slot
        slot = fetched or self._fetch(key, wait=True)
        if slot is None:
            raise ConfigError(f"the staging pool has too few slots for {key}")
        return slot

    def _slot_for_first(self, tensor: Tensor, mapped: Mapped, tokens: int) -> Slot | None:
        """The first rows of a tensor that is read in place, where they are many, go to a slot and are written
        from there behind the caller's back: a mapping would take a page fault for every 4 KiB."""
        many = tokens * tensor.layout.row_bytes >= LEAST_STAGED
        if tensor.tokens or not many or mapped.capacity > self.capacity:
            return None
        slot = self.pool.lease(tensor.spec.key, wait=True)
        if slot is not None:
            self._open_slot(slot, tensor.spec)
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
        before, self._step_tokens = self._step_tokens, self.tokens(layer)
        self.scheduler.step_ended(
            traffic(self.paths),
            partial(reads_of_layers, self._layers, self.tensors),
            prompt=self._step_tokens - before > LONGEST_DECODE,
        )
        direct, drive = self.paths.get(PathKind.DIRECT), self.scheduler.drive
        if direct and drive:
            direct.tune(drive.queue_depth, drive.command_bytes)

    def _leave_layer(self) -> None:
        for key, slot in self._in_use.items():
            tensor = self.tensors[key]
            self._write_held(tensor, slot, tensor.full)
            tensor.in_use, mapped = False, tensor.mapping_in(slot)
            if mapped is None:
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
        """Start reading the tensors after `layer` that are not read in place: as many as `depth` layers have,
        and in place of this layer's own that take no slot, however far away they lie. So the drive is busy
        however few tensors it has. A tensor before that without a block to read takes its slot when its layer
        comes: while a prompt fills the layers, what decoding reads first has to wait for the last of them."""
        depth = self.scheduler.depth
        self._short = False
        if not depth:
            return
        keys, in_use = self._keys(layer), self._in_use.get
        left = 2 * depth + sum(self.tensors[key].mapping_in(in_use(key)) is not None for key in keys)
        for distance, ahead in enumerate(self._layers_after(layer), 1):
            for key in self._keys(ahead):
                if not left:
                    return
                tensor = self.tensors[key]
                if tensor.mapped and distance <= depth:
                    read_ahead(tensor, tensor.mapped)
                if (tensor.mapped and tensor.tokens) or key in self._in_use:  # whose rows may still change
                    continue
                left -= 1
                if tensor.full and key not in self._fetched and not self._fetch_ahead(key):
                    self._short = True
                    return

    def _layers_after(self, layer: int) -> list[int]:
        """In the cyclic order of decoding, this one left out."""
        at = self._layers.index(layer)
        return self._layers[at + 1 :] + self._layers[:at]

    def _fetch_ahead(self, key: TensorKey) -> bool:
        slot = self._fetch(key, wait=False)
        if slot is not None:
            self._fetched[key] = slot
        return slot is not None

    def _fetch(self, key: TensorKey, wait: bool) -> Slot | None:
        """Lease a slot and start reading the tensor's full blocks into it."""
        slot = self.pool.lease(key, wait) or (self._drop_fetched(key, wait) if wait else None)
        if slot is None:
            return None
        tensor = self.tensors[key]
        self._open_slot(slot, tensor.spec)
        end = tensor.end_to_read(self.capacity)
        self.read_through += (end - tensor.full) * tensor.layout.block_bytes
        slot.fills = self._start(READ, tensor, self._pieces(tensor, slot, 0, end), slot)
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
        if mapped := tensor.mapping_in(slot):
            populate(tensor, mapped)
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
        the caller's back, many at once where they are a prompt's; the rest stays in memory.
        Raises StorageError, CapacityError."""
        tensor = self.tensors[key]
        if self._in_use.get(key) is not slot or not self._fits(key.layer, tensor.tokens + count):
            raise ValueError(f"{slot} was not loaded for {key} and {count} more tokens")
        with self.failing():
            old, rest = tensor.full, tensor.rest
            tensor.tokens += count
            if tensor.mapped:
                staged = tensor.mapping_in(slot) is None
                stored = tensor.rest - rest if staged else count  # a rest counts again in its block
                tensor.mapped.path.wrote_in_place(stored * tensor.spec.token_bytes)
                if not staged:
                    return
            if tensor.full > old:
                self._make_room(tensor)
                tensor.held += tensor.full - old
                many = count > LONGEST_DECODE
                end = tensor.end_to_write(tensor.stored, tensor.full) if many else tensor.full
                self._write_held(tensor, slot, end)
            self._keep_tail(tensor, slot, count)

    def _write_held(self, tensor: Tensor, slot: Slot, end: int) -> None:
        """What is held of blocks [0, end) goes to the medium. A prompt comes in small parts: many of
        them are written together, and the rest with the layer."""
        first = tensor.stored
        if first == end:
            return
        self._write(tensor, slot, first, end)
        tensor.held = tensor.full - end

    def _write(self, tensor: Tensor, slot: Slot, first: int, end: int) -> None:
        pieces = self._pieces(tensor, slot, first, end)
        if tensor.checksums:
            self._bring(pieces)
            tensor.checksums.remember(self.pool.rows(slot), tensor.head_stride(self.capacity), first, end)
        tickets = self._start(WRITE, tensor, pieces, slot)
        slot.drains += tickets
        tensor.writes += tickets + self._write_back(tensor, pieces)

    def _keep_tail(self, tensor: Tensor, slot: Slot, count: int) -> None:
        block = tensor.full * tensor.layout.block_tokens
        begin = max(block, tensor.tokens - count)
        if tensor.tokens > begin:
            out, at = (tensor.mapped.slot.view, begin) if tensor.mapped else (tensor.tail, begin - block)
            self.device.copy_rows(slot.view, begin, out, at, tensor.tokens - begin)

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
            if tensor.held:
                self._write_held(tensor, self._in_use[key], tensor.full)
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
            if tensor.mapping_in(slot):
                return
            tensor.held = tensor.full
            self._write_held(tensor, slot, tensor.full)
            self._keep_tail(tensor, slot, tensor.tokens)

    # state ----------------------------------------------------------------------------------

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
        for tensor in self.tensors.values():
            tensor.held = 0
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
        for region in (*self.regions, *([self.mover.region] if self.mover else [])):
            region.abandon() if given_up else region.close()
        if self.failure is not trouble:
            assert self.failure is not None
            raise self.failure
