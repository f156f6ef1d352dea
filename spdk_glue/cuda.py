# SPDX-License-Identifier: Apache-2.0
"""Copies between host memory and a CUDA device, through the driver library that is found at run time."""

from __future__ import annotations

import atexit
import errno
import os
import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

from spdk_glue._ffi import ffi, lib
from spdk_glue.errors import GlueError, NotBuiltError, TransferTimeout
from spdk_glue.memory import PAGE, Region
from spdk_glue.pieces import Piece

TO_DEVICE, TO_HOST = 0, 1
CHUNK_BYTES = 1 << 30  # pinned with one call; far larger ones fail with some drivers
_NAP_S = 50e-6
_open: weakref.WeakSet[Copier] = weakref.WeakSet()


class DevicePiece(NamedTuple):
    """Where the device has what a Piece names in host memory, in bytes: run (block b, head h) begins at
    address + b * block_stride + h * head_stride."""

    address: int
    head_stride: int
    block_stride: int


class Gpu(NamedTuple):
    """integrated: its memory is the machine's. host_pointers: kernels use pinned host memory at its own
    address."""

    name: str
    integrated: bool
    host_pointers: bool


class Copies(NamedTuple):
    """What a READ copies to the device: one of `pieces` for each of the transfer's. The event is recorded
    on `stream` behind the last copy."""

    copier: Copier
    stream: int
    pieces: Sequence[DevicePiece]
    event: Event


class _Release:
    """Lets go of a handle, in the process that made it alone: CUDA does not survive a fork."""

    def __init__(self, how: Any):
        self._how = how
        self._pid = os.getpid()

    def __call__(self, handle: Any) -> None:
        if os.getpid() == self._pid:
            self._how(handle)


class Event:
    """A point of a stream. New, it is done; one that a transfer will record is not done before that."""

    def __init__(self, copier: Copier):
        error = ffi.new("int *")
        handle = lib.glue_event_new(copier.handle, error)
        _check(error[0], "make an event")
        self.copier = copier
        self.handle: Any = ffi.gc(handle, _Release(lib.glue_event_release))

    def record(self, stream: int) -> None:
        """Done when all that is on the stream by now has run. Raises GlueError."""
        _check(lib.glue_event_record(self.handle, stream), "record an event")

    def done(self) -> bool:
        """Raises GlueError where it will never be."""
        return all_done([self])

    def wait(self, timeout: float = 60.0) -> None:
        """The host waits, which nothing on the decode path may do. Raises TransferTimeout, GlueError."""
        deadline = time.monotonic() + timeout
        while not self.done():
            if time.monotonic() > deadline:
                raise TransferTimeout(errno.ETIMEDOUT, f"the device has not finished within {timeout:g} s")
            time.sleep(_NAP_S)


def all_done(events: Sequence[Event]) -> bool:
    """In one call. Raises GlueError where one of them failed."""
    handles = ffi.new("glue_event *[]", [event.handle for event in events])
    return _check(lib.glue_events_done(handles, len(events)), "query events") == len(events)


class Copier:
    """One CUDA device, and two streams: `loads` to it and `stores` from it.

    It works in the device's primary context, which torch uses too; streams are the driver's handles, as
    torch.cuda.Stream.cuda_stream has them. library: the driver's, None for libcuda.so.1.
    Raises NotBuiltError where there is no driver, GlueError.
    """

    def __init__(self, ordinal: int = 0, library: str | None = None):
        self.ordinal = ordinal
        self._pid = os.getpid()
        self.handle: Any = None
        error = ffi.new("int *")
        name = ffi.NULL if library is None else library.encode()
        handle = lib.glue_copier_open(name, ordinal, error)
        if error[0] == -errno.ENOTSUP:
            raise NotBuiltError(last_error())
        _check(error[0], f"open CUDA device {ordinal}")
        self.handle = ffi.gc(handle, _Release(_close_and_release))
        self.gpu = self._ask()
        self.loads = int(lib.glue_copier_stream(self.handle, 0))
        self.stores = int(lib.glue_copier_stream(self.handle, 1))
        self._pinned: dict[int, memoryview] = {}
        self.closed = self.at_risk = False
        _open.add(self)

    def _ask(self) -> Gpu:
        gpu = ffi.new("glue_gpu *")
        lib.glue_copier_gpu(self.handle, gpu)
        name = ffi.string(gpu.name).decode(errors="replace")
        return Gpu(name, bool(gpu.integrated), bool(gpu.host_pointers))

    # host memory ----------------------------------------------------------------------------

    def register(self, region: Region, unit: int = PAGE) -> Registration:
        """Pin the region for copies, none of which may reach over a multiple of `unit` bytes. All of it or
        nothing. Raises GlueError."""
        chunk = max(1, CHUNK_BYTES // unit) * unit
        _check(
            lib.glue_copier_register(self.handle, region.address, region.size, chunk),
            f"pin {region.size} bytes",
        )
        self._pinned[region.address] = region.buffer()  # other memory must not come to lie there
        return Registration(self, region.address)

    def unregister(self, address: int, timeout: float = 10.0) -> None:
        """Waits for the copies under way. Raises GlueError (EBUSY) where they do not end: the memory stays
        pinned and must be kept."""
        if self.closed or address not in self._pinned:
            return
        _check(lib.glue_copier_unregister(self.handle, address, int(timeout * 1000)), "unpin memory")
        del self._pinned[address]

    def device_address(self, host: int) -> int:
        """Where kernels find pinned host memory. Raises GlueError."""
        found = ffi.new("uint64_t *")
        _check(lib.glue_copier_device_address(self.handle, host, found), "map memory")
        return int(found[0])

    # copies ---------------------------------------------------------------------------------

    def copy(self, way: int, stream: int, pieces: Sequence[Piece], device: Sequence[DevicePiece]) -> None:
        """Start copying, TO_DEVICE or TO_HOST. Raises GlueError."""
        host_side = ffi.new("glue_piece[]", list(pieces))
        device_side = ffi.new("glue_device_piece[]", list(device))
        _check(
            lib.glue_copier_copy(self.handle, way, stream, host_side, device_side, len(pieces)),
            "copy to the device" if way == TO_DEVICE else "copy from the device",
        )

    def event(self) -> Event:
        return Event(self)

    def recorded(self, stream: int) -> Event:
        """A new event behind all that is on the stream."""
        event = Event(self)
        event.record(stream)
        return event

    def wait(self, stream: int, event: Event) -> None:
        """What is put on the stream from now on starts after the event; the host goes on. Raises GlueError
        (EAGAIN) for an event that a transfer has yet to record."""
        _check(lib.glue_copier_wait(self.handle, stream, event.handle), "let a stream wait")

    def error_name(self, error: int) -> str:
        return f"{ffi.string(lib.glue_copier_error_name(self.handle, error)).decode()} ({error})"

    # state ----------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """Events in use, bytes of pinned memory."""
        events, pinned = ffi.new("uint32_t *"), ffi.new("uint64_t *")
        lib.glue_copier_counts(self.handle, events, pinned)
        return int(events[0]), int(pinned[0])

    def close(self, timeout: float = 10.0) -> bool:
        """False where copies under way do not end: pinned and device memory must then be kept for ever."""
        if not self.closed and os.getpid() == self._pid:
            self.closed = True
            self.at_risk = bool(lib.glue_copier_close(self.handle, int(timeout * 1000)))
            if self.at_risk:
                _kept.extend(self._pinned.values())
            self._pinned.clear()
        return not self.at_risk

    def __enter__(self) -> Copier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else "{} events, {} bytes pinned".format(*self.counts())
        return f"<Copier {self.gpu.name}, {state}>"


class Registration:
    """Host memory that is pinned until close()."""

    def __init__(self, copier: Copier, address: int):
        self._copier = copier
        self.address = address

    def close(self) -> None:
        """Raises GlueError, see Copier.unregister()."""
        self._copier.unregister(self.address)

    def __enter__(self) -> Registration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Registration at {self.address:#x} of {self._copier}>"


def last_error() -> str:
    """What the driver answered to this thread's last call that failed."""
    return str(ffi.string(lib.glue_copier_error()).decode(errors="replace"))


def _check(result: int, doing: str) -> int:
    if result >= 0:
        return result
    reason = os.strerror(-result) if -result in (errno.EAGAIN, errno.EBUSY, errno.EINVAL) else last_error()
    raise GlueError(-result, f"{doing}: {reason}")


def _close_and_release(handle: Any) -> None:
    lib.glue_copier_close(handle, 10_000)
    lib.glue_copier_release(handle)


_kept: list[memoryview] = []  # that a device may still write to


def _close_all() -> None:
    """Before the driver shuts down: an I/O thread that lives on then meets a closed copier, no driver."""
    for copier in list(_open):
        copier.close(timeout=2.0)


atexit.register(_close_all)
