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


def run_fio(file: Path, rw: str, size: int, command_bytes: int, depth: int) -> float:
    """GiB a second of one sequential pass (`rw`: "read" or "write"), io_uring and O_DIRECT.

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
        f"--size={size}",
        "--invalidate=0",
        "--allow_file_create=0",
        "--registerfiles=1",
        "--fixedbufs=1",
        "--refill_buffers=0",
        "--output-format=json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DualBladeError(f"fio failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0][rw]
    return float(job["io_bytes"]) / (job["runtime"] / 1000) / GIB
