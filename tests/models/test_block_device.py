# SPDX-License-Identifier: Apache-2.0
"""/dev/nvme1n1 while the kernel has it, played by a loop device: every command that takes a TARGET."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loop_devices import loop_device

from dualblade.cli.main import main
from dualblade.units import MIB

pytestmark = pytest.mark.needs("loop", "uring")


@pytest.fixture
def node(direct_dir: Path) -> Iterator[str]:
    """A drive of 320 MiB with nothing on it."""
    with loop_device(direct_dir / "disk.img", 320 * MIB) as made:
        yield made


def record(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


def program(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose memory is what the budget is for."""
    command = [sys.executable, "-m", "dualblade.cli.main", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_run_on_a_drive(node: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--prompt", "The list type", "--mem-budget", "1G", "--kv-path", "direct"]
    refused = program("run", *words, "--nvme", node)
    assert refused.returncode == 1
    assert f"hint: dualblade-spdk volume create {node}" in refused.stderr
    made = record(capsys, "volume", "create", node)
    assert made["serial"] == os.path.basename(node)
    ran = program("run", *words, "--nvme", node, "--max-new-tokens", "8", "--verify", "--json")
    assert ran.returncode == 0, ran.stderr
    done = json.loads(ran.stdout)
    assert (done["paths"]["direct"]["target"], done["paths"]["direct"]["engine"]) == (node, "uring")
    assert done["paths"]["direct"]["write_bytes"] > 0
    assert done["verified"]
    checked = record(capsys, "volume", "check", node)
    assert (checked["ok"], checked["uuid"], checked["extents"]) == (True, made["uuid"], 0)


def test_a_plan_touches_nothing(node: str) -> None:
    words = ["--model", "tiny", "--mem-budget", "1G", "--context", "3000", "--nvme", node]
    planned = program("plan", *words, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["kv_bytes"] > 0
    with open(node, "rb") as device:
        assert not any(device.read(MIB))


@pytest.mark.slow
@pytest.mark.needs("fio")
def test_a_drive_is_measured_beside_fio(
    node: str, direct_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "io", "--nvme", node, "--size", "256M", "--rounds", "1", "--cache-dir", str(direct_dir)]
    assert main(words) == 1
    assert "holds no volume of ours" in capsys.readouterr().err
    uuid = record(capsys, "volume", "create", node)["uuid"]
    found = record(capsys, *words)
    assert found["target"] == node
    assert min(found["engine_read_gib_s"], found["fio_read_gib_s"], found["fio_write_gib_s"]) > 0
    checked = record(capsys, "volume", "check", node)  # fio wrote to the extent alone
    assert (checked["ok"], checked["uuid"], checked["extents"]) == (True, uuid, 0)
    assert node in json.loads((direct_dir / "speeds.json").read_text())["direct"]


@pytest.mark.parametrize("command", ["create", "show", "check", "wipe"])
def test_a_mounted_drive_is_refused(
    node: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", node], check=True)
    point = tmp_path / "mounted"
    point.mkdir()
    subprocess.run(["mount", node, point], check=True)
    try:
        (point / "thesis").write_text("chapter 1")
        assert main(["volume", command, node]) == 1
        assert f"error: {node} is mounted or in use\n" in capsys.readouterr().err
        assert (point / "thesis").read_text() == "chapter 1"
    finally:
        subprocess.run(["umount", point], check=True)
    assert main(["volume", command, node]) == 1
    says = "blkid found" if command == "create" else "holds no volume of ours"
    assert says in capsys.readouterr().err


def test_a_drive_that_another_process_has(node: str, capsys: pytest.CaptureFixture[str]) -> None:
    record(capsys, "volume", "create", node)
    code = (
        "import sys; from pathlib import Path; from dualblade.targets import open_target\n"
        "with open_target(sys.argv[1], capacity=None, cache_dir=Path('/nowhere')):\n"
        "    print('open', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, node], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin
        assert other.stdout
        assert other.stdout.readline() == "open\n"
        assert main(["volume", "show", node]) == 1
        assert f"in use by another process (pid {other.pid})" in capsys.readouterr().err
        other.stdin.close()
    assert record(capsys, "volume", "show", node)["extents"] == []


def test_a_drive_that_this_user_may_not_open(node: str) -> None:
    code = (
        "import os, sys; from dualblade.cli.main import main\n"
        "import dualblade.cli.volume, dualblade.ownership, dualblade.targets\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "sys.exit(main(['volume', 'show', sys.argv[1]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, node], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == f"error: {node} may not be opened by this user"
    assert f"chown 65534 {node}" in done.stderr
