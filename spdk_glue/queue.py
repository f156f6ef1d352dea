# SPDX-License-Identifier: Apache-2.0
"""A queue of transfers to one medium, driven by an I/O thread in C."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from spdk_glue._ffi import ffi, lib
from spdk_glue.cuda import Copier, Copies, Event, last_error
from spdk_glue.env import take_log
from spdk_glue.errors import (
    Completion,
    GlueError,
    NotBuiltError,
    TransferError,
    TransferTimeout,
    check,
    why_no_uring,
)
from spdk_glue.memory import HUGEPAGE, Region
from spdk_glue.opening import (
    MemOptions,
    NvmeOptions,
    QueueOptions,
    c_options,
    file_options,
    why_no_commands,
    why_no_controller,
)
from spdk_glue.pieces import Piece, plain
from spdk_glue.readings import Medium, QueueStats, read_medium, read_stats

READ, WRITE, TRIM, WRITE_BACK, FLUSH = 0, 1, 2, 3, 4
FileEngine = Literal["auto", "uring", "posix"]
_REGISTER, _UNREGISTER = 5, 6
_BUFFER_BYTES = 1 << 30  # the kernel's limit for one registered buffer
_FAULTS = {"error": 0, "torn": 1, "hang": 2}
_BATCH = 64
_NVME_ENGINES = ("spdk", "uring_cmd")
_SLICE_S = 0.2


class _Close:
    """Closes a queue that was forgotten, in the process that opened it alone."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    def __call__(self, queue: Any) -> None:
        if os.getpid() == self._pid:
            lib.glue_queue_close(queue)


class Queue:
    """Submit transfers, wait for them. One thread at a time may use a queue.

    A transfer starts after every earlier one that touches the same bytes, unless both read, so a
    read that follows a write sees what was written.

    reason: why `engine` is not the faster one that would otherwise be used, or None. options: in force;
    limits: as the queue was opened.
    """

    def __init__(
        self, opened: tuple[Any, ...], engine: str, options: QueueOptions, reason: str | None = None
    ):
        self.engine = engine
        self.options = options
        self.reason = reason
        self._pid = os.getpid()
        self._keep = opened
        self._num_files = int(opened[0].num_files)
        self._next_tag = 1
        self._waiting: set[int] = set()
        self._done: dict[int, Completion] = {}
        self._registered: dict[int, memoryview] = {}
        self._copier: Copier | None = None
        self._batch = ffi.new("glue_completion[]", _BATCH)
        self._queue: Any = None
        error = ffi.new("int *")
        queue = lib.glue_queue_open(opened[0], error)
        if error[0] == -errno.ENOTSUP:
            raise NotBuiltError(f"this build has no engine {engine!r} (it has: {', '.join(engines())})")
        check(error[0], f"open the {engine} engine")
        self._queue = ffi.gc(queue, _Close())
        self.options = self.limits = self._options_in_force()

    # open -----------------------------------------------------------------------------------

    @classmethod
    def files(
        cls,
        fds: Sequence[int],
        options: QueueOptions = QueueOptions(),
        engine: FileEngine = "auto",
    ) -> Queue:
        """Open files, which stay the caller's. engine: "auto" is io_uring, or threads ("posix") where
        there is none; `reason` then says why. Raises NotBuiltError, GlueError."""
        if engine != "auto":
            return cls(file_options(engine, fds, options), engine, options)
        try:
            return cls(file_options("uring", fds, options), "uring", options)
        except (NotBuiltError, GlueError) as error:
            reason = why_no_uring(error)
            if reason is None:
                raise
        return cls(file_options("posix", fds, options), "posix", options, reason)

    @classmethod
    def memory(
        cls,
        capacity: int,
        options: QueueOptions = QueueOptions(),
        script: MemOptions = MemOptions(),
    ) -> Queue:
        """A medium of `capacity` bytes in RAM, with a scripted speed and faults."""
        opened = c_options(
            "mem", options, num_files=1, capacity=capacity, bandwidth=script.bandwidth,
            latency_ns=int(script.latency_us * 1000), seed=script.reorder_seed or 0,
            flags=0 if script.reorder_seed is None else 1,
        )  # fmt: skip
        return cls(opened, "mem", options)

    @classmethod
    def nvme_generic(cls, fd: int, options: QueueOptions = QueueOptions()) -> Queue:
        """A namespace by NVMe commands through io_uring: its open generic device, such as /dev/ng0n1, which
        stays the caller's. Raises NotBuiltError, GlueError with the reason."""
        try:
            return cls(file_options("uring_cmd", [fd], options), "uring_cmd", options)
        except GlueError as error:
            raise GlueError(error.errno or errno.EIO, why_no_commands(error)) from error

    @classmethod
    def null(cls, options: QueueOptions = QueueOptions()) -> Queue:
        """Completes at once and moves nothing."""
        return cls(c_options("null", options, num_files=1), "null", options)

    @classmethod
    def nvme(
        cls,
        transport_id: str,
        options: QueueOptions = QueueOptions(),
        nvme: NvmeOptions = NvmeOptions(),
    ) -> Queue:
        """A namespace through SPDK's driver, whose environment must have been started. The transport
        id is as SPDK reads it. Raises NotBuiltError, GlueError with SPDK's own words."""
        texts = {
            name: ffi.new("char[]", text.encode())
            for name in ("hostnqn", "dhchap_key", "dhchap_ctrlr_key", "tls_psk")
            if (text := getattr(nvme, name)) is not None
        }
        opened = c_options(
            "spdk", options, num_files=1, target=ffi.new("char[]", transport_id.encode()), nsid=nvme.nsid,
            timeout_ms=int(nvme.timeout_s * 1000), admin_timeout_ms=int(nvme.admin_s * 1000),
            open_ms=int(nvme.open_s * 1000), **texts,
        )  # fmt: skip
        take_log()
        try:
            return cls(opened, "spdk", options)
        except GlueError as error:
            raise GlueError(error.errno or errno.EIO, why_no_controller(error, nvme)) from error

    # submit ---------------------------------------------------------------------------------

    def try_submit(
        self, op: int, pieces: Sequence[Piece], copies: Copies | None = None, after: Sequence[Event] = ()
    ) -> int | None:
        """The transfer's tag, or None while the queue is full. copies: of a READ, started as its bytes
        arrive; it is complete when all are started. after: it starts when these events are done.
        Raises GlueError."""
        c_pieces = ffi.new("glue_piece[]", list(pieces))
        tag = self._next_tag
        result = self._submit(op, tag, c_pieces, len(pieces), copies, after)
        if result < 0 and (copies or after) and (reason := last_error()):
            raise GlueError(-result, f"submit: {reason}")
        if not check(result, "submit"):
            return None
        self._next_tag += 1
        self._waiting.add(tag)
        return tag

    def _submit(
        self, op: int, tag: int, pieces: Any, count: int, copies: Copies | None, after: Sequence[Event]
    ) -> int:
        if copies is None and not after:
            return int(lib.glue_submit(self._open(), op, tag, pieces, count))
        self._copier = after[0].copier if copies is None else copies.copier
        wanted: Any = ffi.NULL
        if copies is not None:
            device = ffi.new("glue_device_piece[]", list(copies.pieces))
            c_copies = (copies.copier.handle, copies.stream, device, copies.event.handle)
            wanted = ffi.new("glue_copies *", c_copies)
        events = ffi.new("glue_event *[]", [event.handle for event in after])
        return int(lib.glue_submit_copied(self._open(), op, tag, pieces, count, wanted, events, len(after)))

    def submit(
        self,
        op: int,
        pieces: Sequence[Piece],
        timeout: float = 60.0,
        copies: Copies | None = None,
        after: Sequence[Event] = (),
    ) -> int:
        """The transfer's tag; waits for room. Raises GlueError, TransferTimeout."""
        deadline = time.monotonic() + timeout
        while (tag := self.try_submit(op, pieces, copies, after)) is None:
            if not self._reap(1, min(_SLICE_S, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise TransferTimeout(
                    errno.ETIMEDOUT, f"the {self.engine} queue stayed full for {timeout:g} s"
                )
        return tag

    # reap -----------------------------------------------------------------------------------

    def poll(self) -> None:
        """Take in what has completed, without waiting."""
        self._reap(0, 0.0)

    def is_done(self, tag: int) -> bool:
        if tag in self._waiting and tag not in self._done:
            self.poll()
        return tag in self._done

    def wait(self, tag: int, timeout: float = 60.0) -> Completion:
        """The transfer's record, once. Raises TransferError, TransferTimeout, GlueError."""
        self._open()
        if tag not in self._waiting:
            raise GlueError(errno.EINVAL, f"no transfer {tag} is under way")
        deadline = time.monotonic() + timeout
        while tag not in self._done:
            # In slices, so that Ctrl-C is heard while the medium is silent.
            if not self._reap(1, min(_SLICE_S, deadline - time.monotonic())) and time.monotonic() >= deadline:
                raise TransferTimeout(
                    errno.ETIMEDOUT, f"no answer from the {self.engine} engine for {timeout:g} s"
                )
        self._waiting.discard(tag)
        completion = self._done.pop(tag)
        if completion.result < 0:
            raise TransferError(completion, self._device_error(completion))
        return completion

    def _device_error(self, completion: Completion) -> str | None:
        if not completion.device_error or self._copier is None:
            return None
        return f"the device refused a copy: {self._copier.error_name(completion.device_error)}"

    def run(self, op: int, pieces: Sequence[Piece], timeout: float = 60.0) -> Completion:
        """submit() and wait()."""
        return self.wait(self.submit(op, pieces, timeout), timeout)

    def flush(self, timeout: float = 60.0) -> None:
        """Make every write submitted before this call durable, in every file."""
        self.run(FLUSH, [plain(0, 0, 0, file) for file in range(self._num_files)], timeout)

    def _reap(self, least: int, timeout: float) -> int:
        count = check(
            lib.glue_reap(self._open(), self._batch, _BATCH, least, max(0, int(timeout * 1e9))),
            f"the {self.engine} engine",
        )
        for record in self._batch[0:count]:
            self._done[record.tag] = Completion(
                record.tag, record.result, record.offset, record.sct, record.sc, record.file,
                bool(record.memory_at_risk), record.begun_ns / 1e9, record.ended_ns / 1e9,
                record.device_error,
            )  # fmt: skip
        return count

    # memory, state --------------------------------------------------------------------------

    def register(self, region: Region) -> int:
        """Bytes of the region that the engine could register; the rest works unregistered. The memory
        stays until it is unregistered or the queue is closed, also when the region is closed."""
        # Other memory at the same address would be taken for it.
        self._registered[region.address] = region.buffer()
        registered = 0
        for at, size in _buffers(region):
            registered += size * self.run(_REGISTER, [plain(0, region.address + at, size)]).result
        return registered

    def unregister(self, region: Region) -> None:
        for at, _ in _buffers(region):
            self.run(_UNREGISTER, [plain(0, region.address + at, 1)])
        self._registered.pop(region.address, None)

    def fault(
        self, kind: str, op: int, lo: int = 0, hi: int = 1 << 62, skip: int = 0, count: int = 1,
        sct: int = 2, sc: int = 0x81,
    ) -> None:  # fmt: skip
        """Script a fault of the mem engine: "error", "torn" or "hang". sct 2, sc 0x81 is NVMe's
        unrecovered read error."""
        c_fault = ffi.new("glue_fault *", (_FAULTS[kind], op, lo, hi, skip, count, sct, sc))
        check(lib.glue_queue_fault(self._open(), c_fault), "script a fault")

    def stats(self) -> QueueStats:
        return read_stats(self._open())

    def medium(self) -> Medium | None:
        """None where the engine speaks no NVMe."""
        return read_medium(self._open()) if self.engine in _NVME_ENGINES else None

    @property
    def needs_env_memory(self) -> bool:
        """Transfers use the environment's memory alone (Region(of_env=True))."""
        medium = self.medium()
        return medium is not None and not medium.any_memory

    @property
    def moves_bytes(self) -> bool:
        """What completes has been read or written."""
        return self.engine != "null"

    @property
    def polls(self) -> bool:
        """The I/O thread keeps a CPU busy while transfers are under way."""
        return self.engine == "spdk"

    def trim(self, ranges: Sequence[tuple[int, int]], timeout: float = 60.0) -> None:
        """Let the medium forget (offset, bytes), where it can."""
        if self.engine in (*_NVME_ENGINES, "mem") and ranges:
            self.run(TRIM, [plain(offset, 0, nbytes) for offset, nbytes in ranges], timeout)

    def _options_in_force(self) -> QueueOptions:
        depth, command = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        lib.glue_queue_options(self._queue, depth, command)
        return replace(self.options, queue_depth=int(depth[0]), command_bytes=int(command[0]))

    def tune(self, queue_depth: int, command_bytes: int) -> None:
        """Keep so many commands in flight, of at most so many bytes, from now on; at most `limits`. Raises
        GlueError (EINVAL)."""
        check(lib.glue_queue_tune(self._open(), queue_depth, command_bytes), "tune the queue")
        self.options = self._options_in_force()

    @property
    def closed(self) -> bool:
        return self._queue is None

    def _open(self) -> Any:
        if self._queue is None:
            raise GlueError(errno.EBADF, f"the {self.engine} queue is closed")
        if os.getpid() != self._pid:
            raise GlueError(errno.ECHILD, f"the {self.engine} queue belongs to the process that opened it")
        return self._queue

    def close(self) -> int:
        """Transfers given up: the medium may still write to their memory, so keep it."""
        queue, self._queue = self._queue, None
        if queue is None or os.getpid() != self._pid:
            return 0
        ffi.gc(queue, None)
        given_up = int(lib.glue_queue_close(queue))
        self._registered.clear()
        return given_up

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = (
            "closed" if self.closed else f"depth {self.options.queue_depth}, {len(self._waiting)} under way"
        )
        return f"<Queue {self.engine}, {state}>"


def _buffers(region: Region) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of the buffers that a region is registered as.

    Linux keeps a buffer in pages of 2 MiB if it has no others (seen on 6.18), else all of it in pages of
    4 KiB: then neighbouring commands become too many segments to go to the drive as one. So what is behind
    the last 2 MiB is a buffer by itself.
    """
    whole = region.size - region.size % HUGEPAGE
    for at in range(0, whole, _BUFFER_BYTES):
        yield at, min(_BUFFER_BYTES, whole - at)
    if whole < region.size:
        yield whole, region.size - whole


def engines() -> list[str]:
    """The engines of this build."""
    return ffi.string(lib.glue_engines()).decode().split()
