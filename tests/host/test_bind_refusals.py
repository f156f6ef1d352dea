# SPDX-License-Identifier: Apache-2.0
"""Every reason not to take a drive, told with its remedy, and the machine as it was."""

from __future__ import annotations

import fcntl
import json
import re
import shlex
import subprocess
import threading
from collections.abc import Callable
from typing import Any

import pytest
from nvme_machine import DEVICES, FakeDrive, Machine
from one_drive import (
    BDF,
    BIND,
    ENTRY,
    NODE,
    SERIAL,
    driver_of,
    mounted,
    neighbour,
    no_iommu,
    raw_data,
    superblock,
    write,
)

from dualblade.host.command import host_command
from dualblade.units import KIB, MIB

# refusals -----------------------------------------------------------------------------------


def mounted_elsewhere(machine: Machine) -> None:
    machine.process(77, "postgres", "30 25 259:1 / /data rw - ext4 /dev/nvme0n1 rw\n", space=2)


def mounted_btrfs(machine: Machine) -> None:
    machine.put("/proc/1/mountinfo", "30 25 0:44 / /mnt rw - btrfs /dev/nvme0n1 rw\n")


def second_of_btrfs(machine: Machine) -> None:
    machine.link("/sys/fs/btrfs/1-2-3/devices/nvme0n1", "/sys/class/block/nvme0n1")


def swap(machine: Machine) -> None:
    machine.put("/proc/swaps", "Filename\tType\n/dev/nvme0n1 partition 1 0 -2\n")


def lvm(machine: Machine) -> None:
    machine.mapped("dm-3", "253:3", "nvme0n1", name="vg-data", uuid="LVM-abc")


def crypt(machine: Machine) -> None:
    machine.mapped("dm-4", "253:4", "nvme0n1", name="secret", uuid="CRYPT-LUKS2-abc")


def raid(machine: Machine) -> None:
    machine.mapped("md127", "9:127", "nvme0n1")


def bcache(machine: Machine) -> None:
    machine.mapped("bcache0", "251:0", "nvme0n1")


def partitions(machine: Machine) -> None:
    machine.partition("nvme0n1p1", "259:91")


def root_below_lvm(machine: Machine) -> None:
    machine.partition("nvme0n1p2", "259:92")
    machine.mapped("dm-0", "253:0", "nvme0n1p2", name="vg-root", uuid="LVM-xyz")
    machine.put("/proc/1/mountinfo", "25 1 253:0 / / rw - ext4 /dev/mapper/vg-root rw\n")


def boot(machine: Machine) -> None:
    machine.partition("nvme0n1p1", "259:91")
    machine.put("/proc/1/mountinfo", "25 1 259:91 / /boot/efi rw - vfat /dev/nvme0n1p1 rw\n")


def resume(machine: Machine) -> None:
    machine.put("/sys/power/resume", "259:1\n")


def resume_at_boot(machine: Machine) -> None:
    machine.put("/proc/cmdline", f"root=/dev/vda resume={NODE}\n")


def filesystem(machine: Machine) -> None:
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", machine.image(machine.drives[BDF])], check=True)


def raw_data_at_the_end(machine: Machine) -> None:
    write(machine, 8 * MIB - 1, b"\x01")


def damaged_volume(machine: Machine) -> None:
    write(machine, 0, b"DUALBLDE and nothing more")


def open_block(machine: Machine) -> None:
    machine.process(321, "dd", opened=["/dev/null", NODE])


def open_generic(machine: Machine) -> None:
    machine.process(321, "fio", opened=["/dev/ng0n1"])


def open_controller(machine: Machine) -> None:
    machine.process(321, "nvme", opened=["/dev/nvme0"])


def busy(machine: Machine) -> None:
    machine.faults.busy.add(NODE)


def another_path(machine: Machine) -> None:
    machine.add(FakeDrive("0000:02:00.0", SERIAL, "13"))


def virtual_functions(machine: Machine) -> None:
    machine.put(f"{DEVICES}/{BDF}/sriov_numvfs", "2\n")


def dead(machine: Machine) -> None:
    machine.put("/sys/class/nvme/nvme0/state", "dead\n")


def no_namespace(machine: Machine) -> None:
    subprocess.run(["rm", "-rf", machine.path(f"{DEVICES}/{BDF}/nvme/nvme0/nvme0n1")], check=True)


def hidden_namespace(machine: Machine) -> None:
    machine.put(f"{DEVICES}/{BDF}/nvme/nvme0/ng0n7/dev", "242:7\n")


REFUSALS = {
    mounted: ("mounted", "is mounted on /mnt/my disk", "umount '/mnt/my disk'"),
    mounted_elsewhere: (
        "mounted",
        "is mounted on /data, as process 77 sees it",
        "nsenter -t 77 -m umount /data",
    ),
    mounted_btrfs: ("mounted", f"{NODE} is mounted on /mnt", "umount /mnt"),
    second_of_btrfs: ("mounted", "a part of the mounted btrfs 1-2-3", "unmount"),
    swap: ("swap", f"{NODE} is swap space in use", f"swapoff {NODE}"),
    lvm: ("held", "a part of the LVM volume vg-data", "dmsetup remove vg-data"),
    crypt: ("held", "a part of the encrypted volume secret", "cryptsetup close secret"),
    raid: ("held", "a part of the RAID array md127", "mdadm --stop /dev/md127"),
    bcache: ("held", "a part of the cache bcache0", "bcache/stop"),
    partitions: ("partitions", f"{NODE} has partitions (nvme0n1p1)", "wipefs --all"),
    root_below_lvm: ("system", "the system runs from it (/)", "another drive"),
    boot: ("system", "the system runs from it (/boot/efi)", "another drive"),
    resume: ("system", "the image to resume from", "another drive"),
    resume_at_boot: ("system", f"resume={NODE} at boot", "another drive"),
    filesystem: ("signature", f"{NODE} holds data: blkid found", "wipefs --all"),
    raw_data: ("data", "first and last MiB are not zero", f"--i-know-this-erases {SERIAL}"),
    raw_data_at_the_end: ("data", "first and last MiB are not zero", f"--i-know-this-erases {SERIAL}"),
    damaged_volume: ("data", "no volume of ours", f"--i-know-this-erases {SERIAL}"),
    open_block: ("open", f"dd (pid 321) has {NODE} open", "ps -fp 321"),
    open_generic: ("open", "fio (pid 321) has /dev/ng0n1 open", "ps -fp 321"),
    open_controller: ("open", "nvme (pid 321) has /dev/nvme0 open", "ps -fp 321"),
    busy: ("busy", "cannot be had alone", "lsblk"),
    another_path: ("multipath", "in another way, too: nvme1 at 0000:02:00.0", "another one"),
    virtual_functions: ("virtual-functions", "2 virtual functions", "sriov_numvfs"),
    neighbour: ("iommu-group", "shares IOMMU group 12 with 0000:02:00.0", "another slot"),
    no_iommu: ("no-iommu", "no IOMMU switched on", "--driver uio_pci_generic"),
    dead: ("state", "the controller is dead", "dmesg"),
    no_namespace: ("empty", "no namespace", "nvme create-ns"),
    hidden_namespace: ("unknown", "namespace 7 has no block device", "/dev/ng0n7"),
}


@pytest.mark.parametrize("prepare", REFUSALS, ids=lambda prepare: prepare.__name__)
def test_a_refusal_says_why_and_leaves_all_as_it_was(
    machine: Machine, run: Any, prepare: Callable[[Machine], None]
) -> None:
    kind, reason, remedy = REFUSALS[prepare]
    device = BDF if prepare is no_namespace else NODE
    prepare(machine)
    before = machine.snapshot()
    code, out, err = run("bind", device, "--serial", SERIAL)
    assert (code, out) == (1, "")
    error, hint = err.splitlines()
    assert re.match(f"error: {BDF} stays with the kernel: ", error)
    assert reason in error
    assert hint.startswith("hint: ")
    assert remedy in hint
    record = json.loads(run("bind", device, "--serial", SERIAL, "--yes", "--json")[1])
    assert record["ok"] is False
    assert record["refusals"][0]["kind"] == kind
    assert record["error"] in error
    assert machine.snapshot() == before


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("/dev/nvme7n1", "there is no device /dev/nvme7n1"),
        ("/dev/vda", "/dev/vda is no NVMe drive"),
        ("/dev/nvme0n1p1", "is a partition"),
        ("0000:07:00.0", "there is no PCI device 0000:07:00.0"),
        ("0000:00:01.0", "0000:00:01.0 is no NVMe controller (its class is 0x030000)"),
    ],
)
def test_what_is_no_drive(machine: Machine, run: Any, name: str, error: str) -> None:
    machine.put("/dev/vda", "")
    machine.partition("nvme0n1p1", "259:91")
    machine.put("/dev/nvme0n1p1", "")
    machine.put(f"{DEVICES}/0000:00:01.0/class", "0x030000\n")
    before = machine.snapshot()
    code, _, err = run("bind", name, "--serial", SERIAL)
    assert code == 1
    assert error in err
    assert "hint: " in err
    assert machine.snapshot() == before


def test_a_namespace_with_several_paths(machine: Machine, run: Any) -> None:
    for number in (5, 6):
        machine.put(f"/sys/class/nvme/nvme{number}/nvme5c{number}n1/hidden", "1\n")
    machine.put("/sys/class/block/nvme5n1/dev", "259:55\n")
    machine.put("/dev/nvme5n1", "")
    code, _, err = run("bind", "/dev/nvme5n1", "--serial", SERIAL)
    assert code == 1
    assert "reached through several controllers: nvme5" in err


def test_a_namespace_of_a_fabric(machine: Machine, run: Any) -> None:
    machine.put("/sys/class/nvme/nvme5/transport", "tcp\n")
    machine.put("/sys/class/nvme/nvme5/nvme5n1/dev", "259:55\n")
    machine.link("/sys/class/block/nvme5n1", "/sys/class/nvme/nvme5/nvme5n1")
    machine.put("/dev/nvme5n1", "")
    code, _, err = run("bind", "/dev/nvme5n1", "--serial", SERIAL)
    assert code == 1
    assert "a namespace over tcp" in err
    assert "trtype:TCP" in err


@pytest.mark.parametrize("harmless", ["no driver", "vfio-pci", "bridge"])
def test_harmless_neighbours_in_the_group(machine: Machine, run: Any, harmless: str) -> None:
    other = "0000:02:00.0"
    machine.load("pcieport")
    machine.load("vfio-pci")
    machine.add(FakeDrive(other, "OTHER"), driver=None)
    if harmless == "vfio-pci":
        machine.link(f"{DEVICES}/{other}/driver", "/sys/bus/pci/drivers/vfio-pci")
    if harmless == "bridge":
        machine.put(f"{DEVICES}/{other}/class", "0x060400\n")
        machine.link(f"{DEVICES}/{other}/driver", "/sys/bus/pci/drivers/pcieport")
    assert run(*BIND)[0] == 0


def test_the_drives_of_a_group_one_after_the_other(machine: Machine, run: Any) -> None:
    other = "0000:02:00.0"
    neighbour(machine)
    hint = run(*BIND)[2].splitlines()[1]
    assert hint.endswith(host_command(*BIND, "--then", other))
    code, out, _ = run(*BIND, "--then", "/dev/nvme1n1")
    assert code == 0
    assert f"of no use until the rest of its group is bound: {host_command('bind', other)}" in out
    assert run("bind", other, "--serial", "OTHER")[0] == 0
    assert (driver_of(machine), driver_of(machine, other)) == ("vfio-pci", "vfio-pci")


def test_other_devices_of_a_group_are_nobodys_to_take(machine: Machine, run: Any) -> None:
    machine.add(FakeDrive("0000:02:00.0", "OTHER"))
    machine.put(f"{DEVICES}/0000:02:00.0/class", "0x020000\n")
    hint = run(*BIND)[2].splitlines()[1]
    assert hint == "hint: move the drive to another slot"


def test_udev_is_waited_for(machine: Machine, run: Any) -> None:
    machine.process(99, "(udev-worker)", opened=[NODE])
    done = threading.Timer(0.2, machine.path("/proc/99/fd/0").unlink)
    done.start()
    assert run(*BIND)[0] == 0
    done.join()


def test_a_lock_of_udevs_is_waited_for(machine: Machine, run: Any) -> None:
    with open(machine.path(NODE)) as node:
        fcntl.flock(node, fcntl.LOCK_SH)
        done = threading.Timer(0.2, fcntl.flock, (node, fcntl.LOCK_UN))
        done.start()
        assert run(*BIND)[0] == 0
        done.join()


def test_a_lock_that_stays_is_told(machine: Machine, run: Any) -> None:
    with open(machine.path(NODE)) as node:
        fcntl.flock(node, fcntl.LOCK_EX)
        code, _, err = run(*BIND)
    assert code == 1
    assert "cannot be had alone" in err


def test_a_drive_in_use_is_told_before_what_the_machine_lacks(machine: Machine, run: Any) -> None:
    mounted(machine)
    no_iommu(machine)
    filesystem(machine)
    record = json.loads(run("bind", NODE, "--dry-run", "--json")[1])
    assert [refusal["kind"] for refusal in record["refusals"]] == ["mounted", "no-iommu", "signature"]


@pytest.mark.parametrize("copy", [0, 1])
def test_a_volume_of_ours_is_taken(machine: Machine, run: Any, copy: int) -> None:
    write(machine, copy * 64 * KIB, superblock(copy))
    assert run(*BIND)[0] == 0


def test_unknown_data_is_taken_with_the_serial_number(machine: Machine, run: Any) -> None:
    raw_data(machine)
    data = machine.image(machine.drives[BDF]).read_bytes()
    assert run(*BIND, "--i-know-this-erases", "WRONG")[0] == 1
    assert run(*BIND, "--i-know-this-erases", SERIAL)[0] == 0
    assert machine.image(machine.drives[BDF]).read_bytes() == data


def test_hints_keep_what_was_asked_for(machine: Machine, run: Any) -> None:
    """Whoever types what they say gets there."""
    no_iommu(machine)
    raw_data(machine)
    words, hints = [*BIND], 0
    while (said := run(*words))[0]:
        words = shlex.split(said[2].splitlines()[1])
        words = words[words.index("dualblade.host") + 1 :]
        hints += 1
    assert hints == 2
    assert set(words) == {*BIND, "--driver", "uio_pci_generic", "--i-know-this-erases"}
    assert driver_of(machine) == "uio_pci_generic"


def test_a_filesystem_is_not_taken_with_the_serial_number(machine: Machine, run: Any) -> None:
    filesystem(machine)
    assert run(*BIND, "--i-know-this-erases", SERIAL)[0] == 1
    assert driver_of(machine) == "nvme"


def test_neither_blkid_nor_wipefs(machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualblade.host import contents, signatures

    look = signatures.scan_signatures
    monkeypatch.setattr(contents, "scan_signatures", lambda path: look(path, "/nowhere"))
    before = machine.snapshot()
    code, _, err = run(*BIND)
    assert code == 1
    assert "neither blkid nor wipefs is here" in err
    assert "hint: apt-get install util-linux" in err
    assert machine.snapshot() == before


def test_what_came_up_while_the_user_was_typing(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualblade.host import bind_command

    def types(question: str) -> str:
        mounted(machine)
        return SERIAL

    monkeypatch.setattr(bind_command, "ask", types)
    code, _, err = run("bind", NODE)
    assert code == 1
    assert "is mounted on" in err
    assert driver_of(machine) == "nvme"
    assert not machine.exists(ENTRY)


@pytest.mark.parametrize("words", [[], ["--dry-run"], ["--driver", "uio_pci_generic"]])
def test_no_remedy_for_a_drive_with_another_serial_number(
    machine: Machine, run: Any, words: list[str]
) -> None:
    """It may be the wrong drive, whose data the remedy would wipe."""
    filesystem(machine)
    before = machine.snapshot()
    code, out, err = run("bind", NODE, "--serial", "OTHER", *words)
    assert (code, out) == (1, "")
    assert f"{BDF} has the serial number {SERIAL}, not OTHER: nothing was changed" in err
    assert "wipefs" not in err
    assert machine.snapshot() == before
