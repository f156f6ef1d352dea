# SPDX-License-Identifier: Apache-2.0
"""The meter and the snapshot against real memory and a real file."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dualblade.errors import ConfigError
from dualblade.host.sysfs import Host
from dualblade.residency import MemoryMeter, MemorySnapshot, take_snapshot
from dualblade.units import GIB, KIB, MIB
from dualblade.watch import Look, MemoryWatch, changed, look
from spdk_glue import GlueError, cached_bytes, cached_pages, file_facts, punch

BLOCK = 64 * MIB
FILE = 16 * MIB
SLACK = 8 * MIB  # the interpreter's own ups and downs, and the kernel's per-thread counters


@pytest.fixture
def disk_dir(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk: pages of a tmpfs cannot be dropped."""
    with tempfile.TemporaryFile(dir=tmp_path) as probe:
        in_memory = file_facts(probe.fileno()).in_memory
    if not in_memory:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        yield Path(folder)


@pytest.fixture
def cached_file(disk_dir: Path) -> Iterator[int]:
    """A file of FILE bytes that the page cache holds."""
    fd = os.open(disk_dir / "kv", os.O_RDWR | os.O_CREAT)
    os.write(fd, os.urandom(FILE))
    yield fd
    os.close(fd)


def drop(fd: int) -> None:
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def touch(memory: mmap.mmap) -> None:
    for offset in range(0, len(memory), mmap.PAGESIZE):
        memory[offset] = 1


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline, "nothing changed for 20 s"
        time.sleep(0.005)


@pytest.mark.parametrize(("flags", "kind"), [(mmap.MAP_PRIVATE, "anon"), (mmap.MAP_SHARED, "shmem")])
def test_the_peak_keeps_memory_that_is_gone(flags: int, kind: str) -> None:
    with MemoryMeter(interval_s=0.005) as meter:
        before = meter.sample()
        memory = mmap.mmap(-1, BLOCK, flags | mmap.MAP_ANONYMOUS)
        touch(memory)
        until(lambda: getattr(meter.peak, kind) - getattr(before, kind) > BLOCK - SLACK)
        memory.close()
        after = meter.sample()
    grown = meter.peak_bytes - before.total
    assert BLOCK - SLACK < grown < BLOCK + SLACK
    assert meter.peak_bytes == meter.peak.total
    assert getattr(meter.peak, kind) - getattr(after, kind) > BLOCK - SLACK


def test_cached_pages_are_counted_and_drop(cached_file: int) -> None:
    with MemoryMeter(lambda: [cached_file], interval_s=10) as meter:
        held = meter.sample()
        drop(cached_file)
        dropped = meter.sample()
    assert FILE <= held.cached < FILE + MIB
    assert dropped.cached < MIB
    assert meter.peak.cached == held.cached
    assert held.total == held.anon + held.shmem + held.swap + held.hugetlb + held.cached


def test_the_thread_sees_pages_come(cached_file: int) -> None:
    drop(cached_file)
    with MemoryMeter(lambda: [cached_file], interval_s=0.005) as meter:
        assert meter.peak.cached < MIB
        os.pread(cached_file, FILE, 0)
        until(lambda: meter.peak.cached >= FILE)


def test_pages_that_somebody_else_counts_are_not_counted_again(cached_file: int) -> None:
    told: list[int | None] = [5 * MIB, None]
    with MemoryMeter(lambda: [cached_file], interval_s=1000, counted=lambda: told[0]) as meter:
        assert meter.sample().cached == 5 * MIB
        told.pop(0)
        assert meter.sample().cached >= FILE, "nobody does any more"


def test_a_watch_tells_what_is_cached_as_long_as_it_looks(cached_file: int) -> None:
    watch = MemoryWatch(lambda: look(Host(), [cached_file]))
    assert watch.cached is None
    watch.start()
    assert watch.cached is not None
    assert FILE <= watch.cached < FILE + MIB
    watch.stop()
    assert watch.cached is None


def test_a_watch_sleeps_while_nothing_changes_and_wakes_when_stirred(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dualblade.watch.CALM_S", 1000.0)
    first = look(Host(), [])
    glances: list[Look] = []

    def unchanged(before: Look) -> bool:
        glances.append(before)
        return False

    watch = MemoryWatch(lambda: replace(first, at=time.monotonic()), unchanged, interval_s=0.001)
    watch.start()
    until(lambda: len(glances) > 10)
    assert watch.latest is not None
    assert watch.latest[0] == 0
    watch.stir()
    until(lambda: watch.latest is not None and watch.latest[0] > 3)
    watch.stop()


def test_a_calm_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualblade.watch.CALM_S", 0.01)
    watch = MemoryWatch(lambda: look(Host(), []), lambda before: False, interval_s=0.001)
    watch.start()
    until(lambda: watch.latest is not None and watch.latest[0] > 3)
    watch.stop()


def test_more_memory_of_this_process_is_a_change() -> None:
    before = look(Host(), [])
    assert not changed(Host(), before, 64 * GIB)
    with mmap.mmap(-1, BLOCK) as memory:
        touch(memory)
        assert changed(Host(), before, BLOCK // 2)


@pytest.mark.parametrize(
    ("snapshot", "pressure"),
    [
        ({"available": MIB}, {}),
        ({"cgroup_headroom": 1 << 60, "cgroup_limit": "a cgroup"}, {}),
        ({}, {"refault_bytes": -1 << 60}),
        ({}, {"full_s": -1e9}),
    ],
)
def test_what_else_is_a_change(snapshot: dict[str, int], pressure: dict[str, float]) -> None:
    """Other available memory, a limit that was not there, pages that were read back, tasks that waited."""
    seen = look(Host(), [])
    pressures = {name: getattr(seen.pressure, name) + more for name, more in pressure.items()}
    before = replace(
        seen,
        snapshot=replace(seen.snapshot, **snapshot),
        pressure=replace(seen.pressure, **pressures),
    )
    assert changed(Host(), before, 256 * MIB)


def test_a_short_run_has_its_first_and_its_last_sample(cached_file: int) -> None:
    fds: list[int] = []
    meter = MemoryMeter(lambda: fds, interval_s=1000)
    assert meter.peak_bytes == 0
    meter.start()
    assert meter.peak.anon > 0
    fds.append(cached_file)
    meter.stop()
    assert meter.peak.cached >= FILE


def test_a_closed_file_counts_nothing(disk_dir: Path) -> None:
    fd = os.open(disk_dir / "kv", os.O_RDWR | os.O_CREAT)
    os.write(fd, bytes(FILE))
    meter = MemoryMeter(lambda: [fd])
    assert meter.sample().cached >= FILE
    os.close(fd)
    assert meter.sample().cached == 0


def test_closing_waits_for_the_look_at_the_files(cached_file: int) -> None:
    """The owner cannot close a descriptor, so that its number is given out again, between the list
    and the look."""
    listed, go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow_list() -> list[int]:
        listed.set()
        assert go_on.wait(20)
        assert not closed.is_set()
        return [cached_file]

    def close() -> None:
        with meter.closing:
            closed.set()

    meter = MemoryMeter(slow_list)
    samples: list[int] = []
    sampler = threading.Thread(target=lambda: samples.append(meter.sample().cached))
    closer = threading.Thread(target=close)
    sampler.start()
    assert listed.wait(20)
    closer.start()
    assert not closed.wait(0.1)
    go_on.set()
    sampler.join()
    closer.join()
    assert closed.is_set()
    assert samples[0] >= FILE


def test_a_failure_in_the_thread_is_raised_by_stop() -> None:
    called = threading.Event()

    def failing() -> list[int]:
        if threading.current_thread() is threading.main_thread():
            return []
        called.set()
        raise KeyError("gone")

    meter = MemoryMeter(failing, interval_s=0.001)
    meter.start()
    assert called.wait(20)
    with pytest.raises(KeyError, match="gone"):
        meter.stop()
    meter.stop()


def test_start_twice_is_refused_and_restart_is_not() -> None:
    meter = MemoryMeter()
    with meter, pytest.raises(RuntimeError, match="already"):
        meter.start()
    assert "stopped" in repr(meter)
    with meter:
        assert "running" in repr(meter)
    assert not [thread for thread in threading.enumerate() if thread.name == "memory-meter"]


def test_pages_and_holes(cached_file: int) -> None:
    """Dirty ones are told apart where the kernel can (6.5); a hole takes neither pages nor blocks."""
    assert cached_pages(cached_file).cached == FILE
    os.fsync(cached_file)
    assert cached_pages(cached_file).dirty == 0
    blocks = os.fstat(cached_file).st_blocks * 512
    punch(cached_file, FILE // 4, FILE // 2)
    assert cached_bytes(cached_file) <= FILE // 2 + 4 * MIB  # large folios are split when they can be
    assert blocks - os.fstat(cached_file).st_blocks * 512 == FILE // 2
    assert os.pread(cached_file, FILE, 0).count(0) > FILE // 2
    assert os.fstat(cached_file).st_size == FILE
    with pytest.raises(GlueError):
        punch(1 << 20, 0, 4096)


def test_snapshot_of_this_machine(cached_file: int) -> None:
    memory = mmap.mmap(-1, BLOCK, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    before = take_snapshot(Host())
    touch(memory)
    after = take_snapshot(Host(), [cached_file])
    memory.close()
    assert BLOCK - SLACK < after.process_anon - before.process_anon < BLOCK + SLACK
    assert before.cached == 0
    assert after.cached == cached_bytes(cached_file) >= FILE
    assert 0 < after.headroom <= after.available <= after.total


def test_snapshot_refuses_a_bad_descriptor() -> None:
    with pytest.raises(GlueError):
        take_snapshot(Host(), [1 << 20])


def test_snapshot_names_the_level_that_limits(tmp_path: Path) -> None:
    top = "sys/fs/cgroup"
    status = ("RssAnon: 1024 kB", "RssFile: 9 kB", "RssShmem: 2048 kB", "VmSwap: 4096 kB")
    files = {
        "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB",
        "proc/self/status": "\n".join((*status, "HugetlbPages: 2048 kB")),
        "proc/self/cgroup": "0::/a",
        "proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        f"{top}/cgroup.controllers": "memory",
        f"{top}/a/cgroup.controllers": "memory",
        f"{top}/a/cgroup.events": "populated 1",
        f"{top}/a/memory.max": "max",
        f"{top}/a/memory.high": str(2 * GIB),
        f"{top}/a/memory.current": str(GIB),
        f"{top}/a/memory.stat": "active_file 0",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    snapshot = take_snapshot(Host(tmp_path))
    assert snapshot == MemorySnapshot(
        8 * GIB, 4 * GIB, GIB, f"/{top}/a/memory.high", 7 * MIB, 2 * MIB, 0, 9 * KIB
    )
    assert (snapshot.headroom, snapshot.headroom_source) == (GIB, f"/{top}/a/memory.high")

    (tmp_path / top / "a" / "memory.high").write_text(str(7 * GIB))
    snapshot = take_snapshot(Host(tmp_path))
    assert (snapshot.headroom, snapshot.headroom_source) == (4 * GIB, "available memory")

    (tmp_path / top / "a" / "memory.current").unlink()
    with pytest.raises(ConfigError, match="cannot read"):
        take_snapshot(Host(tmp_path))
