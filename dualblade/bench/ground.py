# SPDX-License-Identifier: Apache-2.0
"""Where a sweep's bytes lie: a target that was written once with random bytes, and what its drive can do."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dualblade.extents import Extent
from dualblade.superblock import capacity_for
from dualblade.target_files import check_room, make_cache_dir
from dualblade.targets import OpenTarget, open_target, open_volume
from dualblade.tensors import TensorKey
from dualblade.units import GIB, MIB, format_size
from spdk_glue import PAGE, READ, WRITE, QueueOptions, Region, plain

BUFFER = 64 * MIB
AHEAD = 4  # transfers submitted at a time, each a part of the buffer
OPTIONS = QueueOptions(queue_depth=32, command_bytes=MIB)


@dataclass(frozen=True, slots=True)
class DriveLimit:
    """Sequential, 1 MiB commands at depth 32, in GiB/s."""

    read: float
    write: float


@contextmanager
def prepared_target(
    folder: Path, nvme: str | None, nbytes: int, extents: int, say: Callable[[str], None]
) -> Iterator[str]:
    """A TARGET with room for `nbytes` in that many extents: `nvme` as it is, or a file in `folder` for as
    long as this lasts, every byte of which was written: what a drive never stored it need not read.

    Raises TargetError, CapacityError, VolumeError, StorageError.
    """
    make_cache_dir(folder)
    if nvme is not None:
        yield nvme
        return
    check_room(folder, 2 * nbytes)  # the other half: files of the baselines that have their own
    path = folder / f"sweep-{secrets.token_hex(4)}.kv"
    try:
        say(f"writing {format_size(nbytes)} of random bytes to {path}")
        capacity = capacity_for(nbytes, extents)
        with (
            open_target(str(path), capacity=capacity, cache_dir=folder, options=OPTIONS) as target,
            _extent(target, nbytes) as extent,
            _random_buffer(target) as region,
        ):
            _pass(target, region, WRITE, extent)
        yield str(path)
    finally:
        path.unlink(missing_ok=True)


def mean_limit(*limits: DriveLimit) -> DriveLimit:
    """Of several measurements."""
    return DriveLimit(fmean(each.read for each in limits), fmean(each.write for each in limits))


def measure_limit(folder: Path, nvme: str, nbytes: int) -> DriveLimit:
    """Of one pass over `nbytes` of the target, written with random bytes before they are read.

    Raises TargetError, CapacityError, VolumeError, StorageError.
    """
    with _passes(folder, nvme, nbytes) as one_pass:
        write = one_pass(WRITE)
        return DriveLimit(one_pass(READ), write)


def measure_reading(folder: Path, nvme: str, nbytes: int) -> float:
    """GiB/s of one pass over a target that was prepared for so many bytes, and holds nothing.

    Raises TargetError, CapacityError, VolumeError, StorageError.
    """
    with _passes(folder, nvme, nbytes) as one_pass:
        return one_pass(READ)


@contextmanager
def _passes(folder: Path, nvme: str, nbytes: int) -> Iterator[Callable[[int], float]]:
    with (
        open_target(
            nvme, capacity=None, cache_dir=folder, options=OPTIONS, create=False, memory=BUFFER
        ) as target,
        _extent(target, nbytes) as extent,
        _random_buffer(target) as region,
    ):
        target.queue.register(region)
        yield lambda op: _pass(target, region, op, extent)
        target.queue.unregister(region)


@contextmanager
def _extent(target: OpenTarget, nbytes: int) -> Iterator[Extent]:
    volume = open_volume(target)
    extent = volume.allocate(TensorKey(0, "K"), nbytes // MIB * MIB)
    try:
        yield extent
    finally:
        volume.free([extent])


@contextmanager
def _random_buffer(target: OpenTarget) -> Iterator[Region]:
    region = Region(BUFFER, of_env=target.queue.needs_env_memory)
    region.buffer()[:] = os.urandom(BUFFER)
    try:
        yield region
    finally:
        region.close()


def _pass(target: OpenTarget, region: Region, op: int, extent: Extent) -> float:
    """GiB/s of one sequential pass."""
    step = BUFFER // AHEAD
    tags: list[int] = []
    begun = time.perf_counter()
    for number, at in enumerate(range(0, extent.nbytes, step)):
        if len(tags) == AHEAD:
            target.queue.wait(tags.pop(0))
        part = min(step, extent.nbytes - at) // PAGE * PAGE
        piece = plain(extent.offset + at, region.address + number % AHEAD * step, part)
        tags.append(target.queue.submit(op, [piece]))
    for tag in tags:
        target.queue.wait(tag)
    return extent.nbytes / GIB / (time.perf_counter() - begun)
