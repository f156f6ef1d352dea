# SPDX-License-Identifier: Apache-2.0
"""What an emulated target may leave behind."""

from __future__ import annotations

import glob
import time
from pathlib import Path

from dualblade.emulate import free_hugepages

_ELSEWHERE = ("/var/tmp/spdk_*", "/dev/shm/*nvmf*", "/dev/hugepages/spdk_*", "/mnt/huge/spdk_*")
_PATIENCE_S = 5.0


def processes(base: Path) -> list[int]:
    """Those whose command line names a file below `base`, dead ones that nobody waited for included."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"{base}/".encode() in words and b"--rpc-socket" in words:
            found.append(int(entry.name))
    return found


def folders(base: Path) -> list[Path]:
    return sorted(base.glob("dualblade-emulate-*"))


class Traces:
    """The machine as it was, against which what is left is told."""

    def __init__(self, base: Path):
        self.base = base
        self._files = _elsewhere()
        self._hugepages = free_hugepages()

    def left(self) -> list[str]:
        """Empty once all is gone; the kernel takes its time with hugepages and orphans."""
        deadline = time.monotonic() + _PATIENCE_S
        while (found := self._found()) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _found(self) -> list[str]:
        found = [f"process {pid}" for pid in processes(self.base)]
        found += [str(path) for path in self.base.rglob("*")]
        found += sorted(_elsewhere() - self._files)
        if (missing := self._hugepages - free_hugepages()) > 0:
            found.append(f"{missing} hugepages")
        return found


def _elsewhere() -> set[str]:
    return {path for pattern in _ELSEWHERE for path in glob.glob(pattern)}
