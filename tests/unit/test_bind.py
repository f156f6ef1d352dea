# SPDX-License-Identifier: Apache-2.0
"""bind, unbind and status on machines in a folder: refusals, interruptions, the way back."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from nvme_machine import BOOT_ID, DEVICES, FakeDrive, Machine

from dualblade.cli.main import main as program
from dualblade.host import __main__ as tool
from dualblade.host import bind as bind_module
from dualblade.host import driver, journal, memlock, unbind
from dualblade.host.command import host_command
from dualblade.host.journal import FOLDER, bound_address, bound_namespace
from dualblade.host.sysfs import Host
from dualblade.superblock import Geometry, Superblock, encode_superblock
from dualblade.units import KIB, MIB

BDF, SERIAL = "0000:01:00.0", "S64DNX0R"
NODE = "/dev/nvme0n1"
ENTRY = f"{FOLDER}/{BDF}.json"
GROUP = "/dev/vfio/12"
BIND = ["bind", NODE, "--serial", SERIAL]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One drive, nobody's, driven by the kernel; this process is root there."""
    made = Machine(tmp_path / "root")
    made.add(FakeDrive(BDF, SERIAL))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("SUDO_USER", raising=False)
    for module, name in (
        (driver, "_LINK_SECONDS"),
        (bind_module, "_NODE_SECONDS"),
        (unbind, "_DEVICE_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.05)
    return made


@pytest.fixture
def run(machine: Machine, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(words) -> (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tool.main(words, machine)
        shown = capsys.readouterr()
        print(words, code, shown.err)  # where a test fails
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


def driver_of(machine: Machine, bdf: str = BDF) -> str | None:
    return machine.link_name(f"{DEVICES}/{bdf}/driver")


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


def changed(before: dict[str, Any], machine: Machine) -> set[str]:
    """Names that differ from `before`, but for the folder of the journal and its lock."""
    after = machine.snapshot()
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return names - {"run", "run/dualblade-spdk", "run/dualblade-spdk/lock"}


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


# refusals -----------------------------------------------------------------------------------


def superblock(copy: int = 0) -> bytes:
    uuid = UUID("6f1c7a52-7d0b-4c63-9a57-0a4f5b1d2c11")
    return encode_superblock(Superblock(copy, uuid, 3, Geometry.of(8 * MIB), 0, 0))


def mounted(machine: Machine) -> None:
    machine.process(200, "bash", "30 25 259:1 / /mnt/my\\040disk rw - ext4 /dev/nvme0n1 rw\n", space=1)
    machine.put("/proc/1/mountinfo", "30 25 259:1 / /mnt/my\\040disk rw - ext4 /dev/nvme0n1 rw\n")


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


def raw_data(machine: Machine) -> None:
    write(machine, 4321, b"\x01")


def raw_data_at_the_end(machine: Machine) -> None:
    write(machine, 8 * MIB - 1, b"\x01")


def damaged_volume(machine: Machine) -> None:
    write(machine, 0, b"DUALBLDE and nothing more")


def write(machine: Machine, offset: int, data: bytes) -> None:
    with open(machine.image(machine.drives[BDF]), "r+b") as file:
        file.seek(offset)
        file.write(data)


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


def neighbour(machine: Machine) -> None:
    machine.add(FakeDrive("0000:02:00.0", "OTHER", "12"))


def no_iommu(machine: Machine) -> None:
    machine.path(f"{DEVICES}/{BDF}/iommu_group").unlink()


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
    assert hint.endswith(host_command("bind", BDF, "--then", other))
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


# failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("driver_name", ["vfio-pci", "uio_pci_generic"])
def test_a_driver_that_does_not_take_it(machine: Machine, run: Any, driver_name: str) -> None:
    machine.load(driver_name)
    machine.faults.refuse.add(driver_name)
    before = machine.snapshot()
    code, _, err = run(*BIND, "--driver", driver_name)
    assert code == 1
    assert f"error: {driver_name} did not take {BDF}" in err
    assert changed(before, machine) == set()


def failing_at(wanted: int) -> Callable[[str], None]:
    """A tick that fails once, at the nth time."""
    count = 0

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        if count == wanted:
            raise OSError(5, "Input/output error", what)

    return tick


def test_a_failure_at_any_write_is_undone(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    failures = 0
    for number in range(1, 100):
        machine.faults.tick = failing_at(number)
        code, _, err = run(*BIND, "--user", "daemon")
        machine.faults.tick = lambda _: None
        if code == 0:
            break
        failures += 1
        assert "error: " in err
        assert driver_of(machine) == "nvme", number
        run("unbind", BDF)  # where it failed in the very last write, or in the first
        assert changed(before, machine) == set(), number
    assert failures > 15
    assert run("unbind", NODE)[0] == 0


def test_what_cannot_be_undone_is_told(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    machine.faults.refuse |= {"vfio-pci", "nvme"}
    code, _, err = run(*BIND)
    assert code == 1
    assert "could not be given back to nvme" in err
    assert f"hint: nothing on the drive is lost; mend it with: {host_command('unbind', BDF)}" in err
    machine.faults.refuse.clear()
    assert "interrupted" in run("status")[1]
    assert run("unbind", BDF)[0] == 0
    assert driver_of(machine) == "nvme"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_midst_is_undone(machine: Machine, run: Any, number: signal.Signals) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    machine.faults.tick = lambda what: (
        os.kill(os.getpid(), number) if "after" in what and "unbind" in what else None
    )
    code, _, err = run(*BIND)
    machine.faults.tick = lambda _: None
    assert code == 130
    assert "interrupted" in err
    assert changed(before, machine) == set()


def bind_in_child(machine: Machine, kill_at: int) -> int:
    return in_child(machine, kill_at, [*BIND, "--user", "daemon"])


def in_child(machine: Machine, kill_at: int, words: list[str]) -> int:
    """Exit code of a command that is killed at the nth write."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def tick(what: str) -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    machine.faults.tick = tick
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(tool.main(words, machine))


def test_a_kill_at_any_step_is_told_and_mended(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    told = []
    for number in range(1, 100):
        if bind_in_child(machine, number) == 0:
            break
        record = json.loads(run("status", "--json")[1])
        told.append([leftover["state"] for leftover in record["leftovers"]])
        assert bool(told[-1]) == machine.exists(ENTRY) or driver_of(machine) == "vfio-pci"
        code, _, err = run("unbind", SERIAL if machine.exists(ENTRY) else NODE)
        assert (code, err) == (0, ""), number
        left = changed(before, machine)
        assert left <= {f"run/dualblade-spdk/.{BDF}.json.new"}, number
        assert json.loads(run("status", "--json")[1])["leftovers"] == []
    assert told.count(["binding"]) > 12
    assert driver_of(machine) == "vfio-pci"


def test_a_kill_at_any_step_of_unbind_is_told_and_mended(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    for number in range(1, 100):
        assert run(*BIND)[0] == 0
        if in_child(machine, number, ["unbind", NODE]) == 0:
            break
        if machine.exists(ENTRY) and json.loads(machine.read_text(ENTRY))["state"] == "unbinding":
            assert f"unbind of {BDF} was interrupted" in run("status")[1], number
        code, _, err = run("unbind", BDF)
        assert (code, err) == (0, ""), number
        assert changed(before, machine) <= {f"run/dualblade-spdk/.{BDF}.json.new"}, number
    assert number > 8
    assert driver_of(machine) == "nvme"


def test_bind_goes_on_after_a_kill_before_anything_was_changed(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    bind_in_child(machine, 4)  # the reservation is written
    assert machine.attribute(f"{DEVICES}/{BDF}/driver_override") == "vfio-pci"
    assert driver_of(machine) == "nvme"
    assert run(*BIND)[0] == 0
    assert json.loads(run("status", "--json")[1])["leftovers"] == []


def test_bind_without_a_driver_names_the_cure(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    bind_in_child(machine, 8)  # the kernel has let go of it
    assert driver_of(machine) is None
    code, _, err = run(*BIND)
    assert code == 1
    assert f"hint: give it to the kernel first: {host_command('unbind', BDF)}" in err


def test_fifty_times_there_and_back(machine: Machine, run: Any) -> None:
    machine.load("vfio-pci")
    before = machine.snapshot()
    for _ in range(50):
        assert run(*BIND)[0] == 0
        assert run("unbind", NODE)[0] == 0
    assert changed(before, machine) == set()


def test_a_name_that_is_no_text_stays_on_its_line(machine: Machine, run: Any) -> None:
    machine.process(66, "a\x1b[31m\nb", opened=[NODE])
    machine.put("/proc/1/mountinfo", "30 25 259:1 / /mnt/\\012\\033x rw - ext4 /dev/nvme0n1 rw\n")
    assert "is mounted on /mnt/??x" in run(*BIND)[2]
    assert "a?[31m?b (pid 66) has" in run("bind", NODE, "--dry-run")[1]


def test_the_journal_is_for_all_to_read(machine: Machine, run: Any) -> None:
    mask = os.umask(0o077)
    try:
        assert run(*BIND)[0] == 0
    finally:
        os.umask(mask)
    assert machine.path(FOLDER).stat().st_mode & 0o777 == 0o755
    assert machine.path(ENTRY).stat().st_mode & 0o777 == 0o644


def test_a_write_that_blocks_is_left_to_a_child(tmp_path: Path) -> None:
    host = Host(tmp_path)
    os.mkfifo(tmp_path / "unbind")
    assert host.write_within("/unbind", BDF, 0.05) is False
    with open(tmp_path / "unbind") as reader:  # somebody let go: the child goes on and ends
        assert reader.read() == BDF
    assert os.WEXITSTATUS(os.wait()[1]) == 0


def test_a_write_within_time(tmp_path: Path) -> None:
    (tmp_path / "unbind").touch()
    assert Host(tmp_path).write_within("/unbind", BDF, 5) is True
    assert (tmp_path / "unbind").read_text() == BDF
    with pytest.raises(FileNotFoundError):
        Host(tmp_path).write_within("/missing", BDF, 5)


# unbind -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [NODE, "/dev/ng0n1", "/dev/nvme0", BDF, SERIAL, "/dev/disk/by-id/nvme-Fast"])
def test_unbind_by_every_name(machine: Machine, run: Any, name: str) -> None:
    machine.link("/dev/disk/by-id/nvme-Fast", NODE)
    assert run(*BIND)[0] == 0
    machine.path("/dev/disk/by-id/nvme-Fast").unlink()
    record = json.loads(run("unbind", name, "--json")[1])
    assert record == {
        "ok": True, "changed": True, "bdf": BDF, "model": "Fast SSD 4000", "serial": SERIAL,
        "driver": "nvme", "known": True, "nodes": [NODE],
    }  # fmt: skip


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


# the programs -------------------------------------------------------------------------------


def test_one_at_a_time(machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LOCK_SECONDS", 0.05)
    with journal.locked(machine):
        code, _, err = run(*BIND)
    assert code == 1
    assert "another bind or unbind is at work" in err
    assert driver_of(machine) == "nvme"


@pytest.mark.parametrize(
    "words", [["bind"], ["bind", NODE, "--driver", "nvme"], ["unbind"], ["status", "--all"]]
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(words)
    assert ended.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    command = hint.removeprefix("hint: ").removesuffix(" shows the options")
    assert "Example:" in subprocess.run(command, shell=True, cwd="/", capture_output=True, text=True).stdout


def test_the_hinted_command_works_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the current folder was imported')")
    command = shlex.split(host_command("status", "--json", root=False))
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"] is True


def test_both_programs_take_the_same_options() -> None:
    import argparse

    import click

    from dualblade.cli import bind, status
    from dualblade.cli import unbind as unbind_cli
    from dualblade.host import bind_command, status_command, unbind_command

    pairs: list[tuple[click.Command, Any]] = [
        (bind.bind, bind_command), (unbind_cli.unbind, unbind_command), (status.status, status_command),
    ]  # fmt: skip
    for clicked, module in pairs:
        parser = module.add_parser(argparse.ArgumentParser().add_subparsers())
        spelt = {word for action in parser._actions for word in action.option_strings or [action.metavar]}
        theirs = {
            word
            for option in clicked.params
            for word in (option.opts if option.opts[0][0] == "-" else ["DEV"])
        }
        assert theirs | {"-h", "--help"} == spelt
