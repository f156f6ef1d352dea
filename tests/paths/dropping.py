# SPDX-License-Identifier: Apache-2.0
"""Media on which a room that is dropped too early shows."""

from __future__ import annotations

from collections.abc import Sequence

from stores import MemPath

from dualblade.paths.base import Room, Ticket
from dualblade.paths.pagecache import PageCachePath
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import READ, WRITE, MemOptions, Piece, QueueOptions, Region, plain

RUBBISH = b"\xee"


def overlap(piece: Piece, room: Room) -> bool:
    """Does a transfer use bytes of the room, on the same file? Between the runs of heads it uses none."""
    whole = not piece.medium_stride
    run = piece.nbytes if whole else piece.run_bytes
    begins = range(1) if whole else range(piece.heads)
    offsets = [piece.offset + head * piece.medium_stride for head in begins]
    return any(at < room.offset + room.nbytes and room.offset < at + run for at in offsets)


class Watched:
    """Part of a path: no room may be dropped while rows are read or written there. While they go from the
    page cache to its drive it may: punching waits for those pages."""

    def watch(self) -> None:
        self.under_way: list[tuple[Ticket, list[Piece]]] = []
        self.dropped_bytes = 0

    def note(self, op: int, ticket: Ticket, pieces: Sequence[Piece]) -> Ticket:
        self.under_way = [item for item in self.under_way if not item[0].done()]
        if op in (READ, WRITE):
            self.under_way.append((ticket, list(pieces)))
        return ticket

    def check_drop(self, room: Room) -> None:
        self.dropped_bytes += room.nbytes
        for ticket, pieces in self.under_way:
            used = any(piece.file == room.file and overlap(piece, room) for piece in pieces)
            assert not used or ticket.done(), f"{room} is dropped, and {ticket.key} uses it"


class DroppingPath(Watched, MemPath):
    """The page cache in RAM. What is dropped there is rubbish afterwards."""

    def __init__(self, options: QueueOptions, script: MemOptions):
        super().__init__(options, script, kind=PathKind.PAGE_CACHE)
        self.watch()

    def transfer(self, op: int, key: TensorKey, pieces: Sequence[Piece]) -> Ticket:
        return self.note(op, super().transfer(op, key, pieces), pieces)

    def drop(self, room: Room) -> bool:
        self.check_drop(room)
        with Region(room.nbytes, best="thp") as region:
            region.buffer()[:] = RUBBISH * region.size
            self.queue.run(WRITE, [plain(room.offset, region.address, room.nbytes)])
        return True


class WatchedPageCache(Watched, PageCachePath):
    """The real files, which read as zeros where they were punched."""

    def transfer(self, op: int, key: TensorKey, pieces: Sequence[Piece]) -> Ticket:
        return self.note(op, super().transfer(op, key, pieces), pieces)

    def drop(self, room: Room) -> bool:
        self.check_drop(room)
        return super().drop(room)
