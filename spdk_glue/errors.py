# SPDX-License-Identifier: Apache-2.0
"""Errors of the C border. They are OSError as well, so `errno` is always there."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field


class NotBuiltError(ImportError):
    """The compiled module, or the engine asked for, is not in this build."""


class GlueError(OSError):
    """A call into C failed; `errno` says why."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What became of one transfer.

    result: bytes moved, or -errno. offset: byte offset of the command that failed.
    sct, sc: NVMe status code type and status code where the medium gave them, else 0, 0.
    memory_at_risk: the medium may still write to the transfer's memory, which must be kept for ever.
    device_error: what the device's driver answered where a copy could not be started, else 0.
    begun_s, ended_s: when its first command was sent and its last one had completed, as time.monotonic().
    """

    tag: int
    result: int
    offset: int = 0
    sct: int = 0
    sc: int = 0
    file: int = 0
    memory_at_risk: bool = False
    begun_s: float = field(default=0.0, compare=False)
    ended_s: float = field(default=0.0, compare=False)
    device_error: int = 0


_REASONS = {
    errno.ENODATA: "end of the medium",
    errno.ETIMEDOUT: "the command took too long and was aborted",
    errno.ENOTCONN: "the controller does not answer any more",
    errno.ESTALE: "the connection was lost before the last writes were durable, or leads elsewhere now",
    errno.ENODEV: "the namespace is gone, or is another one now",
    errno.EFAULT: "the controller cannot reach this memory",
}


class TransferError(GlueError):
    """A transfer failed. `completion` is its record; reason: where it is not the errno's."""

    def __init__(self, completion: Completion, reason: str | None = None):
        code = -completion.result
        status = (
            f", NVMe status sct={completion.sct:#x} sc={completion.sc:#x}"
            if completion.sct or completion.sc
            else ""
        )
        reason = reason or _REASONS.get(code) or os.strerror(code)
        super().__init__(code, f"{reason} at byte {completion.offset}{status}")
        self.completion = completion


class TransferTimeout(GlueError, TimeoutError):
    """The medium did not answer in time; the transfer may still be under way."""


_NO_URING = {
    errno.EPERM: "io_uring is forbidden here (EPERM): seccomp profile or kernel.io_uring_disabled",
    errno.EACCES: "io_uring is forbidden here (EACCES): security module",
    errno.ENOSYS: "the kernel has no io_uring (ENOSYS): seccomp profile, or Linux before 5.1",
    errno.ENOMEM: "io_uring may not lock memory (ENOMEM): RLIMIT_MEMLOCK, on Linux before 5.12",
}


def why_no_uring(error: NotBuiltError | OSError) -> str | None:
    """`error` came of opening an io_uring. None where it says nothing against io_uring itself."""
    if isinstance(error, NotBuiltError):
        return "this build has no io_uring: liburing was not found"
    return _NO_URING.get(error.errno or 0)


def check(result: int, doing: str) -> int:
    """`result` unless it is -errno, which is raised as GlueError."""
    if result < 0:
        raise GlueError(-result, f"{doing}: {os.strerror(-result)}")
    return result
