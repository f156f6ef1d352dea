# SPDX-License-Identifier: Apache-2.0
"""Contiguous extents of a namespace, in LBAs of 4 KiB. Pure arithmetic."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualblade.errors import CapacityError
from dualblade.units import KIB, MIB, format_size

LBA = 4 * KIB


@dataclass(frozen=True, slots=True, order=True)
class Extent:
    """`num_lbas` LBAs from `first_lba` on. offset, nbytes: the same in bytes."""

    first_lba: int
    num_lbas: int

    @property
    def end_lba(self) -> int:
        """The first LBA behind it."""
        return self.first_lba + self.num_lbas

    @property
    def offset(self) -> int:
        return self.first_lba * LBA

    @property
    def nbytes(self) -> int:
        return self.num_lbas * LBA


def lbas_for(nbytes: int) -> int:
    """LBAs that hold `nbytes`. Raises ValueError unless `nbytes` is positive."""
    if nbytes <= 0:
        raise ValueError(f"an extent of {nbytes} bytes")
    return -(-nbytes // LBA)


def at_least(nbytes: int) -> str:
    """`nbytes` in whole MiB, never less: a target made of the size named must be large enough."""
    return f"{-(-nbytes // MIB)} MiB"


class ExtentAllocator:
    """Hands out extents of [first_lba, first_lba + num_lbas).

    Best fit, ties to the lowest LBA: the segments of a run come in few sizes, so a freed one is
    taken again by the next of its size and the long runs stay whole for the large tensors.
    """

    def __init__(self, first_lba: int, num_lbas: int):
        if first_lba < 0 or num_lbas < 0:
            raise ValueError(f"{num_lbas} LBAs from {first_lba} on")
        self.first_lba = first_lba
        self.num_lbas = num_lbas
        self._used: set[Extent] = set()
        self._free = [Extent(first_lba, num_lbas)] if num_lbas else []  # by LBA, never adjacent

    # take -----------------------------------------------------------------------------------

    def allocate(self, num_lbas: int) -> Extent:
        """Raises CapacityError, ValueError."""
        if num_lbas <= 0:
            raise ValueError(f"an extent of {num_lbas} LBAs")
        fitting = [run for run in self._free if run.num_lbas >= num_lbas]
        if not fitting:
            raise self._too_small(num_lbas)
        best = min(fitting, key=lambda run: (run.num_lbas, run.first_lba))
        return self._take(best, Extent(best.first_lba, num_lbas))

    def allocate_all(self, sizes: Sequence[int]) -> list[Extent]:
        """One extent for each of `sizes` (LBAs), or none at all. Raises CapacityError, ValueError."""
        extents: list[Extent] = []
        try:
            for num_lbas in sizes:
                extents.append(self.allocate(num_lbas))
        except BaseException:
            self.free_all(extents)
            raise
        return extents

    def allocate_at(self, extent: Extent) -> None:
        """Take exactly this extent, as when a table is loaded. Raises ValueError unless all of it
        is free."""
        run = self._free_run_at(extent.first_lba)
        if extent.num_lbas <= 0 or run is None or run.end_lba < extent.end_lba:
            raise ValueError(f"LBAs {extent.first_lba} to {extent.end_lba} are not free")
        self._take(run, extent)

    def _take(self, run: Extent, part: Extent) -> Extent:
        at = bisect_left(self._free, run)
        before = Extent(run.first_lba, part.first_lba - run.first_lba)
        behind = Extent(part.end_lba, run.end_lba - part.end_lba)
        self._free[at : at + 1] = [left for left in (before, behind) if left.num_lbas]
        self._used.add(part)
        return part

    def _free_run_at(self, lba: int) -> Extent | None:
        """The free run that holds `lba`."""
        at = bisect_left(self._free, lba + 1, key=lambda run: run.first_lba) - 1
        return self._free[at] if at >= 0 and lba < self._free[at].end_lba else None

    # give back ------------------------------------------------------------------------------

    def free(self, extent: Extent) -> None:
        """Raises ValueError for anything that was not handed out, or was freed already."""
        if extent not in self._used:
            raise ValueError(f"{extent} is not allocated")
        self._used.remove(extent)
        insort(self._free, self._merged(extent))

    def free_all(self, extents: Iterable[Extent]) -> None:
        """Raises ValueError, as free() does."""
        for extent in extents:
            self.free(extent)

    def _merged(self, extent: Extent) -> Extent:
        """The extent and its free neighbours, which leave the list."""
        at = bisect_left(self._free, extent)
        first, end = extent.first_lba, extent.end_lba
        if at < len(self._free) and self._free[at].first_lba == end:
            end = self._free.pop(at).end_lba
        if at and self._free[at - 1].end_lba == first:
            first = self._free.pop(at - 1).first_lba
        return Extent(first, end - first)

    # account --------------------------------------------------------------------------------

    @property
    def used(self) -> list[Extent]:
        return sorted(self._used)

    @property
    def free_runs(self) -> list[Extent]:
        return list(self._free)

    @property
    def free_lbas(self) -> int:
        return sum(run.num_lbas for run in self._free)

    @property
    def largest_free(self) -> int:
        """LBAs of the longest free run."""
        return max((run.num_lbas for run in self._free), default=0)

    @property
    def fragmentation(self) -> float:
        """1 - longest free run / all free LBAs: 0.0 while all that is free is one run."""
        free = self.free_lbas
        return 1.0 - self.largest_free / free if free else 0.0

    def lbas_needed(self, num_lbas: int) -> int:
        """LBAs the target must have so that a run of `num_lbas` fits behind what is in use."""
        end = self.first_lba + self.num_lbas
        last = self._free[-1] if self._free else None
        tail = last.num_lbas if last and last.end_lba == end else 0
        return end + max(0, num_lbas - tail)

    def _too_small(self, num_lbas: int) -> CapacityError:
        return CapacityError(
            f"{format_size(num_lbas * LBA)} in one piece do not fit: {format_size(self.free_lbas * LBA)} "
            f"are free, the longest piece {format_size(self.largest_free * LBA)}; "
            f"the target must be at least {at_least(self.lbas_needed(num_lbas) * LBA)}"
        )
