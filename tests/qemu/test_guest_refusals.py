# SPDX-License-Identifier: Apache-2.0
"""Every reason to refuse that a guest can show; none changes anything."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from drives import MIB, Drive, call, drives, host, record, state, wait_until

from dualblade.host import driver
from dualblade.host.sysfs import Host

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.machine("iommu")]


def refused(drive: Drive, kind: str, word: str, *more: str, serial: str = "SPARE0") -> None:
    """bind refuses it for a reason of this kind with this word in it, and nothing has changed."""
    before = state()
    told = record("bind", drive.address, "--serial", serial, "--yes", *more, program=host, code=1)
    assert not told["ok"]
    reasons = {one["kind"]: one["reason"] for one in told["refusals"]}
    assert word in reasons.get(kind, ""), reasons
    assert all(one["remedy"] for one in told["refusals"])
    assert told["error"]
    assert told["hint"]
    assert state() == before
    assert drive.driver == "nvme"


@contextmanager
def process(*words: str, ready: str = "", stdin: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """One that lives meanwhile; `ready`: a file that it makes when it is."""
    running = subprocess.Popen(words, stdin=stdin)
    try:
        if ready:
            wait_until(f"{words} has begun", Path(ready).exists)
        yield running
    finally:
        running.kill()
        running.wait()


@contextmanager
def mounted(block: Path, where: Path) -> Iterator[None]:
    where.mkdir(exist_ok=True)
    call("mount", "-t", "ext4", block, where)
    try:
        yield
    finally:
        call("umount", where)


def make_ext4(block: Path) -> None:
    call("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", block)


def partition_table(mib: int) -> bytes:
    """One Linux partition of the second to the last MiB but one."""
    entry = struct.pack("<B3sB3sII", 0, b"\0\x02\0", 0x83, b"\xff\xff\xff", 2048, (mib - 2) * 2048)
    return bytes(446) + entry + bytes(48) + b"\x55\xaa"


# in use -----------------------------------------------------------------------------------------


def test_a_mounted_filesystem(spare: Drive, tmp_path: Path) -> None:
    make_ext4(spare.block)
    with mounted(spare.block, tmp_path / "mount"):
        (tmp_path / "mount/file").write_text("kept")
        os.sync()
        refused(spare, "mounted", str(tmp_path / "mount"))
        assert (tmp_path / "mount/file").read_text() == "kept"
    refused(spare, "signature", "ext4")


def test_a_mount_that_only_another_mount_namespace_has(spare: Drive, tmp_path: Path) -> None:
    make_ext4(spare.block)
    script = f"mount {spare.block} {tmp_path} && touch /run/ready && exec sleep 1000"
    with process("unshare", "-m", "--propagation", "private", "sh", "-c", script, ready="/run/ready") as one:
        assert str(spare.block) not in Path("/proc/self/mounts").read_text()
        refused(spare, "mounted", f"as process {one.pid} sees it")
    os.remove("/run/ready")


def test_what_the_system_runs_from(spare: Drive) -> None:
    make_ext4(spare.block)
    with mounted(spare.block, Path("/boot")):
        refused(spare, "system", "/boot")


def test_swap(spare: Drive) -> None:
    call("mkswap", spare.block)
    refused(spare, "signature", "swap")
    call("swapon", spare.block)
    try:
        refused(spare, "swap", str(spare.block))
    finally:
        call("swapoff", spare.block)


def test_a_mapped_device(spare: Drive) -> None:
    call("modprobe", "dm-mod")
    call(
        "dmsetup",
        "create",
        "--noudevsync",
        "--noudevrules",
        "mapped",
        "--table",
        f"0 32768 linear {spare.block} 2048",
    )
    try:
        refused(spare, "held", "mapped")
    finally:
        call("dmsetup", "remove", "--noudevsync", "--noudevrules", "mapped")


def test_a_raid_array(spare: Drive) -> None:
    call("modprobe", "-a", "md-mod", "raid1")
    call(
        "mdadm", "--create", "/dev/md0", "--run", "--level=1", "--raid-devices=2", "--metadata=1.2",
        spare.block, "missing",
    )  # fmt: skip
    try:
        refused(spare, "held", "RAID array md0")
    finally:
        call("mdadm", "--stop", "/dev/md0")
    refused(spare, "signature", "raid")


@pytest.mark.parametrize("node", ["block", "generic", "controller"])
def test_an_open_descriptor(spare: Drive, node: str) -> None:
    block = spare.block
    path = {"block": block, "generic": spare.generic, "controller": Path(str(block).removesuffix("n1"))}[node]
    fd = os.open(path, os.O_RDONLY)
    with process("sleep", "1000", stdin=fd) as one:
        os.close(fd)
        refused(spare, "open", f"sleep (pid {one.pid}) has {path} open")


def test_a_claim_without_a_name(spare: Drive) -> None:
    """Opened through a node of another name, for itself alone."""
    node = Path("/run/another-name")
    os.mknod(node, 0o600 | 0o060000, spare.block.stat().st_rdev)
    fd = os.open(node, os.O_RDONLY | os.O_EXCL)
    try:
        refused(spare, "busy", "cannot be had alone")
    finally:
        os.close(fd)
        node.unlink()


# what lies on it --------------------------------------------------------------------------------


def test_partitions(spare: Drive) -> None:
    spare.write(0, partition_table(64))
    call("blockdev", "--rereadpt", spare.block)
    refused(spare, "partitions", "p1")
    assert "name the drive" in host("bind", f"{spare.block}p1", "--serial", "SPARE0", "--yes", code=1)


@pytest.mark.parametrize("offset", [MIB - 4096, 63 * MIB])
def test_unknown_data_at_either_end(spare: Drive, offset: int) -> None:
    spare.write(offset, os.urandom(4096))
    refused(spare, "data", "not empty")
    refused(spare, "data", "not empty", "--i-know-this-erases", "BLANK0")
    told = record(
        "bind", spare.block, "--serial", "SPARE0", "--yes", "--i-know-this-erases", "SPARE0", program=host
    )
    assert told["ok"]


# the drive and its place ------------------------------------------------------------------------


def test_one_namespace_of_two_in_use(tmp_path: Path) -> None:
    drive = drives()["TWO0"]
    second = drive.blocks[1]
    make_ext4(second)
    with mounted(second, tmp_path):
        refused(drive, "mounted", str(second), serial="TWO0")
    call("wipefs", "--all", second)


def test_a_drive_with_two_paths() -> None:
    refused(drives()["PATHS"], "multipath", "nvme", serial="PATHS")


def test_controllers_of_one_iommu_group() -> None:
    found = drives()
    refused(found["GROUP0"], "iommu-group", found["GROUP1"].address, serial="GROUP0")


def test_the_last_controller_of_a_group_may_go_when_the_others_have() -> None:
    found = drives()
    first, last = found["GROUP0"], found["GROUP1"]
    machine = Host()
    driver.load_module(machine, "vfio-pci")
    driver.set_override(machine, first.address, "vfio-pci")
    driver.detach(machine, first.address)
    driver.probe(machine, first.address)
    try:
        assert record("bind", last.address, "--serial", "GROUP1", "--yes", program=host)["ok"]
    finally:
        for one in (last, first):
            host("unbind", one.address)
            one.wait()


def test_another_serial_number_or_none(spare: Drive) -> None:
    before = state()
    assert "has the serial number SPARE0, not BLANK0" in host(
        "bind", spare.block, "--serial", "BLANK0", "--yes", code=1
    )
    assert "--serial SPARE0" in host("bind", spare.block, code=1)
    assert state() == before


def test_what_is_no_nvme_drive(tmp_path: Path) -> None:
    before = state()
    assert "no NVMe controller" in host("bind", "0000:00:00.0", "--serial", "x", "--yes", code=1)
    assert "no PCI device" in host("bind", "0000:ff:00.0", "--serial", "x", "--yes", code=1)
    assert "no NVMe drive" in host("bind", "/dev/null", "--serial", "x", "--yes", code=1)
    assert state() == before


# the way out ------------------------------------------------------------------------------------


def test_who_follows_the_hints_gets_there(spare: Drive, tmp_path: Path) -> None:
    """A drive that is partitioned, mounted and open, and a user who pastes what is after the last colon."""
    spare.write(0, partition_table(64))
    call("blockdev", "--rereadpt", spare.block)
    make_ext4(Path(f"{spare.block}p1"))
    call("mount", f"{spare.block}p1", tmp_path)
    for _ in range(6):
        told = host("bind", spare.address, "--serial", "SPARE0", code=None)
        if "error:" not in told:
            break
        call("sh", "-c", told.partition("hint: ")[2].rpartition(": ")[2])
    assert spare.driver == "vfio-pci", told


def test_a_refusal_tells_every_reason_in_a_dry_run(spare: Drive, tmp_path: Path) -> None:
    make_ext4(spare.block)
    with ExitStack() as stack:
        stack.enter_context(mounted(spare.block, tmp_path))
        fd = os.open(spare.block, os.O_RDONLY)
        stack.enter_context(process("sleep", "1000", stdin=fd))
        os.close(fd)
        before = state()
        told = record("bind", spare.address, "--dry-run", program=host, code=1)
        assert {"mounted", "open", "signature"} <= {one["kind"] for one in told["refusals"]}
        assert state() == before
