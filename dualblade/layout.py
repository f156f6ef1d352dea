# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a KV tensor lie. Pure arithmetic.

A block is the fewest tokens that are written at once: [batch x KV head, tokens, head_dim], of each head
whole 4 KiB pages. On the medium the blocks of a group lie head by head,
[batch x KV head, group's tokens, head_dim], so that a head's run is long enough to be read at the drive's
speed, and the rest that waits in memory to become a block is small all the same. In memory a slot is
head-major too, [batch x KV head, capacity, head_dim], and attention reads it as it is. A group is what a slot
holds, so that a whole one is one sequential range of the medium and of memory; what is not whole is read and
written a run a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import gcd

from dualblade.tensors import TensorSpec
from dualblade.units import KIB, MIB

PAGE = 4 * KIB
# Measured on a virtual drive, 1 MiB commands at depth 32, as a share of contiguous memory:
# runs of 4 KiB 0.41, 16 KiB 0.73, 64 KiB 0.95, 128 KiB 1.05, 256 KiB 1.06. Beside attention on all CPUs even
# those of 128 KiB are slower than contiguous memory: 0.89 of the drive's limit, and 0.94.
BEST_RUN = 128 * KIB
# Copied into the page cache at once: a quarter less CPU than runs of 128 KiB, beside attention on all CPUs.
BEST_COPY = 512 * KIB
# A command takes that drive as long as 24 to 28 KiB more of a longer one (80 to 512 KiB, 32 MiB in flight).
# So what is missing of a group is read with it, unless it is more than this of a head, or than that part.
READ_THROUGH, READ_THROUGH_PART = 16 * KIB, 8
# Moved between the paths in a few milliseconds, the most that a reader waits behind it. More where there is
# much KV: its reading queues behind that of whole layers, so only few chunks move for a token.
CHUNK, LARGEST_CHUNK = 4 * MIB, 16 * MIB
CHUNK_PART = 128  # of the KV
# Shorter blocks cost more commands and checksums than what their rest in memory is worth; and that, which
# rounds a tensor up too, is at most such a part of the tensor.
BEST_BLOCK = 16 * KIB
TAIL_PART = 256


@dataclass(frozen=True, slots=True)
class Layout:
    """How one tensor is cut. block_tokens: tokens in a block; run_bytes: one head's part of it;
    block_bytes: the whole block on the medium; runs: batch x KV heads; group: blocks of a group, fewer where
    there are no more."""

    runs: int
    row_bytes: int
    block_tokens: int
    group: int = 1

    @property
    def run_bytes(self) -> int:
        return self.block_tokens * self.row_bytes

    @property
    def group_run_bytes(self) -> int:
        """What lies together of one head on the medium."""
        return self.group * self.run_bytes

    def written_together(self, best_run: int, parts: int) -> int:
        """Blocks of a prompt that are written at once: `best_run` bytes a head of a group that has as many as
        `parts` of them, or all of it."""
        best = max(1, best_run // self.run_bytes)
        return best if self.group >= parts * best else self.group

    @property
    def block_bytes(self) -> int:
        return self.runs * self.run_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens`, the last one perhaps in part."""
        return -(-tokens // self.block_tokens)

    def full_blocks(self, tokens: int) -> int:
        return tokens // self.block_tokens

    def bytes_for(self, tokens: int) -> int:
        return self.blocks_for(tokens) * self.block_bytes

    def capacity_for(self, tokens: int) -> int:
        """Tokens of a slot that holds `tokens`: whole blocks, so a block never crosses its end."""
        return self.blocks_for(tokens) * self.block_tokens

    def slot_bytes(self, capacity: int) -> int:
        return self.runs * capacity * self.row_bytes

    def for_slots(self, capacity: int) -> Layout:
        """In groups of what a slot of `capacity` tokens holds."""
        return replace(self, group=max(1, capacity // self.block_tokens))


def smallest_block(row_bytes: int) -> int:
    """The fewest tokens whose run is whole pages."""
    return PAGE // gcd(PAGE, row_bytes)


def choose_layout(spec: TensorSpec, tail_bytes: int | None = None) -> Layout:
    """The longest block up to BEST_BLOCK a head whose unfinished one, which stays in memory, takes at most
    `tail_bytes` and at most a TAIL_PART of the tensor. All of it is one group, of BEST_RUN a head at
    least: it may come to be longer."""
    block = smallest_block(spec.row_bytes)
    while (
        2 * block * spec.row_bytes <= BEST_BLOCK
        and 2 * block * TAIL_PART <= spec.tokens
        and (tail_bytes is None or 2 * block * spec.token_bytes <= tail_bytes)
    ):
        block *= 2
    group = max(-(-spec.tokens // block), BEST_RUN // (block * spec.row_bytes), 1)
    return Layout(spec.runs, spec.row_bytes, block, group)


def chunk_bytes(block_bytes: Iterable[int], total: int) -> int:
    """Memory that blocks change paths through: whole ones, one at least. total: bytes of all KV."""
    chunk = max(CHUNK, min(LARGEST_CHUNK, total // CHUNK_PART))
    return max((max(1, chunk // size) * size for size in block_bytes), default=0)
