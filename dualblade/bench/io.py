# SPDX-License-Identifier: Apache-2.0
"""`bench io`: the engine beside fio, and the store beside the engine, interleaved in one run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dualblade.bench.fio import fio_path, run_fio
from dualblade.bench.tensors import RawPath, kv_store
from dualblade.device import CpuDevice
from dualblade.errors import CapacityError, UsageError
from dualblade.integrity import Checksums
from dualblade.paths.pagecache import PageCachePath
from dualblade.store import KVStore
from dualblade.target_files import check_room, make_cache_dir
from dualblade.targets import TargetKind, find_target, open_target, open_volume
from dualblade.tensors import TensorKey
from dualblade.units import GIB, MIB
from spdk_glue import PAGE, READ, WRITE, Queue, QueueOptions, Region, plain

TENSOR_BYTES = 128 * MIB  # one K or V of a Llama-3-8B layer at 64K tokens
Reference = Callable[[str], float]


@dataclass(frozen=True, slots=True)
class IoBench:
    """size: bytes that are measured in, a multiple of 128 MiB. rounds: times each measurement is repeated.
    nvme: a TARGET of the kernel's with a volume of ours; None for a file that is made in `folder`."""

    folder: Path
    size: int = GIB
    queue_depth: int = 32
    command_bytes: int = MIB
    rounds: int = 5
    nvme: str | None = None

    @property
    def options(self) -> QueueOptions:
        return QueueOptions(self.queue_depth, self.command_bytes)


class Ground(NamedTuple):
    """Random bytes to measure on: `path`, open with O_DIRECT as `fd`, from `start` on."""

    path: Path
    fd: int
    start: int = 0


def run_io_bench(bench: IoBench, say: Callable[[str], None]) -> dict[str, Any]:
    """The record of `bench io --json`: medians in GiB/s, ratios, and every single round."""
    with (
        _ground(bench, say) as ground,
        Queue.files([ground.fd], bench.options) as queue,
        Queue.files([ground.fd], bench.options, engine="posix") as posix,
    ):
        with Region(TENSOR_BYTES) as region:
            _touch(region)
            registered = queue.register(region)
            fio = _reference(bench, ground, queue, registered == region.size, say)
            rounds = []
            for number in range(bench.rounds):
                say(f"round {number + 1} of {bench.rounds}")
                rounds.append(_one_round(bench, queue, posix, region, fio, ground.start))
            queue.unregister(region)
        stats, engine, reason = queue.stats(), queue.engine, queue.reason
    rounds = [made | {"page_cache": cached} for made, cached in zip(rounds, _page_cache(bench), strict=True)]
    record = {
        "target": bench.nvme or str(bench.folder),
        "engine": engine,
        "reason": reason,
        "size_bytes": bench.size,
        "queue_depth": bench.queue_depth,
        "command_bytes": bench.command_bytes,
        "rounds": bench.rounds,
        "registered_bytes": registered,
        "max_in_flight": stats.max_in_flight,
    }
    return record | _summary(rounds) | {"software": software_cost(bench.options), "measured": rounds}


def drive_limit(bench: IoBench) -> float:
    """GiB/s of the engine reading sequentially, the better of two passes."""
    with (
        random_file(bench.folder, bench.size, lambda text: None) as (_, fd),
        Queue.files([fd], bench.options) as queue,
        Region(TENSOR_BYTES) as region,
    ):
        _touch(region)
        queue.register(region)
        speed = max(_engine(bench, queue, region, READ) for _ in range(2))
        queue.unregister(region)
    return speed


@contextmanager
def random_file(folder: Path, size: int, say: Callable[[str], None]) -> Iterator[tuple[Path, int]]:
    """A file of `size` bytes and its descriptor (O_DIRECT), written once with random bytes: holes and zeros
    would prove nothing. Raises CapacityError."""
    make_cache_dir(folder)
    check_room(folder, size)
    handle, name = tempfile.mkstemp(prefix="bench-io-", dir=folder)
    try:
        say(f"writing {size // MIB} MiB of random bytes to {name}")
        with os.fdopen(handle, "wb", buffering=0) as out:
            os.posix_fallocate(out.fileno(), 0, size)
            for at in range(0, size, 16 * MIB):
                out.write(os.urandom(min(16 * MIB, size - at)))
            os.fsync(out.fileno())
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        fd = os.open(name, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            yield Path(name), fd
        finally:
            os.close(fd)
    except OSError as error:
        raise CapacityError(
            f"the benchmark file cannot be made: {error.strerror}", "try --cache-dir"
        ) from error
    finally:
        os.unlink(name)


@contextmanager
def _ground(bench: IoBench, say: Callable[[str], None]) -> Iterator[Ground]:
    """Raises TargetError, VolumeError, CapacityError."""
    if bench.nvme is None:
        with random_file(bench.folder, bench.size, say) as (path, fd):
            yield Ground(path, fd)
        return
    target = find_target(bench.nvme)
    if target.kind not in (TargetKind.FILE, TargetKind.BLOCK):
        raise UsageError(f"{bench.nvme!r} is no drive to measure", "name a block device, or leave --nvme out")
    make_cache_dir(bench.folder)
    with open_target(target, capacity=None, cache_dir=bench.folder, create=False) as opened:
        assert opened.path is not None
        volume = open_volume(opened)
        extent = volume.allocate(TensorKey(0, "K"), bench.size)
        say(f"writing {bench.size // MIB} MiB of random bytes to an extent of {opened.name}")
        _write_random(opened.queue, [(extent.offset, extent.nbytes, 0)])
        fd = os.open(opened.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        try:
            yield Ground(opened.path, fd, extent.offset)
        finally:
            os.close(fd)
            volume.free([extent])


def _reference(
    bench: IoBench, ground: Ground, queue: Queue, fixed: bool, say: Callable[[str], None]
) -> Reference | None:
    """GiB/s of fio, by "read" or "write", as the engine drives the file: with registered buffers only where
    the engine could register its own."""
    if not fio_path():
        return None
    if queue.engine != "uring":
        say("no io_uring here, so fio is no reference and left out")
        return None
    return lambda rw: run_fio(
        ground.path, rw, bench.size, bench.command_bytes, bench.queue_depth, fixed, ground.start
    )


def _one_round(
    bench: IoBench, queue: Queue, posix: Queue, region: Region, fio: Reference | None, start: int
) -> dict[str, float]:
    speeds = {
        "engine_read": _engine(bench, queue, region, READ, start),
        "posix_read": _engine(bench, posix, region, READ, start),
        "tensor_engine": _engine(bench, queue, region, READ, start, ahead=1),
        "tensor_store": _store(bench, queue, start),
        "tensor_checksum": _store(bench, queue, start, checksum=True),
    }
    if fio:
        speeds["fio_read"] = fio("read")
    speeds["engine_write"] = _engine(bench, queue, region, WRITE, start)
    if fio:
        speeds["fio_write"] = fio("write")
    return speeds


def _engine(bench: IoBench, queue: Queue, region: Region, op: int, start: int = 0, ahead: int = 4) -> float:
    """GiB/s of one sequential pass, `ahead` transfers submitted at a time."""
    step = TENSOR_BYTES if ahead == 1 else TENSOR_BYTES // ahead
    begun = time.perf_counter()
    tags: list[int] = []
    for offset in range(0, bench.size, step):
        if len(tags) == ahead:
            queue.wait(tags.pop(0))
        tags.append(queue.submit(op, [plain(start + offset, region.address + offset % TENSOR_BYTES, step)]))
    for tag in tags:
        queue.wait(tag)
    return bench.size / GIB / (time.perf_counter() - begun)


def _store(bench: IoBench, queue: Queue, start: int, checksum: bool = False) -> float:
    """GiB/s of loading whole 128 MiB tensors one after the other through the store."""
    layers = bench.size // TENSOR_BYTES // 2
    path = RawPath(queue, start)
    return load_speed(kv_store(queue, CpuDevice(torch.bfloat16), layers, path=path), checksum)


def load_speed(store: KVStore, checksum: bool = False) -> float:
    """GiB/s of loading every tensor once. Closes the store."""
    _touch(store.pool.region)
    if checksum:
        _remember(store)
    begun = time.perf_counter()
    for key in store.tensors:
        store.load(key)
    spent = time.perf_counter() - begun
    store.close()
    nbytes = sum(segment.room.nbytes for tensor in store.tensors.values() for segment in tensor.segments)
    return nbytes / GIB / spent


def _remember(store: KVStore) -> None:
    """Take what lies on the medium for what was written."""
    for key, tensor in store.tensors.items():
        rows = store.pool.rows(store.load(key))
        tensor.checksums = Checksums(key, tensor.layout)
        tensor.checksums.remember(rows, tensor.head_stride(store.capacity), 0, tensor.full)
    store.flush()


def _touch(region: Region) -> None:
    """A run faults its slots in once, at its first token; that is not what is measured here."""
    region.buffer()[::PAGE] = bytes(region.size // PAGE)


def _page_cache(bench: IoBench) -> list[float]:
    """GiB/s of loading a 128 MiB tensor that the page cache holds, once a round."""
    path = PageCachePath(bench.folder)
    try:
        store = kv_store(path.queue, CpuDevice(torch.bfloat16), 1, path=path)
        _touch(store.pool.region)
        rooms = [segment.room for tensor in store.tensors.values() for segment in tensor.segments]
        _write_random(path.queue, [(room.offset, room.nbytes, room.file) for room in rooms])
        speeds = []
        for _ in range(bench.rounds):
            begun = time.perf_counter()
            for key in store.tensors:
                store.load(key)
                store.flush()
            speeds.append(len(store.tensors) * TENSOR_BYTES / GIB / (time.perf_counter() - begun))
        return speeds
    finally:
        path.close()


def _write_random(queue: Queue, places: Iterable[tuple[int, int, int]]) -> None:
    """places: (offset, bytes, file) of each."""
    with Region(TENSOR_BYTES) as region:
        region.buffer()[:] = os.urandom(TENSOR_BYTES)
        for begin, nbytes, file in places:
            for offset in range(begin, begin + nbytes, TENSOR_BYTES):
                part = min(TENSOR_BYTES, begin + nbytes - offset)
                queue.run(WRITE, [plain(offset, region.address, part, file)])


def _summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and ratios of measurements of the same round, whose median is what counts."""
    medians = {f"{name}_gib_s": statistics.median(r[name] for r in rounds) for name in rounds[0]}
    pairs = {
        "read_vs_fio": ("engine_read", "fio_read"),
        "write_vs_fio": ("engine_write", "fio_write"),
        "store_vs_engine": ("tensor_store", "tensor_engine"),
        "checksum_vs_none": ("tensor_checksum", "tensor_store"),
        "posix_vs_engine": ("posix_read", "engine_read"),
    }
    ratios = {
        name: statistics.median(r[ours] / r[other] for r in rounds)
        for name, (ours, other) in pairs.items()
        if other in rounds[0]
    }
    return medians | {"ratios": ratios}


def software_cost(options: QueueOptions, loads: int = 50) -> dict[str, float]:
    """On the null engine: nanoseconds a command, and microseconds of Python that one 128 MiB
    tensor's load takes (the calling thread's CPU time)."""
    with Queue.null(options) as queue:
        store = kv_store(queue, CpuDevice(torch.bfloat16), loads // 2)
        commands, begun, cpu = queue.stats().commands, time.perf_counter(), time.thread_time()
        for key in store.tensors:
            store.load(key)
        wall, cpu = time.perf_counter() - begun, time.thread_time() - cpu
        commands = queue.stats().commands - commands
        store.flush()
    return {
        "ns_per_command": wall / commands * 1e9,
        "commands_per_load": commands / len(store.tensors),
        "python_us_per_load": cpu / len(store.tensors) * 1e6,
    }
