# SPDX-License-Identifier: Apache-2.0
"""The page-cache path: ordinary buffered files that the kernel keeps in memory while it can."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dualblade.errors import CapacityError, StorageError, TargetError
from dualblade.extents import LBA, Extent, ExtentAllocator, lbas_for
from dualblade.paths.base import Room, StoragePath, Ticket
from dualblade.target_files import check_room
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import format_size
from spdk_glue import (
    WRITE_BACK,
    FileRegion,
    GlueError,
    Piece,
    Queue,
    QueueOptions,
    check_written,
    file_facts,
    on_lost_page,
    plain,
    punch,
)

# Inserting pages is serialised per file, so neighbouring tensors go to different files.
FILES = 4
MOST_WRITTEN_BACK = 1 << 30  # with one command
_FILE_LBAS = 1 << 31  # addresses of a file: 8 TiB, of which only what is used takes space
# Copies out of the page cache are made by worker threads side by side, in pieces of this size.
OPTIONS = QueueOptions(queue_depth=16, command_bytes=1 << 20, workers=True)
LOST_PAGE = """error: KV could not be read again that the kernel had taken from the page cache
hint: its drive failed or its file was cut short (see `dmesg`); --kv-path direct leaves the page cache out
"""


def _open_private(folder: Path) -> int:
    """An unlinked file of this process alone, mode 0600."""
    try:
        return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
            raise
    fd, name = tempfile.mkstemp(prefix="dualblade-", dir=folder)
    os.unlink(name)
    return fd


def _lost_writes(fd: int) -> int:
    """An errno, or 0."""
    try:
        check_written(fd)
    except GlueError as error:
        return error.errno or errno.EIO
    return 0


class PageCachePath(StoragePath):
    """Rooms on a few files in `folder`. Their disk space is allocated up front, so writing pages
    back can never run out of it."""

    kind = PathKind.PAGE_CACHE
    maps = True

    def __init__(self, folder: Path, timeout_s: float = 60.0, options: QueueOptions = OPTIONS):
        self.folder = folder
        self.fds: list[int] = []
        self._lost = 0  # errno
        try:
            for _ in range(FILES):
                self.fds.append(_open_private(folder))
            facts = file_facts(self.fds[0])
            if facts.in_memory:
                raise TargetError(
                    f"{folder} is on {facts.filesystem}, which is memory and no disk",
                    "choose another with --cache-dir",
                )
            queue = Queue.files(self.fds, options)
        except OSError as error:
            self._close_files()
            raise TargetError(
                f"cannot make files in {folder}: {error.strerror}", "choose another with --cache-dir"
            ) from error
        except BaseException:
            self._close_files()
            raise
        super().__init__(queue, timeout_s)
        self._spaces = [ExtentAllocator(0, _FILE_LBAS) for _ in range(FILES)]

    @property
    def target(self) -> str:
        return str(self.folder)

    def reserve(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        """Addresses alone: back() takes the space."""
        rooms = []
        for key, nbytes in wanted:
            file = max(range(FILES), key=lambda number: self._spaces[number].free_lbas)
            extent = self._spaces[file].allocate(lbas_for(nbytes))
            rooms.append(Room(key, self.kind, file, extent.offset, nbytes))
        return rooms

    def write_back(self, key: TensorKey, pieces: Sequence[Piece]) -> list[Ticket]:
        ranges = [
            plain(piece.offset + at, 0, min(MOST_WRITTEN_BACK, piece.span - at), piece.file)
            for piece in pieces
            for at in range(0, piece.span, MOST_WRITTEN_BACK)
        ]
        return [self.transfer(WRITE_BACK, key, ranges)] if ranges else []

    def check_kept(self, key: TensorKey) -> None:
        """The kernel writes pages back when it likes. Where it could not it goes on as if it had, tells so
        once, and reads zeros after it has dropped them: nothing is served from then on."""
        if not self._lost:
            self._lost = next(filter(None, map(_lost_writes, self.fds)), 0)
        if self._lost:
            raise StorageError(
                f"{key} may be lost: KV in the page cache could not be written to the drive of "
                f"{self.folder}: {os.strerror(self._lost)}",
                "the KV cache is incomplete, so generation stopped; check that drive and its free space, or "
                "choose another with --cache-dir",
                errno=self._lost,
                tensor=str(key),
            )

    def map(self, room: Room) -> FileRegion:
        on_lost_page(LOST_PAGE)
        try:
            return FileRegion(self.fds[room.file], room.offset, room.nbytes)
        except OSError as error:
            raise CapacityError(
                f"{format_size(room.nbytes)} of a file in {self.folder} cannot be mapped: {error.strerror}",
                "see `ulimit -v`, or keep all on the drive with --kv-path direct",
            ) from error

    def allocate(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        check_room(self.folder, sum(nbytes for _, nbytes in wanted))
        rooms = self.reserve(wanted)
        sizes = [os.fstat(fd).st_size for fd in self.fds]
        try:
            for room in rooms:
                os.posix_fallocate(self.fds[room.file], room.offset, room.nbytes)
        except OSError as error:
            self.release(rooms)
            for fd, size in zip(self.fds, sizes, strict=True):
                os.ftruncate(fd, size)
            raise self._full(sum(nbytes for _, nbytes in wanted), error) from error
        return rooms

    def back(self, room: Room) -> None:
        check_room(self.folder, room.nbytes)
        try:
            os.posix_fallocate(self.fds[room.file], room.offset, room.nbytes)
        except OSError as error:
            self.drop(room)
            raise self._full(room.nbytes, error) from error

    def drop(self, room: Room) -> bool:
        """Pages and blocks at once; where the filesystem makes no holes, the clean pages alone."""
        try:
            punch(self.fds[room.file], room.offset, room.nbytes)
        except GlueError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            os.posix_fadvise(self.fds[room.file], room.offset, room.nbytes, os.POSIX_FADV_DONTNEED)
        return True

    def _full(self, nbytes: int, error: OSError) -> CapacityError:
        return CapacityError(
            f"{self.folder} has no room for {format_size(nbytes)} of KV files: {error.strerror}",
            "free some space, or choose another folder with --cache-dir",
        )

    def release(self, rooms: Sequence[Room]) -> None:
        """Their space comes back at once, and their addresses are used again."""
        for room in rooms:
            self._spaces[room.file].free(Extent(room.offset // LBA, lbas_for(room.nbytes)))
            self.drop(room)

    def close(self) -> int:
        given_up = self.queue.close()
        self._close_files()
        return given_up

    def _close_files(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
