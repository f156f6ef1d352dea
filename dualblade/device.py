# SPDX-License-Identifier: Apache-2.0
"""Where attention runs. Below this file a tensor is an address, a shape and strides.

On the CPU there is nothing to copy: attention reads the memory that the engine filled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from spdk_glue import FileRegion, Region


@contextmanager
def leave_a_cpu(needed: bool) -> Iterator[None]:
    """Where a thread of ours polls, attention on every CPU would wait for the one that it shares:
    torch gets a thread less. Nested calls take no second one."""
    before = torch.get_num_threads()
    if not needed or before < max(2, len(os.sched_getaffinity(0))):
        yield
        return
    torch.set_num_threads(before - 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class CpuDevice:
    """Opens region memory as tensors of `dtype`."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self.itemsize = dtype.itemsize

    def open(
        self, region: Region | FileRegion, offset: int, runs: int, capacity: int, head_dim: int
    ) -> torch.Tensor:
        """[runs, capacity, head_dim] over the region's bytes from `offset` on; no copy."""
        count = runs * capacity * head_dim
        flat = torch.frombuffer(region.buffer(), dtype=self.dtype, count=count, offset=offset)
        return flat.view(runs, capacity, head_dim)

    def copy_rows(self, source: torch.Tensor, start: int, out: torch.Tensor, at: int, count: int) -> None:
        """Tokens [start, start + count) of every run of `source` to [at, at + count) of `out`."""
        out[:, at : at + count].copy_(source[:, start : start + count])

    def write_rows(
        self, rows: torch.Tensor, out: torch.Tensor, at: int, start: int = 0, count: int | None = None
    ) -> None:
        """`count` new rows from token `start` on, or all after it, of [batch, KV head, tokens, head_dim] to
        tokens [at, at + count) of `out`."""
        batch, heads, tokens, _ = rows.shape
        count = tokens - start if count is None else count
        target = out.view(-1, heads, *out.shape[1:])[:batch]
        target[:, :, at : at + count].copy_(rows[:, :, start : start + count])

    def rows(self, view: torch.Tensor, batch: int, heads: int, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens of the first `batch` sequences, [batch, KV head, tokens, head_dim];
        strided, no copy."""
        return view.view(-1, heads, *view.shape[1:])[:batch, :, :tokens]

    def select(self, view: torch.Tensor, batch: int, chosen: torch.Tensor, tokens: int) -> None:
        """Sequence b of `batch` becomes what sequence chosen[b] was, in place, a head at a time."""
        rows = view.view(batch, -1, *view.shape[1:])[:, :, :tokens]
        for head in range(rows.shape[1]):
            rows[: len(chosen), head] = rows[:, head].index_select(0, chosen)
