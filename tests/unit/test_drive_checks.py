# SPDX-License-Identifier: Apache-2.0
"""doctor on machines with NVMe drives: what could be bound, what not, and the command that mends it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from nvme_machine import FakeDrive, Machine

from dualblade.host import checks, doctor_command, drive_checks, software_checks
from dualblade.host.checks import OK, WARN
from dualblade.host.command import host_command
from dualblade.host.journal import BINDING, BOUND, Entry, boot_id

SPARE = FakeDrive("0000:01:00.0", "SPARE1")
ALONE = FakeDrive("0000:01:00.0", "SPARE1", group=None)
RELEASE = "6.1.0-26-amd64"


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    made.put("/proc/sys/kernel/osrelease", f"{RELEASE}\n")
    return made


def modules(machine: Machine, index: str, text: str) -> None:
    machine.put(f"/lib/modules/{RELEASE}/{index}", text)


def journal(machine: Machine, state: str) -> None:
    Entry(
        SPARE.bdf, SPARE.serial, SPARE.model, "nvme", "vfio-pci", None, state, (), {"1": SPARE.size},
        {"/dev/nvme0": 0, "/dev/nvme0n1": 1}, "12", "root", 1, "", boot_id(machine),
    ).save(machine)  # fmt: skip


def is_bound(machine: Machine) -> None:
    machine.load("vfio-pci")
    machine.add(SPARE, driver="vfio-pci")


# IOMMU --------------------------------------------------------------------------------------


def test_an_iommu_that_is_on(machine: Machine) -> None:
    machine.add(SPARE)
    assert drive_checks.iommu(machine).detail == "on, 1 groups"


def test_without_a_drive_nothing_is_missed(machine: Machine) -> None:
    assert drive_checks.iommu(machine).state == drive_checks.vfio(machine).state == OK
    (only,) = drive_checks.drives(machine)
    assert "no NVMe drive" in only.detail


@pytest.mark.parametrize(
    ("cmdline", "table", "fix"),
    [
        ("ro", "DMAR", "intel_iommu=on /"),
        ("ro intel_iommu=off", "DMAR", "s/ *intel_iommu=off//"),
        ("ro amd_iommu=off", "IVRS", "s/ *amd_iommu=off//"),
        ("ro", "FACP", "firmware's settings"),
        ("ro intel_iommu=on", "DMAR", "firmware's settings"),
    ],
)
def test_an_iommu_that_is_off(machine: Machine, cmdline: str, table: str, fix: str) -> None:
    machine.add(ALONE)
    machine.put("/proc/cmdline", f"BOOT_IMAGE=/vmlinuz {cmdline}\n")
    machine.put(f"/sys/firmware/acpi/tables/{table}", "")
    machine.put("/etc/default/grub", "")
    found = drive_checks.iommu(machine)
    assert found.state == WARN
    assert fix in str(found.fix)


@pytest.mark.parametrize(
    ("cmdline", "says"), [("ro", "add intel_iommu=on to"), ("iommu=off", "take iommu=off")]
)
def test_a_boot_loader_of_another_kind(machine: Machine, cmdline: str, says: str) -> None:
    machine.add(ALONE)
    machine.put("/proc/cmdline", f"{cmdline}\n")
    machine.put("/sys/firmware/acpi/tables/DMAR", "")
    fix = str(drive_checks.iommu(machine).fix)
    assert fix.startswith(says)
    assert "grub" not in fix


def test_who_is_not_root_does_not_see_every_use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.add(SPARE)
    for user, says in ((0, "nobody uses it;"), (1000, "nobody is seen to use it")):
        monkeypatch.setattr(os, "geteuid", lambda user=user: user)
        (found,) = drive_checks.drives(machine)
        assert says in found.detail


def test_the_command_line_is_really_changed(machine: Machine, tmp_path: Path) -> None:
    machine.add(ALONE)
    machine.put("/sys/firmware/acpi/tables/DMAR", "")
    machine.put("/etc/default/grub", "")
    grub = tmp_path / "grub"
    for before, cmdline, after in (
        ('GRUB_CMDLINE_LINUX="quiet"\n', "quiet", 'GRUB_CMDLINE_LINUX="intel_iommu=on quiet"\n'),
        ('GRUB_CMDLINE_LINUX="a iommu=off b"\n', "a iommu=off b", 'GRUB_CMDLINE_LINUX="a b"\n'),
    ):
        machine.put("/proc/cmdline", cmdline)
        grub.write_text(before)
        fix = str(drive_checks.iommu(machine).fix)
        assert shlex.split(fix, comments=True)[-1] == "update-grub"  # the line can be pasted whole
        words = shlex.split(fix.partition(" && ")[0])
        words = words[words.index("sed") :]
        subprocess.run([*words[:-1], grub], check=True)
        assert grub.read_text() == after


# vfio-pci -----------------------------------------------------------------------------------


def test_a_module_that_is_loaded_or_there(machine: Machine) -> None:
    machine.add(SPARE)
    modules(machine, "modules.dep", "kernel/drivers/vfio/pci/vfio-pci.ko.xz: kernel/x.ko\n")
    assert drive_checks.vfio(machine).detail == "this kernel has it; bind loads it"
    machine.load("vfio-pci")
    assert drive_checks.vfio(machine).detail == "loaded"


def test_a_module_that_is_built_in(machine: Machine) -> None:
    machine.add(SPARE)
    modules(machine, "modules.builtin", "kernel/drivers/vfio/pci/vfio-pci.ko\n")
    assert drive_checks.vfio(machine).state == OK


def test_a_kernel_without_the_module(machine: Machine) -> None:
    machine.add(SPARE)
    modules(machine, "modules.dep", "kernel/drivers/vfio/pci/vfio-pci-core.ko: kernel/x.ko\n")
    found = drive_checks.vfio(machine)
    assert found.state == WARN
    assert "linux-image-amd64" in str(found.fix)


# drives -------------------------------------------------------------------------------------


def test_a_spare_drive_could_be_bound(machine: Machine) -> None:
    machine.add(SPARE)
    (found,) = drive_checks.drives(machine)
    assert found.state == OK
    assert found.detail.startswith("/dev/nvme0n1 (0000:01:00.0, Fast SSD 4000, serial SPARE1, 8 MiB)")
    assert f"could be bound: {host_command('bind', '/dev/nvme0n1', '--dry-run')}" in found.detail


def test_without_an_iommu_it_is_a_target_of_the_kernels(machine: Machine) -> None:
    machine.add(ALONE)
    (found,) = drive_checks.drives(machine)
    assert "volume create /dev/nvme0n1" in found.detail


def test_a_mounted_drive_stays_with_the_kernel(machine: Machine) -> None:
    machine.add(SPARE)
    dev = machine.attribute("/sys/class/block/nvme0n1/dev")
    machine.process(77, "shell", mounts=f"30 1 {dev} / /data rw - ext4 /dev/nvme0n1 rw\n", space=2)
    (found,) = drive_checks.drives(machine)
    assert found.state == OK
    assert "the kernel's, because /dev/nvme0n1 is mounted on /data" in found.detail


def test_a_bound_drive_is_named_as_it_was(machine: Machine) -> None:
    is_bound(machine)
    (found,) = drive_checks.drives(machine)
    assert found.detail == "0000:01:00.0 is bound to vfio-pci"
    journal(machine, BOUND)
    (found,) = drive_checks.drives(machine)
    assert (found.state, found.detail) == (OK, "/dev/nvme0n1 (0000:01:00.0) is bound to vfio-pci")


@pytest.mark.parametrize("driver", [None, "vfio-pci"])
def test_an_interrupted_bind_is_told_with_its_remedy(machine: Machine, driver: str | None) -> None:
    machine.load("vfio-pci")
    machine.add(SPARE, driver=driver)
    journal(machine, BINDING)
    (found,) = drive_checks.drives(machine)
    assert found.state == WARN
    assert "interrupted" in found.detail
    assert found.fix == host_command("unbind", SPARE.bdf)


def test_a_drive_without_a_driver(machine: Machine) -> None:
    machine.add(SPARE, driver=None)
    (found,) = drive_checks.drives(machine)
    assert (found.state, found.fix) == (WARN, host_command("unbind", SPARE.bdf))


# what a bound drive wants -------------------------------------------------------------------


def test_a_bound_drive_wants_hugepages(machine: Machine) -> None:
    is_bound(machine)
    found = checks.hugepages(machine)
    assert (found.state, found.fix) == (WARN, host_command("hugepages", "--reserve", "1G"))


def test_a_bound_drive_wants_spdk(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    is_bound(machine)
    monkeypatch.setenv("PATH", str(tmp_path))  # no pkg-config
    found = software_checks.spdk(None, "rebuild", machine)
    assert (found.state, found.fix) == (WARN, host_command("unbind", SPARE.bdf))
    assert software_checks.spdk("26.05", "rebuild", machine).state == OK


def test_the_whole_record(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.add(SPARE)
    machine.add(FakeDrive("0000:02:00.0", "SPARE2", group="13"))
    args = argparse.Namespace(cache_dir=None, as_json=True)
    assert doctor_command.run(args, machine) == 0
    found = [
        check["detail"] for check in json.loads(capsys.readouterr().out)["checks"] if check["name"] == "nvme"
    ]
    assert len(found) == 2
    assert "SPARE2" in found[1]
