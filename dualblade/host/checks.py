# SPDX-License-Identifier: Apache-2.0
"""What this machine offers, looked at and never changed. Each finding names the command that mends it."""

from __future__ import annotations

import errno
import mmap
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualblade.errors import ConfigError
from dualblade.host.cgroup import memory_cgroups, tightest
from dualblade.host.command import as_root, host_command
from dualblade.host.hugepages import PAGE, Pool, pools
from dualblade.host.journal import USERSPACE_DRIVERS
from dualblade.host.memlock import raise_limit
from dualblade.host.pci import nvme_devices
from dualblade.host.sysfs import Host
from dualblade.units import GIB, format_size

OK, WARN, FAIL = "ok", "warn", "fail"
HOST = Host()
MEMLOCK_WANTED = 1 * GIB
_INSTEAD = "posix threads move the bytes instead, slower on a fast drive"
_LIBRARIES = {  # Debian's packages
    "liburing": "liburing2",
    "libnuma": "libnuma1",
    "libuuid": "libuuid1",
    "libbsd": "libbsd0",
    "libssl": "libssl3",
    "libcrypto": "libssl3",
}
IN_MEMORY = frozenset({"tmpfs", "ramfs"})
SLOW = {
    "overlay": "an overlay: its upper layer decides the speed",
    "btrfs": "copy-on-write: rewritten extents fragment",
    "bcachefs": "copy-on-write: rewritten extents fragment",
    "zfs": "copy-on-write, and O_DIRECT may be served from its own cache",
} | dict.fromkeys(
    ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "fuse", "fuse.sshfs", "virtiofs"), "not a local disk"
)


@dataclass(frozen=True, slots=True)
class Check:
    """state: "ok", "warn" (works, but worse) or "fail" (`run` with its defaults would not work)."""

    name: str
    state: str
    detail: str
    fix: str | None = None


def python_version(version: tuple[int, ...] = sys.version_info[:3]) -> Check:
    text = ".".join(map(str, version))
    if version >= (3, 11):
        return Check("python", OK, text)
    return Check(
        "python", FAIL, f"{text} is too old", as_root(["apt-get", "install", "python3.11", "python3.11-venv"])
    )


def c_engine(engines: Sequence[str], problem: str | None, rebuild: str) -> Check:
    """`engines` as the build lists them, or `problem`: why the build cannot be loaded. `rebuild`: the
    command that builds it again."""
    if problem:
        return Check("engine", FAIL, problem, _install_library(problem) or rebuild)
    if "uring" not in engines:
        return Check(
            "engine",
            WARN,
            f"built without liburing (it has: {' '.join(engines)}); {_INSTEAD}",
            f"{as_root(['apt-get', 'install', 'liburing-dev', 'pkg-config'])} && {rebuild}",
        )
    return Check("engine", OK, f"built, with {' '.join(engines)}")


def _install_library(problem: str) -> str | None:
    """The command that brings the library which the loader names: those that the engine is linked with."""
    packages = [package for name, package in _LIBRARIES.items() if f"{name}.so" in problem]
    return as_root(["apt-get", "install", packages[0]]) if packages else None


def io_uring(problem: OSError | None, reason: str | None = None, host: Host = HOST) -> Check:
    """`problem`: what the kernel answered when a ring was opened, or None when that worked. `reason`:
    why threads take its place, or None where nothing does."""
    if problem is None:
        return Check("io_uring", OK, "the kernel opens a ring")
    if reason is None:
        fix = "ulimit -n 65536" if problem.errno == errno.EMFILE else None
        return Check("io_uring", FAIL, f"the kernel refuses a ring: {problem.strerror}", fix)
    return Check("io_uring", WARN, f"{reason}; {_INSTEAD}", _uring_fix(problem.errno, host))


def _uring_fix(error: int | None, host: Host) -> str:
    if error == errno.ENOMEM:
        return "ulimit -l unlimited"
    if _read(host, "/proc/sys/kernel/io_uring_disabled") in ("1", "2"):
        return as_root(["sysctl", "-w", "kernel.io_uring_disabled=0"])
    if re.search(r"^Seccomp:\s*2$", _read(host, "/proc/self/status"), re.MULTILINE):
        return "docker run --security-opt seccomp=unconfined, or a profile that allows io_uring_*"
    return "run on Linux 5.19 or later, with io_uring allowed"


def memlock(limit: int | None = None, privileged: bool | None = None) -> Check:
    """RLIMIT_MEMLOCK bounds the buffers registered with io_uring, except for root."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY:
        return Check("memlock", OK, "unlimited")
    if os.geteuid() == 0 if privileged is None else privileged:
        return Check("memlock", OK, f"{format_size(soft)}, which does not bind root")
    if soft >= MEMLOCK_WANTED:
        return Check("memlock", OK, format_size(soft))
    return Check(
        "memlock",
        WARN,
        f"{format_size(soft)}: staging memory beyond it is not registered, which costs CPU time, and VFIO "
        "refuses it to a bound drive",
        raise_limit("*"),
    )


# the cache folder --------------------------------------------------------------------------------


def nearest_folder(folder: Path) -> Path:
    """`folder`, or the closest parent that exists."""
    at = folder.absolute()
    while not os.path.exists(at):  # False too where a parent may not be looked into
        at = at.parent
    return at


def cache_folder(folder: Path) -> Check:
    nearest = nearest_folder(folder)
    move = "name another folder with --cache-dir"
    if not nearest.is_dir():
        return Check("cache folder", FAIL, f"{nearest} is not a folder", move)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Check("cache folder", FAIL, f"{nearest} cannot be written by this user", move)
    return Check("cache folder", OK, f"{folder}" + ("" if nearest == folder else " (made on first use)"))


def filesystem(folder: Path, host: Host = HOST) -> Check:
    name = filesystem_type(nearest_folder(folder), host)
    move = "name a folder on a local ext4 or xfs with --cache-dir"
    if name in IN_MEMORY:
        return Check("filesystem", FAIL, f"{name} is memory itself: nothing would be offloaded", move)
    if name is None:
        return Check("filesystem", WARN, "its type cannot be read from /proc/self/mountinfo", move)
    if name in SLOW:
        return Check("filesystem", WARN, f"{name}: {SLOW[name]}", move)
    return Check("filesystem", OK, name)


def filesystem_type(folder: Path, host: Host = HOST) -> str | None:
    """As /proc/self/mountinfo names it; the longest mount point wins, of equal ones the last."""
    best: tuple[int, str] | None = None
    real = folder.resolve()
    for line in _read(host, "/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if len(fields) < 5 or not after:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if real.is_relative_to(point) and (best is None or len(point) >= best[0]):
            best = len(point), after.split(" ")[0]
    return best[1] if best else None


def direct_io(folder: Path) -> Check:
    problem = try_direct_io(nearest_folder(folder))
    if problem is None:
        return Check("O_DIRECT", OK, "written and read back")
    return Check("O_DIRECT", FAIL, problem, "name a folder on a local ext4 or xfs with --cache-dir")


def try_direct_io(folder: Path) -> str | None:
    """Write and read 4 KiB past the page cache in an unlinked file. None, or what went wrong."""
    page = mmap.mmap(-1, 4096)  # page-aligned, as O_DIRECT wants it
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_DIRECT)
            try:
                page[:] = bytes(range(256)) * 16
                os.pwrite(fd, page, 0)
                page[:] = bytes(4096)
                os.preadv(fd, [page], 0)
            finally:
                os.close(fd)
        return None if page[:] == bytes(range(256)) * 16 else "other bytes came back than were written"
    except OSError as error:
        reason = "the filesystem refuses it" if error.errno == errno.EINVAL else error.strerror
        return f"O_DIRECT does not work in {folder}: {reason}"
    finally:
        page.close()


def free_space(folder: Path) -> Check:
    usage = shutil.disk_usage(nearest_folder(folder))
    return judge_space(usage.free, max(usage.total // 20, 2 * GIB))


def judge_space(free: int, floor: int) -> Check:
    """`floor`: bytes that always stay free, the larger of 5 % and 2 GiB."""
    if free > floor:
        return Check("free space", OK, f"{format_size(free - floor)}, with {format_size(floor)} left alone")
    detail = f"{format_size(free)} free, and {format_size(floor)} must stay free"
    return Check("free space", FAIL, detail, "free space there, or name another folder with --cache-dir")


# memory ------------------------------------------------------------------------------------------


def memory_cgroup(host: Host = HOST) -> Check:
    try:
        levels = memory_cgroups(host)
    except ConfigError as error:
        return Check("memory cgroup", FAIL, error.message, error.hint)
    if not levels:
        return Check("memory cgroup", OK, "none is over this process")
    bound = tightest(levels)
    limit = "no limit" if bound is None else f"{format_size(bound.headroom or 0)} left of its limit"
    return Check("memory cgroup", OK, f"{format_size(levels[0].usage)} charged, {limit}")


def hugepages(host: Host = HOST) -> Check:
    """SPDK's memory; without them it takes ordinary memory, with an IOMMU alone."""
    found = [pool for pool in pools(host) if pool.page == PAGE]
    total = sum(pool.nbytes for pool in found)
    if total:
        free = format_size(sum(pool.free for pool in found) * PAGE)
        return Check("hugepages", OK, f"{format_size(total)} reserved, {free} free{_by_node(found)}")
    bound = [device.bdf for device in nvme_devices(host) if device.driver in USERSPACE_DRIVERS]
    if not bound:
        return Check("hugepages", OK, "none reserved, and no drive is bound that would need them")
    return Check(
        "hugepages", WARN, f"none reserved, and SPDK drives {bound[0]} best from them",
        host_command("hugepages", "--reserve", "1G"),
    )  # fmt: skip


def _by_node(found: Sequence[Pool]) -> str:
    if len(found) < 2:
        return ""
    parts = [f"node {pool.node}: {format_size(pool.free * PAGE)}" for pool in found]
    return f" ({', '.join(parts)})"


def swap(host: Host = HOST) -> Check:
    devices = [line.split()[0] for line in _read(host, "/proc/swaps").splitlines()[1:] if line.split()]
    if not devices:
        return Check("swap", OK, "off")
    return Check(
        "swap", WARN, f"on ({', '.join(devices)}): weights may be swapped out", as_root(["swapoff", "-a"])
    )


def _read(host: Host, path: str) -> str:
    """Empty where it cannot be read."""
    try:
        return host.read_text(path).strip()
    except OSError:
        return ""
