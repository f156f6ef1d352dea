# SPDX-License-Identifier: Apache-2.0
"""The memory cgroups over this process, v2 or v1, from its own up to the top that can be seen.

It refuses to guess: a limit that exists but cannot be read would be found by the OOM killer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dualblade.errors import ConfigError
from dualblade.host.sysfs import Host

_CGROUP = "/proc/self/cgroup"
_MOUNTINFO = "/proc/self/mountinfo"
# v1 writes "no limit" as the largest multiple of the page size, which differs between machines
_V1_UNLIMITED = 1 << 62
OURS = re.compile(r"dualblade-([0-9]+)(\.scope)?")  # of a run, with its process's number
_HINT = "make it readable, e.g. give the container a cgroup namespace and a cgroup mount of its own"


@dataclass(frozen=True, slots=True)
class CgroupLevel:
    """One memory cgroup that this process is charged to.

    path: its directory. limit: bytes, None without one; limit_file: the file in `path` that sets it.
    usage: bytes charged, swap not among them. reclaimable: bytes of it that the kernel can drop at
    once, clean file pages.
    """

    path: str
    limit: int | None
    limit_file: str
    usage: int
    reclaimable: int

    @property
    def headroom(self) -> int | None:
        """Bytes that can still be charged here; None without a limit."""
        return None if self.limit is None else max(0, self.limit - self.usage + self.reclaimable)


@dataclass(frozen=True, slots=True)
class OwnCgroup:
    """The memory cgroup that this process is in. version: 1 or 2. directory: its own; `top`: the
    outermost that can be seen, which may be the same. hugetlb: hugepages are charged to it, too."""

    version: int
    directory: str
    top: str
    hugetlb: bool = False


@dataclass(frozen=True, slots=True)
class _Mount:
    """root: the cgroup that is visible at the directory `point`. options: of the hierarchy."""

    root: str
    point: str
    options: tuple[str, ...] = ()


def memory_cgroups(host: Host) -> list[CgroupLevel]:
    """Own cgroup first, outermost last; empty where no memory cgroup is over this process.

    Raises ConfigError where the process is in one whose files cannot be read.
    """
    own = own_cgroup(host)
    return [] if own is None else levels_of(host, own)


def own_cgroup(host: Host) -> OwnCgroup | None:
    """None where no cgroup with a memory controller is over this process. Raises ConfigError where its
    directory is not to be seen."""
    membership = _membership(host)
    if membership is None:
        return None
    version, path = membership
    point, directory = _locate(host, version, path)
    options = next((mount.options for mount in _mounts(host, version) if mount.point == point), ())
    return OwnCgroup(version, directory, point, hugetlb="memory_hugetlb_accounting" in options)


def levels_of(host: Host, own: OwnCgroup) -> list[CgroupLevel]:
    """memory_cgroups(), for a process that is known to be in `own`."""
    read = _v1_level if own.version == 1 else _v2_level
    levels = (read(host, place) for place in _upwards(own.directory, own.top))
    return [level for level in levels if level is not None]


def is_ours(directory: str) -> bool:
    """Whether the cgroup was made by this program, to judge by its name."""
    return OURS.fullmatch(directory.rpartition("/")[2]) is not None


def numbers(text: str) -> dict[str, int]:
    """Of a file of "name number" lines."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def tightest(levels: list[CgroupLevel]) -> CgroupLevel | None:
    """The level with the least headroom, the outermost of equals; None where none has a limit."""
    limited = [level for level in reversed(levels) if level.limit is not None]
    return min(limited, key=lambda level: level.headroom or 0, default=None)


def _membership(host: Host) -> tuple[int, str] | None:
    """(1 or 2, cgroup path). A v1 line wins: a hybrid system has its controllers there."""
    if not host.exists(_CGROUP):
        return None
    rows = [line.split(":", 2) for line in _read(host, _CGROUP).splitlines() if line.count(":") >= 2]
    v1 = [(1, path) for _, controllers, path in rows if "memory" in controllers.split(",")]
    v2 = [(2, path) for number, controllers, path in rows if number == "0" and not controllers]
    return next(iter(v1 + v2), None)


def _locate(host: Host, version: int, path: str) -> tuple[str, str]:
    """(mount point, directory of the cgroup `path` below it); the widest view first."""
    mounts = sorted(_mounts(host, version), key=lambda mount: len(mount.root))
    for mount in mounts:
        below = _below(path, mount.root)
        if below is not None and host.exists(mount.point + below):
            return mount.point, (mount.point + below).rstrip("/")
    point = _container_top(host, version, path, mounts)
    return point, point


def _container_top(host: Host, version: int, path: str, mounts: list[_Mount]) -> str:
    """The mount point that stands for a container whose cgroup is named from outside.

    Only a top that is itself limited can: at the top of the whole hierarchy our limit is not to be
    seen, and a mount of another part (its root is not "/") has nothing to do with us.
    """
    for mount in mounts:
        if mount.root == "/" and _below(path, "/") is not None and not is_top(host, version, mount.point):
            return mount.point
    where = "below no cgroup mount that is visible here"
    raise ConfigError(f"cannot read the memory cgroup {path} of this process: it is {where}", _HINT)


def _below(path: str, root: str) -> str | None:
    """The part of `path` under `root`; None where it is elsewhere, or outside of the namespace."""
    root = root.rstrip("/")
    if not f"{path}/".startswith(f"{root}/"):
        return None
    below = path[len(root) :]
    return None if ".." in below.split("/") else below


def _mounts(host: Host, version: int) -> list[_Mount]:
    by_point: dict[str, _Mount] = {}  # a later mount hides an earlier one at the same point
    for line in _read(host, _MOUNTINFO).splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        v1 = kind[0] == "cgroup" and "memory" in kind[-1].split(",")
        if len(fields) > 4 and (v1 if version == 1 else kind[0] == "cgroup2"):
            root, point = _unescape(fields[3]), _unescape(fields[4])
            by_point[point] = _Mount(root, point.rstrip("/"), tuple(kind[-1].split(",")))
    return list(by_point.values())


def _unescape(field: str) -> str:
    """mountinfo writes blanks and backslashes as \\ooo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _upwards(directory: str, top: str) -> Iterator[str]:
    while directory != top:
        yield directory
        directory = directory.rpartition("/")[0]
    yield top


def is_top(host: Host, version: int, directory: str) -> bool:
    """Whether this is the top of the whole hierarchy: some files are only there, others never."""
    if version == 1:
        return host.exists(f"{directory}/release_agent")
    return not host.exists(f"{directory}/cgroup.events")


def _v2_level(host: Host, directory: str) -> CgroupLevel | None:
    """None where the memory controller does not act: it charges the next level that has it."""
    controllers = _read(host, f"{directory}/cgroup.controllers").split()
    if "memory" not in controllers or is_top(host, 2, directory):
        return None
    limits = {name: _bytes(host, f"{directory}/{name}") for name in ("memory.max", "memory.high")}
    usage = _number(host, f"{directory}/memory.current")
    reclaimable = _reclaimable(_stat(host, directory), "", "file_")
    return _level(directory, limits, usage, reclaimable)


def _v1_level(host: Host, directory: str) -> CgroupLevel:
    """hierarchical_memory_limit includes the parents, even those above a container's mount."""
    stat = _stat(host, directory)
    limits = {
        "memory.limit_in_bytes": _bytes(host, f"{directory}/memory.limit_in_bytes"),
        "memory.stat": _v1_limit(stat.get("hierarchical_memory_limit", _V1_UNLIMITED)),
    }
    if is_ours(directory):  # elsewhere it is a reservation, e.g. docker's
        limits["memory.soft_limit_in_bytes"] = _bytes(host, f"{directory}/memory.soft_limit_in_bytes")
    usage = _number(host, f"{directory}/memory.usage_in_bytes")
    return _level(directory, limits, usage, _reclaimable(stat, "total_", "total_"))


def _level(path: str, limits: Mapping[str, int | None], usage: int, reclaimable: int) -> CgroupLevel:
    real = [(limit, name) for name, limit in limits.items() if limit is not None]
    limit, name = min(real) if real else (None, "")
    return CgroupLevel(path, limit, name, usage, reclaimable)


def _reclaimable(stat: Mapping[str, int], lists: str, dirt: str) -> int:
    """Clean pages of the two file lists, bytes. Unevictable pages and shared memory are on neither."""
    pages = stat.get(f"{lists}active_file", 0) + stat.get(f"{lists}inactive_file", 0)
    dirty = stat.get(f"{dirt}dirty", 0) + stat.get(f"{dirt}writeback", 0)
    return max(0, pages - dirty)


def _stat(host: Host, directory: str) -> dict[str, int]:
    return numbers(_read(host, f"{directory}/memory.stat"))


def _v1_limit(nbytes: int) -> int | None:
    return None if nbytes >= _V1_UNLIMITED else nbytes


def _bytes(host: Host, path: str) -> int | None:
    """A limit; None for "max" and for v1's huge number."""
    return None if _read(host, path).strip() == "max" else _v1_limit(_number(host, path))


def _number(host: Host, path: str) -> int:
    text = _read(host, path).strip()
    if not text.isdecimal():
        raise ConfigError(f"cannot read {path}: {text!r} is not a number of bytes", _HINT)
    return int(text)


def _read(host: Host, path: str) -> str:
    try:
        return host.read_text(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", _HINT) from error
