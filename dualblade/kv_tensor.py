# SPDX-License-Identifier: Apache-2.0
"""One K or V in the store: where its blocks lie, and the unfinished one that stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from dualblade.integrity import Checksums
from dualblade.layout import Layout
from dualblade.paths.base import Room, StoragePath, Ticket
from dualblade.staging import Slot
from dualblade.tensors import PathKind, TensorSpec
from spdk_glue import FileRegion, Piece


@dataclass(slots=True)
class Segment:
    """Blocks [first, end) of a tensor lie in `room`: one behind the other; or, where `capacity` is given, in
    a room for the whole tensor that is head-major, [batch x KV head, capacity, head_dim]."""

    first: int
    blocks: int
    room: Room
    capacity: int | None = None

    @property
    def end(self) -> int:
        return self.first + self.blocks

    def offset(self, block: int, layout: Layout) -> int:
        """Byte offset of a block, or of its first head's run, on the room's file."""
        if self.capacity is not None:
            return self.room.offset + block * layout.run_bytes
        return self.room.offset + (block - self.first) * layout.block_bytes

    def ranges(self, layout: Layout) -> list[tuple[int, int]]:
        """Offset and bytes of what the blocks take of the room's file."""
        begin = self.offset(self.first, layout)
        if self.capacity is None:
            return [(begin, self.blocks * layout.block_bytes)]
        stride, nbytes = self.capacity * layout.row_bytes, self.blocks * layout.run_bytes
        return [(begin + head * stride, nbytes) for head in range(layout.runs)]

    def rooms(self, layout: Layout) -> list[Room]:
        """The same, as rooms of their own."""
        return [replace(self.room, offset=offset, nbytes=nbytes) for offset, nbytes in self.ranges(layout)]

    def pieces(
        self,
        layout: Layout,
        address: int,
        head_stride: int,
        block_stride: int,
        first: int | None = None,
        blocks: int | None = None,
    ) -> list[Piece]:
        """What moves blocks [first, first + blocks), or all of them: in memory the first one's first
        run is at `address`."""
        first, blocks = self.first if first is None else first, self.blocks if blocks is None else blocks
        run, file, offset = layout.run_bytes, self.room.file, self.offset(first, layout)
        if self.capacity is None:
            return [Piece(offset, address, head_stride, block_stride, run, layout.runs, blocks, file)]
        stride = self.capacity * layout.row_bytes
        return [
            Piece(offset + head * stride, address + head * head_stride, 0, block_stride, run, 1, blocks, file)
            for head in range(layout.runs)
        ]

    def part(self, first: int, end: int, layout: Layout) -> Segment | None:
        """What of blocks [first, end) lies here; None where nothing does."""
        first, end = max(first, self.first), min(end, self.end)
        if first >= end:
            return None
        if self.capacity is not None:
            return replace(self, first=first, blocks=end - first)
        nbytes = (end - first) * layout.block_bytes
        return Segment(
            first, end - first, replace(self.room, offset=self.offset(first, layout), nbytes=nbytes)
        )

    def goes_on_in(self, other: Segment) -> bool:
        """The other one's room begins where this one's ends, or is the same."""
        mine, its = self.room, other.room
        if self.capacity is not None:
            return self.end == other.first and mine == its
        same = (mine.path, mine.file) == (its.path, its.file)
        return same and self.end == other.first and mine.offset + mine.nbytes == its.offset

    def with_next(self, other: Segment) -> Segment:
        """Both as one, where this one goes on in the other."""
        nbytes = self.room.nbytes + (other.room.nbytes if self.capacity is None else 0)
        return replace(self, blocks=self.blocks + other.blocks, room=replace(self.room, nbytes=nbytes))


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
    clean: blocks whose bytes lie in their direct home too, though it is not where they are. intact: blocks
    before it have not been taken back or changed since a migration set it. mapped: all of it is in the page
    cache, and read there. in_use: attention may be reading it there.
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

    @property
    def blocks(self) -> int:
        """Blocks there is room for."""
        return self.segments[-1].end if self.segments else 0

    @property
    def full(self) -> int:
        """Blocks on the medium."""
        return self.layout.full_blocks(self.tokens)

    def segment_of(self, block: int) -> Segment:
        return next(part for part in self.segments if part.first <= block < part.end)

    def offset_of(self, block: int) -> int:
        """Byte offset of a block on its file."""
        return self.segment_of(block).offset(block, self.layout)

    @property
    def whole_blocks(self) -> int:
        """Blocks of all the tokens that were foreseen."""
        return self.layout.blocks_for(self.spec.tokens)

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
        parts = (home.part(first, end, self.layout) for home in self.homes.get(kind, ()))
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
        parts = segment.part(0, first, self.layout), segment.part(end, segment.end, self.layout)
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
                moves = segment.pieces(self.layout, at, stride, run, begin, stop - begin)
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
        part = self.segment_of(block).part(block, block + 1, self.layout)
        assert part is not None
        run, address = self.layout.run_bytes, tails_address + self.tail_offset
        return part.pieces(self.layout, address, run, self.layout.block_bytes)
