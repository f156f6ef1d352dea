# SPDX-License-Identifier: Apache-2.0
"""Where a volume's metadata lies, and its parser against whatever bytes there are."""

from __future__ import annotations

import struct
from dataclasses import replace
from uuid import uuid4
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.errors import VolumeError
from dualblade.extents import LBA, Extent
from dualblade.superblock import (
    ENTRY_BYTES,
    MIN_CAPACITY,
    Geometry,
    Record,
    Superblock,
    capacity_for,
    decode_superblock,
    decode_table,
    encode_superblock,
    encode_table,
)
from dualblade.tensors import TensorKey
from dualblade.units import GIB, KIB, MIB, TIB

CAPACITY = 4 * MIB
K0 = TensorKey(0, "K")


@given(st.integers(MIN_CAPACITY, 16 * TIB))
def test_metadata_is_bounded_and_before_the_data(nbytes: int) -> None:
    place = Geometry.of(nbytes)
    assert 192 * KIB <= place.metadata_bytes <= 4 * MIB
    assert place.max_entries >= 512
    assert place.superblock_offset(1) + LBA <= place.table_offset(0)
    assert place.table_offset(0) + place.table_bytes <= place.table_offset(1)
    assert place.table_offset(1) + place.table_bytes <= place.data_start < place.capacity <= nbytes
    assert place.data_start % (MIB if place.capacity >= 16 * MIB else LBA) == 0


@given(st.integers(0, 2 * TIB), st.integers(1, 200))
def test_capacity_for_is_enough_and_no_waste(data_bytes: int, extents: int) -> None:
    capacity = capacity_for(data_bytes, extents)
    assert capacity % LBA == 0
    assert Geometry(capacity).data_bytes >= data_bytes + extents * (LBA - 1)
    assert capacity <= max(MIN_CAPACITY, data_bytes + extents * LBA + 6 * MIB)


def test_the_table_grows_with_the_target() -> None:
    assert Geometry(8 * GIB).max_entries == 2048
    assert Geometry(8 * TIB).max_entries == 31744
    assert Geometry(8 * TIB).metadata_bytes == 4 * MIB


# the parser ---------------------------------------------------------------------------------


def resealed(raw: bytes, at: int, data: bytes) -> bytes:
    """The superblock with these bytes in it and a checksum that fits."""
    body = bytearray(raw[:-4])
    body[at : at + len(data)] = data
    return bytes(body) + struct.pack("<I", crc32(body))


GEOMETRY = Geometry(CAPACITY)
SUPERBLOCK = Superblock(0, uuid4(), 5, GEOMETRY, 2, 0)


def sealed_table(table: bytes) -> Superblock:
    return replace(SUPERBLOCK, entries=len(table) // ENTRY_BYTES, table_crc=crc32(table))


def records_of(*extents: Extent) -> list[Record]:
    return [Record(extent, K0, uuid4(), 1) for extent in extents]


@given(st.binary(max_size=LBA + 1))
def test_random_bytes_are_no_superblock(raw: bytes) -> None:
    with pytest.raises(VolumeError):
        decode_superblock(raw)


@given(st.binary(min_size=1, max_size=72))
def test_random_fields_with_a_good_checksum(fields: bytes) -> None:
    raw = resealed(encode_superblock(SUPERBLOCK), 8, fields)
    try:
        found = decode_superblock(raw)
    except VolumeError:
        return
    assert encode_superblock(found)[:80] == raw[:80]


@given(st.integers(0, LBA - 1), st.integers(0, 7))
def test_every_flipped_bit_is_found(at: int, bit: int) -> None:
    raw = bytearray(encode_superblock(SUPERBLOCK))
    raw[at] ^= 1 << bit
    with pytest.raises(VolumeError):
        decode_superblock(bytes(raw))


@given(st.binary(max_size=8 * ENTRY_BYTES), st.integers(0, 512), st.integers(0, (1 << 32) - 1))
def test_random_bytes_are_no_table(raw: bytes, entries: int, crc: int) -> None:
    superblock = replace(SUPERBLOCK, entries=entries, table_crc=crc)
    try:
        assert decode_table(raw, superblock) == ()
    except VolumeError:
        return
    assert entries == 0


@given(st.lists(st.binary(min_size=ENTRY_BYTES, max_size=ENTRY_BYTES), min_size=1, max_size=4))
def test_random_entries_with_a_good_checksum(entries: list[bytes]) -> None:
    table = b"".join(entries)
    with pytest.raises(VolumeError):  # 2^-60 that all are K or V within 4 MiB
        decode_table(table, sealed_table(table))


@given(st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 400)), max_size=5))
def test_a_table_is_accepted_exactly_if_it_is_possible(runs: list[tuple[int, int]]) -> None:
    extents = [Extent(first, count) for first, count in runs]
    lbas = [lba for extent in extents for lba in range(extent.first_lba, extent.end_lba)]
    inside = range(GEOMETRY.data_start // LBA, CAPACITY // LBA)
    possible = (
        all(extent.num_lbas for extent in extents)
        and all(lba in inside for lba in lbas)
        and len(lbas) == len(set(lbas))
    )
    records = tuple(records_of(*extents))
    table = encode_table(records)
    try:
        assert decode_table(table, sealed_table(table)) == records
        assert possible
    except VolumeError:
        assert not possible
