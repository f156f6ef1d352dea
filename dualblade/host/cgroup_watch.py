# SPDX-License-Identifier: Apache-2.0
"""What the memory cgroups over this process say now: limits, usage, pressure, events. Cheap enough for
every step; a limit that somebody changes meanwhile is seen at the next look."""

from __future__ import annotations

import mmap
import re
from dataclasses import dataclass

from dualblade.host.cgroup import CgroupLevel, OwnCgroup, levels_of, own_cgroup, tightest
from dualblade.host.sysfs import Host

_MACHINE_PRESSURE = "/proc/pressure/memory"


@dataclass(frozen=True, slots=True)
class Pressure:
    """Time lost to a shortage of memory, in seconds since it began to be counted: `some` task waited;
    in `full`, none could run. of: "cgroup", or "machine" where a cgroup has no such figure (v1)."""

    of: str
    some_s: float
    full_s: float


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


@dataclass(frozen=True, slots=True)
class CgroupMoment:
    """levels: from the process's own outwards. pressure, events: of its own; pressure None where the
    kernel does not count it."""

    levels: tuple[CgroupLevel, ...]
    events: CgroupEvents
    pressure: Pressure | None

    @property
    def bound(self) -> CgroupLevel | None:
        """The level with the least headroom; None without a limit."""
        return tightest(list(self.levels))

    @property
    def headroom(self) -> int | None:
        """Bytes that can still be charged; None without a limit."""
        bound = self.bound
        return None if bound is None else bound.headroom


class CgroupWatch:
    """Looks at the cgroups that this process was in when the watch was made."""

    def __init__(self, own: OwnCgroup, host: Host | None = None):
        self._host = host or Host()
        self.own = own

    @classmethod
    def here(cls, host: Host | None = None) -> CgroupWatch | None:
        """None where no memory cgroup is over this process. Raises ConfigError where it is not to be seen."""
        own = own_cgroup(host or Host())
        return None if own is None else cls(own, host)

    def now(self) -> CgroupMoment:
        """Raises ConfigError where a level cannot be read."""
        levels = tuple(levels_of(self._host, self.own))
        return CgroupMoment(levels, self.events(), self.pressure())

    def events(self) -> CgroupEvents:
        return self._v1_events() if self.own.version == 1 else self._v2_events()

    def pressure(self) -> Pressure | None:
        own = f"{self.own.directory}/memory.pressure"
        of, text = "cgroup", self._host.attribute(own)
        if not text:
            of, text = "machine", self._host.attribute(_MACHINE_PRESSURE)
        totals = dict(re.findall(r"^(some|full) .*total=(\d+)", text, re.MULTILINE))
        if "some" not in totals:
            return None
        return Pressure(of, int(totals["some"]) / 1e6, int(totals.get("full", 0)) / 1e6)

    def _v2_events(self) -> CgroupEvents:
        events, stat = self._numbers("memory.events"), self._numbers("memory.stat")
        return CgroupEvents(
            over_limit=events.get("max", 0),
            over_high=events.get("high", 0),
            oom_kills=events.get("oom_kill", 0),
            refault_bytes=stat.get("workingset_refault_file", 0) * mmap.PAGESIZE,
            scanned_bytes=stat.get("pgscan", 0) * mmap.PAGESIZE,
            reclaimed_bytes=stat.get("pgsteal", 0) * mmap.PAGESIZE,
        )

    def _v1_events(self) -> CgroupEvents:
        stat, failcnt = self._numbers("memory.stat"), self._host.attribute(self._file("memory.failcnt"))
        return CgroupEvents(
            over_limit=int(failcnt) if failcnt.isdecimal() else 0,
            over_high=0,
            oom_kills=self._numbers("memory.oom_control").get("oom_kill", 0),
            refault_bytes=stat.get("total_workingset_refault_file", 0) * mmap.PAGESIZE,
            scanned_bytes=None,
            reclaimed_bytes=None,
        )

    def _numbers(self, name: str) -> dict[str, int]:
        """Of a file of "name number" lines; empty where it is missing, as a root's files are."""
        pairs = (line.split() for line in self._host.attribute(self._file(name)).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}

    def _file(self, name: str) -> str:
        return f"{self.own.directory}/{name}"
