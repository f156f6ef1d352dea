# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup for the processes of a benchmark: made, changed while they run, looked at, removed."""

from __future__ import annotations

import os
import time
from itertools import takewhile

from dualblade.host.cgroup import memory_cgroups
from dualblade.host.sysfs import Host

_PATIENCE_S = 5.0
_MOUNT = "/sys/fs/cgroup"
_V1 = ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
_V2 = ("memory.max", "memory.peak")


class MemoryLimit:
    """One cgroup below this process's own. `make` says why there is none where none can be made.

    directory: where it is mounted. peak: the most that was charged to it, in bytes.
    """

    def __init__(self, host: Host, directory: str, files: tuple[str, str]):
        self._host = host
        self.directory = directory
        self._limit_file, self._peak_file = files

    def set(self, nbytes: int) -> None:
        """Also while processes run in it. Raises OSError: EBUSY where they hold more than they can give."""
        self._host.write_text(f"{self.directory}/{self._limit_file}", str(nbytes))

    def enter(self) -> None:
        """This process, and all that it holds from now on, is charged to it. Raises OSError."""
        self._host.write_text(f"{self.directory}/cgroup.procs", str(os.getpid()))

    @property
    def peak(self) -> int | None:
        """None where the kernel does not tell."""
        text = self._host.attribute(f"{self.directory}/{self._peak_file}")
        return int(text) if text.isdecimal() else None

    def remove(self) -> None:
        """Its processes have ended; the kernel may take a moment to see that. Raises OSError."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._host.path(self.directory).rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


def make_limit(name: str, nbytes: int, host: Host = Host()) -> MemoryLimit | str:  # noqa: B008
    """A cgroup with that limit, or one line why there is none. Raises ConfigError where this process is in a
    memory cgroup whose files cannot be read."""
    reason = ""
    for parent in _parents(host):
        made = _make_in(parent, name, nbytes, host)
        if isinstance(made, MemoryLimit):
            return made
        reason = reason or made
    return reason


def _parents(host: Host) -> list[str]:
    """Its own cgroup, and those above it up to one with a limit, which must go on to hold. A cgroup v2 that
    processes are in can have none with a memory limit below it."""
    levels = memory_cgroups(host)
    free = list(takewhile(lambda level: level.limit is None, levels))
    parents = [level.path for level in levels[: len(free) + 1]]
    if len(free) == len(levels):
        parents += [f"{_MOUNT}/memory" if host.exists(f"{_MOUNT}/memory/{_V1[0]}") else _MOUNT]
    return list(dict.fromkeys(parents))


def _make_in(parent: str, name: str, nbytes: int, host: Host) -> MemoryLimit | str:
    directory = f"{parent}/{name}"
    try:
        host.make_folder(directory)
    except OSError as error:
        return f"no memory cgroup can be made in {parent}: {error.strerror}"
    made = adopt(directory, host)
    try:
        made.set(nbytes)
    except OSError as error:
        made.remove()
        return f"{parent} hands out no memory limits: {error.strerror}"
    return made


def adopt(directory: str, host: Host = Host()) -> MemoryLimit:  # noqa: B008
    """The cgroup that another process has made there."""
    v1 = host.exists(f"{directory}/{_V1[0]}")
    return MemoryLimit(host, directory, _V1 if v1 else _V2)
