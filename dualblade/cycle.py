# SPDX-License-Identifier: Apache-2.0
"""The tensors in the order of decoding, so many of whose blocks lie in the page cache, and which of them is
the next to leave it or to come into it. Pure policy: no I/O, no clock."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from dualblade.governor import Policy
from dualblade.tensors import PathKind, TensorKey


@dataclass(frozen=True, slots=True)
class TensorState:
    """Blocks of one tensor: `blocks` there is room for, `written` on the medium, `cached` in the page cache,
    `cached_written` both, `stuck` of the cached ones without a room on the direct path. in_place: it is read
    where it lies as long as all of it is cached."""

    key: TensorKey
    block_bytes: int
    blocks: int
    written: int
    cached: int
    cached_written: int
    stuck: int = 0
    in_place: bool = False

    @property
    def free(self) -> int:
        """Cached blocks that hold nothing yet."""
        return self.cached - self.cached_written


@dataclass(frozen=True, slots=True)
class Move:
    """`blocks` more of a tensor go `to` a path, so that `cached` are in the page cache. bytes: of them, those
    that must be copied are `copied`."""

    key: TensorKey
    to: PathKind
    blocks: int
    cached: int
    bytes: int
    copied: int
    reason: str


class Cycle:
    """The tensors in the order of decoding as moves change them; each is moved once. One that lies on both
    paths already is the next to move, so that whole tensors come to lie on one."""

    def __init__(self, tensors: Sequence[TensorState], policy: str):
        self.tensors = list(tensors)
        self.moves: list[Move] = []
        self._spread = policy == Policy.SPREAD
        self._moved: set[int] = set()
        self._cached = [index for index, tensor in enumerate(tensors) if tensor.cached]

    def take(self, index: int, to: PathKind, blocks: int, copies: int, reason: str) -> int:
        """Move blocks of a tensor, the last ones out of the page cache or the first ones into it: bytes."""
        tensor = self.tensors[index]
        before, size = tensor.cached, tensor.block_bytes
        cached = before + (blocks if to is PathKind.PAGE_CACHE else -blocks)
        written = tensor.cached_written + (copies if to is PathKind.PAGE_CACHE else -copies)
        self.tensors[index] = replace(tensor, cached=cached, cached_written=written)
        self.moves.append(Move(tensor.key, to, blocks, cached, blocks * size, copies * size, reason))
        self._moved.add(index)
        self._note(index, before, cached)
        return blocks * size

    def _note(self, index: int, before: int, cached: int) -> None:
        if cached and not before:
            insort(self._cached, index)
        elif before and not cached:
            self._cached.remove(index)

    def next_to_demote(self, free: bool = False) -> int | None:
        """Of several the one with the fewest cached blocks, or whose cached neighbours are nearest.
        free: of those with rooms that nothing was written to."""
        able = [
            i
            for i, tensor in enumerate(self.tensors)
            if tensor.cached > tensor.stuck
            and (not free or (tensor.free and not (tensor.in_place and tensor.cached == tensor.blocks)))
        ]
        return min(self._left(able), key=lambda i: (self._part(i), sum(self._gaps(i)), -i), default=None)

    def next_to_promote(self) -> int | None:
        """Of several the one with the most cached blocks, or that is furthest from any cached one."""
        able = [i for i, tensor in enumerate(self.tensors) if tensor.cached < tensor.blocks]
        return min(self._left(able), key=lambda i: (-self._part(i), -min(self._gaps(i)), i), default=None)

    def _left(self, able: Iterable[int]) -> Iterator[int]:
        return (index for index in able if index not in self._moved)

    def _part(self, index: int) -> float:
        """Of its blocks, those that are cached."""
        return self.tensors[index].cached / self.tensors[index].blocks

    def _gaps(self, index: int) -> tuple[int, int]:
        """Steps round the cycle to the nearest other cached tensor before and behind this one; all the way
        where there is none, and where the policy does not ask."""
        total = len(self.tensors)
        if not self._spread or not self._cached:
            return total, total
        before = self._cached[bisect_left(self._cached, index) - 1]
        beyond = self._cached[bisect_left(self._cached, index + 1) % len(self._cached)]
        return (index - before) % total or total, (beyond - index) % total or total
