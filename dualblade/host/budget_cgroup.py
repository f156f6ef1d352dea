# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup of this process alone, which holds it to its budget.

Memory that was charged before the process came stays charged elsewhere, and hugepages as a rule are
charged nowhere. So the cgroup's limit is the budget less both, and follows the hugepages.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from dualblade.errors import EnforcementError
from dualblade.host.cgroup import OURS, OwnCgroup
from dualblade.host.enforce import Way, find_way
from dualblade.host.meminfo import process_memory
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.pressure import Stalls, cgroup_events, stalls
from dualblade.host.sysfs import Host
from dualblade.units import MIB

_LEAST = 16 * MIB  # a limit below it stops the process instead of the growth of its cache


class Held(Protocol):
    """What the process holds of memory that no memory cgroup is charged with."""

    @property
    def hugetlb(self) -> int: ...


def margin(limit: int) -> int:
    """How far below the hard limit reclaim begins, bytes: a step of readahead and more."""
    return max(8 * MIB, limit // 64)


class BudgetCgroup:
    """Use enter(). Every thread of the process and every child started from then on is in it.

    outside_bytes: memory that the process held before, anonymous and shared, and that stays charged where
    it was. The methods may be called from any thread.
    """

    def __init__(self, host: Host, way: Way, own: OwnCgroup):
        self._host = host
        self._way = way
        self._lock = threading.Lock()
        self._left = False
        self._budget: int | None = None
        self._hugetlb = self._most_hugetlb = 0
        self._written: int | None = None  # the limit as this program last set it
        self._settled = True  # the kernel took it in full
        self._usage_peak = self._peak_before = 0
        self._decode_began: Stalls | None = None
        self.own = own
        self._files = MemoryCgroup(own.directory, host, own.version)
        self._entered = stalls(host, own.directory), cgroup_events(host, own)
        self.outside_bytes = 0

    @classmethod
    def enter(cls, host: Host | None = None) -> BudgetCgroup:
        """Without a limit yet. Raises EnforcementError where that cannot be; nothing is changed then."""
        host = host or Host()
        way = find_way(host)
        memory = process_memory(host)
        own = way.own if way.parent is None else _join(host, way, way.parent)
        try:
            made = cls(host, way, own)
            with _kernel_says(own.directory):
                made._lift()  # shows at once whether its limit may be set
        except BaseException:
            _go_back(host, way, own)
            raise
        if way.parent is not None:
            made.outside_bytes = memory.anon + memory.shmem + memory.swap
        return made

    @classmethod
    def held_to(cls, budget: int, host: Host | None = None) -> BudgetCgroup:
        """enter() and limit() as one, which happens or does not. Raises EnforcementError."""
        made = cls.enter(host)
        try:
            made.limit(budget)
        except BaseException:
            made.leave()
            raise
        return made

    # the limit ------------------------------------------------------------------------------

    def limit(self, budget: int) -> None:
        """From now on the process, its hugepages included, takes at most `budget` bytes. Raises
        EnforcementError where the kernel does not take the limit."""
        with self._lock:
            self._budget = budget
            try:
                self._apply()
            except OSError as error:
                raise EnforcementError(
                    f"the limit of {self.own.directory} cannot be set: {error.strerror}"
                ) from error
            self._forget_peak()

    def follow(self, held: Held) -> None:
        """To be called now and then: keeps the peaks, and the limit to what the budget leaves."""
        with self._lock:
            if self._left:
                return
            self._usage_peak = max(self._usage_peak, self._files.usage)
            self._most_hugetlb = max(self._most_hugetlb, held.hugetlb)
            if self._budget is not None and (held.hugetlb != self._hugetlb or not self._settled):
                self._hugetlb = held.hugetlb
                with contextlib.suppress(OSError):  # as it was; the next call tries again
                    self._apply()

    @property
    def limit_bytes(self) -> int | None:
        """What the kernel enforces now; None for nothing."""
        return self._files.limit

    def _apply(self) -> None:
        assert self._budget is not None
        charged = 0 if self.own.hugetlb else self._hugetlb
        target = max(_LEAST, self._budget - self.outside_bytes - charged)
        now = self.limit_bytes
        if now is not None and self._written is not None and now < self._written:
            target = min(target, now)  # somebody has lowered it since, and means it
        self._settled = False
        self._write_v1(target) if self.own.version == 1 else self._write_v2(target)

    def _write_v1(self, target: int) -> None:
        self._files.write("soft_limit_in_bytes", target - margin(target))
        try:
            self._files.set(target)
        except OSError as error:
            if error.errno != errno.EBUSY:  # more is in use than can be reclaimed now
                raise
            return
        self._written, self._settled = target, True

    def _write_v2(self, target: int) -> None:
        """`high` first: it reclaims. What is in use must not be above `max`: the kernel would kill."""
        self._files.write("high", target - margin(target))
        usage = self._files.usage
        self._settled = usage <= target
        self._written = target if self._settled else usage + margin(usage)
        self._files.set(self._written)

    def _lift(self) -> None:
        self._files.set(None)
        if not self._files.v1:
            self._files.write("high", "max")

    # what became of it ----------------------------------------------------------------------

    def decode_begins(self) -> None:
        """What is waited for from now on is waited for while tokens are generated."""
        self._decode_began = stalls(self._host, self.own.directory)

    @property
    def peak_bytes(self) -> int:
        """The most that was charged since the limit was set, and held outside, and in hugepages."""
        hugepages = 0 if self.own.hugetlb else self._most_hugetlb
        return self._peak() + self.outside_bytes + hugepages

    def record(self, decode_s: float | None = None) -> dict[str, Any]:
        """`memory.cgroup` of `run --json`. decode_s: how long the decoding took. Times in seconds."""
        events, stalled = cgroup_events(self._host, self.own), stalls(self._host, self.own.directory)
        began = self._entered[1]
        return {
            "version": self.own.version,
            "description": self._way.words,
            "limit_bytes": self.limit_bytes,
            "outside_bytes": self.outside_bytes,
            "hugepage_bytes": self._most_hugetlb,
            "peak_bytes": self._peak(),
            "over_limit": events.over_limit - began.over_limit,
            "over_high": events.over_high - began.over_high,
            "oom_kills": events.oom_kills - began.oom_kills,
            "refault_bytes": events.refault_bytes - began.refault_bytes,
            "scanned_bytes": _since(events.scanned_bytes, began.scanned_bytes),
            "reclaimed_bytes": _since(events.reclaimed_bytes, began.reclaimed_bytes),
            **_lost(stalled, self._entered[0], self._decode_began, decode_s),
        }

    def _peak(self) -> int:
        peak = self._files.peak
        return peak if peak is not None and peak > self._peak_before else self._usage_peak

    def _forget_peak(self) -> None:
        """What was charged before there was a limit is not what the limit allowed."""
        self._usage_peak = self._files.usage
        if not self._files.v1:  # no kernel before 6.12 forgets it
            self._peak_before = self._files.peak or 0
            return
        with contextlib.suppress(OSError):
            self._files.forget_peak()

    # the end --------------------------------------------------------------------------------

    def leave(self) -> None:
        """The process returns to where it was, and the cgroup goes away, with no error: what cannot be
        undone the next run clears. A second call does nothing."""
        with self._lock:
            if self._left:
                return
            self._left = True
            with contextlib.suppress(OSError):
                self._lift()
            _go_back(self._host, self._way, self.own)

    def __enter__(self) -> BudgetCgroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def __repr__(self) -> str:
        return f"<BudgetCgroup v{self.own.version} {self.own.directory}, limit {self.limit_bytes}>"


def _since(now: int | None, then: int | None) -> int | None:
    return None if now is None or then is None else now - then


def _lost(
    now: Stalls | None, entered: Stalls | None, decode: Stalls | None, decode_s: float | None
) -> dict[str, Any]:
    """Seconds lost to reclaim since the process came, and of them while it decoded."""
    names = ("stalls_of", "stall_some_s", "stall_full_s")
    words: dict[str, Any] = dict.fromkeys(
        (*names, "decode_stall_some_s", "decode_stall_s", "decode_stall_ratio")
    )
    if now and entered:
        words["stalls_of"] = now.of
        words["stall_some_s"] = now.some_s - entered.some_s
        words["stall_full_s"] = now.full_s - entered.full_s
    if now and decode:
        words["decode_stall_some_s"] = now.some_s - decode.some_s
        words["decode_stall_s"] = now.full_s - decode.full_s
        words["decode_stall_ratio"] = words["decode_stall_s"] / decode_s if decode_s else None
    return words


# moving -------------------------------------------------------------------------------------


def _join(host: Host, way: Way, parent: str) -> OwnCgroup:
    """Make the cgroup and move into it. Raises EnforcementError, with all as it was."""
    clear_leftovers(host, parent)
    own = replace(way.own, directory=f"{parent}/dualblade-{os.getpid()}")
    with _kernel_says(own.directory):
        host.make_cgroup(own.directory)
    try:
        with _kernel_says(own.directory):
            host.write_text(f"{own.directory}/cgroup.procs", str(os.getpid()))
            if way.enable:
                host.write_text(f"{parent}/cgroup.subtree_control", "+memory")
    except BaseException:
        _go_back(host, way, own)
        raise
    return own


@contextmanager
def _kernel_says(directory: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EnforcementError(f"the memory cgroup {directory} cannot be made: {error.strerror}") from error


def _go_back(host: Host, way: Way, own: OwnCgroup) -> None:
    """Out of the cgroup, which goes away unless a child is still in it."""
    if way.parent is None:
        return
    with contextlib.suppress(OSError):
        if way.disable and not _others(host, way.parent, own.directory):
            host.write_text(f"{way.parent}/cgroup.subtree_control", "-memory")
    with contextlib.suppress(OSError):
        host.write_text(f"{way.own.directory}/cgroup.procs", str(os.getpid()))
    with contextlib.suppress(OSError):
        host.remove_cgroup(own.directory)


def _others(host: Host, parent: str, own: str) -> bool:
    """Whether `parent` has cgroups beside `own`, which may need its memory controller."""
    mine = own.rpartition("/")[2]
    return any(host.exists(f"{parent}/{name}/cgroup.procs") for name in host.names(parent) if name != mine)


def clear_leftovers(host: Host, parent: str) -> list[str]:
    """Remove the cgroups of runs that were killed. Returns their names."""
    removed = []
    for name in host.names(parent):
        match = OURS.fullmatch(name)
        if match and not host.exists(f"/proc/{match[1]}"):
            with contextlib.suppress(OSError):  # a child of that run is still in it
                host.remove_cgroup(f"{parent}/{name}")
                removed.append(name)
    return removed
