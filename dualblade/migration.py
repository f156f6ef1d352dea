# SPDX-License-Identifier: Apache-2.0
"""Moves blocks between the paths while the store is used, one chunk at a time and behind the caller's back.

A chunk is read from where it lies, or taken from the slot where decoding has its rows anyway, written to its
home on the other path, and only then looked for there. So whatever fails or is killed in between, the blocks
are where they were. What a demotion leaves behind in the page cache is dropped, pages and disk space; what a
promotion leaves on the direct path stays, so that the way back costs no write as long as nobody changed the
rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dualblade.cycle import Move
from dualblade.errors import CapacityError, DualBladeError
from dualblade.in_place import InPlace
from dualblade.kv_tensor import Segment, Tensor
from dualblade.layout import chunk_bytes
from dualblade.paths.base import Room, StoragePath, Ticket, WriteLimit
from dualblade.staging import Slot
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import format_size
from spdk_glue import READ, WRITE, Piece, Region

CACHE, DIRECT = PathKind.PAGE_CACHE, PathKind.DIRECT


@dataclass(slots=True)
class _Chunk:
    """Blocks [first, end) of a tensor on their way. writing: they have been read."""

    tensor: Tensor
    first: int
    end: int
    to: PathKind
    ticket: Ticket
    writing: bool = False


@dataclass(slots=True)
class _Source:
    """Keeps a slot from its next tensor while a chunk is written from it. How that ends is the migrator's."""

    ticket: Ticket

    def done(self) -> bool:
        return self.ticket.done()

    def wait(self) -> None:
        with suppress(DualBladeError):
            self.ticket.wait()


@dataclass(slots=True)
class _Leftover:
    """Rooms that are dropped when the transfers that may still use them are done."""

    tensor: Tensor
    rooms: list[Room]
    users: list[Ticket]


class Migrator:
    """`want()` says what shall lie where, `poll()` goes on with it and never waits. One thread at a time.

    refused: why nothing is moved to a path any more: an error ends migrations, not the run. grant: bytes
    that may still be copied; the caller renews it. wear: what else the paths may write. at_hand: see
    KVStore; where it is given nothing is read to be promoted, but goes when it is used.
    """

    def __init__(
        self,
        tensors: Mapping[TensorKey, Tensor],
        paths: Mapping[PathKind, StoragePath],
        in_place: InPlace,
        wear: WriteLimit | None = None,
        at_hand: Callable[[TensorKey], tuple[Slot, int] | None] | None = None,
    ):
        self.tensors = tensors
        self.paths = paths
        self.wear = wear
        total = sum(tensor.spec.nbytes for tensor in tensors.values())
        nbytes = chunk_bytes((tensor.layout.block_bytes for tensor in tensors.values()), total)
        of_env = any(path.queue.needs_env_memory for path in paths.values())
        self.region = Region(max(1, nbytes), best="thp", of_env=of_env)
        self.refused: dict[PathKind, str] = {}
        self.grant = 0
        self.moved_bytes = dict.fromkeys(PathKind, 0)
        self.copied_bytes = 0
        self._wanted: list[Move] = []
        self._active: _Chunk | None = None
        self._leftovers: list[_Leftover] = []
        self._in_place = in_place
        self._at_hand = at_hand
        self._whole: list[Tensor] = []  # that can be read in place, once nobody uses their slots

    # homes ----------------------------------------------------------------------------------

    def claim(self, tensors: Sequence[Tensor]) -> int:
        """Take room on the direct path for what lies in the page cache: the blocks that got it. Those that
        did not stay where they are. Raises StorageError."""
        path = self.paths.get(DIRECT)
        bare = [(tensor, home) for tensor in tensors for home in _without_twin(tensor)] if path else []
        while bare and path is not None:
            try:
                rooms = path.allocate(
                    [(tensor.spec.key, home.blocks * tensor.layout.block_bytes) for tensor, home in bare]
                )
            except CapacityError:
                bare = bare[: len(bare) // 2]
                continue
            for (tensor, home), room in zip(bare, rooms, strict=True):
                tensor.add_home(tensor.segment(home.first, home.blocks, room))
            break
        return sum(home.blocks for _, home in bare)

    def spare(self) -> bool:
        """Give up the rooms on the direct path that no block lies in: a tensor that grows needs them more."""
        freed = False
        for tensor in self.tensors.values():
            busy = self._active is not None and self._active.tensor is tensor
            if busy or not all(ticket.done() for ticket in tensor.transfers):
                continue
            for home in [home for home in tensor.homes.get(DIRECT, ()) if _is_empty(tensor, home)]:
                tensor.homes[DIRECT].remove(home)
                tensor.clean.difference_update(range(home.first, home.end))
                self.paths[DIRECT].release([home.room])
                freed = True
        return freed

    def _reserve(self, tensor: Tensor, block: int) -> None:
        """Addresses in the page cache's files for all that lies in the same direct home as a block."""
        if tensor.parts(CACHE, block, block + 1):
            return
        home = next(home for home in tensor.homes[DIRECT] if home.first <= block < home.end)
        room = self.paths[CACHE].reserve([(tensor.spec.key, home.room.nbytes)])[0]
        tensor.add_home(self._in_place.segment(tensor, home.first, home.blocks, room))

    # moves ----------------------------------------------------------------------------------

    def want(self, moves: Sequence[Move]) -> None:
        """These instead of what has not begun yet."""
        self._wanted = [move for move in moves if move.to not in self.refused]

    @property
    def idle(self) -> bool:
        return not (self._wanted or self._active)

    @property
    def under_way(self) -> Ticket | None:
        """What the chunk that is being moved waits for."""
        return self._active.ticket if self._active else None

    def poll(self) -> None:
        """Go on as far as it goes without waiting."""
        if self._leftovers:
            self._drop_leftovers()
        if self._whole:
            self._map_whole()
        if self._active is not None and not self._advance():
            return
        for move in tuple(self._wanted):
            while self._active is None and move in self._wanted and self._try(move):
                pass
            if self._active is not None or (move.to is DIRECT and move in self._wanted):
                return

    def _try(self, move: Move) -> bool:
        """As _begin(). What cannot be done is not wanted any more."""
        try:
            return self._begin(move)
        except CapacityError as error:
            self._refuse(str(error), move.to)
        except DualBladeError as error:
            self._refuse(str(error), *PathKind)
        return False

    def _refuse(self, reason: str, *kinds: PathKind) -> None:
        self.refused = dict.fromkeys(kinds, reason) | self.refused
        self._wanted = [move for move in self._wanted if move.to not in self.refused]

    def _begin(self, move: Move) -> bool:
        """Start the next chunk of a move, or finish what of it costs nothing. False: not now."""
        tensor = self.tensors[move.key]
        blocks = abs(tensor.blocks_on(CACHE) - move.cached)
        demotes = tensor.blocks_on(CACHE) > move.cached
        span = _last_cached(tensor, blocks) if demotes else _first_direct(tensor, blocks)
        if not blocks or demotes is not (move.to is DIRECT) or span is None:
            self._wanted.remove(move)
            return True
        if any(left.tensor is tensor for left in self._leftovers):
            return False  # a room is not used again before what was in it is gone
        if demotes and tensor.mapped and tensor.in_use:
            return False  # attention may be reading it where it lies
        return self._demote(tensor, *span) if demotes else self._promote(tensor, *span)

    def _demote(self, tensor: Tensor, first: int, end: int) -> bool:
        """The last of blocks [first, end): without a copy where that goes."""
        for begin in (max(first, tensor.stored), _clean_from(tensor, first, end)):
            if begin < end:
                self._switch(tensor, begin, end, DIRECT)
                return True
        dirty = next((at + 1 for at in range(end - 1, first - 1, -1) if at in tensor.clean), first)
        return self._copy(tensor, max(dirty, end - self._blocks(tensor)), end, DIRECT)

    def _promote(self, tensor: Tensor, first: int, end: int) -> bool:
        """The first of blocks [first, end), which lie in one home."""
        source = self._at_hand(tensor.spec.key) if self._at_hand else None
        copies = first < tensor.stored
        if copies:
            if self.grant <= 0 or (self._at_hand and source is None):
                return False
            end = min(end, tensor.stored, first + self._blocks(tensor) if source is None else end)
        self._reserve(tensor, first)
        for part in tensor.parts(CACHE, first, end):
            for room in part.rooms(tensor.layout):
                self.paths[CACHE].back(room)
        if copies:
            return self._copy(tensor, first, end, CACHE, source)
        self._switch(tensor, first, end, CACHE)
        return True

    def _blocks(self, tensor: Tensor) -> int:
        return self.region.size // tensor.layout.block_bytes

    # a chunk --------------------------------------------------------------------------------

    def _copy(
        self, tensor: Tensor, first: int, end: int, to: PathKind, source: tuple[Slot, int] | None = None
    ) -> bool:
        nbytes = (end - first) * tensor.layout.block_bytes
        if self.grant <= 0:
            return False
        if self.wear is not None and self.wear.left < nbytes + self._to_come():
            self._refuse(f"--write-cap {format_size(self.wear.limit)} leaves nothing for moves", *PathKind)
            return False
        tensor.intact = end
        if source is None:
            ticket = self._transfer(READ, tensor, first, end, CACHE if to is DIRECT else DIRECT)
        else:
            slot, stride = source
            address = slot.address + first * tensor.layout.run_bytes
            ticket = self._move(WRITE, tensor, first, end, to, address, stride)
            slot.drains.append(_Source(ticket))
        self._active = _Chunk(tensor, first, end, to, ticket, writing=source is not None)
        self.grant -= nbytes
        return True

    def _to_come(self) -> int:
        """Bytes that the run itself will still write."""
        tensors = self.tensors.values()
        return sum((tensor.blocks - tensor.stored) * tensor.layout.block_bytes for tensor in tensors)

    def _transfer(self, op: int, tensor: Tensor, first: int, end: int, kind: PathKind) -> Ticket:
        """Move blocks between our memory and their homes on a path."""
        stride = (end - first) * tensor.layout.run_bytes
        return self._move(op, tensor, first, end, kind, self.region.address, stride)

    def _move(
        self, op: int, tensor: Tensor, first: int, end: int, kind: PathKind, address: int, stride: int
    ) -> Ticket:
        """The same with memory where block `first` is at `address`, and `stride` bytes from head to head."""
        run = tensor.layout.run_bytes
        pieces: list[Piece] = []
        for part in tensor.parts(kind, first, end):
            pieces += part.pieces(tensor.layout, address + (part.first - first) * run, stride)
        return self.paths[kind].transfer(op, tensor.spec.key, pieces)

    def _advance(self) -> bool:
        """Go on with the chunk. True when it is over, one way or the other."""
        chunk = self._active
        assert chunk is not None
        if not chunk.ticket.done() or self._is_read(chunk):
            return False
        try:
            chunk.ticket.wait()
            if not chunk.writing:
                self._verify(chunk)
                if chunk.tensor.intact >= chunk.end:
                    self._write(chunk)
                    return False
        except DualBladeError as error:
            self._active = None
            self._abandon(chunk)
            self._refuse(f"{chunk.tensor.spec.key} stays where it is: {error}", *PathKind)
            return True
        self._active = None
        self._arrive(chunk)
        return True

    @staticmethod
    def _is_read(chunk: _Chunk) -> bool:
        """It is about to leave the place where attention may be reading it."""
        return chunk.writing and chunk.to is DIRECT and bool(chunk.tensor.mapped) and chunk.tensor.in_use

    def _verify(self, chunk: _Chunk) -> None:
        tensor, count = chunk.tensor, chunk.end - chunk.first
        if tensor.checksums is None or tensor.intact < chunk.end:
            return
        rows, stride = self.region.buffer(), count * tensor.layout.run_bytes
        tensor.checksums.verify(rows, stride, count, tensor.offset_of, first=chunk.first)

    def _write(self, chunk: _Chunk) -> None:
        chunk.ticket = self._transfer(WRITE, chunk.tensor, chunk.first, chunk.end, chunk.to)
        chunk.writing = True

    def _arrive(self, chunk: _Chunk) -> None:
        """The blocks are there, unless they were changed on the way."""
        if not chunk.writing or chunk.tensor.intact < chunk.end:
            self._abandon(chunk)
            return
        self.copied_bytes += (chunk.end - chunk.first) * chunk.tensor.layout.block_bytes
        self._switch(chunk.tensor, chunk.first, chunk.end, chunk.to)
        if chunk.to is CACHE:
            chunk.tensor.clean.update(range(chunk.first, chunk.end))

    def _abandon(self, chunk: _Chunk) -> None:
        if chunk.to is CACHE:
            self._drop(_rooms(chunk.tensor, chunk.first, chunk.end))

    def _switch(self, tensor: Tensor, first: int, end: int, to: PathKind) -> None:
        """From here on the blocks are looked for, and written, in their homes on `to`."""
        if to is DIRECT:
            self._in_place.unmap(tensor)
        tensor.relocate(first, end, to)
        if to is CACHE:
            self._whole.append(tensor)
            self._map_whole()
        self.moved_bytes[to] += (end - first) * tensor.layout.block_bytes
        if to is DIRECT:
            tensor.clean.difference_update(range(first, end))
            rooms = _rooms(tensor, first, end)
            users = [ticket for ticket in tensor.transfers if not ticket.done()]
            self._leftovers.append(_Leftover(tensor, rooms, users))
            self._drop_leftovers()

    def _map_whole(self) -> None:
        waiting = [tensor for tensor in self._whole if tensor.in_use]
        for tensor in self._whole:
            if not tensor.in_use:
                with suppress(CapacityError):  # it is copied then, as it was
                    self._in_place.map(tensor)
        self._whole = waiting

    def _drop_leftovers(self) -> None:
        waiting = []
        for left in self._leftovers:
            if all(ticket.done() for ticket in left.users):
                self._drop(left.rooms)
            else:
                waiting.append(left)
        self._leftovers = waiting

    def _drop(self, rooms: Iterable[Room]) -> None:
        try:
            for room in rooms:
                self.paths[CACHE].drop(room)
        except OSError as error:  # the blocks are elsewhere by now: memory is wasted, and nothing is lost
            self._refuse(f"what was moved cannot be dropped: {error}", *PathKind)


def _rooms(tensor: Tensor, first: int, end: int) -> list[Room]:
    """What blocks [first, end) take of their homes in the page cache."""
    return [room for part in tensor.parts(CACHE, first, end) for room in part.rooms(tensor.layout)]


def _without_twin(tensor: Tensor) -> list[Segment]:
    """What of the homes in the page cache has none on the direct path."""
    bare = []
    for home in tensor.homes.get(CACHE, ()):
        twins = tensor.parts(DIRECT, home.first, home.end)
        edges = [home.first, *(edge for twin in twins for edge in (twin.first, twin.end)), home.end]
        gaps = zip(edges[::2], edges[1::2], strict=True)
        bare += [part for first, end in gaps if (part := home.part(first, end))]
    return bare


def _is_empty(tensor: Tensor, home: Segment) -> bool:
    """No block is looked for in a direct home."""
    return not any(
        segment.room.path is DIRECT and segment.first < home.end and home.first < segment.end
        for segment in tensor.segments
    )


def _last_cached(tensor: Tensor, blocks: int) -> tuple[int, int] | None:
    """The last blocks in the page cache that may go, up to so many, which lie in one home."""
    for segment in reversed(tensor.segments):
        if segment.room.path is CACHE:
            for part in reversed(tensor.parts(DIRECT, segment.first, segment.end)):
                return max(part.first, part.end - blocks), part.end
    return None


def _first_direct(tensor: Tensor, blocks: int) -> tuple[int, int] | None:
    """The first blocks on the direct path, up to so many, which lie in one home."""
    for segment in tensor.segments:
        if segment.room.path is DIRECT:
            for part in tensor.parts(DIRECT, segment.first, segment.end):
                return part.first, min(part.end, part.first + blocks)
    return None


def _clean_from(tensor: Tensor, first: int, end: int) -> int:
    """Where the clean blocks at the end of [first, end) begin; `end` where the last is not."""
    begin = end
    while begin > first and begin - 1 in tensor.clean:
        begin -= 1
    return begin
