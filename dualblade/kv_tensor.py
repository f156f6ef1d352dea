# SPDX-License-Identifier: Apache-2.0
"""One K or V in the store: where its blocks lie, and the unfinished one that stays in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dualblade.integrity import Checksums
from dualblade.layout import Layout
from dualblade.paths.base import Room, Ticket
from dualblade.staging import Slot
from dualblade.tensors import PathKind, TensorSpec
from spdk_glue import FileRegion, Piece, plain


@dataclass(slots=True)
class Segment:
    """Blocks [first, end) of a tensor lie in `room`."""

    first: int
    blocks: int
    room: Room

    @property
    def end(self) -> int:
        return self.first + self.blocks

    def offset(self, block: int, layout: Layout) -> int:
        """Byte offset of a block on the room's file."""
        return self.room.offset + (block - self.first) * layout.block_bytes


@dataclass(slots=True)
class Home:
    """A tensor that lives in one place, head-major, [batch x KV head, capacity, head_dim], and is read there:
    page-cache memory. slot: stands for all of it."""

    room: Room
    region: FileRegion
    slot: Slot
    capacity: int

    def close(self) -> None:
        """The memory goes back when nobody has a view of it any more."""
        self.slot.view = None
        self.region.close()


@dataclass(slots=True)
class Tensor:
    """tail: the unfinished block, [runs, block_tokens, head_dim]; tail_offset: its byte in the tails'
    region. checksums: of the blocks on the medium, or None. writes: under way. home: instead of segments."""

    spec: TensorSpec
    layout: Layout
    tail: Any
    tail_offset: int
    checksums: Checksums | None = None
    tokens: int = 0
    segments: list[Segment] = field(default_factory=list)
    writes: list[Ticket] = field(default_factory=list)
    home: Home | None = None

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

    def head_stride(self, capacity: int) -> int:
        """Bytes from one head's rows to the next's in a slot of `capacity` tokens."""
        return capacity * self.layout.row_bytes

    def pieces(self, address: int, capacity: int, first: int, end: int) -> dict[PathKind, list[Piece]]:
        """What moves blocks [first, end) between a slot at `address` and their rooms, path by path."""
        pieces: dict[PathKind, list[Piece]] = {}
        for segment in self.segments:
            begin, stop = max(first, segment.first), min(end, segment.end)
            if begin < stop:
                piece = self._piece(segment, address, capacity, begin, stop - begin)
                pieces.setdefault(segment.room.path, []).append(piece)
        return pieces

    def _piece(self, segment: Segment, address: int, capacity: int, first: int, blocks: int) -> Piece:
        return Piece(
            offset=segment.offset(first, self.layout),
            address=address + first * self.layout.run_bytes,
            head_stride=self.head_stride(capacity),
            block_stride=self.layout.run_bytes,
            run_bytes=self.layout.run_bytes,
            heads=self.layout.runs,
            blocks=blocks,
            file=segment.room.file,
        )

    def bytes_on_paths(self) -> Iterator[tuple[PathKind, int]]:
        """Path and bytes of the blocks on the medium, segment after segment."""
        for segment in self.segments:
            blocks = min(self.full, segment.end) - segment.first
            if blocks > 0:
                yield segment.room.path, blocks * self.layout.block_bytes

    def tail_piece(self, block: int, tails_address: int) -> Piece:
        """Brings a block back to the tail, which has the medium's own layout."""
        room = self.segment_of(block).room
        address = tails_address + self.tail_offset
        return plain(self.offset_of(block), address, self.layout.block_bytes, room.file)
