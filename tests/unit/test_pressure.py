# SPDX-License-Identifier: Apache-2.0
"""Memory pressure as the kernel writes it, and as this machine has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualblade.host.cgroup import CgroupLevel, memory_cgroups
from dualblade.host.pressure import Pressure, memory_pressure
from dualblade.host.sysfs import Host

CALM = "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
OWN = "/sys/fs/cgroup/a/b"
LEVELS = [CgroupLevel(OWN, 1, "memory.max", 1, 0), CgroupLevel("/sys/fs/cgroup/a", 1, "memory.max", 1, 0)]


def host_with(root: Path, **files: str) -> Host:
    names = {
        "machine": "/proc/pressure/memory",
        "vmstat": "/proc/vmstat",
        "own": f"{OWN}/memory.pressure",
        "parent": "/sys/fs/cgroup/a/memory.pressure",
        "stat": f"{OWN}/memory.stat",
    }
    for name, text in files.items():
        file = root / names[name].lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Host(root)


def test_the_worst_of_machine_and_cgroups(tmp_path: Path) -> None:
    host = host_with(
        tmp_path,
        machine=CALM.replace("some avg10=0.00", "some avg10=3.50"),
        own=CALM,
        parent=CALM.replace("full avg10=0.00", "full avg10=12.25"),
    )
    assert memory_pressure(host, LEVELS) == Pressure(3.5, 12.25, 0)
    assert memory_pressure(host, []) == Pressure(3.5, 0.0, 0)


@pytest.mark.parametrize("text", ["", "some\n", "some avg10=much full\nfull avg60=1.00\n", "\0\n"])
def test_a_kernel_that_says_nothing_makes_nobody_careful(tmp_path: Path, text: str) -> None:
    assert memory_pressure(host_with(tmp_path, machine=text), LEVELS) == Pressure()
    assert memory_pressure(Host(tmp_path / "nothing"), []) == Pressure()


def test_refaults_of_the_own_cgroup_where_it_counts_them(tmp_path: Path) -> None:
    vmstat = "nr_free_pages 7\nworkingset_refault_anon 5\nworkingset_refault_file 900\n"
    host = host_with(tmp_path, vmstat=vmstat)
    assert memory_pressure(host, []).refaults == 900
    assert memory_pressure(host, LEVELS).refaults == 900
    host = host_with(tmp_path, stat="file 1\nworkingset_refault_file 12\ntotal_workingset_refault_file 30\n")
    assert memory_pressure(host, LEVELS).refaults == 30
    assert memory_pressure(host, []).refaults == 900


def test_this_machine() -> None:
    pressure = memory_pressure(Host(), memory_cgroups(Host()))
    assert 0 <= pressure.full <= 100
    assert 0 <= pressure.some <= 100
    assert pressure.refaults >= 0
