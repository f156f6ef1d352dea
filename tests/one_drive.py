# SPDX-License-Identifier: Apache-2.0
"""A machine with one drive, what can be on it and around it, and how a test tells that all is as it was."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from nvme_machine import DEVICES, FakeDrive, Machine

from dualblade.host.journal import FOLDER
from dualblade.superblock import Geometry, Superblock, encode_superblock
from dualblade.units import MIB

BDF, SERIAL = "0000:01:00.0", "S64DNX0R"
NODE = "/dev/nvme0n1"
ENTRY = f"{FOLDER}/{BDF}.json"
GROUP = "/dev/vfio/12"
BIND = ["bind", NODE, "--serial", SERIAL]


def driver_of(machine: Machine, bdf: str = BDF) -> str | None:
    return machine.link_name(f"{DEVICES}/{bdf}/driver")


def changed(before: dict[str, Any], machine: Machine) -> set[str]:
    """Names that differ from `before`, but for the folder of the journal and its lock."""
    after = machine.snapshot()
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return names - {"run", "run/dualblade-spdk", "run/dualblade-spdk/lock"}


def superblock(copy: int = 0) -> bytes:
    uuid = UUID("6f1c7a52-7d0b-4c63-9a57-0a4f5b1d2c11")
    return encode_superblock(Superblock(copy, uuid, 3, Geometry.of(8 * MIB), 0, 0))


def write(machine: Machine, offset: int, data: bytes) -> None:
    with open(machine.image(machine.drives[BDF]), "r+b") as file:
        file.seek(offset)
        file.write(data)


def raw_data(machine: Machine) -> None:
    write(machine, 4321, b"\x01")


def no_iommu(machine: Machine) -> None:
    machine.path(f"{DEVICES}/{BDF}/iommu_group").unlink()


def mounted(machine: Machine) -> None:
    machine.process(200, "bash", "30 25 259:1 / /mnt/my\\040disk rw - ext4 /dev/nvme0n1 rw\n", space=1)
    machine.put("/proc/1/mountinfo", "30 25 259:1 / /mnt/my\\040disk rw - ext4 /dev/nvme0n1 rw\n")


def neighbour(machine: Machine) -> None:
    machine.add(FakeDrive("0000:02:00.0", "OTHER", "12"))
