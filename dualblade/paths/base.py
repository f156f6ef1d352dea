# SPDX-License-Identifier: Apache-2.0
"""One protocol for both paths: room for a tensor, and transfers to and from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dualblade.errors import CapacityError, StorageError
from dualblade.layout import PAGE
from dualblade.tensors import PathKind, TensorKey
from dualblade.trace import Trace
from dualblade.units import format_size
from spdk_glue import (
    READ,
    WRITE,
    WRITE_BACK,
    Copies,
    Event,
    FileRegion,
    Piece,
    Queue,
    Region,
    TransferError,
    TransferTimeout,
)

VERBS = {READ: "reads", WRITE: "writes", WRITE_BACK: "write-backs"}


@dataclass(frozen=True, slots=True)
class Room:
    """Contiguous space of one tensor on a path: `offset` and `nbytes` in bytes of file `file`."""

    key: TensorKey
    path: PathKind
    file: int
    offset: int
    nbytes: int


class Ticket:
    """A transfer under way for one tensor. wait() any number of times; a failure is raised each time.
    then: called once, when it was waited for and has succeeded."""

    __slots__ = ("_error", "_path", "_tag", "_then", "key", "op")

    def __init__(
        self, path: StoragePath, key: TensorKey, op: int, tag: int, then: Callable[[], None] | None = None
    ):
        self.key = key
        self.op = op
        self._path = path
        self._tag: int | None = tag
        self._error: StorageError | None = None
        self._then = then

    def done(self) -> bool:
        """wait() will not wait."""
        try:
            return self._tag is None or self._path.queue.is_done(self._tag)
        except OSError:
            return True  # the queue itself has failed, which wait() tells

    def wait(self) -> None:
        """Raises StorageError naming tensor, LBA and NVMe status."""
        if self._tag is not None:
            # Ctrl-C in here must leave the tag: a ticket with neither tag nor error means success.
            self._error = self._path.outcome(self, self._tag)
            self._tag = None
        if self._error is not None:
            raise self._error
        if self._then is not None:
            self._then()
            self._then = None


class WriteLimit:
    """How much may be written, to all paths together (--write-cap). written: bytes so far."""

    def __init__(self, limit: int):
        self.limit = limit
        self.written = 0

    @property
    def left(self) -> int:
        return self.limit - self.written

    def write(self, nbytes: int) -> None:
        """Raises CapacityError where that would be too much."""
        if nbytes > self.left:
            raise CapacityError(
                f"writing {format_size(nbytes)} of KV more would pass the limit of "
                f"{format_size(self.limit)}: {format_size(self.written)} are written",
                "raise --write-cap, or lower the context or the batch",
            )
        self.written += nbytes


class StoragePath(ABC):
    """A queue and the rooms on it."""

    kind: PathKind
    queue: Queue
    maps = False

    def __init__(self, queue: Queue, timeout_s: float):
        self.queue = queue
        self.timeout_s = timeout_s
        self.trace: Trace | None = None
        # through map(): bytes, and seconds in which attention had such a tensor before it
        self.in_place_read = self.in_place_written = 0
        self.in_place_s = 0.0
        self.wear: WriteLimit | None = None

    @property
    @abstractmethod
    def target(self) -> str:
        """What a person calls this place."""

    @abstractmethod
    def allocate(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        """Room for each (tensor, bytes), all or none. Raises CapacityError."""

    def reserve(self, wanted: Sequence[tuple[TensorKey, int]]) -> list[Room]:
        """Room that need not be backed by the medium before back(). Raises CapacityError."""
        return self.allocate(wanted)

    def back(self, room: Room) -> None:  # noqa: B027 (most media have their space from the start)
        """Before the first write to (part of) a reserved or dropped room. Raises CapacityError."""

    def drop(self, room: Room) -> bool:
        """Give back what (part of) a room takes; its bytes are gone. False where this path keeps them."""
        return False

    @abstractmethod
    def release(self, rooms: Sequence[Room]) -> None:
        """Give rooms back; their bytes are gone."""

    def map(self, room: Room) -> FileRegion:
        """A room's bytes as memory, where the path `maps`. Raises CapacityError."""
        raise NotImplementedError(f"the rooms of the {self.kind.value} path are no memory")

    @abstractmethod
    def close(self) -> int:
        """Leave nothing behind. Returns the transfers given up, whose memory must be kept."""

    def discard(self) -> None:
        """Close, and take away what opening this path had made."""
        self.close()

    def transfer(
        self,
        op: int,
        key: TensorKey,
        pieces: Sequence[Piece],
        copies: Copies | None = None,
        after: Sequence[Event] = (),
        then: Callable[[], None] | None = None,
    ) -> Ticket:
        """Start moving the pieces. copies, after: as for Queue.submit; then: as for Ticket.

        Raises StorageError where the queue itself has failed, CapacityError where `wear` allows no more
        writing.
        """
        if op == WRITE and self.wear is not None:
            self.wear.write(sum(piece.nbytes for piece in pieces))
        try:
            tag = self.queue.submit(op, pieces, self.timeout_s, copies, after)
            return Ticket(self, key, op, tag, then)
        except OSError as error:
            raise self.error_of(key, op, error) from error

    def write_back(self, key: TensorKey, pieces: Sequence[Piece]) -> list[Ticket]:
        """Begin to bring to the medium what was just written; nothing where writing does that."""
        return []

    def check_kept(self, key: TensorKey) -> None:  # noqa: B027 (a transfer past the page cache tells by itself)
        """Behind whatever was read, before it is used: is it what was written? Raises StorageError."""

    def outcome(self, ticket: Ticket, tag: int) -> StorageError | None:
        try:
            done = self.queue.wait(tag, self.timeout_s)
        except OSError as error:
            return self.error_of(ticket.key, ticket.op, error)
        if ticket.op == READ:
            try:
                self.check_kept(ticket.key)
            except StorageError as error:
                return error
        if self.trace is not None:
            self.trace.add(
                f"{self.kind.value} {VERBS[ticket.op]}", str(ticket.key), done.begun_s, done.ended_s
            )
        return None

    def wrote_in_place(self, nbytes: int) -> None:
        """Raises CapacityError where `wear` allows no more writing."""
        self.in_place_written += nbytes
        if self.wear is not None:
            self.wear.write(nbytes)

    def tune(self, queue_depth: int, command_bytes: int) -> None:
        """Commands in flight, and bytes of each at most, from now on; within the queue's limits."""
        now = self.queue.options
        if (now.queue_depth, now.command_bytes) != (queue_depth, command_bytes):
            self.queue.tune(queue_depth, command_bytes)

    def register(self, region: Region) -> int:
        return self.queue.register(region)

    def error_of(self, key: TensorKey, op: int, error: OSError) -> StorageError:
        verb = "reading" if op == READ else "writing"
        where = f"{verb} {key} on the {self.kind.value} path ({self.target})"
        if isinstance(error, TransferError):
            record = error.completion
            lba = record.offset // PAGE
            status = (
                f", NVMe status type {record.sct:#x} code {record.sc:#x}" if record.sct or record.sc else ""
            )
            return StorageError(
                f"{where} failed at LBA {lba}{status}: {error.strerror}",
                "the KV cache is incomplete, so generation stopped; check the drive, or use another --nvme",
                errno=error.errno or 5, tensor=str(key), lba=lba, sct=record.sct, sc=record.sc,
            )  # fmt: skip
        hint = (
            "the drive does not answer; see the kernel's log" if isinstance(error, TransferTimeout) else None
        )
        return StorageError(f"{where}: {error.strerror}", hint, errno=error.errno or 5, tensor=str(key))
