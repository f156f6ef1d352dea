# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup of a benchmark's run: on this machine where it hands them out, and in a tree of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dualblade.bench.limit import make_limit
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host
from dualblade.units import MIB

EATER = """
import sys
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host
MemoryCgroup(sys.argv[1], Host()).enter()
held = bytearray(int(sys.argv[2]))
held[::4096] = bytes(len(held[::4096]))
print("lived")
"""


@pytest.fixture
def limit() -> object:
    made = make_limit("dualblade-test-limit", 256 * MIB)
    if isinstance(made, str):
        pytest.skip(made)
    yield made
    made.remove()


def eat(limit: MemoryCgroup, nbytes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", EATER, limit.directory, str(nbytes)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.needs("root")
def test_it_holds_and_tells_the_peak(limit: MemoryCgroup) -> None:
    assert eat(limit, 100 * MIB).stdout == "lived\n"
    assert limit.peak is None or 100 * MIB <= limit.peak <= 256 * MIB
    assert eat(limit, 400 * MIB).returncode == -9
    limit.set(600 * MIB)
    assert eat(limit, 400 * MIB).stdout == "lived\n"


def tree(root: Path, files: dict[str, str]) -> Host:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(root)


def test_without_a_memory_controller_it_says_so(tmp_path: Path) -> None:
    """As a folder that was made in a cgroup v2 without the controller: the limit's file is not in it."""
    host = tree(tmp_path, {"sys/fs/cgroup/x": ""})
    made = make_limit("run", MIB, Host(tmp_path))
    assert isinstance(made, str)
    assert "hands out no memory limits" in made
    assert not host.exists("/sys/fs/cgroup/run"), "nothing is left behind"


def test_where_no_folder_can_be_made_it_says_so(tmp_path: Path) -> None:
    tree(tmp_path, {"sys/fs/cgroup": "a file, so there can be no folder in it"})
    made = make_limit("run", MIB, Host(tmp_path))
    assert isinstance(made, str)
    assert "no memory cgroup can be made in /sys/fs/cgroup" in made


@pytest.mark.parametrize(
    ("files", "limit_file"),
    [
        (("memory.limit_in_bytes", "memory.max_usage_in_bytes"), "memory.limit_in_bytes"),
        (("memory.max", "memory.peak"), "memory.max"),
    ],
)
def test_both_versions(files: tuple[str, str], limit_file: str, tmp_path: Path) -> None:
    group = {f"sys/fs/cgroup/run/{name}": "7" for name in (*files, "cgroup.procs")}
    made = MemoryCgroup("/sys/fs/cgroup/run", tree(tmp_path, group))
    made.set(5 * MIB)
    assert (tmp_path / "sys/fs/cgroup/run" / limit_file).read_text() == str(5 * MIB)
    assert made.peak == 7


V2 = {
    "proc/self/cgroup": "0::/user/session\n",
    "proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
    "sys/fs/cgroup/cgroup.controllers": "memory",
}


def level(path: str, limit: str) -> dict[str, str]:
    texts = {
        "cgroup.controllers": "memory", "cgroup.events": "", "memory.max": limit, "memory.high": "max",
        "memory.current": "0", "memory.stat": "",
    }  # fmt: skip
    return {f"sys/fs/cgroup/{path}/{name}": text for name, text in texts.items()}


@pytest.mark.parametrize(
    ("limit", "tried"), [("max", ["user/session", "user", ""]), ("900", ["user/session"])]
)
def test_it_looks_further_up_but_never_past_a_limit(limit: str, tried: list[str], tmp_path: Path) -> None:
    """In a tree of files no folder has a limit of its own, so that all that may be tried are."""
    host = tree(tmp_path, V2 | level("user", "max") | level("user/session", limit))
    seen: list[str] = []

    class Seeing(Host):
        def make_folder(self, path: str) -> None:
            seen.append(path.removeprefix("/sys/fs/cgroup").removesuffix("/run").strip("/"))
            super().make_folder(path)

    made = make_limit("run", MIB, Seeing(host.root))
    assert isinstance(made, str)
    assert "/sys/fs/cgroup/user/session hands out no memory limits" in made
    assert seen == tried
