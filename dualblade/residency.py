# SPDX-License-Identifier: Apache-2.0
"""What memory there is, and what of it this process holds: measured, for the governor and the report."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType

from dualblade.host.cgroup import CgroupLevel, is_ours, memory_cgroups, tightest
from dualblade.host.meminfo import machine_memory, process_memory
from dualblade.host.sysfs import Host
from spdk_glue import GlueError, cached_bytes

BUSY_PART = 50  # of a CPU, at most what looking at the memory takes


def pause(interval_s: float, spent_s: float) -> float:
    """Seconds until the next look after one that took `spent_s` of a CPU: counting the pages of a file takes
    the kernel 200 ns for each folio, which attention would wait for."""
    return max(interval_s, BUSY_PART * spent_s)


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """One moment, in bytes.

    total, available: of the machine. cgroup_headroom: what the tightest memory cgroup still takes,
    None without a limit; cgroup_limit: what sets it, for people. process_anon: anonymous and shared
    memory of this process, swapped-out parts included. process_file: of files that it has mapped, such as
    its libraries. process_hugetlb: hugepages it holds.
    cached: pages of our own files; `available` and the cgroup's headroom count them as free.
    """

    total: int
    available: int
    cgroup_headroom: int | None
    cgroup_limit: str | None
    process_anon: int
    process_hugetlb: int
    cached: int
    process_file: int = 0

    @property
    def headroom(self) -> int:
        """Bytes that this process may still take."""
        return self.available if self.cgroup_headroom is None else min(self.available, self.cgroup_headroom)

    @property
    def headroom_source(self) -> str:
        """What sets `headroom`, for people."""
        if self.cgroup_headroom is None or self.cgroup_headroom > self.available:
            return "available memory"
        return str(self.cgroup_limit)


def take_snapshot(
    host: Host, cached_fds: Iterable[int] = (), levels: list[CgroupLevel] | None = None
) -> MemorySnapshot:
    """cached_fds: our files, which stay open meanwhile. levels: the cgroups where they were read already.
    Raises ConfigError where the machine's or the cgroups' files cannot be read, GlueError for a bad
    descriptor."""
    machine, process = machine_memory(host), process_memory(host)
    level = tightest(memory_cgroups(host) if levels is None else levels)
    return MemorySnapshot(
        total=machine.total,
        available=machine.available,
        cgroup_headroom=level.headroom if level else None,
        cgroup_limit=_limit_words(level) if level else None,
        process_anon=process.anon + process.shmem + process.swap,
        process_hugetlb=process.hugetlb,
        cached=sum(cached_bytes(fd) for fd in cached_fds),
        process_file=process.file,
    )


def _limit_words(level: CgroupLevel) -> str:
    return "the cgroup of --enforce" if is_ours(level.path) else f"{level.path}/{level.limit_file}"


@dataclass(frozen=True, slots=True)
class MemorySample:
    """What the budget is charged with at one moment, in bytes, by kind."""

    anon: int = 0
    shmem: int = 0
    swap: int = 0
    hugetlb: int = 0
    cached: int = 0

    @property
    def total(self) -> int:
        return self.anon + self.shmem + self.swap + self.hugetlb + self.cached


class MemoryMeter:
    """Keeps the peak of this process's memory, sampled by a thread of its own.

    fds: gives the descriptors of our cached files; it is called, and they are looked at, under
    `closing`. counted: what somebody else has just counted of their pages, None where nobody does: then
    they are counted here. observer: is given every sample. interval_s: seconds between samples, more
    where they take long (see pause); the first is taken by
    `start`, the last by `stop`.

    closing: the lock to hold while one of the descriptors is closed and taken off the list, as long as
    the meter runs: a number that was closed and given out again would be another file.
    """

    def __init__(
        self,
        fds: Callable[[], Iterable[int]] = tuple,
        interval_s: float = 0.1,
        host: Host | None = None,
        observer: Callable[[MemorySample], None] = lambda sample: None,
        counted: Callable[[], int | None] = lambda: None,
    ):
        self.closing = threading.Lock()
        self._observer = observer
        self._counted = counted
        self._fds = fds
        self._interval_s = interval_s
        self._host = host or Host()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._peak = MemorySample()

    @property
    def peak(self) -> MemorySample:
        """The sample with the largest total so far."""
        return self._peak

    @property
    def peak_bytes(self) -> int:
        return self._peak.total

    def sample(self) -> MemorySample:
        """Measure now; counts towards the peak. Raises ConfigError, GlueError."""
        process = process_memory(self._host)
        with self.closing:
            cached = self._counted()
            if cached is None:
                cached = sum(_cached(fd) for fd in self._fds())
            taken = MemorySample(process.anon, process.shmem, process.swap, process.hugetlb, cached)
            self._peak = max(self._peak, taken, key=lambda sample: sample.total)
        self._observer(taken)
        return taken

    def start(self) -> None:
        """Raises what `sample` raises, and RuntimeError where it runs already."""
        if self._thread is not None:
            raise RuntimeError("the memory meter runs already")
        self._ended.clear()
        self.sample()
        self._thread = threading.Thread(target=self._run, name="memory-meter", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take the last sample. Raises what ended the thread early, if anything did: the peak would be
        too low. A second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._ended.set()
        thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error
        self.sample()

    def __enter__(self) -> MemoryMeter:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        state = "stopped" if self._thread is None else "running"
        return f"<MemoryMeter {state}, peak {self.peak_bytes} bytes>"

    def _run(self) -> None:
        spent = 0.0
        try:
            while not self._ended.wait(pause(self._interval_s, spent)):
                begun = time.thread_time()
                self.sample()
                spent = time.thread_time() - begun
        except Exception as error:  # kept for stop(): a thread has nobody to raise to
            self._error = error


def _cached(fd: int) -> int:
    """A file that was closed has no pages of ours any more."""
    try:
        return cached_bytes(fd)
    except GlueError as error:
        if error.errno == errno.EBADF:
            return 0
        raise
