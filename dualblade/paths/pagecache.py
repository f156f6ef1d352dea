# SPDX-License-Identifier: Apache-2.0
"""The page-cache path: ordinary buffered files that the kernel keeps in memory while it can."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dualblade.errors import CapacityError, TargetError
from dualblade.paths.base import Room, StoragePath
from dualblade.target_files import check_room
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import format_size
from spdk_glue import FileRegion, Queue, QueueOptions, file_facts

# Inserting pages is serialised per file, so neighbouring tensors go to different files.
FILES = 4
# Copies out of the page cache are made by worker threads side by side, in pieces of this size.
OPTIONS = QueueOptions(queue_depth=16, command_bytes=1 << 20, workers=True)


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


class PageCachePath(StoragePath):
    """Rooms on a few files in `folder`. Their disk space is allocated up front, so writing pages
    back can never run out of it."""

    kind = PathKind.PAGE_CACHE

    def __init__(self, folder: Path, timeout_s: float = 60.0, options: QueueOptions = OPTIONS):
        self.folder = folder
        self.fds: list[int] = []
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
        self._sizes = [0] * FILES

    @property
    def target(self) -> str:
        return str(self.folder)

    def allocate(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        sizes = list(self._sizes)
        rooms = []
        for key, nbytes in wanted:
            file = min(range(FILES), key=sizes.__getitem__)
            rooms.append(Room(key, self.kind, file, sizes[file], nbytes))
            sizes[file] += nbytes
        self._reserve(sizes)
        self._sizes = sizes
        return rooms

    def map(self, room: Room) -> FileRegion:
        try:
            return FileRegion(self.fds[room.file], room.offset, room.nbytes)
        except OSError as error:
            raise CapacityError(
                f"{format_size(room.nbytes)} of a file in {self.folder} cannot be mapped: {error.strerror}",
                "see `ulimit -v`, or keep all on the drive with --kv-path direct",
            ) from error

    def _reserve(self, sizes: list[int]) -> None:
        check_room(self.folder, sum(sizes) - sum(self._sizes))
        try:
            for fd, old, new in zip(self.fds, self._sizes, sizes, strict=True):
                if new > old:
                    os.posix_fallocate(fd, old, new - old)
        except OSError as error:
            for fd, old in zip(self.fds, self._sizes, strict=True):
                os.ftruncate(fd, old)
            need = format_size(sum(sizes) - sum(self._sizes))
            raise CapacityError(
                f"{self.folder} has no room for {need} of KV files: {error.strerror}",
                "free some space, or choose another folder with --cache-dir",
            ) from error

    def release(self, rooms: Sequence[Room]) -> None:
        """Space comes back when the last room goes: rooms are taken once a run and freed together."""
        gone = sum(room.nbytes for room in rooms)
        if gone == sum(self._sizes):
            for fd in self.fds:
                os.ftruncate(fd, 0)
            self._sizes = [0] * FILES

    def close(self) -> int:
        given_up = self.queue.close()
        self._close_files()
        return given_up

    def _close_files(self) -> None:
        while self.fds:
            os.close(self.fds.pop())
