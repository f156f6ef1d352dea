# SPDX-License-Identifier: Apache-2.0
"""A budget enforced by this machine's own v1 memory cgroups."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dualblade.host.cgroup import own_cgroup
from dualblade.host.sysfs import Host

pytestmark = [pytest.mark.needs("cgroup_v1")]
MIB = 1 << 20
TESTS = Path(__file__).parents[1]
BUDGET = 96 * MIB
FILE = 160 * MIB


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A cgroup of this test's own, below the present one."""
    own = own_cgroup(Host())
    assert own is not None
    made = Path(own.directory) / f"test-{os.getpid()}"
    made.mkdir()
    yield made
    for child in [*made.glob("dualblade-*"), made]:
        child.rmdir()


@pytest.fixture
def big_file(direct_dir: Path) -> Path:
    path = direct_dir / "big"
    with path.open("wb") as file:
        for _ in range(FILE // MIB):
            file.write(os.urandom(MIB))
        os.fsync(file.fileno())
    return path


def start(cgroup: Path, *words: object) -> subprocess.Popen[str]:
    """A Python program in `cgroup`."""
    procs = cgroup / "cgroup.procs"
    return subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        preexec_fn=lambda: procs.write_text(str(os.getpid())) and None,
    )  # fmt: skip


def lines_of(process: subprocess.Popen[str], count: int) -> list[dict]:
    assert process.stdout
    lines = [process.stdout.readline() for _ in range(count)]
    assert all(lines), process.communicate()[1]
    return [json.loads(line) for line in lines]


def children(cgroup: Path) -> list[str]:
    return sorted(path.name for path in cgroup.glob("dualblade-*"))


def test_more_page_cache_than_the_budget_is_reclaimed(cgroup: Path, big_file: Path) -> None:
    with start(cgroup, TESTS / "cgroup_work.py", BUDGET, big_file) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err
    record = json.loads(out)
    assert record["version"] == 1
    assert 0.9 * BUDGET < record["peak_bytes"] <= record["limit_bytes"] <= BUDGET
    assert record["budget_peak"] <= BUDGET + record["outside_bytes"]
    assert record["over_limit"] > 0
    assert record["oom_kills"] == 0
    assert children(cgroup) == []


def test_an_interrupt_leaves_no_cgroup_behind(cgroup: Path, big_file: Path) -> None:
    with start(cgroup, TESTS / "cgroup_work.py", BUDGET, big_file, "--repeat") as process:
        lines_of(process, 1)
        assert children(cgroup) == [f"dualblade-{process.pid}"]
        assert (cgroup / "cgroup.procs").read_text() == ""
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert children(cgroup) == []


def test_the_next_run_clears_what_a_killed_one_left(cgroup: Path, big_file: Path) -> None:
    with start(cgroup, TESTS / "cgroup_work.py", BUDGET, big_file, "--repeat") as process:
        lines_of(process, 1)
        process.kill()
        process.communicate()
    assert children(cgroup) == [f"dualblade-{process.pid}"]
    with start(cgroup, TESTS / "cgroup_work.py", BUDGET, big_file) as process:
        assert process.communicate()[0]
    assert children(cgroup) == []


def test_a_limit_lowered_while_it_runs(cgroup: Path, big_file: Path) -> None:
    """It is obeyed, seen by whoever plans, and not raised again."""
    with start(cgroup, TESTS / "cgroup_work.py", BUDGET, big_file, "--repeat") as process:
        (before,) = lines_of(process, 1)
        lower = BUDGET // 2
        (cgroup / f"dualblade-{process.pid}/memory.limit_in_bytes").write_text(str(lower))
        after = lines_of(process, 3)[-1]
        process.send_signal(signal.SIGINT)
        process.communicate()
    assert before["usage"] > lower >= after["usage"]
    assert after["limit_bytes"] == lower
    assert after["headroom"] <= lower < before["headroom"]
    assert after["oom_kills"] == 0


HUGE = """
import json, mmap, sys
from cgroup_work import facts
from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.host.meminfo import process_memory
from dualblade.host.sysfs import Host
with BudgetCgroup.held_to(int(sys.argv[1])) as group:
    limits = [group.limit_bytes]
    try:
        pages = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000)
    except OSError:
        sys.exit(77)
    pages[:] = bytes(len(pages))
    group.follow(process_memory(Host()))
    limits.append(group.limit_bytes)
    print(json.dumps(facts(group) | {"limits": limits}))
"""


@pytest.fixture
def hugepages() -> Iterator[None]:
    """Eight pages of 2 MiB, free."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    pool.write_text(str(int(before) + 8))
    try:
        if int(pool.read_text()) < int(before) + 8:
            pytest.skip("the kernel has no eight hugepages to give")
        yield
    finally:
        pool.write_text(before)


@pytest.mark.needs("hugepage_pool")
def test_hugepages_come_off_the_limit_and_onto_the_peak(cgroup: Path, hugepages: None) -> None:
    """They are of the budget, and no memory cgroup is charged with them."""
    with start(cgroup, "-c", HUGE, BUDGET) as process:
        out, err = process.communicate()
    if process.returncode == 77:
        pytest.skip("somebody else has changed the pool of hugepages meanwhile")
    assert process.returncode == 0, err
    record = json.loads(out)
    before, after = record["limits"]
    assert before - after == 16 * MIB
    assert record["hugepage_bytes"] == 16 * MIB
    assert record["peak_bytes"] < 16 * MIB
    assert record["budget_peak"] == record["peak_bytes"] + record["outside_bytes"] + 16 * MIB
    assert children(cgroup) == []
