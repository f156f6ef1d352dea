# SPDX-License-Identifier: Apache-2.0
"""A KVStore whose slots hold chunks of a layer: rows are used while the next ones arrive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from dualblade.errors import ConfigError
from dualblade.kv_tensor import Tensor
from dualblade.paths.base import Ticket
from dualblade.pipeline import STORE_SLOTS, Mode
from dualblade.staging import Slot
from dualblade.store import KVStore
from dualblade.tensors import TensorKey
from spdk_glue import READ, WRITE


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens [begin, begin + tokens) of a layer are the first ones of `keys` and `values`, each
    [batch x KV head, capacity, head_dim]."""

    begin: int
    tokens: int
    keys: Any
    values: Any


@dataclass(slots=True)
class _Chunk:
    """Blocks [first, end) of a layer's K and V, in a slot each, or none at all."""

    keys: tuple[TensorKey, TensorKey]
    first: int
    end: int
    slots: tuple[Slot, ...]


Place = tuple[int, int]  # layer, number of the chunk in it


class StreamedStore(KVStore):
    """`append_rows` takes new rows; `stream` gives the rows of a layer chunk after chunk, the reads of the
    next chunks under way.

    A chunk is as many whole blocks as a slot of `capacity` tokens holds. After an error or an interrupt
    half-way, nothing is served.
    """

    reads_in_place = False

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._chunks: dict[Place, _Chunk] = {}
        self._current: _Chunk | None = None
        self._streams = 0
        self._last_layer: int | None = None
        self.store_stall_s = 0.0  # of stall_s
        self._step_began = (time.perf_counter(), 0.0, 0.0)
        self._writing: dict[TensorKey, list[tuple[int, Ticket]]] = {key: [] for key in self.tensors}

    # stream ---------------------------------------------------------------------------------

    def chunk_tokens(self, layer: int) -> int:
        """Tokens of a whole chunk."""
        block = self.tensors[TensorKey(layer, "K")].layout.block_tokens
        return self.capacity // block * block

    def stream(self, layer: int, tokens: int | None = None) -> Iterator[Part]:
        """The first `tokens` tokens of a layer, or all, in order. A part is valid until the next one is
        asked for; another stream, or new rows, end this one.

        Raises StorageError, and from then on every call raises the same; ConfigError where the layer
        does not hold so many.
        """
        end = self._checked(layer, tokens)
        self._begin_stream(layer)
        self._streams += 1
        mine, span = self._streams, self.chunk_tokens(layer)
        again, self._last_layer = layer == self._last_layer, layer
        try:
            for number, begin in enumerate(range(0, end, span)):
                if self._streams != mine:
                    raise ConfigError(f"layer {layer} was streamed on after the store had gone on to others")
                with self.failing():
                    self._let_go()
                    self._current = self._claim((layer, number), end)
                    self._run_ahead((layer, number), end, again)
                    part = self._part(self._current, begin, min(end, begin + span))
                yield part
        finally:
            if self._streams == mine:
                self._let_go()

    def _begin_stream(self, layer: int) -> None:
        """Attention begins with a layer's older rows; a layer that is streamed again, as a prompt's are,
        begins no other."""
        if layer == self._last_layer:
            return
        steps = self.scheduler.steps
        self._begin_layer(layer)
        if self.scheduler.steps != steps:
            now = time.perf_counter()
            loads, stores = self.stall_s - self.store_stall_s, self.store_stall_s
            before, self._step_began = self._step_began, (now, loads, stores)
            self.scheduler.share_stores(loads - before[1], stores - before[2], now - before[0])

    def _checked(self, layer: int, tokens: int | None) -> int:
        if self.failure is not None:
            raise self.failure
        keys, values = (self.tensors[key].tokens for key in self._keys(layer))
        end = keys if tokens is None else tokens
        if keys != values or not 0 <= end <= keys:
            raise ConfigError(f"layer {layer} has {keys} keys and {values} values, and {end} were asked for")
        return end

    def _part(self, chunk: _Chunk, begin: int, end: int) -> Part:
        """Tokens [begin, end) of a chunk, complete and proven."""
        tensors = [self.tensors[key] for key in chunk.keys]
        if not chunk.slots:
            return Part(begin, end - begin, *(tensor.tail for tensor in tensors))
        for tensor, slot in zip(tensors, chunk.slots, strict=True):
            self._await_chunk(tensor, slot, chunk)
            at = chunk.end * tensor.layout.block_tokens
            if at < end:
                self.device.copy_rows(tensor.tail, 0, slot.view, at - begin, end - at)
        return Part(begin, end - begin, *(slot.view for slot in chunk.slots))

    def _blocks(self, place: Place, tokens: int | None = None) -> tuple[int, int]:
        """The blocks of a chunk that are on the medium, [first, end): those of the first `tokens` tokens."""
        layer, number = place
        tensor = self.tensors[TensorKey(layer, "K")]
        count = self.capacity // tensor.layout.block_tokens
        full = tensor.full if tokens is None else min(tensor.full, tensor.layout.blocks_for(tokens))
        return number * count, min(full, (number + 1) * count)

    def _claim(self, place: Place, tokens: int) -> _Chunk:
        """The chunk that was fetched ahead, with the blocks that have become whole since, or a new one;
        without slots where all its rows are in memory."""
        first, end = self._blocks(place, tokens)
        if first >= end:
            return _Chunk(self._keys(place[0]), first, first, ())
        chunk = self._chunks.pop(place, None) or self._fetch_chunk(place, first, end, wait=True)
        if chunk is None:
            raise ConfigError(f"the staging pool has too few slots for layer {place[0]}")
        if chunk.end < end:
            self._read(chunk, end)
        return chunk

    def _fetch_chunk(self, place: Place, first: int, end: int, wait: bool) -> _Chunk | None:
        """Lease two slots and start reading blocks [first, end)."""
        keys = self._keys(place[0])
        slots: list[Slot] = []
        for key in keys:
            slot = self._lease(key, wait)
            if slot is None:
                for leased in slots:
                    self.pool.give_back(leased)
                return None
            slots.append(slot)
        chunk = _Chunk(keys, first, first, tuple(slots))
        self._read(chunk, end)
        return chunk

    def _read(self, chunk: _Chunk, end: int) -> None:
        """Start reading the blocks before `end` that are not in the chunk yet."""
        for key, slot in zip(chunk.keys, chunk.slots, strict=True):
            tensor = self.tensors[key]
            pieces = self._pieces(tensor, slot, chunk.end, end, origin=chunk.first)
            slot.fills += self._start(READ, tensor, pieces, slot)
        chunk.end = end

    def _await_chunk(self, tensor: Tensor, slot: Slot, chunk: _Chunk) -> None:
        begun = time.perf_counter()
        filled, slot.fills = slot.fills, []
        for ticket in filled:
            ticket.wait()
        self._await_blocks(tensor, chunk.end)
        self.stall_s += time.perf_counter() - begun
        self._verify_blocks(tensor, slot, chunk.first, chunk.end)

    def _verify_blocks(self, tensor: Tensor, slot: Slot, first: int, end: int) -> None:
        if tensor.checksums is None:
            return
        begun = time.perf_counter()
        stride = tensor.head_stride(self.capacity)
        tensor.checksums.verify(self.pool.rows(slot), stride, end - first, tensor.offset_of, first=first)
        self.checksum_s += time.perf_counter() - begun

    # ahead ----------------------------------------------------------------------------------

    def _run_ahead(self, place: Place, tokens: int, again: bool) -> None:
        """Start reading the chunks that will be asked for next, as far as there are slots."""
        wanted = list(islice(self._following(place, tokens, again), self._chunks_ahead))
        for stale in self._chunks.keys() - set(wanted):
            self._give_back(self._chunks.pop(stale))
        for ahead in wanted:
            if ahead not in self._chunks:
                chunk = self._fetch_chunk(ahead, *self._blocks(ahead), wait=False)
                if chunk is None:
                    return
                self._chunks[ahead] = chunk

    @property
    def _chunks_ahead(self) -> int:
        """As many as the slots that are left to loads hold, beside the chunk in use."""
        share = self.scheduler.store_share
        stores = share.slots if share else STORE_SLOTS
        return 0 if self.scheduler.mode is Mode.NONE else max(0, (self._slots - stores) // 2 - 1)

    def _following(self, place: Place, tokens: int, again: bool) -> Iterator[Place]:
        """The rest of this stream, and then the next layers; or this layer once more, where it was the last
        one too: the chunks of a prompt pass layer by layer."""
        layer, number = place
        yield from self._places(layer, number + 1, tokens)
        if not self.scheduler.mode.crosses_layers:
            return
        at = self._layers.index(layer)
        for following in [layer] if again else self._layers[at + 1 :] + self._layers[:at]:
            yield from self._places(following, 0)

    def _places(self, layer: int, number: int, tokens: int | None = None) -> Iterator[Place]:
        while (blocks := self._blocks((layer, number), tokens))[0] < blocks[1]:
            yield layer, number
            number += 1

    def _lease(self, key: TensorKey, wait: bool) -> Slot | None:
        """wait: at worst the chunk that would be needed last gives its slots up."""
        slot = self.pool.lease(key, wait)
        while slot is None and wait and self._chunks:
            self._give_back(self._chunks.popitem()[1])
            slot = self.pool.lease(key, wait)
        if slot is not None:
            self._open_slot(slot, self.tensors[key].spec)
        return slot

    def _give_back(self, chunk: _Chunk) -> None:
        for slot in chunk.slots:
            self.pool.give_back(slot)

    def _let_go(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            self._give_back(current)

    def _forget(self, layer: int) -> None:
        """What was fetched of a layer whose blocks are about to change."""
        self._let_go()
        for place in [place for place in self._chunks if place[0] == layer]:
            self._give_back(self._chunks.pop(place))

    # append ---------------------------------------------------------------------------------

    def append_rows(self, key: TensorKey, rows: Any, count: int) -> None:
        """Take `count` new tokens, `rows` as the device has them. Whole blocks are written behind the
        caller's back; the rest stays in memory. Raises StorageError, CapacityError."""
        tensor = self.tensors[key]
        with self.failing():
            self._tell_mover(key)
            self._streams += 1
            self._let_go()
            self._settle(key)
            before, old = tensor.tokens, tensor.full
            tensor.tokens += count
            if tensor.full > old:
                self._make_room(tensor)
                for first, end in self._cuts(tensor, before, old):
                    self._write_rows(tensor, rows, before, first, end)
            begin = max(before, tensor.full * tensor.layout.block_tokens)
            at = begin - tensor.full * tensor.layout.block_tokens
            self.device.write_rows(rows, tensor.tail, at, begin - before)

    def _cuts(self, tensor: Tensor, before: int, old: int) -> Iterator[tuple[int, int]]:
        """Blocks that become whole, a slot at a time. One that holds older rows goes alone: whoever reads
        those waits for no other."""
        step = self.capacity // tensor.layout.block_tokens
        first = old
        if before % tensor.layout.block_tokens:
            yield first, first + 1
            first += 1
        for at in range(first, tensor.full, step):
            yield at, min(at + step, tensor.full)

    def _write_rows(self, tensor: Tensor, rows: Any, before: int, first: int, end: int) -> None:
        """Blocks [first, end), of the unfinished one and new rows. before: tokens there were."""
        key, block = tensor.spec.key, tensor.layout.block_tokens
        slot = self._store_slot(key)
        begin, old = first * block, max(0, before - first * block)
        if old:
            self.device.copy_rows(tensor.tail, 0, slot.view, 0, old)
        self.device.write_rows(rows, slot.view, old, begin + old - before, end * block - begin - old)
        self._write_blocks(tensor, slot, first, end)

    def _store_slot(self, key: TensorKey) -> Slot:
        begun = time.perf_counter()
        slot = self._lease(key, wait=True)
        waited = time.perf_counter() - begun
        self.stall_s += waited
        self.store_stall_s += waited
        if slot is None:
            raise ConfigError(f"the staging pool has too few slots for {key}")
        return slot

    def _write_blocks(self, tensor: Tensor, slot: Slot, first: int, end: int) -> None:
        """The slot holds blocks [first, end), and goes back to the pool when they are written."""
        pieces = self._pieces(tensor, slot, first, end, origin=first)
        if tensor.checksums:
            stride = tensor.head_stride(self.capacity)
            self._bring(pieces)
            tensor.checksums.remember(self.pool.rows(slot), stride, first, end, origin=first)
        tickets = self._start(WRITE, tensor, pieces, slot)
        slot.drains += tickets
        tickets = tickets + self._write_back(tensor, pieces)
        self._writing[tensor.spec.key] += [(first, ticket) for ticket in tickets]
        self.pool.give_back(slot)

    def _settle(self, key: TensorKey) -> None:
        """Raises StorageError for a write that has failed by now."""
        under_way = []
        for first, ticket in self._writing[key]:
            if ticket.done():
                ticket.wait()
            else:
                under_way.append((first, ticket))
        self._writing[key] = under_way

    def _await_blocks(self, tensor: Tensor, end: int) -> None:
        """Everything written to blocks before `end` really reached the medium."""
        key = tensor.spec.key
        for first, ticket in self._writing[key]:
            if first < end:
                ticket.wait()
        self._writing[key] = [item for item in self._writing[key] if item[0] >= end]

    def _await_writes(self, tensor: Tensor) -> None:
        self._await_blocks(tensor, tensor.blocks)
        super()._await_writes(tensor)

    # change ---------------------------------------------------------------------------------

    def crop(self, key: TensorKey, tokens: int) -> None:
        self._streams += 1
        self._forget(key.layer)
        super().crop(key, tokens)

    def rewrite(self, key: TensorKey, change: Callable[[Any, int], None]) -> None:
        """Let `change(view, tokens)` alter a tensor's rows in place, chunk after chunk: no row may depend
        on another token's. Raises StorageError."""
        tensor = self.tensors[key]
        with self.failing():
            self._streams += 1
            self._forget(key.layer)
            tensor.changed(0)
            step = self.capacity // tensor.layout.block_tokens
            for first in range(0, tensor.full, step):
                self._change_blocks(tensor, first, min(first + step, tensor.full), change)
            rest = tensor.tokens - tensor.full * tensor.layout.block_tokens
            if rest:
                change(tensor.tail, rest)

    def _change_blocks(
        self, tensor: Tensor, first: int, end: int, change: Callable[[Any, int], None]
    ) -> None:
        slot = self._store_slot(tensor.spec.key)
        pieces = self._pieces(tensor, slot, first, end, origin=first)
        for ticket in self._start(READ, tensor, pieces, slot):
            ticket.wait()
        self._await_blocks(tensor, end)
        self._verify_blocks(tensor, slot, first, end)
        change(slot.view, (end - first) * tensor.layout.block_tokens)
        self._write_blocks(tensor, slot, first, end)

    def _drop_prefetched(self) -> None:
        super()._drop_prefetched()
        self._streams += 1
        for layer in self._layers:
            self._forget(layer)

    def reset(self) -> None:
        super().reset()
        self._writing = {key: [] for key in self.tensors}

    def load(self, key: TensorKey, extra: int = 0) -> NoReturn:
        """Slots of whole layers are what there is no memory for."""
        raise ConfigError(f"{key} is given chunk after chunk, not in one piece")
