# SPDX-License-Identifier: Apache-2.0
"""spdk_nvme_perf, the reference: the same controller, size and depth, one client after the other."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile

from dualblade.config import child_environment
from dualblade.errors import DualBladeError

PROGRAM = "spdk_nvme_perf"
_ALIGNMENT = 4096  # its own default, a sector, is copied by disks on files
_OWN_MIB = 192
_TOTAL = re.compile(r"^Total\s*:\s*[\d.]+\s+([\d.]+)", re.MULTILINE)


def perf_path() -> str | None:
    return shutil.which(PROGRAM)


def run_perf(
    transport_id: str, op: str, size: int, depth: int, seconds: int, cpu: int, hugepages: bool = False
) -> float:
    """GiB a second, sequentially over the whole namespace, which "write" destroys.

    transport_id: with its namespace, ns:1. Raises DualBladeError where it fails.
    """
    memory = ["--env-context", "--in-memory", "-g"] if hugepages else ["--no-huge"]
    command = [
        perf_path() or PROGRAM, "-r", transport_id, "-w", op, "-o", str(size), "-q", str(depth),
        "-t", str(seconds), "-c", hex(1 << cpu), "-A", str(_ALIGNMENT),
        "-s", str(_OWN_MIB + 2 * (size * depth >> 20)), *memory,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="dualblade-perf-") as folder:
        environment = child_environment(RUNTIME_DIRECTORY=folder)  # DPDK leaves a folder in it
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = _TOTAL.search(done.stdout)
    if done.returncode or not found:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        raise DualBladeError(f"{PROGRAM} failed: {said[-1]}")
    return float(found[1]) / 1024
