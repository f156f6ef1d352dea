# SPDX-License-Identifier: Apache-2.0
"""Targets that NVMe commands reach through the kernel's driver: a generic device, /dev/ng1n1.

Such a device goes past the block layer, and so past mounts, claims and locks. The namespace's block
device, /dev/nvme1n1, is therefore claimed and locked for as long as the generic one is in use.
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from dualblade.errors import TargetError
from dualblade.extents import LBA
from dualblade.host.sysfs import Host
from dualblade.target_files import closed_on_error, open_existing, release
from dualblade.target_nvme import NvmeNamespace
from spdk_glue import GlueError, Queue, QueueOptions, engines

_NVME_IOCTL_ID = 0x4E40  # of a generic or a block device: which namespace of its controller it is
_OTHERS = "name another target: a file, or a block device such as /dev/nvme1n1"


@dataclass(slots=True)
class _Claim:
    generic: int
    block: int
    held: bool = True

    def close(self) -> None:
        if not self.held:
            return
        self.held = False
        os.close(self.generic)
        # The page cache may hold what was there before it was written from here.
        os.posix_fadvise(self.block, 0, 0, os.POSIX_FADV_DONTNEED)
        release(self.block)


def open_generic(path: Path, options: QueueOptions) -> NvmeNamespace:
    """Raises TargetError."""
    if "uring_cmd" not in engines():
        raise TargetError(
            f"{path} needs io_uring, which this build is without",
            "install liburing (Debian: apt-get install liburing-dev) and build again: "
            "pip install --force-reinstall --no-deps .",
        )
    with closed_on_error(_claim(path)) as block, closed_on_error(_open(path)) as generic:
        queue = _open_queue(path, generic, options)
        try:
            return _namespace(path, queue, _Claim(generic, block))
        except BaseException:
            queue.close()
            raise


def block_device_of(path: Path, host: Host = Host()) -> Path:
    """The block device of the same namespace. Raises TargetError where `path` is no generic device."""
    try:
        status = path.stat()
    except OSError as error:
        raise TargetError(
            f"{path} cannot be used: {error.strerror}", "ls /dev/ng* shows those there are"
        ) from error
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    name = host.path(f"/sys/dev/char/{number}").resolve().name
    found = re.fullmatch(r"ng(\d+n\d+)", name)
    if not stat.S_ISCHR(status.st_mode) or not found:
        raise TargetError(f"{path} is no NVMe generic device", _OTHERS)
    return Path(f"/dev/nvme{found[1]}")


def _claim(path: Path) -> int:
    """The block device, claimed and locked, with everything on the drive that was written through it."""
    block = block_device_of(path)
    if not block.exists():
        raise TargetError(
            f"{path}: there is no {block}, which must be held so that nobody mounts it meanwhile", _OTHERS
        )
    with closed_on_error(open_existing(block)) as fd:
        os.fsync(fd)
    return fd


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise TargetError(
            f"{path} cannot be opened: {error.strerror}", "run as root, or name a device you may write to"
        ) from error


def _open_queue(path: Path, fd: int, options: QueueOptions) -> Queue:
    try:
        return Queue.nvme_generic(fd, options)
    except GlueError as error:
        raise TargetError(
            f"{path}: {error.strerror}", f"through the block layer: {block_device_of(path)}"
        ) from error


def _identity(fd: int, kind: str) -> tuple[Path, int]:
    """The controller (or its subsystem), and which of its namespaces."""
    number = os.fstat(fd).st_rdev
    node = Host().path(f"/sys/dev/{kind}/{os.major(number)}:{os.minor(number)}/device")
    return node.resolve(), fcntl.ioctl(fd, _NVME_IOCTL_ID)


def _namespace(path: Path, queue: Queue, claim: _Claim) -> NvmeNamespace:
    # The two names say so already; but what is held must be what is written.
    if _identity(claim.generic, "char") != _identity(claim.block, "block"):
        raise TargetError(f"{path} and {block_device_of(path)} are not the same namespace", _OTHERS)
    medium = queue.medium()
    assert medium is not None
    return NvmeNamespace(str(path), queue, medium.nbytes // LBA * LBA, claim)
