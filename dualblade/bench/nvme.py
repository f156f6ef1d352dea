# SPDX-License-Identifier: Apache-2.0
"""`bench io --nvme`, `--emulate`: the spdk engine beside spdk_nvme_perf, and the store beside the
engine, interleaved in one run.

Only an extent of a volume of ours is written to. spdk_nvme_perf writes anywhere, so its writes are
for a target that this run made itself. A vfio-user controller takes one client at a time: every
measurement opens the target anew, and nobody has it while spdk_nvme_perf runs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dualblade.bench.io import TENSOR_BYTES, load_speed, random_file
from dualblade.bench.perf import PROGRAM, perf_path, run_perf
from dualblade.bench.tensors import HEAD_DIM, HEADS, ITEMSIZE, RawPath, kv_store
from dualblade.config import nvme_secrets
from dualblade.device import CpuDevice
from dualblade.emulate import EmulatedTarget
from dualblade.errors import CapacityError, UsageError
from dualblade.extents import Extent
from dualblade.superblock import capacity_for
from dualblade.targets import OpenTarget, Target, find_target, open_target
from dualblade.tensors import TensorKey
from dualblade.units import GIB, KIB, MIB, format_size, round_up
from dualblade.volume import Volume
from spdk_glue import READ, WRITE, Medium, Piece, Queue, QueueOptions, Region, environment, plain

OPS = {"read": READ, "write": WRITE}
SIZES, DEPTHS = (128 * KIB, MIB), (8, 32)
LISTS = 4  # of transfers, handed over and not yet waited for
_STORE_MEMORY = 2 * TENSOR_BYTES + 32 * MIB  # its slots and its tails
_CPU_FIGURES = ("engine_cpu_s_per_gib", "python_cpu_s_per_gib", "uring_cpu_s_per_gib")


class Case(NamedTuple):
    """size: bytes of a transfer. depth: transfers in flight."""

    op: str
    size: int
    depth: int

    @property
    def window(self) -> int:
        """Bytes in flight: buffers used again and again, as spdk_nvme_perf does."""
        return self.size * self.depth


@dataclass(frozen=True, slots=True)
class NvmeBench:
    """text: a TARGET of SPDK's driver. size: bytes of the extent that is measured in, a multiple of
    32 MiB. seconds: of each measurement. emulated: this run made the target itself, of which nothing
    is worth keeping. busy_cpu: what the target keeps busy, where that is known. fd: the file that is its
    disk, open with O_DIRECT, where io_uring is measured too."""

    text: str
    size: int = GIB
    rounds: int = 5
    seconds: int = 1
    emulated: bool = False
    busy_cpu: int | None = None
    fd: int | None = None

    @property
    def target(self) -> Target:
        return find_target(self.text)

    @property
    def tensor_bytes(self) -> int:
        return min(TENSOR_BYTES, self.size // 2)

    @property
    def cases(self) -> list[Case]:
        return [Case(op, size, depth) for op in OPS for size in SIZES for depth in DEPTHS]


@contextmanager
def emulated_bench(
    size: int, rounds: int, seconds: int, folder: Path | None, say: Callable[[str], None]
) -> Iterator[NvmeBench]:
    """On a controller of this run alone, its disk in memory, or a file in `folder` (through io_uring).
    Raises TargetError, CapacityError."""
    capacity = round_up(capacity_for(size), MIB)
    made = partial(NvmeBench, size=size, rounds=rounds, seconds=seconds, emulated=True)
    if folder is None:
        with EmulatedTarget(memory_mib=capacity // MIB) as emulated:
            emulated.malloc("bench", capacity)
            yield made(emulated.export("bench"), busy_cpu=emulated.cpu)
        return
    with random_file(folder, capacity, say) as (path, fd), EmulatedTarget() as emulated:
        emulated.uring("bench", path)
        yield made(emulated.export("bench"), busy_cpu=emulated.cpu, fd=fd)


def run_nvme_bench(bench: NvmeBench, say: Callable[[str], None]) -> dict[str, Any]:
    """The record of `bench io --nvme --json`: medians in GiB/s, ratios, and every single round."""
    if not bench.target.by_spdk:
        raise UsageError(f"{bench.text!r} is not for SPDK's driver", "leave --nvme out for a file")
    medium = _prepare(bench, say)
    reason = no_perf()
    idle = idle_cpu(bench)
    rounds = []
    for number in range(bench.rounds):
        say(f"round {number + 1} of {bench.rounds}")
        rounds.append(_one_round(bench, reason is None))
    record = {
        "target": bench.text,
        "emulated": bench.emulated,
        "engine": "spdk",
        "transport": medium.transport,
        "model": medium.model,
        "max_command_bytes": medium.max_command_bytes,
        "size_bytes": bench.size,
        "tensor_bytes": bench.tensor_bytes,
        "rounds": bench.rounds,
        "seconds": bench.seconds,
        "no_perf": reason,
        "idle_cpu": idle,
        "uring_idle_cpu": _uring_idle_cpu(bench),
    }
    return record | _summary(bench, rounds) | {"measured": rounds}


def no_perf() -> str | None:
    """Why there is no reference, or None."""
    if not perf_path():
        return f"{PROGRAM} is not in PATH (SPDK's build leaves it in build/bin)"
    if nvme_secrets():
        return f"{PROGRAM} would need the keys of this target on its command line"
    return None


# the target ---------------------------------------------------------------------------------


@contextmanager
def _opened(bench: NvmeBench, options: QueueOptions) -> Iterator[tuple[OpenTarget, Extent]]:
    """The extent is entered in the volume's table for as long as it is open. Raises VolumeError where
    there is no volume of ours, CapacityError."""
    memory = _STORE_MEMORY + max(case.window for case in bench.cases)
    with open_target(bench.target, capacity=None, cache_dir=Path(), options=options, memory=memory) as opened:
        volume = _volume(bench, opened)
        extent = volume.allocate(TensorKey(0, "K"), bench.size)
        yield opened, extent
        volume.free([extent])


def _volume(bench: NvmeBench, opened: OpenTarget) -> Volume:
    """What spdk_nvme_perf wrote to the run's own target is gone over."""
    if bench.emulated:
        return Volume.create(opened.queue, opened.capacity, name=opened.name)
    volume = Volume.open(opened.queue, opened.capacity, name=opened.name)
    volume.reclaim()
    return volume


def _prepare(bench: NvmeBench, say: Callable[[str], None]) -> Medium:
    """Random bytes in the whole extent: holes and zeros would prove nothing."""
    largest = max(case.window for case in bench.cases)
    if bench.size < largest or bench.size % largest:
        raise CapacityError(
            f"an extent of {format_size(bench.size)} is no multiple of {format_size(largest)}"
        )
    with _opened(bench, QueueOptions()) as (opened, extent):
        say(f"writing {bench.size // MIB} MiB of random bytes to an extent of {opened.name}")
        _fill(opened.queue, extent)
        medium = opened.queue.medium()
    assert medium is not None
    return medium


def _fill(queue: Queue, extent: Extent) -> None:
    step = 16 * MIB
    with Region(step, of_env=queue.needs_env_memory) as region:
        for offset in range(extent.offset, extent.offset + extent.nbytes, step):
            region.buffer()[:] = os.urandom(step)
            queue.run(WRITE, [plain(offset, region.address, step)])
        queue.flush()


def idle_cpu(bench: NvmeBench) -> float:
    """Share of a CPU that the I/O thread takes while nothing is asked of it."""
    with _opened(bench, QueueOptions()) as (opened, _):
        return _idle(opened.queue, bench.seconds)


def _idle(queue: Queue, seconds: float) -> float:
    begun, wall = queue.stats().cpu_s, time.perf_counter()
    time.sleep(seconds)
    return (queue.stats().cpu_s - begun) / (time.perf_counter() - wall)


def _uring_idle_cpu(bench: NvmeBench) -> float | None:
    if bench.fd is None:
        return None
    with Queue.files([bench.fd], engine="uring") as queue:
        return _idle(queue, bench.seconds)


# one round ----------------------------------------------------------------------------------


def _one_round(bench: NvmeBench, with_perf: bool) -> dict[str, Any]:
    cases = []
    for case in bench.cases:
        found = _ours(bench, case)
        if with_perf and (case.op == "read" or bench.emulated):
            found["perf"] = _perf(bench, case)
        cases.append(found)
    return {"cases": cases, **_tensors(bench)}


def _ours(bench: NvmeBench, case: Case) -> dict[str, float]:
    options = QueueOptions(case.depth, case.size)
    with (
        _opened(bench, options) as (opened, extent),
        Region(case.window, of_env=opened.queue.needs_env_memory) as region,
    ):
        region.buffer()[:] = os.urandom(region.size)
        _whole_passes(case, opened.queue, extent, region, 0.0)  # the target maps the pages, once
        speeds = {}
        for name, measure in (("engine", _whole_passes), ("python", _in_lists)):
            run = partial(measure, case, opened.queue, extent, region, bench.seconds)
            speeds[name], speeds[f"{name}_cpu_s_per_gib"] = _timed(opened.queue, run)
    return speeds if bench.fd is None else speeds | _on_file(bench.fd, case, extent, bench.seconds)


def _on_file(fd: int, case: Case, extent: Extent, seconds: float) -> dict[str, float]:
    """The bytes of the same extent, without SPDK and its target."""
    with (
        Queue.files([fd], QueueOptions(case.depth, case.size), engine="uring") as queue,
        Region(case.window) as region,
    ):
        region.buffer()[:] = os.urandom(region.size)
        queue.register(region)
        gib_s, cpu = _timed(queue, partial(_whole_passes, case, queue, extent, region, seconds))
    return {"uring": gib_s, "uring_cpu_s_per_gib": cpu}


def _timed(queue: Queue, run: Callable[[], int]) -> tuple[float, float]:
    """GiB/s, and seconds of CPU of the I/O thread and the calling one for each GiB."""
    begun, cpu, own = time.perf_counter(), queue.stats().cpu_s, time.thread_time()
    gib = run() / GIB
    wall = time.perf_counter() - begun
    return gib / wall, (queue.stats().cpu_s - cpu + time.thread_time() - own) / gib


def _whole_passes(case: Case, queue: Queue, extent: Extent, region: Region, seconds: float) -> int:
    """Bytes moved: each transfer covers the extent, and is cut into commands in C."""
    piece = Piece(extent.offset, region.address, 0, 0, case.window, heads=extent.nbytes // case.window)
    moved, deadline = 0, time.perf_counter() + seconds
    while not moved or time.perf_counter() < deadline:
        queue.run(OPS[case.op], [piece])
        moved += piece.nbytes
    return moved


def _in_lists(case: Case, queue: Queue, extent: Extent, region: Region, seconds: float) -> int:
    """Bytes moved: Python names every transfer's LBA and buffer, and hands them over `depth` a call, a few
    lists ahead, so that the engine always has `depth` commands in flight."""
    op, tags = OPS[case.op], deque[int]()
    moved, deadline = 0, time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        pieces = [
            plain(extent.offset + (moved + at) % extent.nbytes, region.address + at, case.size)
            for at in range(0, case.window, case.size)
        ]
        tags.append(queue.submit(op, pieces))
        moved += case.window
        if len(tags) == LISTS:
            queue.wait(tags.popleft())
    while tags:
        queue.wait(tags.popleft())
    return moved


def _perf(bench: NvmeBench, case: Case) -> float:
    target = bench.target
    words = [target.address, f"ns:{target.namespace}"]
    if target.hostnqn:
        words.append(f"hostnqn:{target.hostnqn}")
    running = environment()
    hugepages = running is not None and running.hugepages
    return run_perf(
        " ".join(words), case.op, case.size, case.depth, bench.seconds, _client_cpu(bench), hugepages
    )


def _client_cpu(bench: NvmeBench) -> int:
    """One that the target does not keep busy, where there is one: `emulate` takes the last by itself."""
    allowed = os.sched_getaffinity(0)
    busy = max(allowed) if bench.busy_cpu is None else bench.busy_cpu
    return max(allowed - {busy} or allowed)


def _tensors(bench: NvmeBench) -> dict[str, float]:
    """GiB/s of whole KV tensors one after the other: the engine alone, and through the store."""
    tokens = bench.tensor_bytes // (HEADS * HEAD_DIM * ITEMSIZE)
    layers = bench.size // bench.tensor_bytes // 2
    with _opened(bench, QueueOptions()) as (opened, extent):
        engine = _tensor_engine(bench, opened.queue, extent)
        path = RawPath(opened.queue, extent.offset)
        store = kv_store(opened.queue, CpuDevice(torch.bfloat16), layers, tokens, path)
        for key in store.tensors:
            store.load(key)
        store.flush()
        return {"tensor_engine": engine, "tensor_store": load_speed(store)}


def _tensor_engine(bench: NvmeBench, queue: Queue, extent: Extent) -> float:
    with Region(bench.tensor_bytes, of_env=queue.needs_env_memory) as region:
        queue.run(READ, [plain(extent.offset, region.address, region.size)])  # the target maps its pages
        begun = time.perf_counter()
        for offset in range(extent.offset, extent.offset + bench.size, region.size):
            queue.run(READ, [plain(offset, region.address, region.size)])
        return bench.size / GIB / (time.perf_counter() - begun)


# summary ------------------------------------------------------------------------------------


def _summary(bench: NvmeBench, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and ratios of measurements of the same round, whose median is what counts."""
    rows = [_row(case, [found["cases"][i] for found in rounds]) for i, case in enumerate(bench.cases)]
    medians = {
        f"{name}_gib_s": statistics.median(found[name] for found in rounds)
        for name in ("tensor_engine", "tensor_store")
    }
    return medians | {
        "ratios": {"store_vs_engine": _ratio(rounds, "tensor_store", "tensor_engine")},
        "cases": rows,
    }


def _row(case: Case, found: list[dict[str, float]]) -> dict[str, Any]:
    pairs = [("engine", "perf"), ("python", "perf"), ("python", "engine"), ("engine", "uring")]
    medians = {
        name if name in _CPU_FIGURES else f"{name}_gib_s": statistics.median(one[name] for one in found)
        for name in found[0]
    }
    ratios = {f"{ours}_vs_{other}": _ratio(found, ours, other) for ours, other in pairs if other in found[0]}
    return {"op": case.op, "transfer_bytes": case.size, "depth": case.depth, **medians, "ratios": ratios}


def _ratio(found: list[dict[str, Any]], ours: str, other: str) -> float:
    return statistics.median(one[ours] / one[other] for one in found)
