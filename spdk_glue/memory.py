# SPDX-License-Identifier: Apache-2.0
"""Memory that engines read into: hugepages where there are any, else aligned ordinary memory."""

from __future__ import annotations

import mmap
import os
from typing import Any

from spdk_glue._ffi import ffi, lib
from spdk_glue.errors import check

PAGE = 4096
HUGEPAGE = 2 << 20
_KINDS = ("plain", "thp", "hugetlb")  # as glue_api.h numbers them


class _Free:
    """Gives memory back, in the process that took it alone."""

    def __init__(self, size: int, of_env: bool):
        self._size = size
        self._of_env = of_env
        self._pid = os.getpid()

    def __call__(self, pointer: Any) -> None:
        if os.getpid() != self._pid:
            return
        if self._of_env:
            lib.glue_env_free(pointer)
        else:
            lib.glue_memory_free(pointer, self._size)


class Region:
    """`size` bytes in whole pages of 4 KiB, zero at first, aligned to 2 MiB. held: bytes that the
    process pays for, whole hugepages where it got them.

    kind: "hugetlb" (reserved hugepages), "thp" (the kernel may use transparent hugepages), "plain" (pages
    of 4 KiB, so that no more is taken than is touched), or "spdk", the environment's, which a controller
    can reach. best: the first of these three that is tried. of_env: take it from the environment.
    Raises GlueError (ENOMEM) where there is no memory.
    """

    def __init__(self, size: int, best: str = "hugetlb", of_env: bool = False):
        c_size, c_kind, c_error = ffi.new("uint64_t *", size), ffi.new("int *"), ffi.new("int *")
        self.size = -(-size // PAGE) * PAGE
        if of_env:
            pointer = lib.glue_env_alloc(self.size, c_error)
            c_size[0] = self.size
        else:
            pointer = lib.glue_memory_alloc(c_size, _KINDS.index(best), c_kind, c_error)
        check(c_error[0], f"allocate {size} bytes" + " of SPDK's memory" * of_env)
        self.held = int(c_size[0])
        self.address = int(ffi.cast("uintptr_t", pointer))
        self.kind = "spdk" if of_env else _KINDS[c_kind[0]]
        self._owner: Any = ffi.gc(pointer, _Free(self.held, of_env))
        self._buffer: Any = memoryview(ffi.buffer(self._owner, self.size))

    def buffer(self, offset: int = 0, size: int | None = None) -> memoryview:
        """A writable view of part of the region. It keeps the memory alive."""
        end = self.size if size is None else offset + size
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"bytes {offset} to {end} are not in a region of {self.size}")
        return self._buffer[offset:end]

    @property
    def resident(self) -> int:
        """Bytes that are in memory now: a page comes with its first touch. Raises GlueError."""
        owner = self._owner  # so that another thread's close() does not take it meanwhile
        if owner is None:
            return 0
        return check(lib.glue_resident(int(ffi.cast("uintptr_t", owner)), self.size), "look for memory")

    def close(self) -> None:
        """The memory goes back when the last view of it is gone."""
        self._owner = self._buffer = None
        self.address = 0

    def abandon(self) -> None:
        """Never give the memory back: a transfer that was given up may still write to it."""
        if self._owner is not None:
            ffi.gc(self._owner, None)
        self.close()

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{self.size} bytes, {self.kind}" if self.address else "closed"
        return f"<Region {state}>"


def on_lost_page(text: str) -> None:
    """What stderr gets before the process ends with 1 when a page of a FileRegion was taken away and cannot
    be read again at the moment of a touch. Without it the process ends by SIGBUS and says nothing; one that
    has a handler of its own keeps it. The first text stays. Raises GlueError (EINVAL) over 512 bytes."""
    check(lib.glue_on_lost_page(text.encode()), "keep a text for lost pages")


class FileRegion:
    """`size` bytes of an open file from `offset` on, as memory that is the page cache itself: whole pages of
    4 KiB. The file may be closed meanwhile. Raises OSError."""

    def __init__(self, fd: int, offset: int, size: int):
        self._map: Any = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self._buffer: Any = memoryview(self._map)
        self.size = size
        self.address = int(ffi.cast("uintptr_t", ffi.from_buffer(self._map)))

    def buffer(self, offset: int = 0, size: int | None = None) -> memoryview:
        """A writable view of part of the region. It keeps the memory alive."""
        end = self.size if size is None else offset + size
        if not 0 <= offset <= end <= self.size:
            raise ValueError(f"bytes {offset} to {end} are not in a region of {self.size}")
        view: memoryview = self._buffer[offset:end]
        return view

    def populate(self, nbytes: int, stride: int, runs: int) -> int:
        """Read in what is missing of `runs` ranges, each `nbytes` long, `stride` apart: how many bytes that
        were, with what lies between ranges that are at most 64 KiB apart. Afterwards no touch of them waits
        for the drive, or fails. Raises GlueError (EIO)."""
        missing = lib.glue_populate(self.address, nbytes, stride, runs)
        return int(check(missing, "read mapped memory in"))

    def read_ahead(self, nbytes: int, stride: int, runs: int) -> None:
        """populate() will find this much done: its reads are started."""
        check(lib.glue_read_ahead(self.address, nbytes, stride, runs), "read mapped memory ahead")

    def prefault(self) -> None:
        """All of it comes into memory, and a touch will take no page fault. Raises GlueError."""
        check(lib.glue_prefault(self.address, self.size), "map memory in")

    def close(self) -> None:
        """The memory goes back when the last view of it is gone."""
        self._buffer = self._map = None
        self.address = 0

    def __repr__(self) -> str:
        return f"<FileRegion {self.size} bytes>" if self.address else "<FileRegion closed>"
