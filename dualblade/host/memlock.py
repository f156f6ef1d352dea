# SPDX-License-Identifier: Apache-2.0
"""How much memory a user may lock: VFIO locks all that the drive may reach."""

from __future__ import annotations

import os
import re
import resource

from dualblade.host.command import as_root
from dualblade.host.sysfs import Host
from dualblade.units import GIB, format_size

WANTED = 1 * GIB
_IPC_LOCK = 1 << 14  # the capability
_FILE = "/etc/security/limits.d/90-dualblade.conf"


def memlock_note(host: Host, owner: tuple[str, int] | None) -> list[str]:
    """What the user should know, where their limit is, or may be, too low. Root has none."""
    if owner is None or owner[1] == 0:
        return []
    limit = limit_of(host, owner[1])
    if limit is not None and (limit < 0 or limit >= WANTED):
        return []
    has = f"may lock {format_size(limit)} of memory" if limit is not None else "needs to lock memory"
    return [
        f"{owner[0]} {has}, and VFIO locks all that the drive reaches (8 MiB, the usual limit, are too few): "
        f"{raise_limit(owner[0])}"
    ]


def raise_limit(who: str) -> str:
    """The command that lifts the limit: of a user, or "*", which is all but root."""
    return f"echo '{who} - memlock unlimited' | {as_root(['tee', '-a', _FILE])}  # then log in again"


def lock_limit() -> int | None:
    """Bytes that this process may lock; None where nothing bounds it."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    may = re.search(r"^CapEff:\s*([0-9a-f]+)", Host().attribute("/proc/self/status"), re.M)
    free = bool(may and int(may[1], 16) & _IPC_LOCK)
    return None if free or soft == resource.RLIM_INFINITY else soft


def limit_of(host: Host, uid: int) -> int | None:
    """Bytes; -1 for no limit; None where it cannot be told. As the process above this one has it that
    belongs to the user: the shell that sudo was typed in."""
    pid = os.getpid()
    while pid > 1:
        status = host.attribute(f"/proc/{pid}/status")
        owner = re.search(r"^Uid:\s+(\d+)", status, re.M)
        if owner and int(owner[1]) == uid:
            return _limit(host.attribute(f"/proc/{pid}/limits"))
        parent = re.search(r"^PPid:\s+(\d+)", status, re.M)
        pid = int(parent[1]) if parent else 0
    return None


def _limit(limits: str) -> int | None:
    found = re.search(r"^Max locked memory\s+(\S+)", limits, re.M)
    if found is None:
        return None
    return -1 if found[1] == "unlimited" else int(found[1])
