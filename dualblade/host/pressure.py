# SPDX-License-Identifier: Apache-2.0
"""How short memory is: time that tasks lost waiting for it, pages that had to be read back, and what a
cgroup's limit has led to. A few small files a look; missing ones are zeros, as nothing relies on them alone.
"""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass

from dualblade.host.cgroup import CgroupLevel, OwnCgroup, numbers
from dualblade.host.sysfs import Host

_MACHINE = "/proc/pressure/memory"
_VMSTAT = "/proc/vmstat"
_REFAULTS = ("total_workingset_refault_file", "workingset_refault_file", "workingset_refault")


@dataclass(frozen=True, slots=True)
class Stalls:
    """Time lost to a shortage of memory, in seconds since it began to be counted: `some` task waited;
    in `full`, none could run. of: "cgroup", or "machine" where a cgroup has no such figure (v1)."""

    of: str
    some_s: float
    full_s: float


@dataclass(frozen=True, slots=True)
class Pressure:
    """What this process feels of a shortage, so far: seconds as in Stalls, and file pages that were read back
    after they had been dropped. some_s: of its own cgroup alone; on a machine somebody always waits for
    the limit of another one, while `full` counts only when this process waits too."""

    some_s: float = 0.0
    full_s: float = 0.0
    refault_bytes: int = 0


@dataclass(frozen=True, slots=True)
class CgroupEvents:
    """Of a cgroup and those below it, since it was made. over_limit: times that the limit stood in the
    way of a charge (v2 `max`, v1 failcnt); over_high: that `memory.high` did (v2). oom_kills: processes.
    refault_bytes: file pages that were reclaimed and soon read again. scanned_bytes, reclaimed_bytes:
    what reclaim looked at and took; None on v1."""

    over_limit: int
    over_high: int
    oom_kills: int
    refault_bytes: int
    scanned_bytes: int | None
    reclaimed_bytes: int | None


def stalls(host: Host, directory: str | None) -> Stalls | None:
    """directory: of a cgroup, None without one. None where the kernel counts nothing."""
    of, text = "cgroup", host.attribute(f"{directory}/memory.pressure") if directory else ""
    if not text:
        of, text = "machine", host.attribute(_MACHINE)
    totals = dict(re.findall(r"^(some|full) .*total=(\d+)", text, re.MULTILINE))
    if "some" not in totals:
        return None
    return Stalls(of, int(totals["some"]) / 1e6, int(totals.get("full", 0)) / 1e6)


def memory_pressure(host: Host, levels: list[CgroupLevel]) -> Pressure:
    """levels: this process's cgroups, the innermost first."""
    own = levels[0].path if levels else None
    found = stalls(host, own)
    refaults = (_refault_bytes(_of(host, f"{own}/memory.stat")) if own else 0) or _refault_bytes(
        _of(host, _VMSTAT)
    )
    if found is None:
        return Pressure(refault_bytes=refaults)
    return Pressure(found.some_s if found.of == "cgroup" else 0.0, found.full_s, refaults)


def cgroup_events(host: Host, own: OwnCgroup) -> CgroupEvents:
    events = _of(host, f"{own.directory}/memory.events")
    stat = _of(host, f"{own.directory}/memory.stat")
    v1 = own.version == 1
    if v1:
        killed = _of(host, f"{own.directory}/memory.oom_control")
        failed = host.attribute(f"{own.directory}/memory.failcnt")
        events = {"max": int(failed) if failed.isdecimal() else 0, "oom_kill": killed.get("oom_kill", 0)}
    return CgroupEvents(
        over_limit=events.get("max", 0),
        over_high=events.get("high", 0),
        oom_kills=events.get("oom_kill", 0),
        refault_bytes=_refault_bytes(stat),
        scanned_bytes=None if v1 else stat.get("pgscan", 0) * mmap.PAGESIZE,
        reclaimed_bytes=None if v1 else stat.get("pgsteal", 0) * mmap.PAGESIZE,
    )


def _refault_bytes(stat: dict[str, int]) -> int:
    return next((stat[name] for name in _REFAULTS if name in stat), 0) * mmap.PAGESIZE


def _of(host: Host, path: str) -> dict[str, int]:
    return numbers(host.attribute(path))
