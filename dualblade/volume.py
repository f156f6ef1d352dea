# SPDX-License-Identifier: Apache-2.0
"""A volume on a target: proves that the target is ours, and says which extents are in use.

Two copies of the metadata take turns. A commit writes the copy that is not in use, the table
before the superblock with a flush after each, so a kill at any instant leaves the old state or
the new one. Nothing outside the metadata is ever written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4
from zlib import crc32

from dualblade.errors import CapacityError, VolumeError
from dualblade.extents import LBA, Extent, ExtentAllocator, at_least, lbas_for
from dualblade.metadata import Copy, Medium, newest_of, read_copy
from dualblade.superblock import (
    COPIES,
    Geometry,
    Record,
    Superblock,
    capacity_for,
    encode_superblock,
    encode_table,
    problems_of,
)
from dualblade.tensors import TensorKey
from dualblade.units import format_size
from spdk_glue import Queue

__all__ = ["Volume", "VolumeReport", "capacity_for"]

TIMEOUT = 60.0


@dataclass(frozen=True, slots=True)
class VolumeReport:
    """What check() found. Sizes in bytes; leftovers: extents of sessions that died; problems: one
    line each. A damaged copy beside a valid one is no problem: a kill during a commit leaves it."""

    uuid: UUID
    generation: int
    capacity: int
    copies: tuple[Copy, ...]
    extents: int
    leftovers: int
    leftover_bytes: int
    data_bytes: int
    free_bytes: int
    largest_free_bytes: int
    fragmentation: float
    problems: tuple[str, ...]

    @property
    def clean(self) -> bool:
        return not self.problems


class Volume:
    """Extents of a target. One thread at a time; the queue stays the caller's.

    Everything that commits raises StorageError, and then is as it was before the call, in memory;
    on the medium it is the old state or the new one. session: owner of what this object allocates.
    """

    def __init__(self, medium: Medium, geometry: Geometry, uuid: UUID, name: str):
        """For create() and open()."""
        self.uuid = uuid
        self.session = uuid4()
        self.name = name
        self.geometry = geometry
        self.generation = 0
        self._medium = medium
        self._active = COPIES[-1]
        self._wiped = False
        self._records: dict[Extent, Record] = {}
        self._allocator = ExtentAllocator(geometry.data_start // LBA, geometry.data_bytes // LBA)

    @classmethod
    def create(cls, queue: Queue, capacity: int, *, name: str = "TARGET", timeout: float = TIMEOUT) -> Volume:
        """Make the target ours: the caller has made sure that nothing on it is needed.

        capacity: bytes of the target. timeout: seconds for one transfer. Raises CapacityError,
        StorageError.
        """
        volume = cls(Medium(queue, timeout), Geometry.of(capacity), uuid4(), name)
        volume._erase_superblocks()
        for _ in COPIES:
            volume.commit()
        return volume

    @classmethod
    def open(cls, queue: Queue, capacity: int, *, name: str = "TARGET", timeout: float = TIMEOUT) -> Volume:
        """Read only. Raises VolumeError where no volume of ours is on the target, CapacityError,
        StorageError. What it holds was left by a dead session: see `leftovers`, reclaim()."""
        medium = Medium(queue, timeout)
        copies = [read_copy(medium, Geometry.of(capacity).capacity, number) for number in COPIES]
        newest = newest_of(copies, name)
        volume = cls(medium, newest.geometry, newest.uuid, name)
        volume._active, volume.generation = newest.copy, newest.generation
        volume._load(copies[newest.copy].records)
        return volume

    def _load(self, records: Iterable[Record]) -> None:
        for record in records:
            self._allocator.allocate_at(record.extent)
            self._records[record.extent] = record

    # allocate, free -------------------------------------------------------------------------

    def allocate(self, key: TensorKey, nbytes: int, commit: bool = True) -> Extent:
        """Raises CapacityError, StorageError."""
        return self.allocate_many([(key, nbytes)], commit)[0]

    def allocate_many(self, wanted: Sequence[tuple[TensorKey, int]], commit: bool = True) -> list[Extent]:
        """An extent for every (key, bytes), or none, in one commit. Raises CapacityError, StorageError."""
        sizes = [lbas_for(nbytes) for _, nbytes in wanted]
        self._check_room(sizes)
        extents = self._allocator.allocate_all(sizes)
        keys = [key for key, _ in wanted]
        self._records |= {
            extent: Record(extent, key, self.session, self.generation + 1)
            for extent, key in zip(extents, keys, strict=True)
        }
        if commit:
            self._commit_or(lambda: self._forget(extents))
        return extents

    def free(self, extents: Iterable[Extent], commit: bool = True) -> None:
        """Raises ValueError for an extent that is not allocated (then nothing is freed), StorageError."""
        records = []
        for extent in set(extents):
            if extent not in self._records:
                raise ValueError(f"{extent} is not allocated")
            records.append(self._records[extent])
        if records:
            self._forget(record.extent for record in records)
            if commit:
                self._commit_or(lambda: self._load(records))

    def free_all(self) -> None:
        """Every extent of this session. Raises StorageError."""
        self.free(record.extent for record in self.extents if record.owner == self.session)

    def reclaim(self) -> int:
        """Free the leftovers; their bytes. Only under the target's lock. Raises StorageError."""
        leftovers = [record.extent for record in self.leftovers]
        self.free(leftovers)
        return sum(extent.nbytes for extent in leftovers)

    def _forget(self, extents: Iterable[Extent]) -> None:
        for extent in extents:
            self._allocator.free(extent)
            del self._records[extent]

    def _check_room(self, sizes: Sequence[int]) -> None:
        if len(self._records) + len(sizes) > self.geometry.max_entries:
            raise CapacityError(
                f"the volume's table is full: it holds {self.geometry.max_entries} extents",
                "use a larger target: the table grows with it",
            )
        needed = sum(sizes) * LBA
        if needed > self.free_bytes:
            target = capacity_for(self.data_bytes - self.free_bytes + needed)
            raise CapacityError(
                f"{format_size(needed)} are needed, {format_size(self.free_bytes)} of {self.name} are free; "
                f"the target must be at least {at_least(target)}"
            )

    # commit ---------------------------------------------------------------------------------

    def commit(self) -> None:
        """Write the state into the copy that is not in use. Raises StorageError, VolumeError (wiped)."""
        if self._wiped:
            raise VolumeError(f"the volume on {self.name} was wiped")
        number = 1 - self._active
        table = encode_table(self.extents)
        superblock = Superblock(
            number, self.uuid, self.generation + 1, self.geometry, len(self._records), crc32(table)
        )
        if table:
            self._medium.write(self.geometry.table_offset(number), table)
            self._medium.flush()
        self._medium.write(self.geometry.superblock_offset(number), encode_superblock(superblock))
        self._medium.flush()
        self._active, self.generation = number, superblock.generation

    def _commit_or(self, undo: Callable[[], None]) -> None:
        try:
            self.commit()
        except BaseException:
            undo()
            raise

    def _erase_superblocks(self) -> None:
        for number in COPIES:
            self._medium.write(self.geometry.superblock_offset(number), bytes(LBA))
        self._medium.flush()

    def wipe(self) -> None:
        """Erase both metadata copies: the target is nobody's afterwards. Raises StorageError."""
        self._wiped = True
        self._erase_superblocks()
        self._medium.write(0, bytes(self.geometry.metadata_bytes))
        self._medium.flush()

    # look -----------------------------------------------------------------------------------

    @property
    def extents(self) -> tuple[Record, ...]:
        """All that is allocated, by LBA."""
        return tuple(self._records[extent] for extent in self._allocator.used)

    @property
    def leftovers(self) -> tuple[Record, ...]:
        """What sessions that died have left."""
        return tuple(record for record in self.extents if record.owner != self.session)

    @property
    def capacity(self) -> int:
        """Bytes, metadata and all."""
        return self.geometry.capacity

    @property
    def data_bytes(self) -> int:
        return self.geometry.data_bytes

    @property
    def free_bytes(self) -> int:
        return self._allocator.free_lbas * LBA

    @property
    def largest_free_bytes(self) -> int:
        return self._allocator.largest_free * LBA

    def check(self) -> VolumeReport:
        """Read both copies again and compare. Raises StorageError, VolumeError."""
        copies = tuple(read_copy(self._medium, self.capacity, number) for number in COPIES)
        leftovers = self.leftovers
        return VolumeReport(
            uuid=self.uuid,
            generation=self.generation,
            capacity=self.capacity,
            copies=copies,
            extents=len(self._records),
            leftovers=len(leftovers),
            leftover_bytes=sum(record.extent.nbytes for record in leftovers),
            data_bytes=self.data_bytes,
            free_bytes=self.free_bytes,
            largest_free_bytes=self.largest_free_bytes,
            fragmentation=self._allocator.fragmentation,
            problems=(*problems_of(self.extents, self.geometry), *self._medium_problems(copies)),
        )

    def _medium_problems(self, copies: Sequence[Copy]) -> list[str]:
        problems = []
        active = copies[self._active]
        if active.damage or not active.superblock:
            problems.append(f"copy {active.number}, the newest, is {active.state}")
        elif (active.superblock.uuid, active.generation) != (self.uuid, self.generation):
            problems.append(f"copy {active.number} is not what this process knows: {active.state}")
        return problems

    def __repr__(self) -> str:
        return (
            f"<Volume {self.name}, {len(self._records)} extents, {format_size(self.free_bytes)} of "
            f"{format_size(self.data_bytes)} free>"
        )
