# SPDX-License-Identifier: Apache-2.0
"""Reads and writes a volume's metadata copies: blocking transfers, and what was found."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualblade.errors import StorageError, VolumeError
from dualblade.extents import LBA
from dualblade.superblock import (
    ENTRY_BYTES,
    Geometry,
    Record,
    Superblock,
    VersionError,
    decode_superblock,
    decode_table,
    has_magic,
)
from dualblade.units import round_up
from spdk_glue import READ, WRITE, GlueError, Queue, Region, TransferError, plain


@dataclass(frozen=True, slots=True)
class Copy:
    """One metadata copy as it is on the medium. damage: None where it is valid or empty."""

    number: int
    superblock: Superblock | None = None
    records: tuple[Record, ...] = ()
    damage: str | None = None

    @property
    def generation(self) -> int | None:
        return self.superblock.generation if self.superblock else None

    @property
    def state(self) -> str:
        if self.damage:
            return f"damaged: {self.damage}"
        return f"valid, generation {self.generation}" if self.superblock else "empty"


@dataclass(frozen=True, slots=True)
class Medium:
    """Blocking transfers of whole LBAs. All raise StorageError."""

    queue: Queue
    timeout: float

    def read(self, offset: int, nbytes: int) -> bytes:
        with _Transfer(self, offset, nbytes) as region:
            self.queue.run(READ, [plain(offset, region.address, nbytes)], self.timeout)
            return bytes(region.buffer(0, nbytes))

    def write(self, offset: int, data: bytes) -> None:
        nbytes = round_up(len(data), LBA)
        with _Transfer(self, offset, nbytes) as region:
            region.buffer(0, nbytes)[:] = data.ljust(nbytes, b"\0")
            self.queue.run(WRITE, [plain(offset, region.address, nbytes)], self.timeout)

    def flush(self) -> None:
        try:
            self.queue.flush(self.timeout)
        except GlueError as error:
            raise _storage_error("flush the volume's metadata", 0, error) from error


@dataclass(slots=True)
class _Transfer:
    """The memory of one transfer. Unless the medium has answered it is never given back."""

    medium: Medium
    offset: int
    nbytes: int
    region: Region = field(init=False)

    def __enter__(self) -> Region:
        self.region = Region(self.nbytes, best="thp", of_env=self.medium.queue.needs_env_memory)
        return self.region

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is None or (isinstance(error, TransferError) and not error.completion.memory_at_risk):
            self.region.close()
        else:
            self.region.abandon()
        if isinstance(error, GlueError):
            raise _storage_error("move the volume's metadata", self.offset, error) from error


def _storage_error(doing: str, offset: int, error: GlueError) -> StorageError:
    number = error.errno or errno.EIO
    if not isinstance(error, TransferError):
        return StorageError(f"cannot {doing}: {error.strerror}", errno=number, lba=offset // LBA)
    record = error.completion
    where = record.offset // LBA
    message = f"cannot {doing}: {error.strerror}"
    return StorageError(message, errno=number, lba=where, sct=record.sct, sc=record.sc)


def read_copy(medium: Medium, capacity: int, number: int) -> Copy:
    """Raises StorageError; VersionError and VolumeError where the volume is whole but not usable."""
    raw = medium.read(Geometry(capacity).superblock_offset(number), LBA)
    if not has_magic(raw):
        return Copy(number)
    try:
        superblock = decode_superblock(raw)
        if superblock.copy != number:
            raise VolumeError(f"it is copy {superblock.copy} in the place of copy {number}")
    except VersionError:
        raise
    except VolumeError as error:
        return Copy(number, damage=error.message)
    _check_not_truncated(superblock.geometry.capacity, capacity)
    return _with_table(medium, superblock)


def _check_not_truncated(recorded: int, capacity: int) -> None:
    if recorded > capacity:
        raise VolumeError(
            f"the volume was made on {recorded} bytes, but the target holds only {capacity}: it was cut off",
            "make the target as large as it was, or make a new volume on it",
        )


def _with_table(medium: Medium, superblock: Superblock) -> Copy:
    nbytes = round_up(superblock.entries * ENTRY_BYTES, LBA)
    try:
        table = medium.read(superblock.geometry.table_offset(superblock.copy), nbytes) if nbytes else b""
        return Copy(superblock.copy, superblock, decode_table(table, superblock))
    except VolumeError as error:
        return Copy(superblock.copy, superblock, damage=error.message)


def newest_of(copies: Sequence[Copy], name: str) -> Superblock:
    """Raises VolumeError where no copy is valid."""
    valid = [copy.superblock for copy in copies if copy.superblock and not copy.damage]
    if valid:
        return max(valid, key=lambda superblock: superblock.generation)
    if any(copy.damage for copy in copies):
        states = "; ".join(f"copy {copy.number} {copy.state}" for copy in copies)
        raise VolumeError(
            f"both copies of the volume's metadata are damaged ({states})",
            f"if nothing on it is needed: dualblade-spdk volume create {name}",
        )
    raise VolumeError(
        f"{name} holds no volume of ours (no superblock)", f"dualblade-spdk volume create {name}"
    )
