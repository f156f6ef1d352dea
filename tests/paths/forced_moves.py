# SPDX-License-Identifier: Apache-2.0
"""Migrations at random moments, and media on which a room that is dropped too early shows."""

from __future__ import annotations

import random
from collections.abc import Sequence

from stores import MemPath

from dualblade.migration import Migrator
from dualblade.paths.base import Room, Ticket
from dualblade.paths.pagecache import PageCachePath
from dualblade.revision import Move
from dualblade.store import KVStore
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


class RandomMoves:
    """A governor without sense: any number of blocks of any tensor, at any time. often: 0 to 1."""

    def __init__(self, store: KVStore, seed: int, often: float = 0.5):
        self.migrator = Migrator(store.tensors, store.paths)
        self.random = random.Random(seed)
        self.often = often
        self.tensors = store.tensors
        store.mover = self
        self.migrator.claim(list(self.tensors.values()))

    @property
    def region(self) -> Region:
        return self.migrator.region

    def reached(self, key: TensorKey) -> None:
        if self.random.random() < self.often:
            self.want_anything()
        self.migrator.poll()

    def grown(self, tensor) -> None:
        self.migrator.claim([tensor])

    def want_anything(self) -> None:
        keys = self.random.sample(sorted(self.tensors), self.random.randint(1, min(3, len(self.tensors))))
        self.migrator.want([move for key in keys if (move := self.any_move(key))])
        self.migrator.grant = self.random.choice([1, 1 << 16, 1 << 30])

    def any_move(self, key: TensorKey) -> Move | None:
        tensor = self.tensors[key]
        now = tensor.blocks_on(PathKind.PAGE_CACHE)
        cached = self.random.choice([0, tensor.blocks, self.random.randint(0, tensor.blocks)])
        return move_to(key, now, cached) if cached != now else None


def move_to(key: TensorKey, now: int, cached: int) -> Move:
    """So many blocks of a tensor in the page cache, where `now` are."""
    to = PathKind.PAGE_CACHE if cached > now else PathKind.DIRECT
    return Move(key, to, abs(cached - now), cached, 0, 0, "a test")
