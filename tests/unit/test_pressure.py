# SPDX-License-Identifier: Apache-2.0
"""Memory pressure as the kernel writes it, and as this machine has it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from dualblade.host.cgroup import CgroupLevel, OwnCgroup, memory_cgroups
from dualblade.host.pressure import Pressure, Stalls, cgroup_events, memory_pressure, stalls
from dualblade.host.sysfs import Host

CALM = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
BUSY = CALM.replace("total=0", "total=3500000", 1).replace("total=0", "total=1250000")
OWN = "/sys/fs/cgroup/a/b"
LEVELS = [CgroupLevel(OWN, 1, "memory.max", 1, 0), CgroupLevel("/sys/fs/cgroup/a", 1, "memory.max", 1, 0)]


def host_with(root: Path, **files: str) -> Host:
    names = {
        "machine": "/proc/pressure/memory",
        "vmstat": "/proc/vmstat",
        "own": f"{OWN}/memory.pressure",
        "stat": f"{OWN}/memory.stat",
    }
    for name, text in files.items():
        file = root / names[name].lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Host(root)


def test_the_own_cgroup_is_what_counts(tmp_path: Path) -> None:
    """Others wait for limits of their own."""
    host = host_with(tmp_path, machine=BUSY, own=CALM)
    assert stalls(host, OWN) == Stalls("cgroup", 0.0, 0.0)
    assert memory_pressure(host, LEVELS) == Pressure()
    assert memory_pressure(host_with(tmp_path, own=BUSY), LEVELS) == Pressure(3.5, 1.25, 0)


def test_of_the_machine_only_what_stops_this_process_too(tmp_path: Path) -> None:
    """As with cgroup v1, or without any."""
    host = host_with(tmp_path, machine=BUSY)
    assert stalls(host, OWN) == stalls(host, None) == Stalls("machine", 3.5, 1.25)
    assert memory_pressure(host, LEVELS) == memory_pressure(host, []) == Pressure(0.0, 1.25, 0)


@pytest.mark.parametrize("text", ["", "some\n", "some total=much full\nfull total=1.00\n", "\0\n"])
def test_a_kernel_that_says_nothing_makes_nobody_careful(tmp_path: Path, text: str) -> None:
    assert memory_pressure(host_with(tmp_path, machine=text), LEVELS) == Pressure()
    assert memory_pressure(Host(tmp_path / "nothing"), []) == Pressure()
    assert stalls(Host(tmp_path / "nothing"), OWN) is None


def test_refaults_of_the_own_cgroup_where_it_counts_them(tmp_path: Path) -> None:
    def pages(host: Host, levels: list[CgroupLevel]) -> float:
        return memory_pressure(host, levels).refault_bytes / mmap.PAGESIZE

    vmstat = "nr_free_pages 7\nworkingset_refault_anon 5\nworkingset_refault_file 900\n"
    host = host_with(tmp_path, vmstat=vmstat)
    assert pages(host, []) == pages(host, LEVELS) == 900
    host = host_with(tmp_path, stat="file 1\nworkingset_refault_file 12\ntotal_workingset_refault_file 30\n")
    assert pages(host, LEVELS) == 30
    assert pages(host, []) == 900


@pytest.mark.parametrize(
    ("version", "files", "expected"),
    [
        (1, {"memory.failcnt": "5", "memory.oom_control": "oom_kill_disable 0\noom_kill 2"}, (5, 0, 2)),
        (2, {"memory.events": "low 0\nhigh 3\nmax 5\noom 1\noom_kill 2"}, (5, 3, 2)),
        (2, {}, (0, 0, 0)),
    ],
)
def test_what_a_limit_has_led_to(
    version: int, files: dict[str, str], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    host = host_with(tmp_path, stat="pgscan 4\npgsteal 3\n")
    for name, text in files.items():
        (tmp_path / OWN.lstrip("/") / name).write_text(text)
    events = cgroup_events(host, OwnCgroup(version, OWN, OWN))
    assert (events.over_limit, events.over_high, events.oom_kills) == expected
    reclaim = (4 * mmap.PAGESIZE, 3 * mmap.PAGESIZE) if version == 2 else (None, None)
    assert (events.scanned_bytes, events.reclaimed_bytes) == reclaim


def test_this_machine() -> None:
    before, after = (memory_pressure(Host(), memory_cgroups(Host())) for _ in range(2))
    assert 0 <= before.full_s <= after.full_s
    assert 0 <= before.refault_bytes <= after.refault_bytes
