# SPDX-License-Identifier: Apache-2.0
"""Where a volume lies: reads TARGET as users write it, and opens it under its lock."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from dualblade.errors import TargetError, UsageError
from dualblade.extents import LBA
from dualblade.host.command import host_command
from dualblade.host.journal import bound_namespace
from dualblade.host.sysfs import Host
from dualblade.superblock import MIN_CAPACITY
from dualblade.target_files import (
    closed_on_error,
    facts_of,
    open_default,
    open_existing,
    open_new,
    read_edges,
    release,
    remove_if_same,
    room,
    whole_lbas,
    zero_edges,
)
from dualblade.target_generic import open_generic
from dualblade.target_nvme import NvmeNamespace, check_pci, nvme_options, open_nvme
from dualblade.units import parse_size
from dualblade.volume import TIMEOUT, Volume
from spdk_glue import GlueError, Queue, QueueOptions

_PCI = re.compile(
    r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([0-1][0-9a-f])\.([0-7])(?:\s+ns:(\d+))?", re.IGNORECASE
)
_DRIVE = re.compile(r"nvme\d+n\d+|sd[a-z]+|ng\d+n\d+")
_PASSTHROUGH = re.compile(r"/dev/ng\d+n\d+")
_TRANSPORTS = {
    "PCIE": {"traddr"},
    "VFIOUSER": {"traddr"},
    "TCP": {"adrfam", "traddr", "trsvcid", "subnqn"},
    "RDMA": {"adrfam", "traddr", "trsvcid", "subnqn"},
}
_TRANSPORT_KEYS = {
    "trtype",
    "adrfam",
    "traddr",
    "trsvcid",
    "subnqn",
    "hostnqn",
    "hostaddr",
    "hostsvcid",
    "ns",
}
_FILES_BELOW_DEV = ("/dev/shm/", "/dev/mqueue/", "/dev/hugepages/")
_TRANSPORT_EXAMPLE = (
    "write e.g. trtype:TCP adrfam:IPv4 traddr:10.0.0.1 trsvcid:4420 subnqn:nqn.2016-06.io.spdk:n1"
)


class TargetKind(Enum):
    """How a target is reached, as its spelling says."""

    FILE = "file"
    BLOCK = "block device"
    PASSTHROUGH = "NVMe passthrough device"
    PCI = "PCI address"
    TRANSPORT = "transport id"
    MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class Target:
    """text: as written. path: FILE, BLOCK, PASSTHROUGH, and PCI where a node led to it. capacity: bytes,
    MEMORY. address: PCI or transport id as SPDK reads it. namespace: from 1, PCI and TRANSPORT."""

    kind: TargetKind
    text: str
    path: Path | None = None
    capacity: int = 0
    address: str = ""
    namespace: int = 1
    hostnqn: str | None = None

    @property
    def by_spdk(self) -> bool:
        """SPDK's driver reaches it."""
        return self.kind in (TargetKind.PCI, TargetKind.TRANSPORT)


# parse --------------------------------------------------------------------------------------


def parse_target(text: str) -> Target:
    """Reads the spelling and touches nothing. Raises UsageError."""
    text = text.strip()
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is not a target", "name a file, a block device or mem:SIZE")
    if text.lower().startswith("mem:"):
        return Target(
            TargetKind.MEMORY, text, capacity=whole_lbas(parse_size(text[4:], "the size in mem:SIZE"))
        )
    if text.lower().startswith("trtype:"):
        return _parse_transport(text)
    if match := _PCI.fullmatch(text):
        address = "trtype:PCIe traddr:" + f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}".lower()
        return Target(TargetKind.PCI, text, address=address, namespace=_namespace(match[5] or "1"))
    if _PASSTHROUGH.fullmatch(text):
        return Target(TargetKind.PASSTHROUGH, text, Path(text))
    below_dev = text.startswith("/dev/") and not text.startswith(_FILES_BELOW_DEV)
    return Target(TargetKind.BLOCK if below_dev else TargetKind.FILE, text, Path(text))


def _parse_transport(text: str) -> Target:
    values: dict[str, str] = {}
    for part in text.split():
        key, _, value = part.partition(":")
        if key.lower() not in _TRANSPORT_KEYS or not value or key.lower() in values:
            raise UsageError(f"{part!r} makes no sense in a transport id", _TRANSPORT_EXAMPLE)
        values[key.lower()] = value
    namespace = _namespace(values.pop("ns", "1"))
    _check_transport(values)
    hostnqn = values.pop("hostnqn", None)
    address = " ".join(f"{key}:{value}" for key, value in values.items())
    return Target(TargetKind.TRANSPORT, text, address=address, namespace=namespace, hostnqn=hostnqn)


def _check_transport(values: dict[str, str]) -> None:
    needed = _TRANSPORTS.get(values["trtype"].upper())
    if needed is None:
        raise UsageError(f"trtype:{values['trtype']} is none of {', '.join(_TRANSPORTS)}", _TRANSPORT_EXAMPLE)
    if missing := sorted(needed - values.keys()):
        raise UsageError(f"the transport id lacks {', '.join(missing)}", _TRANSPORT_EXAMPLE)


def _namespace(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 32:
        raise UsageError(f"ns:{text} is not a namespace", "namespaces count from 1")
    return int(text)


def find_target(text: str, host: Host = Host()) -> Target:
    """parse_target(), and for a node that is gone because its drive is bound the drive's PCI address.

    Raises UsageError.
    """
    target = parse_target(text)
    if target.kind is not TargetKind.BLOCK:
        return target
    found = bound_namespace(str(target.path), host)
    if found is None:
        return target
    bdf, namespace = found
    address = f"trtype:PCIe traddr:{bdf}"
    return replace(target, kind=TargetKind.PCI, address=address, namespace=namespace)


# open ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class OpenTarget:
    """A queue on a target that nobody else has. Close it after the last transfer.

    capacity: bytes, whole LBAs. created: made by this call, so nothing on it is anybody's.
    exclusive: it vanishes with this process. note: why the place may be slow, or None.
    filesystem: its name, "block device", "NVMe namespace" or "memory". reason: why its engine is not
    io_uring, or None. given_up: transfers that close() gave up; the medium may still write to their
    memory, so keep it.
    """

    name: str
    queue: Queue
    capacity: int
    created: bool
    exclusive: bool
    filesystem: str
    note: str | None = None
    path: Path | None = None
    given_up: int = 0
    nvme: NvmeNamespace | None = None
    _fd: int | None = field(default=None, repr=False)

    @property
    def engine(self) -> str:
        return self.queue.engine

    @property
    def reason(self) -> str | None:
        return self.queue.reason

    def edges(self) -> bytes:
        """The first and the last MiB, as they are now. Raises TargetError."""
        if self.nvme is not None:
            return self.nvme.edges()
        return b"" if self._fd is None else read_edges(self._fd, self.name)

    def erase_edges(self) -> None:
        """Zeros there: what other programs know a disk by. Raises TargetError."""
        if self.nvme is not None:
            self.nvme.erase_edges()
        if self._fd is not None:
            zero_edges(self._fd, self.name)

    def close(self) -> None:
        if not self.queue.closed:
            self.given_up = self.queue.close()
        if self.nvme is not None and not self.given_up:
            self.nvme.close()
        # A write that was given up may still land: until the process ends nobody else gets the lock.
        if self._fd is not None and not self.given_up:
            release(self._fd)
            self._fd = None

    def discard(self) -> None:
        """Close, and remove the file if this call made it."""
        if self.created and self.path is not None and self._fd is not None:
            remove_if_same(self.path, self._fd)
        self.close()

    def __enter__(self) -> OpenTarget:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_target(
    target: Target | str | None,
    *,
    capacity: int | None,
    cache_dir: Path,
    options: QueueOptions = QueueOptions(),
    create: bool = True,
    memory: int = 0,
    timeout: float = TIMEOUT,
) -> OpenTarget:
    """None: a file of this process alone in `cache_dir`.

    capacity: bytes of a file that is made; what exists keeps its size. create: make a file that
    does not exist. memory: bytes that buffers will take, and timeout: seconds for one transfer, for
    SPDK. Raises UsageError, TargetError, CapacityError, BudgetError.
    """
    if target is None:
        return _open_exclusive(cache_dir, capacity, options)
    target = find_target(target) if isinstance(target, str) else target
    if target.kind is TargetKind.MEMORY:
        queue = _open_queue(target.text, lambda: Queue.memory(target.capacity, options))
        return OpenTarget(target.text, queue, target.capacity, True, True, "memory")
    if target.by_spdk:
        return _open_nvme(target, options, memory, timeout)
    assert target.path is not None
    if target.kind is TargetKind.PASSTHROUGH:
        return _on_namespace(open_generic(target.path, options))
    return _open_path(target, target.path, capacity, options, create)


def _open_nvme(target: Target, options: QueueOptions, memory: int, timeout: float) -> OpenTarget:
    if target.kind is TargetKind.PCI:
        check_pci(target.text, target.address.rpartition("traddr:")[2])
    nvme = nvme_options(target.namespace, target.hostnqn, timeout)
    found = open_nvme(target.text, target.address, nvme, options, memory)
    return _on_namespace(found)


def _on_namespace(found: NvmeNamespace) -> OpenTarget:
    return OpenTarget(found.name, found.queue, found.capacity, False, False, "NVMe namespace", nvme=found)


def _open_exclusive(cache_dir: Path, capacity: int | None, options: QueueOptions) -> OpenTarget:
    if capacity is None:
        raise UsageError("the default target needs a capacity", "pass for instance --capacity 8G")
    name = f"a file in {cache_dir}"
    return _on_fd(open_default(cache_dir, whole_lbas(capacity)), name, options, created=True)


def _open_path(
    target: Target, path: Path, capacity: int | None, options: QueueOptions, create: bool
) -> OpenTarget:
    if os.path.lexists(path):
        return _on_fd(open_existing(path), target.text, options, path=path)
    if target.kind is TargetKind.BLOCK:
        raise TargetError(
            f"there is no device {path}", f"those there are, also half bound: {host_command('status')}"
        )
    if _DRIVE.fullmatch(str(path)) and Path("/dev", path).exists():
        raise UsageError(f"there is no file {path} here", f"the drive is /dev/{path}")
    if not create:
        raise TargetError(f"{path} does not exist", f"dualblade-spdk volume create {path} --capacity 8G")
    if capacity is None:
        raise UsageError(
            f"{path} does not exist, and no capacity is given", "pass for instance --capacity 8G"
        )
    fd = open_new(path, whole_lbas(capacity))
    return _on_fd(fd, target.text, options, path=path, created=True)


def _on_fd(
    fd: int, name: str, options: QueueOptions, *, path: Path | None = None, created: bool = False
) -> OpenTarget:
    """Owns `fd`, and removes the file after an error if it was `created`."""

    def undo() -> None:
        if created and path is not None:
            remove_if_same(path, fd)

    with closed_on_error(fd, undo):
        facts = facts_of(fd, name)
        queue = _open_queue(name, lambda: Queue.files([fd], options))
        return OpenTarget(
            name, queue, facts.size // LBA * LBA, created, created and path is None,
            facts.filesystem, facts.note, path, _fd=fd,
        )  # fmt: skip


def _open_queue(name: str, make: Callable[[], Queue]) -> Queue:
    """Raises TargetError."""
    try:
        return make()
    except GlueError as error:
        raise TargetError(f"{name}: {error.strerror}") from error


def open_volume(target: OpenTarget, timeout: float = TIMEOUT) -> Volume:
    """The volume on it, with no leftovers: a new one where this process made the target, else one
    that is there. timeout: seconds for one transfer.

    Raises VolumeError, CapacityError, StorageError. After an error a target that was made by this
    process is closed and gone; one that was there stays open.
    """
    if not target.created:
        volume = Volume.open(target.queue, target.capacity, name=target.name, timeout=timeout)
        volume.reclaim()
        return volume
    try:
        return Volume.create(target.queue, target.capacity, name=target.name, timeout=timeout)
    except BaseException:
        target.discard()
        raise


def default_capacity(cache_dir: Path, limit: int) -> int:
    """What a default target may take: `limit` bytes, or less where the disk has less to spare.

    Raises TargetError.
    """
    folder = cache_dir.absolute()
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    free, floor = room(folder)
    return max(MIN_CAPACITY, min(limit, free - floor) // LBA * LBA)
