# SPDX-License-Identifier: Apache-2.0
"""What a queue has done so far, and what the namespace behind it says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spdk_glue._ffi import ffi, lib
from spdk_glue.errors import check

_TEXTS = ("transport", "serial", "model", "firmware", "uuid")


@dataclass(frozen=True, slots=True)
class QueueStats:
    """busy_s: seconds with a command in flight; read_busy_s, write_busy_s: with one of that kind."""

    commands: int
    read_bytes: int
    write_bytes: int
    busy_s: float
    read_busy_s: float
    write_busy_s: float
    max_in_flight: int
    registered_bytes: int
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Medium:
    """What an NVMe namespace says of itself. volatile_cache: writes are durable only after a flush.
    recoveries: times its connection or controller was brought back."""

    nbytes: int
    lba_bytes: int
    max_command_bytes: int
    volatile_cache: bool
    can_trim: bool
    any_memory: bool
    recoveries: int
    transport: str
    serial: str
    model: str
    firmware: str
    uuid: str


def read_stats(queue: Any) -> QueueStats:
    """queue: the C engine's."""
    c_stats = ffi.new("glue_stats *")
    lib.glue_queue_stats(queue, c_stats)
    return QueueStats(
        c_stats.commands, c_stats.read_bytes, c_stats.write_bytes, c_stats.busy_ns / 1e9,
        c_stats.read_busy_ns / 1e9, c_stats.write_busy_ns / 1e9, c_stats.max_in_flight,
        c_stats.registered << 20, c_stats.cpu_ns / 1e9,
    )  # fmt: skip


def read_medium(queue: Any) -> Medium:
    """queue: the C engine's, of an engine that speaks NVMe. Raises GlueError."""
    c_medium = ffi.new("glue_medium *")
    check(lib.glue_queue_medium(queue, c_medium), "ask the controller")
    texts = [ffi.string(getattr(c_medium, name)).decode(errors="replace") for name in _TEXTS]
    return Medium(
        c_medium.bytes, c_medium.lba_bytes, c_medium.max_command_bytes, bool(c_medium.volatile_cache),
        bool(c_medium.can_trim), bool(c_medium.any_memory), c_medium.recoveries, *texts,
    )  # fmt: skip
