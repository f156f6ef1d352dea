# SPDX-License-Identifier: Apache-2.0
"""Targets that SPDK's NVMe driver reaches: a PCI address or a transport id."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from typing import Protocol

from dualblade.config import nvme_secrets
from dualblade.errors import BudgetError, TargetError
from dualblade.extents import LBA
from dualblade.host.command import as_root, host_command
from dualblade.host.eligible import VFIO
from dualblade.host.journal import DEVICES, USERSPACE_DRIVERS, driver_of, entry_of
from dualblade.host.meminfo import machine_memory
from dualblade.host.memlock import lock_limit, raise_limit
from dualblade.host.pci import obstacles_in_group, pci_device
from dualblade.host.status import user_name
from dualblade.host.sysfs import Host
from dualblade.metadata import Medium
from dualblade.units import MIB, format_size, round_up
from spdk_glue import (
    GlueError,
    NotBuiltError,
    NvmeOptions,
    Queue,
    QueueOptions,
    engines,
    environment,
    start_environment,
)

EDGE = MIB
METADATA_BYTES = 16 * MIB  # what reading and writing a volume's metadata takes of the environment
RESERVE_STEP = 256 * MIB  # so that what a volume needs does for a small run, too
ENVIRONMENT_BYTES = 64 * MIB  # queues, requests and the libraries' own
TIMEOUT = 60.0


class Claim(Protocol):
    """What keeps others off a namespace."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class NvmeNamespace:
    """A queue on one namespace, and what proves that it is empty or makes it so."""

    name: str
    queue: Queue
    capacity: int
    claim: Claim

    def close(self) -> None:
        """After the queue: somebody else may have it."""
        self.claim.close()

    def edges(self) -> bytes:
        """The first and the last MiB, as they are now. Raises StorageError."""
        medium = Medium(self.queue, TIMEOUT)
        return b"".join(medium.read(offset, min(EDGE, self.capacity)) for offset in self._edge_offsets())

    def erase_edges(self) -> None:
        """Zeros there: what other programs know a disk by. Raises StorageError."""
        medium = Medium(self.queue, TIMEOUT)
        for offset in self._edge_offsets():
            medium.write(offset, bytes(min(EDGE, self.capacity)))
        medium.flush()

    def _edge_offsets(self) -> tuple[int, int]:
        return 0, max(0, self.capacity - EDGE)


def nvme_options(nsid: int, hostnqn: str | None, timeout: float) -> NvmeOptions:
    """timeout: seconds for one transfer, in which a command is tried, aborted and what is below it
    brought back."""
    secrets = nvme_secrets()
    return NvmeOptions(
        nsid, timeout / 4, max(0.5, timeout / 15), hostnqn=hostnqn, dhchap_key=secrets.get("dhchap_key"),
        dhchap_ctrlr_key=secrets.get("dhchap_ctrlr_key"), tls_psk=secrets.get("tls_psk"),
    )  # fmt: skip


def check_pci(name: str, bdf: str, host: Host = Host()) -> None:
    """Is SPDK in this build, and the drive there, with a userspace driver and open to this user? Asked
    before SPDK is started, which would not say. Raises TargetError."""
    driver = driver_of(bdf, host)
    bound = driver in USERSPACE_DRIVERS
    if "spdk" not in engines():
        raise _bound_without_spdk(name, bdf, str(driver)) if bound else _needs_spdk(name)
    if not host.exists(f"{DEVICES}/{bdf}"):
        raise TargetError(f"{name}: there is no PCI device {bdf}", "lspci -D shows those there are")
    if not bound:
        has = f"belongs to the kernel's driver {driver}" if driver else "has no driver"
        raise TargetError(f"{name} {has}, and SPDK needs it bound to vfio-pci", host_command("bind", bdf))
    _check_group(name, bdf, host)
    _check_permission(name, bdf, str(driver), host)


def _check_group(name: str, bdf: str, host: Host) -> None:
    """VFIO hands out all devices of an IOMMU group or none."""
    device = pci_device(host, bdf)
    others = obstacles_in_group(host, device) if device and device.driver == VFIO else []
    if others:
        names = ", ".join(f"{other.bdf} (with {other.driver})" for other in others)
        raise TargetError(
            f"{name} shares IOMMU group {device.group if device else None} with {names}: of no use until the "
            "whole group is bound",
            host_command("bind", others[0].bdf) if others[0].is_nvme else host_command("unbind", bdf),
        )


def _bound_without_spdk(name: str, bdf: str, driver: str) -> TargetError:
    return TargetError(
        f"{name} is bound to {driver}, and this build has no SPDK to drive it",
        f"to give it back to the kernel: {host_command('unbind', bdf)}",
    )


def _needs_spdk(name: str) -> TargetError:
    return TargetError(
        f"{name} needs SPDK, which this build is without",
        "install SPDK (https://spdk.io/doc/getting_started.html) and build again: "
        "pip install --force-reinstall --no-deps .",
    )


def _check_permission(name: str, bdf: str, driver: str, host: Host) -> None:
    if driver != VFIO and os.geteuid() != 0:
        raise TargetError(
            f"{name} is bound to {driver}, and root alone can use a drive through it",
            f"run it as root, or give the drive back to the kernel: {host_command('unbind', bdf)}",
        )
    group = host.link_name(f"{DEVICES}/{bdf}/iommu_group")
    node = f"/dev/vfio/{group}"
    if group and host.exists(node) and not os.access(host.path(node), os.R_OK | os.W_OK):
        user = user_name(os.geteuid())
        known = entry_of(bdf, host) is not None
        mend = host_command("bind", bdf, "--user", user) if known else as_root(["chown", user, node])
        raise TargetError(f"{name}: this user may not open {node}", mend)


def open_nvme(
    name: str, transport_id: str, nvme: NvmeOptions, options: QueueOptions, memory: int
) -> NvmeNamespace:
    """memory: bytes that the transfers' buffers will take. Raises TargetError, BudgetError."""
    claim = _claim(name, transport_id, nvme.nsid)
    try:
        queue = _connect(name, transport_id, nvme, options, memory)
    except BaseException:
        claim.close()
        raise
    medium = queue.medium()
    assert medium is not None
    return NvmeNamespace(name, queue, medium.nbytes // LBA * LBA, claim)


def _claim(name: str, transport_id: str, nsid: int) -> socket.socket:
    """One process of this machine at a time: a second one would take the first one's extents for
    leftovers. An abstract socket goes with its process, however that ends."""
    words = sorted(transport_id.lower().split())
    digest = hashlib.sha256(" ".join([*words, f"ns:{nsid}"]).encode()).hexdigest()[:32]
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        claim.bind(f"\0dualblade-spdk/{digest}")
    except OSError as error:
        claim.close()
        raise TargetError(
            f"{name} is in use by another run", "wait until it ends, or use another target"
        ) from error
    return claim


def _connect(name: str, transport_id: str, nvme: NvmeOptions, options: QueueOptions, memory: int) -> Queue:
    pci = transport_id.lower().startswith("trtype:pcie")
    try:
        _start(memory, transport_id.rpartition("traddr:")[2] if pci else None)
        return Queue.nvme(transport_id, options, nvme)
    except NotBuiltError as error:
        raise _needs_spdk(name) from error
    except GlueError as error:
        raise TargetError(f"{name}: {error.strerror}", _hint(transport_id)) from error


def _start(memory: int, bdf: str | None) -> None:
    """bdf: of a drive on PCI. All memory is reserved at once, for a vfio-user controller maps 16 regions at
    most. Ordinary memory is taken only as it is touched, so there is no harm in a reserve."""
    running = environment()
    wanted = round_up(memory + METADATA_BYTES, 2 * MIB) + ENVIRONMENT_BYTES
    if running is None:
        machine = machine_memory(Host())
        usable = (machine.hugepages_free - machine.hugepages_reserved) * machine.hugepage_bytes
        hugepages = machine.hugepage_bytes == 2 * MIB and usable >= wanted
        if bdf and not hugepages:
            raise _no_hugepages(bdf, wanted, machine.hugepages_total * machine.hugepage_bytes - usable)
        if bdf:
            _check_lock(bdf, wanted)
        start_environment(wanted if hugepages else max(2 * wanted, 512 * MIB), hugepages, bdf is not None)
        return
    if bdf and not running.pci:
        raise TargetError("SPDK was started in this process without PCI devices", "use a new process")
    if wanted > running.nbytes:
        raise BudgetError(
            f"SPDK was started in this process with {format_size(running.nbytes)} of memory, "
            f"and {format_size(wanted)} are needed",
            "open the larger cache first, or use a new process",
        )


def _no_hugepages(bdf: str, wanted: int, used: int) -> TargetError:
    """Ordinary memory will not do for a drive on PCI. Without an IOMMU the drive cannot be told where its
    scattered pages are; with one, VFIO pins and maps every page of 4 KiB by itself, 65535 of them at most.
    used: bytes of hugepages that others have."""
    return TargetError(
        f"SPDK needs {format_size(wanted)} in free hugepages of 2 MiB to drive {bdf}",
        host_command("hugepages", "--reserve", f"{round_up(used + wanted, RESERVE_STEP) // MIB}M"),
    )


def _check_lock(bdf: str, wanted: int) -> None:
    limit = lock_limit()
    if limit is not None and limit < wanted:
        raise TargetError(
            f"VFIO locks the {format_size(wanted)} of memory that {bdf} may reach, and this user may lock "
            f"{format_size(limit)}",
            raise_limit(user_name(os.geteuid())),
        )


def _hint(transport_id: str) -> str:
    kind = transport_id.split()[0].lower()
    if "vfiouser" in kind:
        return "is the target running, and does no other process use it? `dualblade-spdk emulate` starts one"
    if "pcie" in kind:
        return f"dualblade-spdk doctor looks at the machine; who has the drive: {host_command('status')}"
    return "is the target listening there, and does it allow this host?"
