# SPDX-License-Identifier: Apache-2.0
"""A systemd scope for this process: systemd makes the cgroup, removes it however the process ends, and
asks for no root where a user's own manager runs. The program starts anew in it, as the same process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from dualblade.errors import ConfigError
from dualblade.host.cgroup import own_cgroup
from dualblade.host.enforce import SYSTEMD, own_limit
from dualblade.host.sysfs import Host
from dualblade.units import GIB

_MARK = "DUALBLADE_SCOPE"  # in the environment: this is the second start
# Until the plan is made a budget that is too small must be refused in words, not by the OOM killer.
_ROOM_TO_PLAN = GIB


def scope_possible(host: Host) -> bool:
    """Whether systemd can be asked, and leaving the present cgroup escapes no limit of its own."""
    if _MARK in os.environ or not host.exists(SYSTEMD) or host.program("systemd-run") is None:
        return False
    try:
        own = own_cgroup(host)
        return own is not None and own.version == 2 and not own_limit(host, own)
    except ConfigError:
        return False


def scope_command(host: Host, budget: int, words: Sequence[str]) -> list[str]:
    """`words` in a scope that takes at most `budget` bytes, or what planning needs."""
    program = host.program("systemd-run") or "systemd-run"
    user = [] if os.geteuid() == 0 else ["--user"]
    limit = f"MemoryMax={max(budget, _ROOM_TO_PLAN)}"
    properties = ["-p", limit, "-p", "Delegate=yes"]
    return [program, *user, "--scope", "--quiet", "--collect", *properties, *words]


def scope_works(host: Host, budget: int) -> bool:
    """Try it with a program that does nothing: what replaces this process cannot come back to tell."""
    try:
        done = subprocess.run(
            scope_command(host, budget, ["true"]), stdin=subprocess.DEVNULL, capture_output=True,
            timeout=10, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def start_again(host: Host, budget: int) -> None:
    """Replace this process by the same command line in a scope. Returns only where that cannot be."""
    if not (scope_possible(host) and scope_works(host, budget)):
        return
    unit = f"--unit=dualblade-{os.getpid()}"
    program, *rest = scope_command(host, budget, [sys.executable, *sys.orig_argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(program, [program, unit, *rest], os.environ | {_MARK: "1"})
