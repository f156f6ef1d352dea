# SPDX-License-Identifier: Apache-2.0
"""Media on which a room that is dropped too early shows."""

from __future__ import annotations

from collections.abc import Sequence

from stores import MemPath

from dualblade.paths.base import Room, Ticket
from dualblade.paths.pagecache import PageCachePath
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import WRITE, MemOptions, Piece, QueueOptions, Region, plain

RUBBISH = b"\xee"


class Watched:
    """Part of a path: no room may be dropped while a transfer uses it."""

    def watch(self) -> None:
        self.under_way: list[tuple[Ticket, list[Piece]]] = []
        self.dropped_bytes = 0

    def note(self, ticket: Ticket, pieces: Sequence[Piece]) -> Ticket:
        self.under_way = [item for item in self.under_way if not item[0].done()]
        self.under_way.append((ticket, list(pieces)))
        return ticket

    def check_drop(self, room: Room) -> None:
        self.dropped_bytes += room.nbytes
        for ticket, pieces in self.under_way:
            for piece in pieces:
                apart = (
                    piece.offset + piece.nbytes <= room.offset or piece.offset >= room.offset + room.nbytes
                )
                same_file = piece.file == room.file
                assert ticket.done() or apart or not same_file, f"{room} is dropped, and {ticket.key} uses it"


class DroppingPath(Watched, MemPath):
    """The page cache in RAM. What is dropped there is rubbish afterwards."""

    def __init__(self, options: QueueOptions, script: MemOptions):
        super().__init__(options, script, kind=PathKind.PAGE_CACHE)
        self.watch()

    def transfer(self, op: int, key: TensorKey, pieces: Sequence[Piece]) -> Ticket:
        return self.note(super().transfer(op, key, pieces), pieces)

    def drop(self, room: Room) -> bool:
        self.check_drop(room)
        with Region(room.nbytes, hugepages=False) as region:
            region.buffer()[:] = RUBBISH * region.size
            self.queue.run(WRITE, [plain(room.offset, region.address, room.nbytes)])
        return True


class WatchedPageCache(Watched, PageCachePath):
    """The real files, which read as zeros where they were punched."""

    def transfer(self, op: int, key: TensorKey, pieces: Sequence[Piece]) -> Ticket:
        return self.note(super().transfer(op, key, pieces), pieces)

    def drop(self, room: Room) -> bool:
        self.check_drop(room)
        return super().drop(room)
