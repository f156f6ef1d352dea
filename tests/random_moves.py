# SPDX-License-Identifier: Apache-2.0
"""Migrations at random moments."""

from __future__ import annotations

import random

from dualblade.cycle import Move
from dualblade.migration import Migrator
from dualblade.store import KVStore
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import Region


class RandomMoves:
    """A governor without sense: any number of blocks of any tensor, at any time. often: 0 to 1. With an odd
    seed what is promoted comes from the slots, where a store has any."""

    def __init__(self, store: KVStore, seed: int, often: float = 0.5):
        at_hand = store.at_hand if store.whole_on_host and seed % 2 else None
        self.migrator = Migrator(store.tensors, store.paths, store.in_place, at_hand=at_hand)
        self.random = random.Random(seed)
        self.often = often
        self.in_place: set[tuple[TensorKey, bool]] = set()  # how tensors were found when they were used
        self.tensors = store.tensors
        store.mover = self
        self.migrator.claim(list(self.tensors.values()))

    @property
    def region(self) -> Region:
        return self.migrator.region

    def reached(self, key: TensorKey) -> None:
        self.in_place.add((key, self.tensors[key].mapped is not None))
        if self.random.random() < self.often:
            self.want_anything()
        self.migrator.poll()

    def grown(self, tensor) -> None:
        self.migrator.claim([tensor])

    def spare(self) -> bool:
        return self.migrator.spare()

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
