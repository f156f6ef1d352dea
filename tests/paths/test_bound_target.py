# SPDX-License-Identifier: Apache-2.0
"""/dev/nvme1n1 once its drive is bound: found by its old name, and each way in which it cannot be used."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from dualblade import target_nvme, targets
from dualblade.cli.main import main
from dualblade.errors import TargetError
from dualblade.host.command import host_command
from dualblade.host.journal import BOUND, DEVICES, FOLDER, Entry
from dualblade.host.meminfo import MachineMemory
from dualblade.host.status import user_name
from dualblade.host.sysfs import Host
from dualblade.ownership import scan_edges
from dualblade.target_nvme import check_pci
from dualblade.targets import TargetKind, find_target
from dualblade.units import GIB, MIB

BDF = "0000:01:00.0"
OTHER = "0000:01:00.1"
NODE = "/dev/nvme1n1"
ENTRY = Entry(
    bdf=BDF, serial="S3X", model="Drive", old_driver="nvme", driver="vfio-pci", owner=None, state=BOUND,
    steps=(), sizes={"1": GIB, "2": GIB},
    nodes={"/dev/nvme1": 0, NODE: 1, "/dev/nvme1n2": 2, "/dev/disk/by-id/nvme-Drive_S3X": 1},
    group="7", by="root", pid=1, since="", boot="this",
)  # fmt: skip


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """A machine whose one drive was bound to vfio-pci."""
    made = Host(tmp_path)
    device = made.path(f"{DEVICES}/{BDF}")
    device.mkdir(parents=True)
    (device / "driver").symlink_to("../../../bus/pci/drivers/vfio-pci")
    (device / "iommu_group").symlink_to("../../../kernel/iommu_groups/7")
    for path, text in {"/proc/sys/kernel/random/boot_id": "this\n", "/dev/vfio/7": ""}.items():
        made.path(path).parent.mkdir(parents=True, exist_ok=True)
        made.path(path).write_text(text)
    ENTRY.save(made)
    return made


def drive(host: Host, driver: str | None) -> None:
    link = host.path(f"{DEVICES}/{BDF}/driver")
    link.unlink()
    if driver:
        link.symlink_to(f"../../../bus/pci/drivers/{driver}")


# names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "namespace"), [(NODE, 1), ("/dev/nvme1n2", 2), ("/dev/disk/by-id/nvme-Drive_S3X", 1)]
)
def test_a_node_that_is_gone_leads_to_the_drive(host: Host, node: str, namespace: int) -> None:
    found = find_target(node, host)
    assert (found.kind, found.text, found.namespace) == (TargetKind.PCI, node, namespace)
    assert found.address == f"trtype:PCIe traddr:{BDF}"
    assert found.by_spdk


@pytest.mark.parametrize("node", ["/dev/nvme2n1", "/dev/sda", "kv.img", "mem:64M", "/dev/ng1n1"])
def test_other_names_mean_what_they_say(host: Host, node: str) -> None:
    assert find_target(node, host) == targets.parse_target(node)


def test_a_node_that_is_there_is_the_kernels(host: Host) -> None:
    host.path(NODE).touch()
    assert find_target(NODE, host).kind is TargetKind.BLOCK


def test_a_drive_that_went_back_is_the_kernels(host: Host) -> None:
    drive(host, "nvme")
    assert find_target(NODE, host).kind is TargetKind.BLOCK


def test_a_journal_of_another_boot_says_nothing(host: Host) -> None:
    replace(ENTRY, boot="before").save(host)
    assert find_target(NODE, host).kind is TargetKind.BLOCK


# before SPDK is started -----------------------------------------------------------------------


def refused(host: Host, name: str = NODE, bdf: str = BDF) -> TargetError:
    with pytest.raises(TargetError) as caught:
        check_pci(name, bdf, host)
    return caught.value


@pytest.fixture
def with_spdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_nvme, "engines", lambda: ["uring", "spdk"])


def test_all_well(host: Host, with_spdk: None) -> None:
    check_pci(NODE, BDF, host)


def test_a_build_without_spdk_says_how_to_give_the_drive_back(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_nvme, "engines", lambda: ["uring"])
    error = refused(host)
    assert error.message == f"{NODE} is bound to vfio-pci, and this build has no SPDK to drive it"
    assert error.hint == f"to give it back to the kernel: {host_command('unbind', BDF)}"


@pytest.mark.parametrize(
    ("driver", "says"), [("nvme", "belongs to the kernel's driver nvme"), (None, "has no driver")]
)
def test_a_drive_that_is_not_bound(host: Host, with_spdk: None, driver: str | None, says: str) -> None:
    drive(host, driver)
    error = refused(host, BDF)
    assert says in error.message
    assert error.hint == host_command("bind", BDF)


def test_no_such_device(host: Host, with_spdk: None) -> None:
    assert "no PCI device 0000:02:00.0" in refused(host, bdf="0000:02:00.0").message


def test_a_group_that_this_user_may_not_open(
    host: Host, with_spdk: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    error = refused(host)
    assert error.message.endswith("this user may not open /dev/vfio/7")
    assert error.hint == host_command("bind", BDF, "--user", user_name(1000))
    host.remove(f"{FOLDER}/{BDF}.json")  # somebody else bound it
    assert str(refused(host).hint).endswith(f"chown {user_name(1000)} /dev/vfio/7")


def test_root_alone_can_use_uio(host: Host, with_spdk: None, monkeypatch: pytest.MonkeyPatch) -> None:
    drive(host, "uio_pci_generic")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    check_pci(NODE, BDF, host)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    error = refused(host)
    assert "bound to uio_pci_generic, and root alone can use a drive through it" in error.message
    assert str(error.hint).endswith(host_command("unbind", BDF))


@pytest.mark.parametrize(
    ("pci_class", "command"), [("0x010802", ["bind", OTHER]), ("0x020000", ["unbind", BDF])]
)
def test_a_group_of_which_the_kernel_has_a_part(
    host: Host, with_spdk: None, pci_class: str, command: list[str]
) -> None:
    other = host.path(f"{DEVICES}/{OTHER}")
    other.mkdir()
    (other / "class").write_text(f"{pci_class}\n")
    (other / "driver").symlink_to("../../../bus/pci/drivers/theirs")
    (other / "iommu_group").symlink_to("../../../kernel/iommu_groups/7")
    for bdf in (BDF, OTHER):
        host.path(f"/sys/kernel/iommu_groups/7/devices/{bdf}").mkdir(parents=True)
    error = refused(host)
    assert f"shares IOMMU group 7 with {OTHER} (with theirs)" in error.message
    assert error.hint == host_command(*command)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """How SPDK was started, on a machine with 100 hugepages, 40 of them free: with hugepages?"""
    found: list[object] = []
    memory = MachineMemory(16 * GIB, 8 * GIB, 100, 40, 0, 0, 2 * MIB)
    monkeypatch.setattr(target_nvme, "environment", lambda: None)
    monkeypatch.setattr(target_nvme, "start_environment", lambda *words: found.append(words[1]))
    monkeypatch.setattr(target_nvme, "machine_memory", lambda host: memory)
    return found


def test_a_drive_on_pci_wants_hugepages(started: list[object]) -> None:
    """tests/qemu shows what becomes of ordinary memory."""
    with pytest.raises(TargetError, match=r"SPDK needs 208 MiB in free hugepages") as caught:
        target_nvme._start(128 * MIB, BDF)
    assert caught.value.hint == host_command("hugepages", "--reserve", "512M")  # 120 are in use
    assert started == []


def test_memory_that_may_not_be_locked(started: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_nvme, "ENVIRONMENT_BYTES", 0)
    monkeypatch.setattr(target_nvme, "lock_limit", lambda: 8 * MIB)
    with pytest.raises(TargetError, match=r"VFIO locks the 48 MiB .* this user may lock 8 MiB") as caught:
        target_nvme._start(32 * MIB, BDF)
    assert "memlock unlimited" in str(caught.value.hint)
    assert started == []
    target_nvme._start(32 * MIB, None)
    monkeypatch.setattr(target_nvme, "lock_limit", lambda: None)
    target_nvme._start(32 * MIB, BDF)
    assert started == [True, True]


def test_a_target_elsewhere_takes_ordinary_memory(started: list[object]) -> None:
    target_nvme._start(128 * MIB, None)
    assert started == [False]


@pytest.mark.parametrize("words", [["volume", "show"], ["volume", "create"], ["volume", "wipe"]])
def test_commands_look_for_the_drive(
    with_spdk: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    monkeypatch.setattr(targets, "bound_namespace", lambda node, host: ("0000:ff:1f.7", 1))
    assert main([*words, "/dev/nvme77n1"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: /dev/nvme77n1: there is no PCI device 0000:ff:1f.7\nhint: "
    )


# what the edges hold --------------------------------------------------------------------------


def test_signatures_in_the_edges_are_named() -> None:
    edges = bytearray(2 * MIB)
    assert scan_edges(bytes(edges), 64 * GIB) == []
    edges[4096 - 10 : 4096] = b"SWAPSPACE2"
    edges[1024:1032] = (1).to_bytes(4, "little") + (4095).to_bytes(4, "little")
    found = scan_edges(bytes(edges), 64 * GIB)
    assert found
    assert all("swap" in line for line in found)


def test_a_drive_larger_than_any_file_here_is_not_scanned() -> None:
    assert scan_edges(b"\1" * 2 * MIB, 1 << 62) == []
