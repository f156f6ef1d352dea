# SPDX-License-Identifier: Apache-2.0
"""Tensors that the page cache holds, read where they are: attention reads the mapping of the file.

In its file such a tensor is head-major, [batch x KV head, capacity, head_dim], as it is in a slot. While all
of it lies there, nothing is copied in either direction, and the rows of the unfinished block are there too;
when blocks of it leave, the rest is copied from there to a slot, as from any other room.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from dualblade.kv_tensor import Mapped, Segment, Tensor
from dualblade.paths.base import Room, StoragePath
from dualblade.staging import Slot
from dualblade.tensors import PathKind
from dualblade.units import KIB
from spdk_glue import READ, FileRegion, Region

CACHE = PathKind.PAGE_CACHE
LEAST_STAGED = 16 * KIB  # of a head: so many first rows are written by the engine (see KVStore)


class Device(Protocol):
    """What is asked of a device (see device.py)."""

    def open(
        self, region: Region | FileRegion, offset: int, runs: int, capacity: int, head_dim: int
    ) -> Any: ...
    def copy_rows(self, source: Any, start: int, out: Any, at: int, count: int) -> None: ...


class InPlace:
    """Maps tensors and unmaps them. used: False where none is to be read in place."""

    def __init__(self, device: Device, paths: Mapping[PathKind, StoragePath], used: bool):
        self._device = device
        self._paths = paths
        self._used = used

    def segment(self, tensor: Tensor, first: int, blocks: int, room: Room) -> Segment:
        """Blocks in a room that was just taken; head-major where it holds the tensor as a whole."""
        whole = first == 0 and blocks == tensor.whole_blocks
        maps = self._used and room.path is CACHE and self._paths[CACHE].maps
        return tensor.segment(first, blocks, room, blocks if whole and maps else None)

    def place_part(self, tensor: Tensor, blocks: int) -> bool:
        """The first blocks of a tensor that is cached in part go to a room for all of it, head-major: when
        the rest has come it can be read in place. False where it could not be. Raises CapacityError."""
        path, whole = self._paths[CACHE], tensor.whole_blocks
        if not (self._used and path.maps and not tensor.segments and 0 < blocks < whole):
            return False
        room = path.reserve([(tensor.spec.key, whole * tensor.layout.block_bytes)])[0]
        home = tensor.segment(0, whole, room, whole)
        part = replace(home, blocks=blocks)
        for used in part.rooms(tensor.layout):
            path.back(used)
        tensor.segments = [part]
        tensor.add_home(home)
        return True

    def map(self, tensor: Tensor) -> None:
        """Read it in place from now on, if all of it lies in one head-major room. Raises CapacityError."""
        if tensor.mapped or len(tensor.segments) != 1:
            return
        segment, spec = tensor.segments[0], tensor.spec
        path, blocks = self._paths[segment.room.path], tensor.whole_blocks
        head_major = (
            segment.group == segment.blocks == blocks and segment.room_blocks(tensor.layout) == blocks
        )
        capacity = blocks * tensor.layout.block_tokens
        if not (self._used and path.maps and head_major) or tensor.tokens > capacity:
            return  # beyond what was foreseen an unfinished block has no room yet
        region = path.map(segment.room)
        slot = Slot(region.address, 0)
        slot.owner = spec.key
        slot.view = self._device.open(region, 0, spec.runs, capacity, spec.head_dim)
        begin = tensor.full * tensor.layout.block_tokens
        if tensor.tokens > begin:
            self._device.copy_rows(tensor.tail, 0, slot.view, begin, tensor.tokens - begin)
        tensor.mapped = Mapped(path, region, slot, capacity)

    def unmap(self, tensor: Tensor) -> None:
        """It is copied from now on. Nobody may be reading it."""
        mapped, tensor.mapped = tensor.mapped, None
        if mapped is None:
            return
        begin = tensor.full * tensor.layout.block_tokens
        if tensor.tokens > begin:
            self._device.copy_rows(mapped.slot.view, begin, tensor.tail, 0, tensor.tokens - begin)
        mapped.close()


def take_pages(tensors: Iterable[Tensor]) -> None:
    """The pages of what is read in place, and the page tables, before anything lies there: by all CPUs at
    once, and not while a prompt wants these. A virtual machine's pages may have to come from its host first,
    which takes ten times as long as to fill them."""
    regions = [tensor.mapped.region for tensor in tensors if tensor.mapped]
    if not regions:
        return
    pool = ThreadPoolExecutor(min(len(regions), len(os.sched_getaffinity(0))))
    try:
        list(pool.map(_take, regions))
    finally:
        pool.shutdown(cancel_futures=True)


def _take(region: FileRegion) -> None:
    with suppress(OSError):  # what cannot be had now fails with an error when rows are written
        region.prefault()


def populate(tensor: Tensor, mapped: Mapped) -> None:
    """What the kernel took from the page cache is read in again here, where that can fail with an error: a
    touch would end the process. Raises StorageError."""
    try:
        mapped.missed = mapped.region.populate(*_rows(tensor, mapped)) > 0
    except OSError as error:
        raise mapped.path.error_of(tensor.spec.key, READ, error) from error
    mapped.path.check_kept(tensor.spec.key)
    mapped.path.in_place_read += tensor.tokens * tensor.spec.token_bytes


def read_ahead(tensor: Tensor, mapped: Mapped) -> None:
    """Before its layer is computed, where pages were missing the last time."""
    if mapped.missed and tensor.tokens:
        with suppress(OSError):  # which populate() will meet again
            mapped.region.read_ahead(*_rows(tensor, mapped))


def _rows(tensor: Tensor, mapped: Mapped) -> tuple[int, int, int]:
    """Bytes of each head's rows, from one head to the next, and how many."""
    row = tensor.layout.row_bytes
    return tensor.tokens * row, mapped.capacity * row, tensor.spec.runs
