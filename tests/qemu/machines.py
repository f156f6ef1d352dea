# SPDX-License-Identifier: Apache-2.0
"""The guests: their controllers, and QEMU's command line.

TCG always: a test must not depend on whether a host's KVM works, and most CI machines have none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
# a busy host may keep the timer waiting longer than the kernel's check of it
KERNEL = "console=ttyS0 panic=-1 quiet loglevel=4 transparent_hugepage=never no_timer_check psi=1"
IOMMU = ("-device", "intel-iommu,intremap=on,aw-bits=48")  # SPDK's addresses take 48 bits
# q35's chipset takes a few slots; these are free and stay the same whatever else is plugged in
SLOTS = range(0x10, 0x1F)


@dataclass(frozen=True)
class Drive:
    """A controller with one namespace a size (MiB). Those of one subsystem share a serial number and
    the namespaces; elsewhere the name is the serial number."""

    name: str
    mib: tuple[int, ...] = (64,)
    bus: str = "pcie.0"
    subsystem: str = ""
    metadata: int = 0  # bytes with each block

    @property
    def serial(self) -> str:
        return self.subsystem or self.name


@dataclass(frozen=True)
class Machine:
    drives: tuple[Drive, ...]
    memory_mib: int
    iommu: bool


MACHINES = {
    "iommu": Machine(
        (
            Drive("BLANK0", (96,)),
            Drive("SPARE0"),
            Drive("TWO0", (32, 64)),
            Drive("GROUP0", bus="bridge"),
            Drive("GROUP1", bus="bridge"),
            Drive("PATHS0", subsystem="PATHS"),
            Drive("PATHS1", (), subsystem="PATHS"),
        ),
        1536,
        True,
    ),
    # the kernel's driver and the IOMMU disagree about metadata, which is therefore here
    "no-iommu": Machine(
        (Drive("BLANK0", (96,)), Drive("SPARE0"), Drive("META0", (32,), metadata=8)), 1024, False
    ),
    # for whole runs, which take minutes and leave 2 GiB of their filesystem free
    "runs": Machine((Drive("DISK0", (4096,)),), 1536, False),
}


def command(machine: Machine, kernel: Path, initramfs: Path, folder: Path) -> list[str]:
    """QEMU for `machine`. `folder`: where its media are made, the guest writes and its console goes."""
    words = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-smp", "2",
        "-m", str(machine.memory_mib), "-nodefaults", "-display", "none", "-no-reboot",
        "-serial", f"file:{folder / 'console'}", "-kernel", str(kernel), "-initrd", str(initramfs),
        "-append", KERNEL + (" intel_iommu=on" if machine.iommu else ""),
        *(IOMMU if machine.iommu else ()),
        *_shared("host", Path("/"), ",readonly=on"), *_shared("out", folder / "host", ""),
    ]  # fmt: skip
    buses = {drive.bus for drive in machine.drives}
    if "bridge" in buses:
        words += ["-device", f"pcie-pci-bridge,id=bridge,addr={SLOTS[-1]:#x}"]
    for name in dict.fromkeys(drive.subsystem for drive in machine.drives if drive.subsystem):
        words += ["-device", f"nvme-subsys,id={name}"]
    for number, drive in enumerate(machine.drives):
        words += _drive(drive, number, folder)
    return words


def _shared(tag: str, folder: Path, options: str) -> list[str]:
    """A folder of the host in the guest, through 9p."""
    device = f"local,id={tag},path={folder},security_model=none,multidevs=remap{options}"
    return ["-fsdev", device, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]


def _drive(drive: Drive, number: int, folder: Path) -> Sequence[str]:
    place = f"bus={drive.bus},addr={SLOTS[number]:#x}"
    subsystem = f",subsys={drive.subsystem}" if drive.subsystem else ""
    words = ["-device", f"nvme,id={drive.name},serial={drive.serial},{place}{subsystem}"]
    for index, mib in enumerate(drive.mib, 1):
        name = f"{drive.name}.{index}"
        make_medium(folder / name, mib * MIB)
        words += ["-drive", f"file={folder / name},id={name},if=none,format=raw,cache=unsafe,discard=unmap"]
        shared = "on" if drive.subsystem else "off"
        words += [
            "-device",
            f"nvme-ns,drive={name},bus={drive.name},nsid={index},shared={shared},ms={drive.metadata}",
        ]
    return words


def make_medium(path: Path, nbytes: int) -> None:
    """Noise that no tool knows as data, between a zero first and a zero last MiB and more."""
    with path.open("wb") as file:
        file.truncate(nbytes)
        file.seek(8 * MIB)
        file.write(random.Random(path.name).randbytes(2 * MIB))
