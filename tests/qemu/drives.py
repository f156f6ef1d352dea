# SPDX-License-Identifier: Apache-2.0
"""The guest's side: its drives by serial number, commands, and the state that a refusal must not change."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualblade.host.__main__ import main

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

    def wait(self) -> None:
        """Until the kernel has its namespaces again."""
        wait_until(f"{self.address} is the kernel's", lambda: self.driver == "nvme" and bool(self.blocks))

    def write(self, offset: int, data: bytes) -> None:
        fd = os.open(self.block, os.O_WRONLY | os.O_SYNC)
        os.pwrite(fd, data, offset)
        os.close(fd)

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
    assert code is None or done.returncode == code, (
        f"{words} exit {done.returncode}, not {code}\n{done.stdout}"
    )
    return done.stdout


def dualblade(*words: str | Path, code: int = 0, seconds: float = 180) -> str:
    """A command of the whole program."""
    return call(sys.executable, "-m", "dualblade.cli.main", *words, code=code, seconds=seconds)


def host(*words: str | Path, code: int | None = 0) -> str:
    """A command of `python3 -m dualblade.host`, in this process: its stdout and stderr."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            got = main([str(word) for word in words])
        except SystemExit as error:
            got = int(error.code or 0)
    assert code is None or got == code, f"{words} exit {got}, not {code}\n{out.getvalue()}"
    return out.getvalue()


def record(*words: str | Path, program: Callable[..., str] = dualblade, code: int = 0) -> dict[str, Any]:
    """What a command says with --json, whatever it says on stderr before and after."""
    out = program(*words, "--json", code=code)
    return dict(json.JSONDecoder().raw_decode(out[out.index("{") :])[0])


def in_child(work: Callable[[], None]) -> int:
    """Runs it in a child of this process, which has all modules already; its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


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
    found["journal"] = names(Path("/run/dualblade-spdk").glob("*.json"))
    return found


def names(paths: Iterable[Path]) -> list[str]:
    return sorted(str(path) for path in paths)
