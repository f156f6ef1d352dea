# SPDX-License-Identifier: Apache-2.0
"""A process that takes more page cache than its budget allows, beside some anonymous memory.

`python cgroup_work.py BUDGET FILE [--repeat]`: enters a memory cgroup, goes through FILE and prints one
JSON record. --repeat: a line after each pass, until it is interrupted.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from io import FileIO
from typing import Any

from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.host.cgroup import memory_cgroups, tightest
from dualblade.host.meminfo import process_memory
from dualblade.host.sysfs import Host

STEP = 1 << 20


def open_cold(path: str) -> FileIO:
    """With none of it cached: such pages were charged to somebody else. A block device loses its pages
    again when the last who has it open closes it."""
    file = open(path, "rb", buffering=0)  # noqa: SIM115
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def read_through(file: FileIO, group: BudgetCgroup) -> None:
    """Through the page cache, whose pages the cgroup is charged with."""
    file.seek(0)
    while file.read(STEP):
        group.follow(process_memory(Host()))


def facts(group: BudgetCgroup) -> dict[str, Any]:
    levels = memory_cgroups(Host())
    bound = tightest(levels)
    return group.record() | {
        "budget_peak": group.peak_bytes,
        "usage": levels[0].usage,
        "headroom": bound.headroom if bound else None,
    }


def work(budget: int, path: str, anon: int = 8 << 20, passes: int = 2) -> dict[str, Any]:
    """budget: bytes beside what this process holds already. What became of it."""
    memory = process_memory(Host())
    with open_cold(path) as file, BudgetCgroup.held_to(budget + memory.anon + memory.shmem) as group:
        held = mmap.mmap(-1, anon)
        for offset in range(0, anon, mmap.PAGESIZE):
            held[offset] = 1
        for _ in range(passes):
            read_through(file, group)
        return facts(group)


def main(budget: int, path: str, repeat: bool) -> None:
    if not repeat:
        print(json.dumps(work(budget, path)), flush=True)
        return
    with open_cold(path) as file, BudgetCgroup.held_to(budget) as group:
        while True:
            read_through(file, group)
            print(json.dumps(facts(group)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], "--repeat" in sys.argv)
