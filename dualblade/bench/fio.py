# SPDX-License-Identifier: Apache-2.0
"""fio, the reference: the same file, engine, command size and depth, in the same run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from dualblade.errors import DualBladeError

GIB = 2**30


def fio_path() -> str | None:
    return shutil.which("fio")


def run_fio(
    file: Path, rw: str, size: int, command_bytes: int, depth: int, fixed: bool, start: int = 0
) -> float:
    """GiB a second of one sequential pass (`rw`: "read" or "write") over `size` bytes from `start` on,
    io_uring and O_DIRECT.

    fixed: with registered buffers, which RLIMIT_MEMLOCK must have room for.

    Raises DualBladeError where fio fails.
    """
    command = [
        fio_path() or "fio",
        "--name=reference",
        f"--filename={file}",
        f"--rw={rw}",
        f"--bs={command_bytes}",
        f"--iodepth={depth}",
        "--ioengine=io_uring",
        "--direct=1",
        f"--offset={start}",
        f"--size={size}",
        "--invalidate=0",
        "--allow_file_create=0",
        "--registerfiles=1",
        f"--fixedbufs={fixed:d}",
        "--refill_buffers=0",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DualBladeError(f"fio failed: {_complaint(done)}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][rw]
    return float(job["io_bytes"]) / (job["runtime"] / 1000) / GIB


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """Its line begins with "fio:", beside the report or before it."""
    lines = f"{done.stderr}\n{done.stdout}".splitlines()
    said = [line.removeprefix("fio:").strip() for line in lines if line.startswith("fio:")]
    return said[0] if said else f"exit status {done.returncode}"
