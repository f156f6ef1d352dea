# SPDX-License-Identifier: Apache-2.0
"""A machine with NVMe drives in a folder, which answers as the kernel does: it all lies in files, so a
process that is killed leaves what it would leave."""

from __future__ import annotations

import errno
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualblade.host.sysfs import Host
from dualblade.units import MIB

DEVICES = "/sys/bus/pci/devices"
DRIVERS = "/sys/bus/pci/drivers"
VFIO = "vfio-pci"
BOOT_ID = "5e1f0a52-0d5b-4a3f-9f57-3a1f5f1d2c11"


@dataclass(frozen=True)
class FakeDrive:
    bdf: str
    serial: str
    group: str | None = "12"
    size: int = 8 * MIB
    model: str = "Fast SSD 4000"
    namespaces: int = 1
    multipath: bool = False


@dataclass
class Faults:
    """What goes wrong. refuse: drivers whose probe fails. busy: nodes that cannot be had alone. unloadable:
    modules. blocked: unbind waits for ever. tick: called before and after each write."""

    refuse: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)
    unloadable: set[str] = field(default_factory=set)
    blocked: bool = False
    tick: Callable[[str], None] = lambda _: None


class Machine(Host):
    """Begins with no drive, and with the module vfio-pci not loaded."""

    __slots__ = ("drives", "faults", "owners")

    def __init__(self, root: Path):
        object.__setattr__(self, "root", root)
        object.__setattr__(self, "drives", {})
        object.__setattr__(self, "faults", Faults())
        object.__setattr__(self, "owners", {})
        for path in ("/sys/class/nvme", "/sys/class/block", "/sys/dev/block", "/dev/vfio", DEVICES):
            self.path(path).mkdir(parents=True)
        for name, text in {
            "/sys/bus/pci/drivers_probe": "", "/proc/cmdline": "BOOT_IMAGE=/vmlinuz root=UUID=1 ro\n",
            "/proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n", "/sys/power/resume": "0:0\n",
            "/proc/sys/kernel/random/boot_id": f"{BOOT_ID}\n",
        }.items():  # fmt: skip
            self.put(name, text)
        self.load("nvme")
        self.process(1, "init", mounts="25 1 254:0 / / rw shared:1 - ext4 /dev/vda rw\n")

    # set up ---------------------------------------------------------------------------------

    def put(self, path: str, text: str) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def link(self, path: str, target: str) -> None:
        """A relative link, as sysfs has them."""
        place = self.path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(os.path.relpath(self.path(target).resolve(), place.parent.resolve()))

    def load(self, driver: str) -> None:
        self.put(f"{DRIVERS}/{driver}/unbind", "")

    def process(
        self, pid: int, name: str, mounts: str = "", opened: Sequence[str] = (), space: int = 1
    ) -> None:
        self.put(f"/proc/{pid}/comm", f"{name}\n")
        self.put(f"/proc/{pid}/mountinfo", mounts)
        self.path(f"/proc/{pid}/fd").mkdir(exist_ok=True)
        self.path(f"/proc/{pid}/ns").mkdir(exist_ok=True)
        self.path(f"/proc/{pid}/ns/mnt").symlink_to(f"mnt:[{space}]")
        for number, path in enumerate(opened):
            self.path(f"/proc/{pid}/fd/{number}").symlink_to(path)

    def add(self, drive: FakeDrive, driver: str | None = "nvme") -> FakeDrive:
        self.drives[drive.bdf] = drive
        folder = f"/sys/devices/pci0000:00/{drive.bdf}"
        for name, text in {
            "class": "0x010802", "vendor": "0x1b36", "device": "0x0010", "numa_node": "-1",
            "driver_override": "(null)", "sriov_numvfs": "0",
        }.items():  # fmt: skip
            self.put(f"{folder}/{name}", f"{text}\n")
        self.link(f"{DEVICES}/{drive.bdf}", folder)
        if drive.group:
            self.put(f"/sys/kernel/iommu_groups/{drive.group}/type", "DMA\n")
            self.link(f"{folder}/iommu_group", f"/sys/kernel/iommu_groups/{drive.group}")
            self.link(f"/sys/kernel/iommu_groups/{drive.group}/devices/{drive.bdf}", folder)
        for nsid in range(1, drive.namespaces + 1):
            self.image(drive, nsid).parent.mkdir(exist_ok=True)
            with open(self.image(drive, nsid), "wb") as file:
                file.truncate(drive.size)
        if driver:
            self._attach(drive, driver)
        return drive

    def image(self, drive: FakeDrive, nsid: int = 1) -> Path:
        """What is on a namespace."""
        return self.path(f"/store/{drive.serial}.{nsid}")

    def partition(self, name: str, dev: str) -> None:
        parent = name.rpartition("p")[0]
        folder = self.resolve(f"/sys/class/block/{parent}")
        self.put(f"{folder}/{name}/dev", f"{dev}\n")
        self.put(f"{folder}/{name}/partition", "1\n")
        self.link(f"/sys/class/block/{name}", f"{folder}/{name}")
        self.link(f"/sys/dev/block/{dev}", f"{folder}/{name}")

    def mapped(self, node: str, dev: str, below: str, **facts: str) -> None:
        """A virtual device on a drive or a partition."""
        folder = f"/sys/devices/virtual/block/{node}"
        self.put(f"{folder}/dev", f"{dev}\n")
        for fact, text in facts.items():
            self.put(f"{folder}/dm/{fact}", f"{text}\n")
        self.link(f"/sys/class/block/{node}", folder)
        self.link(f"/sys/dev/block/{dev}", folder)
        lower = self.resolve(f"/sys/class/block/{below}")
        self.link(f"{folder}/slaves/{below}", lower)
        self.link(f"{lower}/holders/{node}", folder)

    def snapshot(self) -> dict[str, Any]:
        """Every file, link and folder, with what it holds."""
        found: dict[str, Any] = {}
        for path in sorted(self.root.rglob("*")):
            name = str(path.relative_to(self.root))
            found[name] = os.readlink(path) if path.is_symlink() else path.is_dir() or path.read_bytes()
        return found

    # as the kernel --------------------------------------------------------------------------

    def write_text(self, path: str, text: str) -> None:
        self.faults.tick(f"before {path}")
        override = path.endswith("/driver_override")
        if not override:
            assert self.exists(path), path
        bdf = text.strip()
        if override:
            super().write_text(path, text if bdf else "(null)\n")
        elif path.endswith("/driver/unbind"):
            self._detach(self.drives[bdf])
        elif path.endswith("/drivers_probe"):
            self._probe(self.drives[bdf])
        else:
            raise AssertionError(f"nobody should write {path}")
        self.faults.tick(f"after {path}")

    def write_within(self, path: str, text: str, seconds: float) -> bool:
        if self.faults.blocked:
            return False
        self.write_text(path, text)
        return True

    def save(self, path: str, text: str) -> None:
        self.faults.tick(f"before {path}")
        super().save(path, text)
        self.faults.tick(f"after {path}")

    def remove(self, path: str) -> None:
        self.faults.tick(f"before {path}")
        super().remove(path)
        self.faults.tick(f"after {path}")

    def chown(self, path: str, uid: int) -> None:
        self.faults.tick(f"before {path}")
        assert self.exists(path)
        self.owners[path] = uid

    def owner(self, path: str) -> int:
        return int(self.owners.get(path, 0))

    def device_number(self, path: str) -> str | None:
        name = self.resolve(path).rpartition("/")[2]
        for kind, place in (("b", "class/block"), ("c", "class/nvme"), ("c", "class/nvme-generic")):
            if self.exists(path) and self.exists(f"/sys/{place}/{name}/dev"):
                return kind + self.attribute(f"/sys/{place}/{name}/dev")
        return None

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_EXCL and path in self.faults.busy:
            raise OSError(errno.EBUSY, "Device or resource busy", path)
        return super().open(path, flags)

    def program(self, name: str) -> str | None:
        return f"/sbin/{name}"

    def run(self, command: Sequence[str], seconds: float = 60) -> subprocess.CompletedProcess[str]:
        assert command[0] == "/sbin/modprobe"
        if command[1] in self.faults.unloadable:
            return subprocess.CompletedProcess(command, 1, "", f"FATAL: Module {command[1]} not found")
        self.load(command[1])
        return subprocess.CompletedProcess(command, 0, "", "")

    def _probe(self, drive: FakeDrive) -> None:
        """Says nothing if it fails."""
        override = self.attribute(f"{DEVICES}/{drive.bdf}/driver_override")
        driver = "nvme" if override == "(null)" else override
        if self.exists(f"{DEVICES}/{drive.bdf}/driver") or driver in self.faults.refuse:
            return
        if self.exists(f"{DRIVERS}/{driver}"):
            self._attach(drive, driver)

    def _attach(self, drive: FakeDrive, driver: str) -> None:
        self.link(f"{DEVICES}/{drive.bdf}/driver", f"{DRIVERS}/{driver}")
        if driver == "nvme":
            self._show_controller(drive)
        elif driver == VFIO and drive.group:
            self.put(f"/dev/vfio/{drive.group}", "")

    def _detach(self, drive: FakeDrive) -> None:
        driver = self.link_name(f"{DEVICES}/{drive.bdf}/driver")
        self.path(f"{DEVICES}/{drive.bdf}/driver").unlink()
        if driver == "nvme":
            self._hide_controller(drive)
        elif driver == VFIO:
            self.path(f"/dev/vfio/{drive.group}").unlink()

    def _show_controller(self, drive: FakeDrive) -> None:
        taken = {int(name[4:]) for name in self.names("/sys/class/nvme")}
        number = next(n for n in range(99) if n not in taken)
        name, folder = f"nvme{number}", f"{DEVICES}/{drive.bdf}/nvme/nvme{number}"
        for attribute, text in {
            "model": drive.model, "serial": drive.serial.ljust(20), "firmware_rev": "1.0", "state": "live",
            "transport": "pcie", "subsysnqn": f"nqn.2014-08.org.example:{drive.serial}",
            "dev": f"241:{number}",
        }.items():  # fmt: skip
            self.put(f"{folder}/{attribute}", f"{text}\n")
        self.link(f"/sys/class/nvme/{name}", self.resolve(folder))
        self.link(f"{folder}/device", self.resolve(f"{DEVICES}/{drive.bdf}"))
        self.put(f"/dev/{name}", "")
        for nsid in range(1, drive.namespaces + 1):
            self._show_namespace(drive, number, nsid)

    def _show_namespace(self, drive: FakeDrive, number: int, nsid: int) -> None:
        name, dev = f"nvme{number}n{nsid}", f"259:{number * 100 + nsid}"
        controller = f"{DEVICES}/{drive.bdf}/nvme/nvme{number}"
        folder = f"{controller}/{name}"
        if drive.multipath:  # the subsystem has another number than the controller
            self.put(f"{controller}/nvme{number}c{number}n{nsid}/hidden", "1\n")
            folder = f"/sys/devices/virtual/nvme-subsystem/nvme-subsys{number}/{name}"
        for attribute, text in {
            "dev": dev, "size": str(drive.size // 512), "nsid": str(nsid), "queue/logical_block_size": "512",
        }.items():  # fmt: skip
            self.put(f"{folder}/{attribute}", f"{text}\n")
        real = self.resolve(folder)
        self.link(f"/sys/class/block/{name}", real)
        self.link(f"/sys/dev/block/{dev}", real)
        os.link(self.image(drive, nsid), self.path(f"/dev/{name}"))
        generic = name.replace("nvme", "ng")
        self.put(f"{real}.generic/dev", f"242:{number * 100 + nsid}\n")
        self.link(f"/sys/class/nvme-generic/{generic}", f"{real}.generic")
        self.put(f"/dev/{generic}", "")

    def _hide_controller(self, drive: FakeDrive) -> None:
        number = self.names(f"{DEVICES}/{drive.bdf}/nvme")[0][4:]
        mine = re.compile(rf"(nvme|ng){number}(n\d+(p\d+)?)?")
        virtual = f"/sys/devices/virtual/nvme-subsystem/nvme-subsys{number}"
        for folder in (f"{DEVICES}/{drive.bdf}/nvme", virtual):
            subprocess.run(["rm", "-rf", self.path(self.resolve(folder))], check=True)
        for folder in ("/dev", "/sys/class/nvme", "/sys/class/block", "/sys/class/nvme-generic"):
            for name in self.names(folder):
                if mine.fullmatch(name):
                    self.path(f"{folder}/{name}").unlink()
        for name in self.names("/sys/dev/block"):
            if not self.path(f"/sys/dev/block/{name}").exists():
                self.path(f"/sys/dev/block/{name}").unlink()
