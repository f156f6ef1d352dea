# SPDX-License-Identifier: Apache-2.0
"""Commands as a hint shows them: whole, so that they can be pasted as they are."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def host_command(*words: str, root: bool = True) -> str:
    """`python -m dualblade.host` with `words`, by absolute paths: sudo drops PATH and PYTHONPATH, and
    with them a virtual environment. root: put sudo before it, as as_root() does."""
    # -P: whatever lies in the current folder must not be imported by root
    command = [sys.executable or "python3", "-P", "-m", "dualblade.host", *words]
    if Path(sysconfig.get_path("purelib")).resolve() != _ROOT:  # a checkout, which no interpreter knows
        command = ["env", f"PYTHONPATH={_ROOT}", *command]
    return as_root(command) if root else shlex.join(command)


def as_root(words: Sequence[str]) -> str:
    """With sudo; without it where this is root anyway, and not by sudo."""
    sudo = os.geteuid() != 0 or "SUDO_USER" in os.environ
    return shlex.join([*(["sudo"] if sudo or shutil.which("sudo") else []), *words])
