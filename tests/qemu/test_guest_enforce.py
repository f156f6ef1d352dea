# SPDX-License-Identifier: Apache-2.0
"""A budget enforced by v2 memory cgroups: at the top, in a delegated subtree, beside others."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drives import MIB, drives, in_child, wait_until

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.machine("iommu")]
TOP = Path("/sys/fs/cgroup")
NOBODY = 65534
BUDGET = 40 * MIB


@pytest.fixture
def tree() -> Iterator[Path]:
    """A subtree whose children may have a memory controller."""
    made = TOP / "test"
    (TOP / "cgroup.subtree_control").write_text("+memory")
    made.mkdir()
    (made / "cgroup.subtree_control").write_text("+memory")
    yield made
    for folder in sorted(made.glob("**/"), reverse=True):
        folder.rmdir()


@pytest.fixture
def drive() -> Iterator[Path]:
    """A block device that everyone may read through the page cache."""
    block = drives()["BLANK0"].block
    block.chmod(0o644)
    yield block
    block.chmod(0o600)


def give(folder: Path, uid: int) -> None:
    """As a service manager delegates: the directory and the files that divide it."""
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads"):
        os.chown(folder / name, uid, uid)


def leaf(tree: Path, name: str = "job", uid: int = 0) -> Path:
    made = tree / name
    made.mkdir()
    give(made, uid)
    return made


def inside(cgroup: Path, work: Callable[[], Any], answer: Path, uid: int = 0) -> None:
    """Run `work` in `cgroup` as a user; what it returns lies in `answer`, as JSON."""

    def child() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        out = answer.open("w")
        if uid:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        out.write(json.dumps(work()))
        out.close()

    assert in_child(child) == 0


def worked(cgroup: Path, drive: Path, tmp_path: Path, uid: int = 0) -> dict[str, Any]:
    """More page cache than the budget, from `cgroup`."""
    from cgroup_work import work

    answer = tmp_path / "answer"
    inside(cgroup, lambda: work(BUDGET, str(drive)), answer, uid)
    return dict(json.loads(answer.read_text()))


def check(record: dict[str, Any]) -> None:
    assert record["version"] == 2
    assert 0.8 * BUDGET < record["peak_bytes"] <= record["limit_bytes"] <= BUDGET
    assert record["budget_peak"] <= BUDGET + record["outside_bytes"]
    assert record["over_high"] > 0
    assert record["oom_kills"] == 0
    assert record["reclaimed_bytes"] > 0
    assert record["stalls_of"] == "cgroup"


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.glob("**/dualblade-*")]


def test_from_the_top(drive: Path, tmp_path: Path) -> None:
    """Where processes and children may be in one cgroup, as nowhere else."""
    record = worked(TOP, drive, tmp_path)
    check(record)
    assert record["description"] == "a v2 cgroup below its former one"
    assert left_behind(TOP) == []


@pytest.mark.parametrize("uid", [0, NOBODY])
def test_alone_in_a_delegated_cgroup(tree: Path, drive: Path, tmp_path: Path, uid: int) -> None:
    job = leaf(tree, uid=uid)
    record = worked(job, drive, tmp_path, uid)
    check(record)
    assert record["description"] == "a v2 cgroup below its former one"
    assert left_behind(tree) == []
    assert (job / "cgroup.subtree_control").read_text().split() == []


def test_with_company_in_a_delegated_subtree(tree: Path, drive: Path, tmp_path: Path) -> None:
    """A shell and what it starts: the run moves beside it, and the shell stays."""
    give(tree, NOBODY)
    job = leaf(tree, uid=NOBODY)
    shell = os.fork()
    if not shell:
        while True:
            time.sleep(1)
    try:
        (job / "cgroup.procs").write_text(str(shell))
        record = worked(job, drive, tmp_path, NOBODY)
        check(record)
        assert record["description"] == "a v2 cgroup beside its former one"
        assert (job / "cgroup.procs").read_text().split() == [str(shell)]
    finally:
        os.kill(shell, 9)
        os.waitpid(shell, 0)
    wait_until("the shell has left", lambda: not (job / "cgroup.procs").read_text())
    assert left_behind(tree) == []


def test_without_delegation_it_says_why_and_changes_nothing(tree: Path, tmp_path: Path) -> None:
    from dualblade.errors import EnforcementError
    from dualblade.host.budget_cgroup import BudgetCgroup

    job = leaf(tree)

    def refused() -> str:
        try:
            BudgetCgroup.enter()
        except EnforcementError as error:
            return f"{error} / {error.hint}"
        return "entered"

    answer = tmp_path / "answer"
    inside(job, refused, answer, NOBODY)
    said = json.loads(answer.read_text())
    assert f"{job} is not writable by this user" in said
    assert "chown -R 65534" in said
    assert sorted(path.name for path in tree.glob("*/")) == ["job"]


def test_the_hint_for_a_user_is_enough(drive: Path, tmp_path: Path) -> None:
    """What it tells root to do gives the user's shell, and what it starts, a delegated subtree."""
    from dualblade.host.cgroup import own_cgroup
    from dualblade.host.enforce import _v2_hint, find_way
    from dualblade.host.sysfs import Host

    made = TOP / f"user-{NOBODY}"

    def as_nobody() -> list[str | None]:
        os.setuid(NOBODY)
        own = own_cgroup(Host())
        assert own is not None
        hint = _v2_hint(Host(), own).removeprefix("sudo ")
        return [hint, None]

    answer = tmp_path / "hint"
    inside(TOP, as_nobody, answer)
    hint = json.loads(answer.read_text())[0]
    assert str(os.getpid()) in hint  # the parent of who asked, this process
    try:
        assert os.system(hint) == 0
        answer = tmp_path / "way"
        inside(made / "shell", lambda: find_way(Host()).parent, answer, NOBODY)
        assert json.loads(answer.read_text()) == str(made)
        record = worked(made / "shell", drive, tmp_path, NOBODY)
        check(record)
    finally:
        (TOP / "cgroup.procs").write_text(str(os.getpid()))
        for folder in sorted(made.glob("**/"), reverse=True):
            folder.rmdir()


def test_a_limit_lowered_while_it_runs(tree: Path, drive: Path, tmp_path: Path) -> None:
    """It is obeyed without a kill, whoever plans sees it, and it is not raised again."""
    from cgroup_work import facts, open_cold, read_through

    from dualblade.host.budget_cgroup import BudgetCgroup
    from dualblade.host.meminfo import process_memory
    from dualblade.host.sysfs import Host

    job = leaf(tree)
    told = tmp_path / "told"

    def child() -> None:
        (job / "cgroup.procs").write_text(str(os.getpid()))
        memory = process_memory(Host())
        budget = 2 * BUDGET + memory.anon + memory.shmem
        with open_cold(str(drive)) as file, BudgetCgroup.held_to(budget) as group, told.open("w") as out:
            for number in range(4):
                read_through(file, group)
                out.write(json.dumps(facts(group)) + "\n")
                if not number:  # as somebody else might
                    (job / f"dualblade-{os.getpid()}/memory.max").write_text(str(BUDGET))

    assert in_child(child) == 0
    before, *_, after = map(json.loads, told.read_text().splitlines())
    assert before["usage"] > BUDGET >= after["usage"]
    assert after["limit_bytes"] == BUDGET
    assert after["headroom"] <= BUDGET < before["headroom"]
    assert after["oom_kills"] == 0


def test_high_lies_below_max_and_is_what_counts(tree: Path, drive: Path, tmp_path: Path) -> None:
    """Reclaim begins before the limit, whose own counter stays where it was."""
    record = worked(leaf(tree), drive, tmp_path)
    check(record)
    assert record["over_limit"] == 0
    assert record["usage"] <= record["limit_bytes"] - 4 * MIB
    assert record["headroom"] < record["limit_bytes"] - 8 * MIB


def test_pressure_of_a_starved_cgroup_is_counted(tree: Path, drive: Path, tmp_path: Path) -> None:
    from cgroup_work import work

    answer = tmp_path / "answer"
    job = leaf(tree)
    inside(job, lambda: work(24 * MIB, str(drive), anon=8 * MIB, passes=3), answer)
    record = json.loads(answer.read_text())
    assert record["stall_some_s"] > 0
    assert record["oom_kills"] == 0


@pytest.mark.slow  # torch alone takes a minute and more to load
def test_a_whole_run(tree: Path, tmp_path: Path) -> None:
    from dualblade.cli.main import main

    words = [
        "run", "--model", "tiny", "--prompt-len", "40", "--max-new-tokens", "3", "--mem-budget", "640M",
        "--enforce", "--nvme", "mem:64M", "--kv-path", "direct", "--cache-dir", str(tmp_path),
        "--report", str(tmp_path / "report"),
    ]  # fmt: skip
    inside(leaf(tree), lambda: main(words), tmp_path / "code")
    assert (tmp_path / "code").read_text() == "0"
    memory = json.loads((tmp_path / "report").read_text())["memory"]
    assert memory["enforced"] is True
    assert memory["cgroup"]["version"] == 2
    assert memory["cgroup"]["oom_kills"] == 0
    assert memory["cgroup"]["decode_stall_ratio"] < 0.01
    assert memory["peak_bytes"] <= 640 * MIB
    assert left_behind(TOP) == []
