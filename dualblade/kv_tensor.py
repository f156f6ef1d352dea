# SPDX-License-Identifier: Apache-2.0
"""One K or V in the store: where its blocks lie, and the unfinished one that stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dualblade.integrity import Checksums
from dualblade.layout import BEST_COPY, BEST_RUN, READ_THROUGH, READ_THROUGH_PART, Layout
from dualblade.paths.base import Room, StoragePath, Ticket
from dualblade.staging import Slot
from dualblade.tensors import PathKind, TensorSpec
from spdk_glue import FileRegion, Piece


@dataclass(slots=True)
class Segment:
    """Blocks [first, end) of a tensor lie in `room`, which begins with block `base` of it and is a row of
    groups of `group` blocks, each head by head; of the last group there is what fits the room.

    One group for all of them makes the room head-major, [batch x KV head, capacity, head_dim].
    """

    first: int
    blocks: int
    room: Room
    group: int
    base: int

    @property
    def end(self) -> int:
        return self.first + self.blocks

    def room_blocks(self, layout: Layout) -> int:
        return self.room.nbytes // layout.block_bytes

    def offset(self, block: int, layout: Layout) -> int:
        """Byte offset of a block's first run on the room's file."""
        whole, within = divmod(block - self.base, self.group)
        return self.room.offset + whole * self.group * layout.block_bytes + within * layout.run_bytes

    def group_of(self, block: int, layout: Layout) -> tuple[int, int]:
        """First block and end of the group that a block lies in."""
        begin = block - (block - self.base) % self.group
        return begin, min(begin + self.group, self.base + self.room_blocks(layout))

    def _cuts(self, first: int, end: int, layout: Layout) -> Iterator[tuple[int, int, int]]:
        """Blocks [first, end) as (begin, end, blocks of a group there): whole groups together, and parts of
        one alone."""
        while first < end:
            begin, behind = self.group_of(first, layout)
            size = behind - begin
            if begin == first and behind <= end:
                stop = first + (end - first) // size * size
            else:
                stop = min(end, behind)
            yield first, stop, size
            first = stop

    def ranges(self, layout: Layout) -> list[tuple[int, int]]:
        """Offset and bytes of what the blocks take of the room's file."""
        found = []
        for first, end, size in self._cuts(self.first, self.end, layout):
            begin = self.offset(first, layout)
            if (end - first) % size == 0:
                found.append((begin, (end - first) * layout.block_bytes))
                continue
            stride, nbytes = size * layout.run_bytes, (end - first) * layout.run_bytes
            found += [(begin + head * stride, nbytes) for head in range(layout.runs)]
        return found

    def rooms(self, layout: Layout) -> list[Room]:
        """The same, as rooms of their own."""
        return [replace(self.room, offset=offset, nbytes=nbytes) for offset, nbytes in self.ranges(layout)]

    def pieces(
        self, layout: Layout, address: int, head_stride: int, first: int | None = None, end: int | None = None
    ) -> list[Piece]:
        """What moves blocks [first, end), or all of them: in memory, head-major, the first one's first run
        is at `address`."""
        begin, stop = self.first if first is None else first, self.end if end is None else end
        run, heads, file = layout.run_bytes, layout.runs, self.room.file
        made = []
        for first, end, size in self._cuts(begin, stop, layout):
            offset, at, groups = self.offset(first, layout), address + (first - begin) * run, 1
            nbytes, stride = (end - first) * run, size * run
            if (end - first) % size == 0:
                groups, nbytes, stride = (end - first) // size, stride, 0
            made.append(Piece(offset, at, head_stride, nbytes, nbytes, heads, groups, file, stride))
        return made

    def part(self, first: int, end: int) -> Segment | None:
        """What of blocks [first, end) lies here; None where nothing does."""
        first, end = max(first, self.first), min(end, self.end)
        return replace(self, first=first, blocks=end - first) if first < end else None

    def goes_on_in(self, other: Segment) -> bool:
        """The other one lies in the same room, behind this one."""
        return self.end == other.first and self.room == other.room

    def with_next(self, other: Segment) -> Segment:
        """Both as one, where this one goes on in the other."""
        return replace(self, blocks=self.blocks + other.blocks)


@dataclass(slots=True)
class Mapped:
    """The memory of a head-major room in the page cache, [batch x KV head, capacity, head_dim]. slot: stands
    for all of it. `path` counts what is read and written in it."""

    path: StoragePath
    region: FileRegion
    slot: Slot
    capacity: int
    missed: bool = True  # the last load found pages that the kernel had taken, or there was none

    def close(self) -> None:
        """The memory goes back when nobody has a view of it any more."""
        self.slot.view = None
        self.region.close()


@dataclass(slots=True)
class Tensor:
    """tail: the unfinished block, [runs, block_tokens, head_dim]; tail_offset: its byte in the tails'
    region. checksums: of the blocks on the medium, or None. writes, transfers: under way.

    segments: where the blocks are. homes: where they may be on each path, rooms that the tensor keeps.
    held: so many of the last full blocks are in the slot alone. clean: blocks whose bytes lie in their direct
    home too, though it is not where they are. intact: blocks before it have not been taken back or changed
    since a migration set it. mapped: all of it is in the page cache, and read there. in_use: attention may be
    reading it there.
    """

    spec: TensorSpec
    layout: Layout
    tail: Any
    tail_offset: int
    checksums: Checksums | None = None
    tokens: int = 0
    segments: list[Segment] = field(default_factory=list)
    writes: list[Ticket] = field(default_factory=list)
    mapped: Mapped | None = None
    in_use: bool = False
    transfers: list[Ticket] = field(default_factory=list)
    homes: dict[PathKind, list[Segment]] = field(default_factory=dict)
    clean: set[int] = field(default_factory=set)
    intact: int = 0
    held: int = 0

    @property
    def blocks(self) -> int:
        """Blocks there is room for."""
        return self.segments[-1].end if self.segments else 0

    @property
    def full(self) -> int:
        """Whole blocks."""
        return self.layout.full_blocks(self.tokens)

    @property
    def stored(self) -> int:
        """Of these the blocks on the medium."""
        return self.full - self.held

    @property
    def rest(self) -> int:
        """Tokens of the unfinished block."""
        return self.tokens - self.full * self.layout.block_tokens

    def mapping_in(self, slot: Slot | None) -> Mapped | None:
        """The mapping, where the slot stands for that: attention reads the tensor in place, and not in a slot
        of the pool."""
        return self.mapped if self.mapped and slot is self.mapped.slot else None

    def end_to_write(self, first: int, end: int) -> int:
        """Where in blocks [first, end) the last one ends that completes what is written together, or a
        segment; `first` where none does."""
        segment = self.segment_of(end - 1)
        if segment.room.path is PathKind.PAGE_CACHE:
            # what is left for the layer's end keeps a slot from the next one
            together = self.layout.written_together(BEST_COPY, parts=1)
        else:  # all of a group is one sequential range
            together = self.layout.written_together(BEST_RUN, parts=2)
        part = (end - segment.base) % together if end < segment.end else 0
        return max(first, segment.first, end - part)

    def end_to_read(self, capacity: int) -> int:
        """Where a load of all full blocks into a slot of `capacity` tokens ends. On the direct path it takes
        along what little a group lacks, whatever lies there: behind the last row nobody looks, and the group
        is one sequential range instead of a run a head."""
        full, layout = self.full, self.layout
        if not full:
            return 0
        segment = self.segment_of(full - 1)
        begin, end = segment.group_of(full - 1, layout)
        lacks = end - full
        little = lacks * layout.run_bytes <= READ_THROUGH and lacks * READ_THROUGH_PART <= end - begin
        whole = segment.first <= begin and end <= min(segment.end, capacity // layout.block_tokens)
        direct = segment.room.path is PathKind.DIRECT
        return end if direct and whole and little else full

    def segment_of(self, block: int) -> Segment:
        return next(part for part in self.segments if part.first <= block < part.end)

    def offset_of(self, block: int) -> int:
        """Byte offset of a block on its file."""
        return self.segment_of(block).offset(block, self.layout)

    @property
    def whole_blocks(self) -> int:
        """Blocks of all the tokens that were foreseen."""
        return self.layout.blocks_for(self.spec.tokens)

    def segment(self, first: int, blocks: int, room: Room, group: int | None = None) -> Segment:
        """Blocks in a room that was just taken."""
        return Segment(first, blocks, room, self.layout.group if group is None else group, first)

    def add(self, segment: Segment) -> None:
        """The tensor grows by a segment, which is a home too."""
        self.segments = [*self.segments, segment]
        self.add_home(segment)

    def add_home(self, home: Segment) -> None:
        homes = self.homes.setdefault(home.room.path, [])
        homes.append(home)
        homes.sort(key=lambda segment: segment.first)

    def parts(self, kind: PathKind, first: int, end: int) -> list[Segment]:
        """The homes of blocks [first, end) on a path; shorter than these where some have none."""
        parts = (home.part(first, end) for home in self.homes.get(kind, ()))
        return [part for part in parts if part]

    def relocate(self, first: int, end: int, kind: PathKind) -> None:
        """Blocks [first, end) are in their homes on a path from now on."""
        kept = (part for segment in self.segments for part in self._without(segment, first, end))
        merged: list[Segment] = []
        for segment in sorted([*kept, *self.parts(kind, first, end)], key=lambda segment: segment.first):
            if merged and merged[-1].goes_on_in(segment):
                segment = merged.pop().with_next(segment)
            merged.append(segment)
        self.segments = merged

    def _without(self, segment: Segment, first: int, end: int) -> list[Segment]:
        """What of a segment lies before `first` and from `end` on."""
        parts = segment.part(0, first), segment.part(end, segment.end)
        return [part for part in parts if part]

    def changed(self, block: int) -> None:
        """Blocks from `block` on hold other rows from now on, or none."""
        self.clean = {number for number in self.clean if number < block}
        self.intact = min(self.intact, block)

    def blocks_on(self, kind: PathKind) -> int:
        return sum(segment.blocks for segment in self.segments if segment.room.path is kind)

    def head_stride(self, capacity: int) -> int:
        """Bytes from one head's rows to the next's in a slot of `capacity` tokens."""
        return capacity * self.layout.row_bytes

    def pieces(self, address: int, capacity: int, first: int, end: int) -> dict[PathKind, list[Piece]]:
        """What moves blocks [first, end) between a slot at `address` and their rooms, path by path."""
        pieces: dict[PathKind, list[Piece]] = {}
        run, stride = self.layout.run_bytes, self.head_stride(capacity)
        for segment in self.segments:
            begin, stop = max(first, segment.first), min(end, segment.end)
            if begin < stop:
                at = address + begin * run
                moves = segment.pieces(self.layout, at, stride, begin, stop)
                pieces.setdefault(segment.room.path, []).extend(moves)
        return pieces

    def bytes_on_paths(self) -> Iterator[tuple[PathKind, int]]:
        """Path and bytes of the blocks that a load copies, segment after segment."""
        for segment in self.segments:
            blocks = min(self.full, segment.end) - segment.first
            if blocks > 0 and not self.mapped:
                yield segment.room.path, blocks * self.layout.block_bytes

    def tail_pieces(self, block: int, tails_address: int) -> list[Piece]:
        """Bring a block back to the tail, [batch x KV head, block_tokens, head_dim]."""
        address = tails_address + self.tail_offset
        return self.segment_of(block).pieces(self.layout, address, self.layout.run_bytes, block, block + 1)
