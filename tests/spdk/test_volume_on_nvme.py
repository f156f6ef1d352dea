# SPDX-License-Identifier: Apache-2.0
"""`volume create` on a namespace behind SPDK's driver: what it names, what it refuses, what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from traces import Traces

from dualblade.emulate import EmulatedTarget
from dualblade.units import MIB

pytestmark = pytest.mark.needs("spdk")
SIZE = 16 * MIB
SWAP = (1).to_bytes(4, "little") + (4095).to_bytes(4, "little")


def volume(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dualblade.cli.main", "volume", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def drive(nothing_left: Traces, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The file that is a drive's medium, and its TARGET."""
    path = tmp_path / "drive.img"
    path.write_bytes(bytes(SIZE))
    with EmulatedTarget(memory_mib=0, hugepages=False) as emulated:
        emulated.file("drive", path)
        yield path, emulated.export("drive")


def test_a_foreign_drive_is_named_with_what_is_on_it(drive: tuple[Path, str]) -> None:
    path, target = drive
    with path.open("r+b") as file:
        file.seek(1024)
        file.write(SWAP)
        file.seek(4096 - 10)
        file.write(b"SWAPSPACE2")
    before = path.read_bytes()
    done = volume("create", target)
    assert done.returncode == 1
    assert "swap" in done.stderr
    assert "its first and last MiB are not all zero" in done.stderr
    serial = done.stderr.partition(", serial ")[2].partition(",")[0]
    assert f"--i-know-this-erases {serial}" in done.stderr
    assert volume("create", target, "--i-know-this-erases", "another").returncode == 1
    assert path.read_bytes() == before
    made = volume("create", target, "--i-know-this-erases", serial, "--json")
    assert json.loads(made.stdout)["serial"] == serial
    assert json.loads(volume("check", target, "--json").stdout)["ok"] is True


def test_an_empty_drive_is_taken_and_named(drive: tuple[Path, str]) -> None:
    done = volume("create", drive[1])
    assert done.returncode == 0, done.stderr
    assert ", serial " in done.stdout
    assert "16 MiB" in done.stdout
    assert volume("wipe", drive[1]).returncode == 0
    assert not any(drive[0].read_bytes()[:MIB])
