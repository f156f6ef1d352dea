# SPDX-License-Identifier: Apache-2.0
"""Looks at the memory from a thread of its own, so that no forward pass waits for /proc."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from dualblade.errors import ConfigError
from dualblade.host.cgroup import memory_cgroups
from dualblade.host.pressure import Pressure, memory_pressure
from dualblade.host.sysfs import Host
from dualblade.residency import MemorySnapshot, pause, take_snapshot
from spdk_glue import CachedPages, GlueError, Region, cached_pages

INTERVAL_S = 0.25
CALM_S = 2.0  # without a whole look where nothing changes
STIRRED_S = 1.0
STALLED_PART = 0.01  # of the time, spent waiting for memory: no calm


@dataclass(frozen=True, slots=True)
class Look:
    """One look. pages: what the page cache holds of our files. at: seconds of the monotonic clock. touched:
    bytes of each buffer that were in memory, by the part of the footprint that it is."""

    snapshot: MemorySnapshot
    pressure: Pressure
    pages: CachedPages
    at: float = 0.0
    touched: Mapping[str, int] = field(default_factory=dict)


def look(host: Host, fds: Iterable[int], buffers: Mapping[str, Region] | None = None) -> Look:
    """fds: our files, which stay open meanwhile. buffers: by the part of the footprint that each is. Raises
    ConfigError, GlueError."""
    # first: what comes meanwhile counts twice
    touched = {part: region.resident for part, region in (buffers or {}).items()}
    found = [cached_pages(fd) for fd in fds]
    pages = CachedPages(
        sum(pages.cached for pages in found),
        sum(pages.dirty for pages in found),
        sum(pages.evicted for pages in found),
    )
    return Look(*_glance(host), pages, time.monotonic(), touched)


def _glance(host: Host) -> tuple[MemorySnapshot, Pressure]:
    """What can be had without counting pages. Raises ConfigError."""
    levels = memory_cgroups(host)
    return take_snapshot(host, levels=levels), memory_pressure(host, levels)


def changed(host: Host, before: Look, noticed: int) -> bool:
    """Whether it is time for another look, without counting pages: 20 ns for each, which attention on all
    CPUs would wait for. noticed: bytes by which a figure has to differ. Raises ConfigError."""
    was, then = before.snapshot, before.pressure
    now, here = _glance(host)
    if (was.cgroup_limit, was.cgroup_headroom is None) != (now.cgroup_limit, now.cgroup_headroom is None):
        return True
    differences = (
        now.available - was.available,
        (now.cgroup_headroom or 0) - (was.cgroup_headroom or 0),
        now.process_anon - was.process_anon,
        now.process_hugetlb - was.process_hugetlb,
        here.refault_bytes - then.refault_bytes,
    )
    stalled = max(here.some_s - then.some_s, here.full_s - then.full_s)
    return max(map(abs, differences)) >= noticed or stalled > STALLED_PART * (time.monotonic() - before.at)


class MemoryWatch:
    """`latest` is the last look and its number. error: why there are no more, or None.

    take: makes a look. changed: tells cheaply whether there is something to see, so that CALM_S may go by
    without a look. interval_s: seconds between two, more where that takes long (see pause). The
    descriptors that it looks at must stay open until stop() has returned.
    """

    def __init__(
        self,
        take: Callable[[], Look],
        changed: Callable[[Look], bool] = lambda before: True,
        interval_s: float = INTERVAL_S,
    ):
        self.latest: tuple[int, Look] | None = None
        self.error: str | None = None
        self._take = take
        self._changed = changed
        self._stirred_until = 0.0
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """The first look is taken before this returns, and its errors are raised."""
        self.latest = (0, self._take())
        self._ended.clear()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended.set()
            thread.join()

    def stir(self) -> None:
        """Look at each interval for a while: a decision is under way."""
        self._stirred_until = time.monotonic() + STIRRED_S

    @property
    def cached(self) -> int | None:
        """Bytes of our files in the page cache at the last look; None where no more looks are taken."""
        thread, latest = self._thread, self.latest  # once: the meter's thread asks while stop() is called
        if thread is None or latest is None or not thread.is_alive():
            return None
        return latest[1].pages.cached

    def _run(self) -> None:
        spent = 0.0
        try:
            while not self._ended.wait(pause(self._interval_s, spent)):
                begun = time.thread_time()
                self._look_again()
                spent = time.thread_time() - begun
        except (
            ConfigError,
            GlueError,
            OSError,
        ) as error:  # the governor says so, and leaves things as they are
            self.error = str(error)

    def _look_again(self) -> None:
        assert self.latest is not None
        number, before = self.latest
        now = time.monotonic()
        if now < self._stirred_until or now - before.at >= CALM_S or self._changed(before):
            self.latest = (number + 1, self._take())
