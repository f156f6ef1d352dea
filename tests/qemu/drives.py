# SPDX-License-Identifier: Apache-2.0
"""The guest's side: its drives by serial number, commands, and the state that a refusal must not change."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PCI = Path("/sys/bus/pci/devices")
NVME_CLASS = "0x010802"
MIB = 1 << 20


@dataclass(frozen=True)
class Drive:
    """A controller by its place on the bus, which stays when drivers come and go."""

    address: str

    @property
    def sysfs(self) -> Path:
        return PCI / self.address

    @property
    def driver(self) -> str | None:
        link = self.sysfs / "driver"
        return os.readlink(link).rpartition("/")[2] if link.exists() else None

    @property
    def group(self) -> str | None:
        link = self.sysfs / "iommu_group"
        return os.readlink(link).rpartition("/")[2] if link.exists() else None

    @property
    def blocks(self) -> list[Path]:
        """Its namespaces' block devices, now."""
        names = sorted(path.name for path in self.sysfs.glob("nvme/nvme*/nvme*n*"))
        return [Path("/dev", name) for name in names if Path("/dev", name).is_block_device()]

    @property
    def block(self) -> Path:
        return self.blocks[0]

    @property
    def generic(self) -> Path:
        return self.block.with_name(self.block.name.replace("nvme", "ng"))

    def bytes_of(self, offset: int, nbytes: int) -> bytes:
        """Read past the page cache of whoever read here before."""
        with self.block.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), offset, nbytes, os.POSIX_FADV_DONTNEED)
            return os.pread(file.fileno(), nbytes, offset)

    def digest(self) -> str:
        """Of every byte of the first namespace."""
        digest = hashlib.sha256()
        with self.block.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while piece := file.read(4 * MIB):
                digest.update(piece)
        return digest.hexdigest()


def drives() -> dict[str, Drive]:
    """By serial number, as the kernel's driver tells it; where two share one, the first by address."""
    found: dict[str, Drive] = {}
    for device in sorted(PCI.iterdir()):
        for serial in device.glob("nvme/nvme*/serial"):
            found.setdefault(serial.read_text().strip(), Drive(device.name))
    return found


def call(*words: str | Path, code: int | None = 0, seconds: float = 120, **options: Any) -> str:
    """A command's stdout and stderr, in which it must exit with `code` (None: any)."""
    done = subprocess.run(
        [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=seconds, check=False, **options,
    )  # fmt: skip
    assert code is None or done.returncode == code, f"{words} exit {done.returncode}, not {code}\n{done.stdout}"
    return done.stdout


def dualblade(*words: str | Path, code: int = 0, seconds: float = 180) -> str:
    """A command of the whole program."""
    return call(sys.executable, "-m", "dualblade.cli.main", *words, code=code, seconds=seconds)


def record(*words: str | Path, program: Callable[..., str] = dualblade) -> dict[str, Any]:
    """What a command says with --json. Talk on stderr comes before it."""
    out = program(*words, "--json")
    return dict(json.loads(out[out.index("{") :]))


def wait_until(what: str, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def state() -> dict[str, object]:
    """What a refusal must leave as it was: drivers, overrides, mounts, swap, groups, sectors written."""
    found: dict[str, object] = {}
    for device in PCI.iterdir():
        if (device / "class").read_text().strip() == NVME_CLASS:
            drive = Drive(device.name)
            override = (device / "driver_override").read_text().strip()
            found[device.name] = (drive.driver, override, [str(block) for block in drive.blocks])
    for stat in Path("/sys/block").glob("nvme*n*/stat"):
        found[stat.parent.name] = stat.read_text().split()[6]  # sectors written
    found["mounts"] = Path("/proc/self/mounts").read_text()
    found["swaps"] = Path("/proc/swaps").read_text().split()
    found["vfio"] = names(Path("/dev").glob("vfio/*"))
    found["journal"] = names(Path("/run").glob("dualblade*/*"))
    return found


def names(paths: Iterable[Path]) -> list[str]:
    return sorted(str(path) for path in paths)
