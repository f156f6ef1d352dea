# SPDX-License-Identifier: Apache-2.0
"""What kind of machine this is: WSL, an old kernel, a container, a cgroup of its own."""

from __future__ import annotations

import re

from dualblade.errors import EnforcementError
from dualblade.host.checks import HOST, OK, WARN, Check
from dualblade.host.command import as_root
from dualblade.host.enforce import find_way
from dualblade.host.sysfs import Host
from dualblade.host.systemd_scope import scope_possible

_OVERLAY = re.compile(r"^\S+ \S+ \S+ \S+ / .* - (fuse-)?overlay", re.MULTILINE)
_CONTAINER_PATHS = re.compile(r"docker|containerd|kubepods|libpod|lxc")


def kernel(host: Host = HOST) -> Check:
    """WSL2 names itself in the kernel's release."""
    release = host.attribute("/proc/sys/kernel/osrelease")
    if "microsoft" not in release.lower():
        return Check("kernel", OK, release or "unknown")
    return Check(
        "kernel",
        WARN,
        f"{release}: WSL2, whose Windows drives are network filesystems",
        "keep --cache-dir on the Linux side, not below /mnt/c",
    )


def kernel_features(host: Host = HOST) -> Check:
    """What of the kernel is used where it is there. io_uring has a check of its own."""
    features = _features(host)
    detail = ", ".join(name for name, (present, _) in features.items() if present) or "none"
    if missing := [name for name, (present, _) in features.items() if not present]:
        detail += f"; without {', '.join(missing)}"
    fixes = [fix for present, fix in features.values() if fix and not present]
    return Check("kernel features", WARN if fixes else OK, detail, fixes[0] if fixes else None)


def _features(host: Host) -> dict[str, tuple[bool, str | None]]:
    """Whether each is there, and the remedy where its absence matters."""
    version = _version(host)
    pages = "/sys/kernel/mm/transparent_hugepage/enabled"
    transparent = re.search(r"\[(always|madvise)\]", host.attribute(pages)) is not None
    return {
        "hugepages": (bool(host.names("/sys/kernel/mm/hugepages")), "run a kernel with CONFIG_HUGETLBFS"),
        "transparent hugepages": (transparent, f"echo madvise | {as_root(['tee', pages])}"),
        "NVMe passthrough by io_uring": (version >= (5, 19), "run on Linux 5.19 or later"),
        "cachestat": (version >= (6, 5), None),  # mincore takes its place
        "memory pressure": (host.exists("/proc/pressure/memory"), None),
    }


def _version(host: Host) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", host.attribute("/proc/sys/kernel/osrelease"))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def container(host: Host = HOST) -> Check:
    # The marks of an image are left where a virtual machine was made of it; an overlay below / is not.
    marked = any(host.exists(path) for path in ("/.dockerenv", "/run/.containerenv"))
    overlay = re.search(
        r"^\S+ \S+ \S+ \S+ / .* - (fuse-)?overlay", host.attribute("/proc/self/mountinfo"), re.M
    )
    if not (marked and overlay) and not _CONTAINER_PATHS.search(host.attribute("/proc/self/cgroup")):
        return Check("container", OK, "none seen")
    return Check(
        "container",
        WARN,
        "this is a container: its root filesystem is an overlay, and its memory limit counts",
        "mount a volume of a local disk and name it with --cache-dir",
    )


def enforcement(host: Host = HOST) -> Check:
    """Would `run --enforce` find a memory cgroup for itself?"""
    name = "budget enforcement"
    try:
        return Check(name, OK, f"run --enforce works, in {find_way(host).words}")
    except EnforcementError as error:
        if scope_possible(host):
            return Check(name, OK, "run --enforce works, in a systemd scope of its own")
        return Check(name, WARN, f"run --enforce cannot, and goes on without: {error.message}", error.hint)
