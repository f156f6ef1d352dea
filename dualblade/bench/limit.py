# SPDX-License-Identifier: Apache-2.0
"""A memory cgroup for the processes of a benchmark: made, changed while they run, looked at, removed."""

from __future__ import annotations

from itertools import takewhile

from dualblade.host.cgroup import memory_cgroups
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host

_MOUNT = "/sys/fs/cgroup"


def make_limit(name: str, nbytes: int, host: Host = Host()) -> MemoryCgroup | str:
    """A cgroup below this process's own with that limit, or one line why there is none. Raises ConfigError
    where this process is in a memory cgroup whose files cannot be read."""
    reason = ""
    for parent in _parents(host):
        made = _make_in(parent, name, nbytes, host)
        if isinstance(made, MemoryCgroup):
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
        parents += [f"{_MOUNT}/memory" if MemoryCgroup(f"{_MOUNT}/memory", host).v1 else _MOUNT]
    return list(dict.fromkeys(parents))


def _make_in(parent: str, name: str, nbytes: int, host: Host) -> MemoryCgroup | str:
    directory = f"{parent}/{name}"
    try:
        host.make_folder(directory)
    except OSError as error:
        return f"no memory cgroup can be made in {parent}: {error.strerror}"
    made = MemoryCgroup(directory, host)
    try:
        made.set(nbytes)
    except OSError as error:
        made.remove()
        return f"{parent} hands out no memory limits: {error.strerror}"
    return made
