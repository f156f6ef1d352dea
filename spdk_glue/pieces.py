# SPDX-License-Identifier: Apache-2.0
"""What a transfer moves: strided parts of memory."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """A strided part of a transfer, all in bytes.

    On the medium: contiguous from `offset`, block after block, in a block head after head, each
    run `run_bytes` long; or, with a `medium_stride`, the runs of one block that far apart. In memory run
    (block b, head h) begins at address + b * block_stride + h * head_stride.
    """

    offset: int
    address: int
    head_stride: int
    block_stride: int
    run_bytes: int
    heads: int = 1
    blocks: int = 1
    file: int = 0
    medium_stride: int = 0

    @property
    def nbytes(self) -> int:
        return self.run_bytes * self.heads * self.blocks

    @property
    def span(self) -> int:
        """From its first byte on the medium to behind its last one."""
        apart = (self.heads - 1) * self.medium_stride
        return apart + self.run_bytes if self.medium_stride else self.nbytes


def plain(offset: int, address: int, nbytes: int, file: int = 0) -> Piece:
    """One contiguous buffer."""
    return Piece(offset, address, 0, 0, nbytes, 1, 1, file)
