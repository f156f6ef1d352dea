# SPDX-License-Identifier: Apache-2.0
"""What a volume's metadata looks like on the medium. Pure: bytes in, values out.

    0        superblock, copy 0             64 KiB   superblock, copy 1
    128 KiB  extent table of copy 0, then the one of copy 1, then the data

The superblocks lie at fixed places, so that each is found whatever became of the other. All
numbers are little-endian. Magic, version and checksum keep their places in every version.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from uuid import UUID
from zlib import crc32

from dualblade.errors import CapacityError, VolumeError
from dualblade.extents import LBA, Extent
from dualblade.tensors import TensorKey
from dualblade.units import KIB, MIB, format_size, round_up

MAGIC = b"DUALBLDE"
VERSION = 1
COPIES = (0, 1)
MIN_CAPACITY = MIB
ENTRY_BYTES = 64

_SUPERBLOCK_OFFSETS = (0, 64 * KIB)
_TABLES_OFFSET = 128 * KIB
_MIN_TABLE, _MAX_TABLE = 32 * KIB, 1984 * KIB  # both tables and superblocks: 192 KiB to 4 MiB
_CAPACITY_PER_ENTRY = 4 * MIB
_ALIGN_DATA_FROM = 16 * MIB
_GENERATIONS = 1 << 63  # room to count on from any valid one
_HEADER = struct.Struct("<8sII16sQQIQQII")
_CHECKSUM = struct.Struct("<I")
_ENTRY = struct.Struct("<16sIc3xQQQ16x")


class VersionError(VolumeError):
    """A volume of another version of this program."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where everything lies on a volume of `capacity` bytes (whole LBAs); all in bytes."""

    capacity: int

    @classmethod
    def of(cls, nbytes: int) -> Geometry:
        """Of a target that holds `nbytes`. Raises CapacityError."""
        if nbytes < MIN_CAPACITY:
            least = format_size(MIN_CAPACITY)
            raise CapacityError(
                f"the target holds {format_size(nbytes)}; a volume needs at least {least}",
                "name a larger target, or pass a larger --capacity",
            )
        return cls(nbytes // LBA * LBA)

    @property
    def table_bytes(self) -> int:
        """One table: an entry for every 4 MiB of capacity, within bounds."""
        wanted = round_up(self.capacity // _CAPACITY_PER_ENTRY * ENTRY_BYTES, LBA)
        return min(max(wanted, _MIN_TABLE), _MAX_TABLE)

    @property
    def max_entries(self) -> int:
        return self.table_bytes // ENTRY_BYTES

    @property
    def metadata_bytes(self) -> int:
        return _TABLES_OFFSET + len(COPIES) * self.table_bytes

    @property
    def data_start(self) -> int:
        """On a MiB, except on volumes so small that this would cost them much of their data."""
        return round_up(self.metadata_bytes, MIB if self.capacity >= _ALIGN_DATA_FROM else LBA)

    @property
    def data_bytes(self) -> int:
        return self.capacity - self.data_start

    def superblock_offset(self, copy: int) -> int:
        return _SUPERBLOCK_OFFSETS[copy]

    def table_offset(self, copy: int) -> int:
        return _TABLES_OFFSET + copy * self.table_bytes


def capacity_for(data_bytes: int, extents: int = 1) -> int:
    """The bytes a target must hold for `data_bytes` of data in that many extents."""
    data_bytes += extents * (LBA - 1)  # each may have to be rounded up
    capacity = max(MIN_CAPACITY, round_up(data_bytes, LBA))
    while (short := data_bytes - Geometry(capacity).data_bytes) > 0:
        capacity += round_up(short, LBA)
    return capacity


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of the extent table. owner: the session that allocated it; generation: the first
    commit that held it."""

    extent: Extent
    key: TensorKey
    owner: UUID
    generation: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """copy: which of the two it is. entries, table_crc: of the table of the same copy."""

    copy: int
    uuid: UUID
    generation: int
    geometry: Geometry
    entries: int
    table_crc: int


def has_magic(block: bytes) -> bool:
    return block[: len(MAGIC)] == MAGIC


def encode_superblock(block: Superblock) -> bytes:
    """One LBA."""
    place = block.geometry
    header = _HEADER.pack(
        MAGIC, VERSION, LBA, block.uuid.bytes, block.generation, place.capacity, block.copy,
        place.table_bytes, place.data_start, block.entries, block.table_crc,
    )  # fmt: skip
    body = header.ljust(LBA - _CHECKSUM.size, b"\0")
    return body + _CHECKSUM.pack(crc32(body))


def decode_superblock(raw: bytes) -> Superblock:
    """Raises VersionError, VolumeError."""
    if len(raw) != LBA or not has_magic(raw):
        raise VolumeError("it is no superblock")
    body = raw[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(raw[-_CHECKSUM.size :])[0] != crc32(body):
        raise VolumeError("its checksum is wrong")
    version = _HEADER.unpack_from(body)[1]
    if version != VERSION:
        raise VersionError(f"the volume is of version {version}; this program knows version {VERSION}")
    return _superblock_of(body)


def _superblock_of(body: bytes) -> Superblock:
    _, _, lba, uuid, generation, capacity, copy, table_bytes, data_start, entries, table_crc = (
        _HEADER.unpack_from(body)
    )
    place = Geometry(capacity)
    if lba != LBA or capacity < MIN_CAPACITY or capacity % LBA:
        raise VolumeError(f"its geometry is wrong: {capacity} bytes in blocks of {lba}")
    if (table_bytes, data_start) != (place.table_bytes, place.data_start):
        raise VolumeError(f"its geometry is wrong: tables of {table_bytes} bytes, data from {data_start}")
    if entries > place.max_entries or copy not in COPIES or generation >= _GENERATIONS:
        raise VolumeError(f"copy {copy}, generation {generation} with {entries} entries cannot be")
    return Superblock(copy, UUID(bytes=uuid), generation, place, entries, table_crc)


def encode_table(records: Iterable[Record]) -> bytes:
    return b"".join(map(_encode_entry, records))


def _encode_entry(record: Record) -> bytes:
    extent, key = record.extent, record.key
    return _ENTRY.pack(
        record.owner.bytes, key.layer, key.kind.encode(), extent.first_lba, extent.num_lbas, record.generation
    )


def decode_table(raw: bytes, superblock: Superblock) -> tuple[Record, ...]:
    """Raises VolumeError. The records are within the data and do not overlap."""
    table = raw[: superblock.entries * ENTRY_BYTES]
    if len(table) < superblock.entries * ENTRY_BYTES or crc32(table) != superblock.table_crc:
        raise VolumeError("the checksum of its extent table is wrong")
    records = tuple(_record_of(*fields) for fields in _ENTRY.iter_unpack(table))
    problems = problems_of(records, superblock.geometry)
    if problems:
        raise VolumeError("; ".join(problems))
    return records


def _record_of(owner: bytes, layer: int, kind: bytes, first: int, count: int, generation: int) -> Record:
    if kind not in (b"K", b"V"):
        raise VolumeError(f"an extent of kind {kind!r}")
    return Record(Extent(first, count), TensorKey(layer, kind.decode()), UUID(bytes=owner), generation)


def problems_of(records: Sequence[Record], geometry: Geometry) -> list[str]:
    """What makes a table impossible, one line each."""
    first, end = geometry.data_start // LBA, geometry.capacity // LBA
    problems = [
        f"{_where(record)} is outside the data"
        for record in records
        if record.extent.num_lbas < 1 or record.extent.first_lba < first or record.extent.end_lba > end
    ]
    by_lba = sorted(records, key=lambda record: record.extent)
    problems += [
        f"{_where(a)} overlaps {_where(b)}"
        for a, b in pairwise(by_lba)
        if a.extent.end_lba > b.extent.first_lba
    ]
    return problems


def _where(record: Record) -> str:
    return f"{record.key} at LBA {record.extent.first_lba} ({record.extent.num_lbas} LBAs)"
