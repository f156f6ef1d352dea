# SPDX-License-Identifier: Apache-2.0
"""bind: what it shows, what it asks, whom it lets use the drive."""

from __future__ import annotations

import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from nvme_machine import DEVICES, FakeDrive, Machine
from one_drive import (
    BDF,
    BIND,
    GROUP,
    NODE,
    SERIAL,
    changed,
    driver_of,
    no_iommu,
    superblock,
)

from dualblade.host import memlock
from dualblade.host.command import host_command
from dualblade.host.journal import bound_namespace
from dualblade.host.sysfs import Host
from dualblade.units import MIB

# bind ---------------------------------------------------------------------------------------


def test_a_drive_goes_to_vfio_and_comes_back_with_its_data(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    machine.image(machine.drives[BDF]).write_bytes(superblock().ljust(8 * MIB, b"\0"))
    before = machine.snapshot()
    assert run(*BIND)[0] == 0
    assert driver_of(machine) == "vfio-pci"
    assert machine.exists(GROUP)
    assert not machine.exists(NODE)
    assert machine.attribute(f"{DEVICES}/{BDF}/driver_override") == "(null)"
    code, out, _ = run("unbind", NODE)
    assert code == 0
    assert f"back with nvme, as {NODE}" in out
    assert changed(before, machine) == set()


def test_the_module_is_loaded_where_it_is_missing(machine: Machine, run: Any) -> None:
    code, out, _ = run(*BIND, "--json")
    record = json.loads(out)
    assert code == 0
    assert [step["name"] for step in record["steps"]] == [
        "load", "override", "unbind", "probe", "clear", "permit",
    ]  # fmt: skip
    assert "modprobe" in record["steps"][0]["does"]
    assert driver_of(machine) == "vfio-pci"


def test_a_module_that_cannot_be_loaded(machine: Machine, run: Any) -> None:
    machine.faults.unloadable.add("vfio-pci")
    before = machine.snapshot()
    code, _, err = run(*BIND)
    assert code == 1
    assert "the module vfio-pci cannot be loaded: FATAL" in err
    assert "linux-image" in err
    assert changed(before, machine) == set()


def test_json_of_bind(machine: Machine, run: Any) -> None:
    code, out, _ = run(*BIND, "--json")
    record = json.loads(out)
    assert code == 0
    expected = {
        "ok": True, "dry_run": False, "already": False, "bdf": BDF, "controller": "/dev/nvme0",
        "model": "Fast SSD 4000", "serial": SERIAL, "firmware": "1.0", "size_bytes": 8 * MIB,
        "old_driver": "nvme", "driver": "vfio-pci", "iommu_group": "12", "numa_node": None,
        "target": BDF, "node": GROUP, "user": None, "refusals": [], "notes": [],
    }  # fmt: skip
    assert {key: record[key] for key in expected} == expected
    assert record["namespaces"] == [{"node": NODE, "nsid": 1, "size_bytes": 8 * MIB, "block_bytes": 512}]


@pytest.mark.parametrize(
    "name", [NODE, "/dev/nvme0", "/dev/ng0n1", BDF, "01:00.0", "/dev/disk/by-id/nvme-Fast"]
)
def test_every_name_of_a_drive(machine: Machine, run: Any, name: str) -> None:
    machine.link("/dev/disk/by-id/nvme-Fast", NODE)
    code, out, _ = run("bind", name, "--dry-run")
    assert code == 0
    assert f"{BDF}: Fast SSD 4000, serial {SERIAL}, firmware 1.0, 8 MiB" in out
    assert f"namespace 1: {NODE}" in out
    assert "IOMMU group 12" in out
    assert "nothing speaks against it" in out


def test_a_dry_run_changes_nothing(machine: Machine, run: Any) -> None:
    before = machine.snapshot()
    code, out, _ = run("bind", NODE, "--dry-run", "--json")
    record = json.loads(out)
    assert (code, record["ok"], record["dry_run"], record["refusals"]) == (0, True, True, [])
    assert machine.snapshot() == before


def test_a_dry_run_lists_all_that_speaks_against_it(machine: Machine, run: Any) -> None:
    machine.partition("nvme0n1p1", "259:91")
    machine.put("/proc/swaps", "Filename\n/dev/nvme0n1p1 partition 1 0 -2\n")
    before = machine.snapshot()
    code, out, _ = run("bind", NODE, "--dry-run")
    assert code == 1
    assert "swap space" in out
    assert "has partitions" in out
    kinds = [
        refusal["kind"] for refusal in json.loads(run("bind", NODE, "--dry-run", "--json")[1])["refusals"]
    ]
    assert kinds == ["swap", "partitions"]
    assert "(and 1 more: --dry-run lists all)" in run(*BIND)[2]
    assert machine.snapshot() == before


@pytest.mark.parametrize("multipath", [False, True])
def test_a_head_of_multipath_is_the_same_drive(
    tmp_path: Path, machine: Machine, run: Any, multipath: bool
) -> None:
    machine.add(FakeDrive("0000:02:00.0", "SECOND", "13", namespaces=2, multipath=multipath))
    assert run("bind", "/dev/nvme1n2", "--serial", "SECOND")[0] == 0
    assert driver_of(machine, "0000:02:00.0") == "vfio-pci"
    assert driver_of(machine) == "nvme"
    assert bound_namespace("/dev/nvme1n2", machine) == ("0000:02:00.0", 2)
    assert run("unbind", "/dev/nvme1n2")[0] == 0


# confirmation -------------------------------------------------------------------------------


def test_the_serial_number_must_be_right(machine: Machine, run: Any) -> None:
    before = machine.snapshot()
    code, _, err = run("bind", NODE, "--serial", "S64DNX0X")
    assert code == 1
    assert f"has the serial number {SERIAL}, not S64DNX0X: nothing was changed" in err
    assert machine.snapshot() == before


def test_nobody_to_ask(machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    before = machine.snapshot()
    code, _, err = run("bind", NODE)
    assert code == 1
    assert f"hint: {host_command('bind', NODE, '--serial', SERIAL)}" in err
    assert machine.snapshot() == before


@pytest.mark.parametrize(("typed", "code"), [(SERIAL, 0), ("yes", 1), ("", 1)])
def test_the_serial_number_is_typed(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch, typed: str, code: int
) -> None:
    leader, follower = os.openpty()
    os.write(leader, f"{typed}\n".encode())
    monkeypatch.setattr(sys, "stdin", os.fdopen(follower))
    found, out, err = run("bind", NODE)
    assert found == code
    assert "what will happen (nothing is written to the drive)" in out
    assert f"type its serial number ({SERIAL})" in err
    assert driver_of(machine) == ("nvme" if code else "vfio-pci")
    os.close(leader)


def test_yes_alone_is_a_mistake(machine: Machine, run: Any) -> None:
    code, _, err = run("bind", NODE, "--yes")
    assert code == 2
    assert "--yes needs --serial" in err


def test_an_unknown_user(machine: Machine, run: Any) -> None:
    before = machine.snapshot()
    assert run(*BIND, "--user", "nobody-of-that-name")[0] == 2
    assert machine.snapshot() == before


def test_an_ordinary_user_is_told_the_command(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for words in (BIND, ["unbind", NODE]):
        code, _, err = run(*words)
        assert code == 1
        hint = err.splitlines()[1].removeprefix("hint: ")
        assert hint.startswith("sudo ")
        assert hint.endswith(shlex.join(["-m", "dualblade.host", *words]))


# uio ----------------------------------------------------------------------------------------


def test_uio_by_its_flag_alone_and_with_its_warning(machine: Machine, run: Any) -> None:
    no_iommu(machine)
    code, out, _ = run(*BIND, "--driver", "uio_pci_generic")
    assert code == 0
    assert "has no protection" in out
    assert driver_of(machine) == "uio_pci_generic"
    assert run("unbind", SERIAL)[0] == 0
    assert driver_of(machine) == "nvme"


def test_uio_below_an_iommu_warns_more(machine: Machine, run: Any) -> None:
    out = run(*BIND, "--driver", "uio_pci_generic", "--dry-run")[1]
    assert "SPDK does not get past it" in out


# users --------------------------------------------------------------------------------------


def test_the_group_becomes_the_users(machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memlock, "limit_of", lambda host, uid: 8 * MIB)
    code, out, _ = run(*BIND, "--user", "daemon")
    assert code == 0
    assert machine.owners == {GROUP: 1}
    assert "daemon may lock 8 MiB of memory" in out
    assert "daemon - memlock unlimited" in out
    drive = json.loads(run("status", "--json")[1])["drives"][0]
    assert drive["usable_by"] == ["root", "daemon"]


def test_a_user_can_be_named_later(machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUDO_USER", "daemon")
    again = host_command("bind", BDF, "--user", "daemon")
    assert f"root alone may use it; for daemon, too: {again}" in run(*BIND)[1]
    code, out, _ = run("bind", BDF, "--user", "daemon")
    assert code == 0
    assert "is bound already" in out
    assert "root alone" not in out
    assert machine.owners == {GROUP: 1}


def test_uio_is_roots_alone(machine: Machine, run: Any) -> None:
    assert run(*BIND, "--driver", "uio_pci_generic", "--user", "daemon")[0] == 2


def test_binding_twice(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    before = machine.snapshot()
    record = json.loads(run(*BIND, "--json")[1])
    assert (record["ok"], record["already"], record["target"]) == (True, True, BDF)
    assert run("bind", BDF, "--serial", "OTHER")[0] == 1
    assert run("bind", BDF, "--driver", "uio_pci_generic")[0] == 1
    assert machine.snapshot() == before


def limits_of(tmp_path: Path, locked: str) -> Host:
    """This process was started by a shell of user 1000."""
    files = {
        f"/proc/{os.getpid()}/status": "PPid:\t500\nUid:\t0\t0\n",
        "/proc/500/status": "PPid:\t400\nUid:\t1000\t1000\n",
        "/proc/500/limits": f"Limit  Soft Limit  Hard Limit\nMax locked memory  {locked}  {locked}  bytes\n",
    }
    for name, text in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("locked", "told"), [("8388608", "may lock 8 MiB"), ("unlimited", None), ("2147483648", None)]
)
def test_the_limit_is_the_callers(tmp_path: Path, locked: str, told: str | None) -> None:
    notes = memlock.memlock_note(limits_of(tmp_path, locked), ("me", 1000))
    assert bool(notes) == bool(told)
    assert (told or "") in "".join(notes)


def test_root_has_no_limit(tmp_path: Path) -> None:
    assert memlock.memlock_note(limits_of(tmp_path, "65536"), None) == []
    assert "needs to lock" in memlock.memlock_note(limits_of(tmp_path, "65536"), ("you", 1001))[0]
