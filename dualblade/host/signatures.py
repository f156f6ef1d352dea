# SPDX-License-Identifier: Apache-2.0
"""Filesystems, partition tables, RAID members and the like on a device, as libblkid knows them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from dualblade.errors import TargetError
from dualblade.host.sysfs import TOOLS_PATH

_SCAN_SECONDS = 60
# What an exit status means: has it found something? wipefs tells by its output alone.
_SCANS = (
    ("blkid", ("-p",), {2: False, 0: True, 8: True}),
    ("wipefs", ("--no-act", "--parsable", "--noheadings"), {0: False}),
)


def scan_signatures(path: Path, tools_path: str = TOOLS_PATH) -> list[str]:
    """Signatures of filesystems, partitions and the like. Raises TargetError where none can be
    looked for."""
    scans = [(shutil.which(tool, path=tools_path), arguments, codes) for tool, arguments, codes in _SCANS]
    if not any(program for program, _, _ in scans):
        raise TargetError(
            f"neither blkid nor wipefs is here to look for data on {path}", "apt-get install util-linux"
        )
    found = []
    for program, arguments, codes in scans:
        if program:
            found += _scan([program, *arguments, str(path.absolute())], codes)
    return found


def _scan(command: list[str], codes: dict[int, bool]) -> list[str]:
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_SCAN_SECONDS,
            env={"LC_ALL": "C", "PATH": TOOLS_PATH}, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetError(f"{name} could not look for data: {error}") from error
    if done.returncode not in codes:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise TargetError(f"{name} could not look for data: {said}")
    if codes[done.returncode] or done.stdout.strip():
        return [f"{name} found {' '.join(done.stdout.split()) or 'a signature'}"]
    return []
