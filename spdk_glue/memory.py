# SPDX-License-Identifier: Apache-2.0
"""Memory that engines read into: hugepages where there are any, else aligned ordinary memory."""

from __future__ import annotations

import os
from typing import Any

from spdk_glue._ffi import ffi, lib
from spdk_glue.errors import check

PAGE = 4096


class Region:
    """`size` bytes, zero at first, aligned to 2 MiB where they come from the page allocator.

    kind: "hugetlb" (reserved hugepages), "thp" (the kernel may use transparent hugepages) or
    "plain". Raises GlueError (ENOMEM) where there is no memory.
    """

    def __init__(self, size: int, hugepages: bool = True):
        self._pid = os.getpid()
        self.address = 0
        c_size, c_kind, c_error = ffi.new("uint64_t *", size), ffi.new("int *"), ffi.new("int *")
        pointer = lib.glue_memory_alloc(c_size, int(hugepages), c_kind, c_error)
        check(c_error[0], f"allocate {size} bytes")
        self._pointer = pointer
        self.address = int(ffi.cast("uintptr_t", pointer))
        self.size = int(c_size[0])
        self.kind = ("plain", "thp", "hugetlb")[c_kind[0]]

    def buffer(self, offset: int = 0, size: int | None = None) -> Any:
        """A writable buffer over part of the region. It is valid until close()."""
        size = self.size - offset if size is None else size
        return ffi.buffer(self._pointer + offset, size)

    def close(self) -> None:
        if self.address and os.getpid() == self._pid:
            lib.glue_memory_free(self._pointer, self.size)
        self.address = 0

    def abandon(self) -> None:
        """Never give the memory back: a transfer that was given up may still write to it."""
        self.address = 0

    def __enter__(self) -> Region:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{self.size} bytes, {self.kind}" if self.address else "closed"
        return f"<Region {state}>"
