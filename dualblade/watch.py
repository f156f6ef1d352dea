# SPDX-License-Identifier: Apache-2.0
"""Looks at the memory from a thread of its own, so that no forward pass waits for /proc."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dualblade.errors import ConfigError
from dualblade.host.cgroup import memory_cgroups
from dualblade.host.pressure import Pressure, memory_pressure
from dualblade.host.sysfs import Host
from dualblade.residency import MemorySnapshot, pause, take_snapshot
from spdk_glue import CachedPages, GlueError, cached_pages

INTERVAL_S = 0.25


@dataclass(frozen=True, slots=True)
class Look:
    """One look. pages: what the page cache holds of our files. at: seconds of the monotonic clock."""

    snapshot: MemorySnapshot
    pressure: Pressure
    pages: CachedPages
    at: float = 0.0


def look(host: Host, fds: Iterable[int]) -> Look:
    """fds: our files, which stay open meanwhile. Raises ConfigError, GlueError."""
    found = [cached_pages(fd) for fd in fds]
    pages = CachedPages(
        sum(pages.cached for pages in found),
        sum(pages.dirty for pages in found),
        sum(pages.evicted for pages in found),
    )
    levels = memory_cgroups(host)
    return Look(take_snapshot(host, levels=levels), memory_pressure(host, levels), pages, time.monotonic())


class MemoryWatch:
    """`latest` is the last look and its number. error: why there are no more, or None.

    take: makes a look. interval_s: seconds between two, more where that takes long (see pause). The
    descriptors that it looks at must stay open until stop() has returned.
    """

    def __init__(self, take: Callable[[], Look], interval_s: float = INTERVAL_S):
        self.latest: tuple[int, Look] | None = None
        self.error: str | None = None
        self._take = take
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

    @property
    def cached(self) -> int | None:
        """Bytes of our files in the page cache at the last look; None where no more looks are taken."""
        thread, latest = self._thread, self.latest  # once: the meter's thread asks while stop() is called
        if thread is None or latest is None or not thread.is_alive():
            return None
        return latest[1].pages.cached

    def _run(self) -> None:
        number, spent = 0, 0.0
        try:
            while not self._ended.wait(pause(self._interval_s, spent)):
                number, begun = number + 1, time.thread_time()
                self.latest = (number, self._take())
                spent = time.thread_time() - begun
        except (
            ConfigError,
            GlueError,
            OSError,
        ) as error:  # the governor says so, and leaves things as they are
            self.error = str(error)
