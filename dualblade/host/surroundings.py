# SPDX-License-Identifier: Apache-2.0
"""What kind of machine this is: WSL, a container, a cgroup of its own, a spare NVMe drive."""

from __future__ import annotations

import os
import re

from dualblade.errors import ConfigError
from dualblade.host.cgroup import memory_cgroups
from dualblade.host.checks import HOST, OK, WARN, Check
from dualblade.host.sysfs import Host

_CONTAINER_PATHS = re.compile(r"docker|containerd|kubepods|libpod|lxc")


def kernel(host: Host = HOST) -> Check:
    """WSL2 names itself in the kernel's release."""
    release = _read(host, "/proc/sys/kernel/osrelease").strip()
    if "microsoft" not in release.lower():
        return Check("kernel", OK, release or "unknown")
    return Check(
        "kernel",
        WARN,
        f"{release}: WSL2, whose Windows drives are network filesystems",
        "keep --cache-dir on the Linux side, not below /mnt/c",
    )


def container(host: Host = HOST) -> Check:
    # The marks of an image are left where a virtual machine was made of it; an overlay below / is not.
    marked = any(host.exists(path) for path in ("/.dockerenv", "/run/.containerenv"))
    overlay = re.search(r"^\S+ \S+ \S+ \S+ / .* - (fuse-)?overlay", _read(host, "/proc/self/mountinfo"), re.M)
    if not (marked and overlay) and not _CONTAINER_PATHS.search(_read(host, "/proc/self/cgroup")):
        return Check("container", OK, "none seen")
    return Check(
        "container",
        WARN,
        "this is a container: its root filesystem is an overlay, and its memory limit counts",
        "mount a volume of a local disk and name it with --cache-dir",
    )


def delegation(host: Host = HOST) -> Check:
    """Could this user make a memory cgroup below the present one?"""
    try:
        levels = memory_cgroups(host)
    except ConfigError:
        return Check("cgroup delegation", OK, "no memory cgroup that can be read")
    if not levels:
        return Check("cgroup delegation", OK, "no memory cgroups here")
    if os.access(host.path(levels[0].path), os.W_OK):
        return Check("cgroup delegation", OK, f"{levels[0].path} is writable")
    return Check(
        "cgroup delegation",
        WARN,
        f"{levels[0].path} is not writable: the budget is kept by planning, nothing enforces it",
        "systemd-run --user --scope -p MemoryMax=6G dualblade-spdk run ..., if it should be enforced",
    )


def drives(host: Host = HOST) -> Check:
    """Is there an NVMe drive that the system does not run from?"""
    names = [name for name in _listdir(host, "/sys/block") if name.startswith("nvme")]
    if not names:
        return Check("nvme", OK, "no NVMe drive: the direct path uses a file in the cache folder")
    root = _root_disk(host)
    spare = [name for name in names if name != root]
    if spare:
        return Check("nvme", OK, f"beside the system's own: {', '.join(spare)}")
    return Check(
        "nvme",
        WARN,
        f"{root} is the only NVMe drive, and the system runs from it",
        "use a file on it (the default); it can never be given to a volume of its own",
    )


def _root_disk(host: Host) -> str | None:
    """The disk, as /sys/block names it, that / is mounted from."""
    for fields in map(str.split, _read(host, "/proc/self/mountinfo").splitlines()):
        if len(fields) > 4 and fields[4] == "/":
            for disk in _listdir(host, "/sys/block"):
                parts = [p for p in _listdir(host, f"/sys/block/{disk}") if p.startswith(disk)]
                if any(_read(host, f"/sys/block/{place}/dev").strip() == fields[2]
                       for place in [disk, *(f"{disk}/{part}" for part in parts)]):  # fmt: skip
                    return disk
    return None


def _listdir(host: Host, path: str) -> list[str]:
    try:
        return host.listdir(path)
    except OSError:
        return []


def _read(host: Host, path: str) -> str:
    try:
        return host.read_text(path)
    except OSError:
        return ""
