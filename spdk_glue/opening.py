# SPDX-License-Identifier: Apache-2.0
"""What a queue is opened with, as C takes it, and why one could not be opened."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spdk_glue._ffi import ffi
from spdk_glue.env import first_words
from spdk_glue.errors import GlueError, why_no_uring


@dataclass(frozen=True, slots=True)
class QueueOptions:
    """queue_depth: commands in flight. command_bytes: larger transfers are split at this size.
    in_flight_bytes: no more commands than move so many together (0: any). max_transfers: transfers
    accepted and not yet reaped. workers: hand commands to a few worker threads at once, which copies
    from a buffered file in parallel."""

    queue_depth: int = 32
    command_bytes: int = 1 << 20
    max_transfers: int = 256
    in_flight_bytes: int = 0
    workers: bool = False
    drain_ms: int = 10_000


@dataclass(frozen=True, slots=True)
class MemOptions:
    """The script of the `mem` engine. bandwidth: bytes a second (0: as fast as memory)."""

    bandwidth: int = 0
    latency_us: float = 0.0
    reorder_seed: int | None = None


@dataclass(frozen=True, slots=True)
class NvmeOptions:
    """How the spdk engine speaks to its controller. Seconds: timeout_s for one command, admin_s for
    an admin command, open_s for the connection. hostnqn: who we say we are. dhchap_key,
    dhchap_ctrlr_key: DH-HMAC-CHAP, "DHHC-1:..."; tls_psk: "NVMeTLSkey-1:..."."""

    nsid: int = 1
    timeout_s: float = 30.0
    admin_s: float = 4.0
    open_s: float = 15.0
    hostnqn: str | None = None
    dhchap_key: str | None = None
    dhchap_ctrlr_key: str | None = None
    tls_psk: str | None = None


def file_options(kind: str, fds: Sequence[int], options: QueueOptions) -> tuple[Any, ...]:
    c_fds = ffi.new("int[]", list(fds))
    return c_options(kind, options, fds=c_fds, num_files=len(fds), flags=2 if options.workers else 0)


def c_options(kind: str, options: QueueOptions, **fields: Any) -> tuple[Any, ...]:
    name = ffi.new("char[]", kind.encode())
    made = ffi.new("glue_options *", {
        "kind": name, "queue_depth": options.queue_depth, "command_bytes": options.command_bytes,
        "max_transfers": options.max_transfers, "drain_ms": options.drain_ms,
        "in_flight_bytes": options.in_flight_bytes, **fields,
    })  # fmt: skip
    return made, name, fields  # cffi structs do not own what their pointers name


def why_no_controller(error: GlueError, nvme: NvmeOptions) -> str:
    """Why a controller could not be opened."""
    reasons = {
        errno.ETIMEDOUT: f"no connection within {nvme.open_s:g} s; a vfio-user controller serves one client",
        errno.EBUSY: "this process has the controller open already",
        errno.ENXIO: f"the controller has no active namespace {nvme.nsid}",
        errno.EMEDIUMTYPE: "the namespace is formatted with metadata, or with blocks larger than 4 KiB",
        errno.EINVAL: "SPDK cannot read the transport id, or a key",
        errno.ECHILD: "SPDK's environment does not run in this process",
    }
    return reasons.get(error.errno or 0) or f"cannot connect: {first_words()}"


def why_no_commands(error: GlueError) -> str:
    """Why a generic device could not be opened."""
    reasons = {
        errno.ENOTTY: "it is no NVMe generic device, as /dev/ng0n1 is",
        errno.EACCES: "NVMe commands are root's; on Linux 6.2 or later also of whoever may write the device",
        errno.ENXIO: "the namespace is not active",
        errno.EMEDIUMTYPE: "the namespace has metadata or blocks larger than 4 KiB, or is zoned",
        errno.ENOSYS: "the kernel has no NVMe commands through io_uring: Linux 5.19 or later has them",
    }
    return reasons.get(error.errno or 0) or why_no_uring(error) or str(error.strerror)
