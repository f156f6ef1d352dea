# SPDX-License-Identifier: Apache-2.0
"""Commands as a hint shows them: whole, so that they can be pasted as they are."""

from __future__ import annotations

import os
import shlex
import sys
import sysconfig
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def host_command(*words: str, root: bool = True) -> str:
    """`python -m dualblade.host` with `words`, by absolute paths: sudo drops PATH, and with it a virtual
    environment. root: put sudo before it, unless this is root already."""
    command = [sys.executable or "python3", "-m", "dualblade.host", *words]
    if Path(sysconfig.get_path("purelib")).resolve() != _ROOT:  # a checkout, which no interpreter knows
        command = ["env", f"PYTHONPATH={_ROOT}", *command]
    if root and os.geteuid() != 0:
        command = ["sudo", *command]
    return shlex.join(command)
