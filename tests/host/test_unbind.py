# SPDX-License-Identifier: Apache-2.0
"""unbind, status, and the journal that both read."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvme_machine import BOOT_ID, DEVICES, FakeDrive, Machine
from one_drive import (
    BDF,
    BIND,
    ENTRY,
    GROUP,
    NODE,
    SERIAL,
    driver_of,
    superblock,
    write,
)

from dualblade.cli.main import main as program
from dualblade.host import __main__ as tool
from dualblade.host import journal, status
from dualblade.host.command import host_command
from dualblade.host.journal import bound_address, bound_namespace
from dualblade.units import MIB

# unbind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NODE, "/dev/ng0n1", "/dev/nvme0", BDF, SERIAL, "/dev/disk/by-id/nvme-Fast"])
def test_unbind_by_every_name(machine: Machine, run: Any, name: str) -> None:
    machine.link("/dev/disk/by-id/nvme-Fast", NODE)
    assert run(*BIND)[0] == 0
    machine.path("/dev/disk/by-id/nvme-Fast").unlink()
    record = json.loads(run("unbind", name, "--json")[1])
    assert record == {
        "ok": True, "changed": True, "bdf": BDF, "model": "Fast SSD 4000", "serial": SERIAL,
        "driver": "nvme", "known": True, "nodes": [NODE], "was": [NODE], "others": [],
    }  # fmt: skip


def test_a_name_that_another_drive_has_now(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.add(FakeDrive("0000:02:00.0", "OTHER", "13"))
    assert f"{NODE}: another drive now)" in run("status")[1]
    code, out, _ = run("unbind", NODE)
    assert code == 0
    assert "serial OTHER) is not bound" in out
    assert f"the one bound under that name: {host_command('unbind', BDF)}" in out
    for _ in range(2):  # the second time it is with the kernel
        assert run("unbind", SERIAL)[0] == 0


def test_another_name_than_before_is_told(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    entry = journal.entry_of(BDF, machine)
    assert entry is not None
    assert "note" not in run("unbind", BDF)[1]
    replace(entry, nodes={"/dev/nvme7": 0, "/dev/nvme7n1": 1, "/dev/ng7n1": 1}).save(machine)
    assert "note: it was /dev/nvme7n1, which may be the name of another drive now" in run("unbind", BDF)[1]


def test_unbind_of_what_is_not_bound(machine: Machine, run: Any) -> None:
    before = machine.snapshot()
    code, out, _ = run("unbind", NODE)
    assert code == 0
    assert f"is not bound: it is with nvme, as {NODE}" in out
    assert machine.snapshot() == before


def test_unbind_of_what_somebody_else_bound(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.path(ENTRY).unlink()
    code, out, _ = run("unbind", BDF)
    assert code == 0
    assert "not bound by this program" in out
    assert driver_of(machine) == "nvme"


@pytest.mark.parametrize("opened", [GROUP, "/dev/vfio/devices/vfio0", "anon_inode:[vfio-device]"])
def test_a_process_that_still_drives_it_is_named(machine: Machine, run: Any, opened: str) -> None:
    assert run(*BIND)[0] == 0
    machine.put(f"{DEVICES}/{BDF}/vfio-dev/vfio0/dev", "511:0\n")
    machine.process(4711, "python3", opened=[opened])
    machine.put("/proc/4711/fdinfo/0", f"pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:00/{BDF}\n")
    before = machine.snapshot()
    code, _, err = run("unbind", NODE)
    assert code == 1
    assert f"error: {BDF} is in use by python3 (pid 4711)" in err
    assert "kill 4711" in err
    assert machine.snapshot() == before
    drive = json.loads(run("status", "--json")[1])["drives"][0]
    assert drive["held_by"] == [{"pid": 4711, "name": "python3", "path": opened}]


def test_a_kernel_that_waits_is_not_waited_for(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.faults.blocked = True
    code, _, err = run("unbind", NODE)
    assert code == 1
    assert "the kernel waits for whoever has" in err
    assert "interrupted" in run("status")[1]
    machine.faults.blocked = False
    assert run("unbind", BDF)[0] == 0


def test_another_drive_in_the_slot_is_told(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.drives[BDF] = FakeDrive(BDF, "OTHER")
    machine.image(machine.drives[BDF]).write_bytes(bytes(8 * MIB))
    code, _, err = run("unbind", BDF)
    assert code == 1
    assert f"another one now: serial OTHER, and {SERIAL} was bound" in err
    assert not machine.exists(ENTRY)


def test_a_block_device_that_does_not_come_back(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.drives[BDF] = FakeDrive(BDF, SERIAL, namespaces=0)
    code, _, err = run("unbind", BDF)
    assert code == 1
    assert "its block device did not appear" in err
    assert machine.exists(ENTRY)


def test_a_drive_that_was_pulled_out(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.path(f"{DEVICES}/{BDF}").unlink()
    assert f"{BDF} was bound, and is gone from the machine" in run("status")[1]
    code, _, err = run("unbind", BDF)
    assert code == 1
    assert "the record of it is removed" in err
    assert json.loads(run("status", "--json")[1])["leftovers"] == []


# status -------------------------------------------------------------------------------------


def test_status_shows_every_drive(machine: Machine, run: Any) -> None:
    machine.add(FakeDrive("0000:02:00.0", "SECOND", "13"))
    write(machine, 0, superblock())
    assert run("bind", "/dev/nvme1n1", "--serial", "SECOND")[0] == 0
    before = machine.snapshot()
    record = json.loads(run("status", "--json")[1])
    first, second = record["drives"]
    assert record["ok"] is True
    assert record["iommu"] is True
    assert (first["driver"], first["bound"], second["driver"], second["bound"]) == (
        "nvme",
        False,
        "vfio-pci",
        True,
    )
    assert first["namespaces"][0]["volume"] == "6f1c7a52-7d0b-4c63-9a57-0a4f5b1d2c11"
    assert "/dev/nvme1n1" in second["was"]
    assert (second["model"], second["serial"]) == ("Fast SSD 4000", "SECOND")
    assert second["usable_by"] == ["root"]
    assert second["bound_by"]
    text = run("status")[1]
    assert "/dev/nvme0n1, 8 MiB: volume 6f1c7a52" in text
    assert "0000:02:00.0: Fast SSD 4000, serial SECOND: vfio-pci" in text
    assert "IOMMU: on" in text
    assert machine.snapshot() == before


def test_a_drive_that_does_not_answer_holds_nothing_up(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "_READ_SECONDS", 0.1)
    machine.path(NODE).unlink()
    os.mkfifo(machine.path(NODE))  # to open it blocks until there is a writer
    assert json.loads(run("status", "--json")[1])["drives"][0]["namespaces"][0]["contents"] == "unknown"
    os.close(os.open(machine.path(NODE), os.O_WRONLY))  # the child ends
    os.wait()


def test_status_without_a_drive(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["status"], Machine(tmp_path / "root")) == 0
    assert "this machine has no NVMe drive on PCI" in capsys.readouterr().out


def test_status_of_this_machine_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["status", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record.keys() >= {"ok", "privileged", "drives", "leftovers", "hugepages", "iommu"}


# the journal --------------------------------------------------------------------------------


def test_a_name_stands_for_its_drive_while_it_is_bound(machine: Machine, run: Any) -> None:
    assert bound_address(NODE, machine) is None
    assert run(*BIND)[0] == 0
    assert [bound_address(node, machine) for node in (NODE, "/dev/ng0n1", "/dev/nvme0")] == [BDF] * 3
    assert bound_namespace(NODE, machine) == (BDF, 1)
    assert bound_address("/dev/nvme1n1", machine) is None
    machine.add(FakeDrive("0000:02:00.0", "SECOND", "13"))  # and is now called nvme0
    assert bound_address(NODE, machine) is None


def test_a_name_of_a_drive_that_went_back_by_hand(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.write_text(f"{DEVICES}/{BDF}/driver/unbind", BDF)
    assert bound_address(NODE, machine) is None
    assert "was bound to vfio-pci, and has no driver now" in run("status")[1]


def test_a_journal_of_another_uptime_is_nothing(machine: Machine, run: Any) -> None:
    assert run(*BIND)[0] == 0
    machine.put("/proc/sys/kernel/random/boot_id", BOOT_ID.replace("5", "6"))
    assert journal.entries(machine) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"bdf": 1}'])
def test_a_damaged_journal_is_passed_over(machine: Machine, text: str) -> None:
    machine.put(ENTRY, text)
    assert journal.entries(machine) == []
