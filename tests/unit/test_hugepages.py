# SPDX-License-Identifier: Apache-2.0
"""Hugepages: reserved, read back and given back; on machines of two nodes, and on this one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dualblade.cli.main import main as program
from dualblade.errors import UsageError
from dualblade.host import __main__ as tool
from dualblade.host import hugepages
from dualblade.host.command import host_command
from dualblade.host.hugepages import PAGE, RECORD, Added
from dualblade.host.hugepages_boot import SYSCTL, TMPFILES
from dualblade.host.sysfs import Host
from dualblade.units import GIB, KIB, MIB

ROOT = Path(__file__).parents[2]
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
NODE = "/sys/devices/system/node/node{}/hugepages/hugepages-2048kB"
MEMINFO = "MemTotal: {} kB\nMemAvailable: {} kB\nHugepagesize: {} kB\n"


class Machine(Host):
    """A folder that answers as the kernel does: a pool grows as far as its node has memory, and does not
    shrink below the pages in use. frame: the pages that each node could give."""

    __slots__ = ("room", "used")

    def __init__(self, root: Path, room: list[int]):
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "room", room)
        object.__setattr__(self, "used", [0] * len(room))
        for node in range(len(room)):
            self.show(node, 0)
            self.put(f"/sys/devices/system/node/node{node}/meminfo", self.node_meminfo(node, 8 * GIB))
        self.put("/proc/meminfo", MEMINFO.format(16 * MIB, 12 * MIB, 2048))
        self.put(f"{POOL}/nr_hugepages", "0\n")

    @staticmethod
    def node_meminfo(node: int, free: int) -> str:
        fields = {"MemTotal": 8 * GIB, "MemFree": free, "Active(file)": 0, "Inactive(file)": 0}
        return "".join(f"Node {node} {name}: {value // KIB:8} kB\n" for name, value in fields.items())

    def put(self, path: str, text: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def show(self, node: int, kept: int) -> None:
        total = max(kept, self.used[node])
        numbers = {"nr": total, "free": total - self.used[node], "surplus": total - kept}
        for name, number in numbers.items():
            self.put(f"{NODE.format(node)}/{name}_hugepages", f"{number}\n")

    def kept(self, node: int) -> int:
        folder = NODE.format(node)
        return self.read_int(f"{folder}/nr_hugepages") - self.read_int(f"{folder}/surplus_hugepages")

    def write_text(self, path: str, text: str) -> None:
        assert path.endswith("/nr_hugepages")
        if match := re.search(r"/node(\d+)/", path):
            node = int(match[1])
            self.show(node, min(int(text), self.room[node]))
            return
        shares = [self.kept(node) for node in range(len(self.room))]
        while sum(shares) > int(text):
            shares[shares.index(max(shares))] -= 1
        while sum(shares) < int(text) and any(map(int.__lt__, shares, self.room)):
            shares[min((s, n) for n, s in enumerate(shares) if s < self.room[n])[1]] += 1
        for node, share in enumerate(shares):
            self.show(node, share)

    @property
    def all_kept(self) -> list[int]:
        return [self.kept(node) for node in range(len(self.room))]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Two nodes with room for 1000 pages each."""
    return Machine(tmp_path, [1000, 1000])


def call(host: Host, *words: str) -> int:
    return tool.main(["hugepages", *words], host)


@pytest.fixture
def record(machine: Machine, capsys: pytest.CaptureFixture[str]) -> Any:
    def ask(*words: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert call(machine, *words, "--json") == code
        return json.loads(capsys.readouterr().out)

    return ask


# show ---------------------------------------------------------------------------------------


def test_every_node_and_page_size_is_shown(machine: Machine, record: Any) -> None:
    huge = "/sys/devices/system/node/node1/hugepages/hugepages-1048576kB"
    for name, number in (("nr", 2), ("free", 1), ("surplus", 0)):
        machine.put(f"{huge}/{name}_hugepages", f"{number}\n")
    machine.show(0, 512)
    found = [(p["node"], p["page_bytes"], p["total_bytes"], p["free_bytes"]) for p in record()["pools"]]
    assert found == [(0, PAGE, GIB, GIB), (1, PAGE, 0, 0), (1, GIB, 2 * GIB, GIB)]
    assert [pool["node"] for pool in record("--node", "1")["pools"]] == [1, 1]


def test_a_kernel_without_numa_has_one_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("nr", "free", "surplus"):
        file = tmp_path / f"{POOL[1:]}/{name}_hugepages"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("0\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO.format(16 * MIB, 12 * MIB, 2048))
    host = Host(tmp_path)
    assert call(host) == 0
    assert capsys.readouterr().out == "machine, pages of 2 MiB: none\n"
    assert call(host, "--reserve", "8M") == 0
    assert host.read_int(f"{POOL}/nr_hugepages") == 4
    assert call(host, "--release") == 0
    assert host.read_int(f"{POOL}/nr_hugepages") == 0


def test_a_kernel_without_hugepages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(Host(tmp_path)) == 0
    assert capsys.readouterr().out == "this kernel has no hugepages\n"
    assert call(Host(tmp_path), "--reserve", "1G") == 1
    assert "CONFIG_HUGETLBFS" in capsys.readouterr().err


# reserve ------------------------------------------------------------------------------------


def test_reserve_means_that_the_pool_holds_so_much(machine: Machine, record: Any) -> None:
    machine.show(0, 100)
    change = record("--reserve", "1G")["change"]
    assert change == {"before_bytes": 100 * PAGE, "after_bytes": GIB, "wanted_bytes": GIB}
    assert sum(machine.all_kept) == 512
    assert record("--reserve", "512M")["change"]["after_bytes"] == GIB  # never made smaller
    assert sum(machine.all_kept) == 512


def test_reserve_rounds_up_to_whole_pages(machine: Machine, record: Any) -> None:
    record("--reserve", "3M", "--node", "1")
    assert machine.all_kept == [0, 2]


def test_a_node_of_its_own(machine: Machine, record: Any) -> None:
    found = record("--reserve", "1G", "--node", "1")
    assert machine.all_kept == [0, 512]
    assert [pool["total_bytes"] for pool in found["pools"]] == [GIB]
    with pytest.raises(UsageError, match="no NUMA node 7"):
        hugepages.reserve(machine, GIB, 7, {})


def test_less_than_asked_for_is_kept_and_told(
    machine: Machine, capsys: pytest.CaptureFixture[str], record: Any
) -> None:
    machine.room[:] = [300, 100]
    assert call(machine, "--reserve", "1G") == 1
    shown = capsys.readouterr()
    assert "reserved: 800 MiB more, as read back" in shown.out
    assert "error: the kernel granted 800 MiB of 1 GiB in hugepages" in shown.err
    assert "compact_memory" in shown.err
    assert host_command("hugepages", "--release") in shown.err
    assert machine.all_kept == [300, 100]
    found = record("--reserve", "1G", code=1)
    assert (found["ok"], found["change"]["after_bytes"]) == (False, 800 * MIB)


def test_a_refusal_is_one_record_too(machine: Machine, record: Any) -> None:
    found = record("--reserve", "100G", code=1)
    assert found["ok"] is False
    assert "too much" in found["error"]


def test_pages_on_loan_do_not_count(machine: Machine, record: Any) -> None:
    machine.used[0] = 600
    machine.show(0, 100)  # 500 of the 600 in use go when they are freed
    assert record("--reserve", "1G")["change"]["after_bytes"] == GIB
    assert sum(machine.all_kept) == 512


@pytest.mark.parametrize(("words", "where"), [([], "available, and"), (["--node", "1"], "on node 1, and")])
def test_the_machine_is_left_memory_to_run_in(
    machine: Machine, capsys: pytest.CaptureFixture[str], words: list[str], where: str
) -> None:
    machine.put("/proc/meminfo", MEMINFO.format(16 * MIB, MIB, 2048))
    machine.put("/sys/devices/system/node/node1/meminfo", machine.node_meminfo(1, GIB))
    assert call(machine, "--reserve", "1G", *words) == 1
    assert where in capsys.readouterr().err
    assert machine.all_kept == [0, 0]
    assert call(machine, "--reserve", "100M", *words) == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--persist"], "goes with --reserve"),
        (["--release", "--reserve", "1G"], "gives back all"),
        (["--release", "--node", "0"], "gives back all"),
        (["--reserve", "8"], "is not a size"),
    ],
)
def test_usage(machine: Machine, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert call(machine, *words) == 2
    shown = capsys.readouterr()
    assert says in shown.err
    assert shown.out == ""
    assert machine.all_kept == [0, 0]


# give back ----------------------------------------------------------------------------------


def test_release_takes_what_was_added_and_no_more(machine: Machine, record: Any) -> None:
    machine.show(0, 100)
    record("--reserve", "1G", "--node", "0")
    record("--reserve", "2G")
    assert sum(one["bytes"] for one in record()["added"]) == 2 * GIB - 100 * PAGE
    freed = record("--release")["change"]
    assert freed["before_bytes"] - freed["after_bytes"] == 2 * GIB - 100 * PAGE
    assert machine.all_kept == [100, 0]
    assert not machine.exists(RECORD)
    assert record("--release")["change"]["before_bytes"] == 100 * PAGE
    assert machine.all_kept == [100, 0]


@pytest.mark.parametrize(("now", "left"), [(900, 488), (400, 100), (50, 50)])
def test_release_minds_what_others_did_meanwhile(machine: Machine, record: Any, now: int, left: int) -> None:
    machine.show(0, 100)
    record("--reserve", "1G", "--node", "0")
    machine.show(0, now)
    record("--release")
    assert machine.all_kept == [left, 0]


def test_pages_in_use_go_later(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(machine, "--reserve", "1G", "--node", "0") == 0
    machine.used[0] = 5
    capsys.readouterr()
    assert call(machine, "--release") == 0
    assert "10 MiB is in use, and goes when its process ends" in capsys.readouterr().out
    assert machine.all_kept == [0, 0]


def test_a_damaged_record_is_not_guessed_at(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.put(RECORD, "{")
    machine.show(0, 10)
    assert call(machine, "--release") == 1
    assert f"rm {RECORD}" in capsys.readouterr().err
    assert machine.all_kept == [10, 0]


@pytest.mark.parametrize(("before", "pages", "kept", "left"), [(0, 5, 5, 0), (3, 5, 20, 15), (3, 5, 2, 2)])
def test_left_of(before: int, pages: int, kept: int, left: int) -> None:
    assert Added(before, pages).left_of(kept) == left


# at boot ------------------------------------------------------------------------------------


def boot(machine: Machine) -> None:
    """What /run held is gone, and the files are carried out."""
    machine.path(RECORD).unlink(missing_ok=True)
    for node in range(len(machine.room)):
        machine.show(node, 0)
    if machine.exists(SYSCTL):
        number = re.search(r"^vm.nr_hugepages = (\d+)$", machine.read_text(SYSCTL), re.MULTILINE)
        assert number
        machine.write_text(f"{POOL}/nr_hugepages", number[1])
    if machine.exists(TMPFILES):
        for line in machine.read_text(TMPFILES).splitlines():
            if not line.startswith("#"):
                kind, path, *_, value = line.split()
                assert kind == "w"
                machine.write_text(path, value)


def test_persist_for_the_machine(machine: Machine, record: Any) -> None:
    made = record("--reserve", "1G", "--persist")
    assert made["written"] == SYSCTL
    assert made["persisted"] == [{"node": None, "pages": 512, "file": SYSCTL}]
    assert machine.path(SYSCTL).stat().st_mode & 0o777 == 0o644
    boot(machine)
    assert sum(machine.all_kept) == 512
    assert record("--release")["removed"] == [SYSCTL]
    assert machine.all_kept == [0, 0]
    boot(machine)
    assert machine.all_kept == [0, 0]


def test_persist_for_nodes(machine: Machine, record: Any) -> None:
    machine.put("/run/systemd/system/x", "")
    record("--reserve", "1G", "--node", "0", "--persist")
    record("--reserve", "512M", "--node", "1", "--persist")
    made = record("--reserve", "1536M", "--node", "0", "--persist")
    assert [(one["node"], one["pages"]) for one in made["persisted"]] == [(0, 768), (1, 256)]
    boot(machine)
    assert machine.all_kept == [768, 256]
    assert record("--release")["removed"] == [TMPFILES]
    assert machine.all_kept == [0, 0]


def test_more_is_reserved_after_a_boot(machine: Machine, record: Any) -> None:
    record("--reserve", "1G", "--persist")
    boot(machine)
    record("--reserve", "2G", "--persist")
    boot(machine)
    assert sum(machine.all_kept) == 1024
    record("--reserve", "3G")
    record("--release")
    assert machine.all_kept == [0, 0]


def test_booting_does_not_shrink_a_larger_pool(machine: Machine, record: Any) -> None:
    machine.show(1, 700)
    assert record("--reserve", "1G", "--persist")["persisted"][0]["pages"] == 700
    boot(machine)
    record("--release")
    assert sum(machine.all_kept) == 700  # none of them was ours


def test_short_now_whole_at_boot(machine: Machine, record: Any) -> None:
    machine.room[:] = [100, 100]
    record("--reserve", "1G", "--persist", code=1)
    machine.room[:] = [1000, 1000]
    boot(machine)
    assert sum(machine.all_kept) == 512


@pytest.mark.parametrize(
    ("path", "text", "words", "says"),
    [
        ("/etc/sysctl.d/10-db.conf", "vm.nr_hugepages=64\n", [], "10-db.conf sets vm.nr_hugepages = 64"),
        ("/etc/sysctl.conf", "# x\nvm/nr_hugepages = 9\n", [], "sysctl.conf sets vm.nr_hugepages = 9"),
        ("/proc/meminfo", MEMINFO.format(16 * MIB, 12 * MIB, 1048576), [], "another size than 2 MiB"),
        ("/etc/hostname", "x", ["--node", "0"], "without systemd"),
    ],
)
def test_persist_that_would_not_hold_is_refused_first(
    machine: Machine, capsys: pytest.CaptureFixture[str], path: str, text: str, words: list[str], says: str
) -> None:
    machine.put(path, text)
    assert call(machine, "--reserve", "1G", "--persist", *words) == 1
    shown = capsys.readouterr()
    assert says in shown.err
    assert "hint: " in shown.err
    assert machine.all_kept == [0, 0]
    assert not machine.exists(SYSCTL)
    assert not machine.exists(TMPFILES)


# who may ------------------------------------------------------------------------------------


def test_who_is_not_root_gets_the_whole_command(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Host, path: str, text: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Machine, "write_text", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert call(machine, "--reserve", "1G", "--node", "0") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: the pool of hugepages is root's to change"
    assert not machine.exists(RECORD)
    assert hint.startswith("hint: sudo ")
    assert hint.endswith(f"{sys.executable} -P -m dualblade.host hugepages --reserve 1G --node 0")


def test_a_read_only_sysfs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Host, path: str, text: str) -> None:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(Machine, "write_text", refuse)
    assert call(machine, "--reserve", "1G") == 1
    assert "in a container the pool is the host's" in capsys.readouterr().err
    assert machine.all_kept == [0, 0]


# this machine -------------------------------------------------------------------------------


@pytest.fixture
def own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What was reserved on this machine before is none of the test's."""
    path = tmp_path / "hugepages.json"
    monkeypatch.setattr(hugepages, "RECORD", str(path))
    return path


@pytest.mark.needs("hugepage_pool")
@pytest.mark.parametrize("words", [[], ["--node", "0"]])
def test_reserve_and_release_on_this_machine(
    own_record: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    host = Host()
    before = sum(pool.kept for pool in hugepages.pools_of(host, None))
    wanted = f"{2 * before + 24}M"
    try:
        assert program(["hugepages", "--reserve", wanted, *words, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["change"]["after_bytes"] == (before + 12) * PAGE
        assert sum(pool.kept for pool in hugepages.pools_of(host, None)) == before + 12
        assert json.loads(own_record.read_text())["added"] != []
    finally:
        assert program(["hugepages", "--release"]) == 0
    assert sum(pool.kept for pool in hugepages.pools_of(host, None)) == before
    assert not own_record.exists()


def test_the_script_runs_with_nothing_installed(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    script = ROOT / "scripts" / "setup_hugepages.sh"
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(bare)}
    done = subprocess.run(
        [script, "--json"], env=environment, cwd="/", capture_output=True, text=True, check=True
    )
    assert "pools" in json.loads(done.stdout)


def test_the_command_of_a_hint_can_be_pasted(tmp_path: Path) -> None:
    command = host_command("hugepages", "--json", root=False)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "pools" in json.loads(done.stdout)
