# SPDX-License-Identifier: Apache-2.0
"""Where a run may have a cgroup of its own, and what it writes there: cgroup trees under tmp_path."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dualblade.errors import EnforcementError
from dualblade.host import enforce, surroundings, systemd_scope
from dualblade.host.budget_cgroup import BudgetCgroup, clear_leftovers, margin
from dualblade.host.cgroup import memory_cgroups
from dualblade.host.checks import OK, WARN
from dualblade.host.enforce import find_way
from dualblade.host.sysfs import Host
from dualblade.residency import MemorySample
from dualblade.units import GIB, MIB

TOP = "/sys/fs/cgroup"
V1_TOP = f"{TOP}/memory"
V1_NONE = 9223372036854771712
MOUNT = {
    1: f"35 31 0:32 / {V1_TOP} rw - cgroup cgroup rw,memory",
    2: f"30 23 0:26 / {TOP} rw - cgroup2 cgroup2 rw",
}
PID = os.getpid()
V2_FILES = {
    "memory.max": "max", "memory.high": "max", "memory.current": "0", "memory.peak": "0",
    "memory.stat": "anon 0\nworkingset_refault_file 0\npgscan 0\npgsteal 0",
    "memory.events": "high 0\nmax 0\noom_kill 0",
    "memory.pressure": "some avg10=0.00 total=0\nfull avg10=0.00 total=0",
}  # fmt: skip
V1_FILES = {
    "memory.limit_in_bytes": str(V1_NONE), "memory.soft_limit_in_bytes": str(V1_NONE),
    "memory.usage_in_bytes": "0", "memory.max_usage_in_bytes": "0", "memory.failcnt": "0",
    "memory.stat": "cache 0\ntotal_workingset_refault_file 0", "memory.oom_control": "oom_kill 0",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kernel(Host):
    """Cgroup files as a kernel keeps them: they come with the directory and go with it."""

    version: int = 2
    locked: set[str] = field(default_factory=set)  # paths that this user may not write
    busy: set[str] = field(default_factory=set)  # writes to these fail with EBUSY
    writes: list[tuple[str, str]] = field(default_factory=list)

    def put(self, path: str, text: str | int) -> None:
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def get(self, path: str) -> str:
        return self.read_text(path).strip()

    def cgroup(
        self, directory: str, controllers: str = "memory", procs: str = "", children: str = ""
    ) -> None:
        files = V1_FILES if self.version == 1 else V2_FILES if "memory" in controllers else {}
        if self.version == 2:
            files = files | {
                "cgroup.controllers": controllers, "cgroup.subtree_control": children,
                "cgroup.events": "populated 1",
            }  # fmt: skip
        for name, text in (files | {"cgroup.procs": procs}).items():
            self.put(f"{directory}/{name}", text)

    def writable(self, path: str) -> bool:
        return self.exists(path) and path not in self.locked

    def write_text(self, path: str, text: str) -> None:
        if path in self.busy:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        Host.write_text(self, path, text)
        self.writes.append((path, text))
        directory, _, name = path.rpartition("/")
        if name == "cgroup.procs":
            for procs in self.path(TOP).rglob("cgroup.procs"):
                left = [pid for pid in procs.read_text().split() if pid != text]
                procs.write_text("\n".join(left) + "\n")
            self.put(path, text)
            where = directory.removeprefix(V1_TOP if self.version == 1 else TOP) or "/"
            self.put("/proc/self/cgroup", f"4:memory:{where}" if self.version == 1 else f"0::{where}")
        if name == "cgroup.subtree_control":
            self.put(path, "memory" if text == "+memory" else "")

    def make_cgroup(self, path: str) -> None:
        if self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self.cgroup(path)

    def remove_cgroup(self, path: str) -> None:
        if self.get(f"{path}/cgroup.procs"):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        for file in self.path(path).iterdir():
            file.unlink()
        self.path(path).rmdir()


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[int, str], Kernel]:
    """kernel(version, cgroup of this process)"""

    def make(version: int, cgroup: str) -> Kernel:
        host = Kernel(tmp_path, version)
        host.put("/proc/self/mountinfo", MOUNT[version])
        host.put("/proc/self/cgroup", f"4:memory:{cgroup}" if version == 1 else f"0::{cgroup}")
        host.put("/proc/self/status", "RssAnon: 20480 kB\nRssFile: 9 kB\nRssShmem: 1024 kB")
        host.path("/proc/1").mkdir()
        return host

    return make


def v2_machine(kernel: Callable[[int, str], Kernel], procs: str = str(PID)) -> Kernel:
    """Top, /app and /app/shell, in which this process is."""
    host = kernel(2, "/app/shell")
    host.cgroup(TOP, children="memory")
    host.path(f"{TOP}/cgroup.events").unlink()
    host.cgroup(f"{TOP}/app", children="memory")
    host.cgroup(f"{TOP}/app/shell", procs=procs)
    return host


def v1_machine(kernel: Callable[[int, str], Kernel]) -> Kernel:
    host = kernel(1, "/jobs")
    host.cgroup(V1_TOP)
    host.put(f"{V1_TOP}/release_agent", "")
    host.cgroup(f"{V1_TOP}/jobs", procs=str(PID))
    return host


# where --------------------------------------------------------------------------------------


def test_v1_below_the_own(kernel) -> None:
    host = v1_machine(kernel)
    way = find_way(host)
    assert (way.parent, way.enable) == (f"{V1_TOP}/jobs", False)
    host.locked.add(f"{V1_TOP}/jobs")
    with pytest.raises(EnforcementError, match="jobs is not writable by this user") as caught:
        find_way(host)
    assert caught.value.hint


def test_v2_alone_in_the_own_means_below_it(kernel) -> None:
    way = find_way(v2_machine(kernel))
    assert (way.parent, way.enable, way.disable) == (f"{TOP}/app/shell", True, True)


def test_v2_with_company_means_beside_it(kernel) -> None:
    """v2 gives the memory controller to no child of a cgroup that holds processes."""
    way = find_way(v2_machine(kernel, procs=f"{PID}\n77"))
    assert (way.parent, way.enable, way.disable) == (f"{TOP}/app", False, False)


def test_v2_the_top_may_hold_processes_and_children(kernel) -> None:
    host = kernel(2, "/")
    host.cgroup(TOP, procs=f"{PID}\n77")
    host.path(f"{TOP}/cgroup.events").unlink()
    way = find_way(host)
    assert (way.parent, way.enable, way.disable) == (TOP, True, False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda host: host.locked.update({f"{TOP}/app"}), "2 other processes.*app is not writable either"),
        (lambda host: host.put(f"{TOP}/app/shell/memory.max", GIB), "would escape the limit"),
        (lambda host: host.put(f"{TOP}/app/cgroup.subtree_control", "pids"), "gives its children no memory"),
    ],
)
def test_v2_refusals_say_why(kernel, change: Callable[[Kernel], object], reason: str) -> None:
    host = v2_machine(kernel, procs=f"{PID}\n77\n78")
    change(host)
    with pytest.raises(EnforcementError, match=reason):
        find_way(host)


def test_v2_beside_the_own_is_systemds_business_where_it_runs(kernel) -> None:
    host = v2_machine(kernel, procs=f"{PID}\n77")
    host.path(enforce.SYSTEMD).mkdir(parents=True)
    with pytest.raises(EnforcementError, match="only systemd makes cgroups"):
        find_way(host)


def test_a_scope_without_a_memory_controller_is_refused(kernel) -> None:
    host = kernel(2, f"/user/dualblade-{PID}.scope")
    host.cgroup(f"{TOP}/user/dualblade-{PID}.scope", controllers="pids", procs=str(PID))
    with pytest.raises(EnforcementError, match="no memory controller") as caught:
        find_way(host)
    assert "Delegate=memory" in str(caught.value.hint)


def test_hints_are_for_the_user_who_asks(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    host = v2_machine(kernel, procs=f"{PID}\n77")
    host.locked.update({f"{TOP}/app", f"{TOP}/app/shell"})

    def hint() -> str:
        with pytest.raises(EnforcementError) as caught:
            find_way(host)
        return str(caught.value.hint)

    monkeypatch.setattr(enforce.os, "geteuid", lambda: 0)
    assert "docker run --memory" in hint()  # root who may not write: a container
    monkeypatch.setattr(enforce.os, "geteuid", lambda: 1000)
    assert "chown -R" in hint()
    assert str(os.getppid()) in hint()
    host.path(enforce.SYSTEMD).mkdir(parents=True)
    assert hint().startswith("systemd-run --user --scope -p Delegate=yes ")


def test_without_memory_cgroups(tmp_path: Path) -> None:
    with pytest.raises(EnforcementError, match="no memory cgroup") as caught:
        find_way(Host(tmp_path))
    assert "cgroup_enable=memory" in str(caught.value.hint)


def test_doctor_says_whether_it_would_work(kernel) -> None:
    host = v2_machine(kernel)
    assert surroundings.enforcement(host).state == OK
    host.locked.update({f"{TOP}/app", f"{TOP}/app/shell"})
    found = surroundings.enforcement(host)
    assert found.state == WARN
    assert "shell is not writable" in found.detail
    assert found.fix


# in and out ---------------------------------------------------------------------------------


def test_v1_in_and_out(kernel) -> None:
    host = v1_machine(kernel)
    before = sorted(host.listdir(f"{V1_TOP}/jobs"))
    with BudgetCgroup.enter(host) as group:
        at = f"{V1_TOP}/jobs/dualblade-{PID}"
        assert group.own.directory == at
        assert host.get(f"{at}/cgroup.procs") == str(PID)
        assert group.limit_bytes is None
        group.limit(GIB)
        assert group.limit_bytes == GIB - 21 * MIB == GIB - group.outside_bytes
        assert host.get(f"{at}/memory.soft_limit_in_bytes") == str(
            group.limit_bytes - margin(group.limit_bytes)
        )
        assert memory_cgroups(host)[0].headroom == group.limit_bytes - margin(group.limit_bytes)
    assert host.get(f"{V1_TOP}/jobs/cgroup.procs") == str(PID)
    assert sorted(host.listdir(f"{V1_TOP}/jobs")) == before


def test_v2_in_and_out(kernel) -> None:
    host = v2_machine(kernel)
    with BudgetCgroup.enter(host) as group:
        at = f"{TOP}/app/shell/dualblade-{PID}"
        group.limit(GIB)
        limit = GIB - 21 * MIB
        assert (host.get(f"{at}/memory.max"), host.get(f"{at}/memory.high")) == (
            str(limit), str(limit - margin(limit)),
        )  # fmt: skip
        order = [re.sub(".*/", "", path) for path, _ in host.writes if path.startswith(at)]
        assert order[-2:] == ["memory.high", "memory.max"]  # reclaim first, the killer after it
    procs = [(path, text) for path, text in host.writes if not path.startswith(at)]
    assert procs == [
        (f"{TOP}/app/shell/cgroup.subtree_control", "+memory"),
        (f"{TOP}/app/shell/cgroup.subtree_control", "-memory"),
        (f"{TOP}/app/shell/cgroup.procs", str(PID)),
    ]
    assert not host.exists(at)


def test_a_failure_half_way_leaves_all_as_it_was(kernel) -> None:
    host = v2_machine(kernel)
    host.busy.add(f"{TOP}/app/shell/cgroup.subtree_control")
    with pytest.raises(EnforcementError, match="cannot be made: Device or resource busy"):
        BudgetCgroup.enter(host)
    assert host.get(f"{TOP}/app/shell/cgroup.procs") == str(PID)
    assert not host.exists(f"{TOP}/app/shell/dualblade-{PID}")


def test_a_limit_that_may_not_be_set_is_found_on_entry(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    host = v1_machine(kernel)
    host.busy.add(f"{V1_TOP}/jobs/dualblade-{PID}/memory.limit_in_bytes")
    with pytest.raises(EnforcementError, match="cannot be made"):
        BudgetCgroup.held_to(GIB, host)
    assert host.get(f"{V1_TOP}/jobs/cgroup.procs") == str(PID)


def test_what_killed_runs_left_is_cleared(kernel) -> None:
    host = v1_machine(kernel)
    for name, procs in (
        ("dualblade-1", ""),
        ("dualblade-999999", ""),
        ("dualblade-999998", "55"),
        ("other-7", ""),
    ):
        host.cgroup(f"{V1_TOP}/jobs/{name}", procs=procs)
    assert clear_leftovers(host, f"{V1_TOP}/jobs") == ["dualblade-999999"]
    left = [name for name in host.listdir(f"{V1_TOP}/jobs") if "-" in name]
    assert left == ["dualblade-1", "dualblade-999998", "other-7"]  # a live process, a child of one, not ours


def test_the_controller_stays_where_another_run_needs_it(kernel) -> None:
    host = v2_machine(kernel)
    with BudgetCgroup.enter(host):
        host.cgroup(f"{TOP}/app/shell/dualblade-1", procs="1")
    assert host.get(f"{TOP}/app/shell/cgroup.subtree_control") == "memory"


# the limit ----------------------------------------------------------------------------------


def held(hugetlb: int) -> MemorySample:
    return MemorySample(hugetlb=hugetlb)


def test_hugepages_come_off_the_limit(kernel) -> None:
    with BudgetCgroup.held_to(GIB, v2_machine(kernel)) as group:
        full = group.limit_bytes
        group.follow(held(128 * MIB))
        assert group.limit_bytes == full - 128 * MIB
        group.follow(held(64 * MIB))
        assert group.limit_bytes == full - 64 * MIB
        assert group.peak_bytes == group.outside_bytes + 128 * MIB


def test_hugepages_that_the_cgroup_is_charged_with_do_not(kernel) -> None:
    host = v2_machine(kernel)
    host.put("/proc/self/mountinfo", MOUNT[2] + ",memory_hugetlb_accounting")
    with BudgetCgroup.held_to(GIB, host) as group:
        full = group.limit_bytes
        group.follow(held(128 * MIB))
        assert group.limit_bytes == full
        assert group.peak_bytes == group.outside_bytes


def test_what_somebody_lowered_is_not_raised_again(kernel) -> None:
    host = v2_machine(kernel)
    with BudgetCgroup.held_to(GIB, host) as group:
        host.put(f"{group.own.directory}/memory.max", 300 * MIB)
        group.follow(held(64 * MIB))
        assert group.limit_bytes == 300 * MIB


def test_v2_max_never_goes_below_what_is_in_use(kernel) -> None:
    """The kernel would kill; `high` reclaims meanwhile, and the next call tries again."""
    host = v2_machine(kernel)
    with BudgetCgroup.enter(host) as group:
        at = group.own.directory
        host.put(f"{at}/memory.current", 2 * GIB)
        group.limit(GIB)
        assert group.limit_bytes > 2 * GIB
        assert int(host.get(f"{at}/memory.high")) < GIB
        host.put(f"{at}/memory.current", GIB // 2)
        group.follow(held(0))
        assert group.limit_bytes == GIB - group.outside_bytes


def test_v1_a_limit_below_what_is_in_use_is_set_later(kernel) -> None:
    host = v1_machine(kernel)
    with BudgetCgroup.enter(host) as group:
        file = f"{group.own.directory}/memory.limit_in_bytes"
        host.busy.add(file)
        group.limit(GIB)
        assert group.limit_bytes is None
        host.busy.clear()
        group.follow(held(0))
        assert group.limit_bytes == GIB - group.outside_bytes


def test_the_record(kernel) -> None:
    host = v2_machine(kernel)
    with BudgetCgroup.held_to(GIB, host) as group:
        at = group.own.directory
        group.decode_begins()
        host.put(f"{at}/memory.events", "high 7\nmax 2\noom_kill 0")
        host.put(f"{at}/memory.stat", "anon 1\nworkingset_refault_file 3\npgscan 9\npgsteal 5")
        host.put(f"{at}/memory.pressure", "some avg10=0.00 total=400000\nfull avg10=0.00 total=100000")
        host.put(f"{at}/memory.peak", 900 * MIB)
        record = group.record(decode_s=10.0)
    page = os.sysconf("SC_PAGESIZE")
    assert record["version"] == 2
    assert "/" not in record["description"]
    assert (record["over_high"], record["over_limit"], record["oom_kills"]) == (7, 2, 0)
    assert (record["refault_bytes"], record["scanned_bytes"], record["reclaimed_bytes"]) == (
        3 * page, 9 * page, 5 * page,
    )  # fmt: skip
    assert record["stalls_of"] == "cgroup"
    assert record["decode_stall_some_s"] == pytest.approx(0.4)
    assert record["decode_stall_s"] == pytest.approx(0.1)
    assert record["decode_stall_ratio"] == pytest.approx(0.01)
    assert record["peak_bytes"] == 900 * MIB


def test_v1_takes_the_machines_pressure_and_says_so(kernel) -> None:
    host = v1_machine(kernel)
    host.put("/proc/pressure/memory", "some avg10=0.00 total=5\nfull avg10=0.00 total=3")
    with BudgetCgroup.held_to(GIB, host) as group:
        record = group.record()
    assert (record["stalls_of"], record["decode_stall_ratio"], record["scanned_bytes"]) == (
        "machine",
        None,
        None,
    )


def test_a_peak_from_before_the_limit_does_not_count(kernel) -> None:
    host = v2_machine(kernel)
    with BudgetCgroup.enter(host) as group:
        at = group.own.directory
        host.put(f"{at}/memory.peak", 3 * GIB)  # file pages of libraries, say
        host.put(f"{at}/memory.current", 200 * MIB)
        group.limit(GIB)
        host.put(f"{at}/memory.current", 300 * MIB)
        group.follow(held(0))
        assert group.record()["peak_bytes"] == 300 * MIB


# systemd ------------------------------------------------------------------------------------


def test_a_scope_made_for_this_process_is_used_as_it_is(kernel) -> None:
    host = kernel(2, f"/user/dualblade-{PID}.scope")
    host.cgroup(f"{TOP}/user/dualblade-{PID}.scope", procs=str(PID))
    at = f"{TOP}/user/dualblade-{PID}.scope"
    with BudgetCgroup.held_to(GIB, host) as group:
        assert (group.own.directory, group.outside_bytes, group.limit_bytes) == (at, 0, GIB)
    assert host.exists(at)  # systemd's to remove
    assert host.get(f"{at}/memory.max") == "max"


def test_systemd_is_asked_only_where_no_limit_is_escaped(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    host = v2_machine(kernel, procs=f"{PID}\n77")
    monkeypatch.setattr(Kernel, "program", lambda self, name: f"/usr/bin/{name}")
    assert not systemd_scope.scope_possible(host)
    host.path(enforce.SYSTEMD).mkdir(parents=True)
    assert systemd_scope.scope_possible(host)
    host.put(f"{TOP}/app/shell/memory.high", GIB)
    assert not systemd_scope.scope_possible(host)
    host.put(f"{TOP}/app/shell/memory.high", "max")
    monkeypatch.setenv("DUALBLADE_SCOPE", "1")  # this is the second start
    assert not systemd_scope.scope_possible(host)


def test_a_budget_too_small_to_plan_with_is_refused_in_words(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    host = v2_machine(kernel)
    monkeypatch.setattr(systemd_scope.os, "geteuid", lambda: 1000)
    command = systemd_scope.scope_command(host, 50 * MIB, ["python", "-m", "x"])
    assert command[1:4] == ["--user", "--scope", "--quiet"]
    assert f"MemoryMax={GIB}" in command
    assert command[-3:] == ["python", "-m", "x"]
