# SPDX-License-Identifier: Apache-2.0
"""Guests under way: one boot a machine, in which pytest runs what this session selected."""

from __future__ import annotations

import contextlib
import json
import lzma
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import initramfs
from machines import MACHINES, command

REPO = Path(__file__).parents[2]
BUILT = REPO / "build/qemu"
ROOT = BUILT / "root"
PATIENCE_S = 700.0  # to the first report, and from one to the next; a test may take 600
GUEST_S = 3600  # a guest that nobody waits for any more ends by itself
_XZ = b"\xfd7zXZ\0"


@dataclass(frozen=True)
class Outcome:
    """passed, failed or skipped; why, as the guest's pytest tells it."""

    kind: str
    text: str


def vmlinux() -> Path:
    """The kernel unpacked: the guest's own unpacking takes seconds under TCG."""
    (packed,) = (ROOT / "boot").glob("vmlinuz-*")
    unpacked = BUILT / packed.name.replace("vmlinuz", "vmlinux")
    if not unpacked.exists():
        data = packed.read_bytes()
        if _XZ not in data:
            return packed
        temporary = unpacked.with_suffix(".new")
        temporary.write_bytes(lzma.LZMADecompressor().decompress(data[data.index(_XZ) :]))
        temporary.rename(unpacked)
    return unpacked


class Guest:
    """One boot of `machine`, running `tests` in their order."""

    def __init__(self, machine: str, tests: Sequence[str], folder: Path):
        self._folder = folder
        self._shared = folder / "host"
        self._shared.mkdir()
        self._read = 0
        self._shown = False
        self._lines: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._heard = time.monotonic()
        self._leave_settings(tests)
        archive = folder / "initramfs"
        archive.write_bytes(initramfs.build(ROOT))
        words = command(MACHINES[machine], vmlinux(), archive, folder)
        (folder / "command").write_text(shlex.join(words) + "\n")
        with (folder / "qemu.log").open("wb") as log:
            self._qemu = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _leave_settings(self, tests: Sequence[str]) -> None:
        settings = {"PYTHON": sys.executable, "REPO": REPO, "TOOLS": ROOT, "LIMIT_S": GUEST_S}
        lines = [f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items()]
        (self._shared / "settings.sh").write_text("".join(lines))
        (self._shared / "tests").write_text("".join(f"{test}\n" for test in tests))
        (self._shared / "reports").touch()

    def outcome(self, test: str) -> Outcome:
        """Of one test; waits until the guest has told it, or cannot any more."""
        while not self._complete(test):
            ended = self._qemu.poll() is not None
            if self._listen():
                self._heard = time.monotonic()
            elif ended:
                return Outcome("failed", f"the guest ended without a word on this test\n{self.console()}")
            elif time.monotonic() - self._heard > PATIENCE_S:
                self.stop()
                return Outcome(
                    "failed", f"nothing heard of the guest for {PATIENCE_S:.0f} s\n{self.console()}"
                )
            else:
                time.sleep(0.1)
        return _judged(self._lines[test])

    def _complete(self, test: str) -> bool:
        return any(line["when"] == "teardown" for line in self._lines[test])

    def _listen(self) -> bool:
        """New whole lines of the guest's report, if any."""
        data = (self._shared / "reports").read_bytes()[self._read :]
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            record = json.loads(line)
            self._lines[record["test"]].append(record)
        return bool(whole)

    def console(self) -> str:
        """The end of it, the first time; where it lies."""
        tail = [f"(all of it: {self._folder})"]
        if self._shown:
            return tail[0]
        self._shown = True
        for name in ("qemu.log", "console"):
            with contextlib.suppress(FileNotFoundError):
                tail += (self._folder / name).read_text(errors="replace").splitlines()[-60:]
        return "\n".join(tail)

    def stop(self) -> None:
        if self._qemu.poll() is None:
            self._qemu.kill()
        self._qemu.wait()


def _judged(lines: list[dict[str, Any]]) -> Outcome:
    for kind in ("failed", "skipped"):
        if texts := [line["text"] for line in lines if line["outcome"] == kind]:
            return Outcome(kind, "\n".join(texts))
    return Outcome("passed", "")
