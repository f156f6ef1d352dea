# SPDX-License-Identifier: Apache-2.0
"""Checksums of what was written, kept in memory, so that a medium that returns anything else is caught.

One CRC-32C (Castagnoli) a run: one head's part of one block. A lost write, a stale block, a block that
somebody else wrote and a flipped bit all differ from what this process remembers.
"""

from __future__ import annotations

from collections.abc import Callable

from crc32c import crc32c

from dualblade.errors import StorageError
from dualblade.layout import PAGE, Layout
from dualblade.tensors import TensorKey


class Checksums:
    """The checksums of one tensor's blocks. Memory is head-major, [runs, capacity, head_dim]."""

    def __init__(self, key: TensorKey, layout: Layout):
        self._key = key
        self._layout = layout
        self._blocks: list[tuple[int, ...]] = []

    def remember(self, rows: memoryview, head_stride: int, first: int, end: int, origin: int = 0) -> None:
        """Blocks [first, end) are about to be written from `rows`, which begin with block `origin`.

        head_stride: bytes from one head's rows to the next's.
        """
        self._blocks[first:end] = [
            self._block(rows, head_stride, block - origin) for block in range(first, end)
        ]

    def verify(
        self, rows: memoryview, head_stride: int, count: int, lba_of: Callable[[int], int], first: int = 0
    ) -> None:
        """`rows` holds blocks [first, first + count), as they were read. lba_of(block): its byte offset.

        Raises StorageError naming the first block that is not what was written.
        """
        for block in range(first, first + count):
            if self._block(rows, head_stride, block - first) != self._blocks[block]:
                lba = lba_of(block) // PAGE
                raise StorageError(
                    f"block {block} of {self._key} at LBA {lba} is not what was written there: "
                    "its checksum differs",
                    "the drive returned corrupt, stale or foreign data; check it before using it again",
                    tensor=str(self._key),
                    lba=lba,
                )

    def _block(self, rows: memoryview, head_stride: int, block: int) -> tuple[int, ...]:
        run = self._layout.run_bytes
        begins = (head * head_stride + block * run for head in range(self._layout.runs))
        return tuple(crc32c(rows[begin : begin + run]) for begin in begins)
