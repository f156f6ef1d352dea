# SPDX-License-Identifier: Apache-2.0
"""SPDK's environment: one for the life of the process, with all its memory taken at the start."""

from __future__ import annotations

import errno
import re
import threading
from dataclasses import dataclass

from spdk_glue._ffi import ffi, lib
from spdk_glue.errors import GlueError, NotBuiltError, check

_LOG_BYTES = 16384
_NOISE = re.compile(r"^(?:EAL: |\[[^]]*\] )+")
# Of the socket that tells of drives plugged in; without a line's end, and of no consequence.
_SOCKET = re.compile(r"Socket recv buffer is too small [^.]*\.")
_lock = threading.Lock()
_running: Environment | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """nbytes: of memory for buffers. hugepages: it is made of reserved hugepages. pci: PCI devices
    can be used."""

    nbytes: int
    hugepages: bool
    pci: bool


def spdk_version() -> str | None:
    """SPDK's version in this build, e.g. "26.05"."""
    return ffi.string(lib.glue_spdk_version()).decode() or None


def environment() -> Environment | None:
    """The one that runs."""
    return _running


def start_environment(nbytes: int, hugepages: bool, pci: bool) -> Environment:
    """Starts it, or returns the one that runs already, which keeps what it was started with.

    Raises NotBuiltError, GlueError with SPDK's own words.
    """
    global _running
    with _lock:
        if _running is not None:
            return _running
        take_log()
        options = ffi.new("glue_env_options *", (nbytes, int(hugepages), int(pci)))
        result = lib.glue_env_start(options)
        if result == -errno.ENOTSUP:
            raise NotBuiltError("this build has no SPDK")
        if result:
            raise GlueError(-result, f"SPDK's environment does not start: {last_words()}")
        _running = Environment(nbytes, hugepages, pci)
        return _running


def take_log() -> list[str]:
    """What SPDK and DPDK have logged since the last call."""
    text = ffi.new("char[]", _LOG_BYTES)
    check(lib.glue_log_take(text, _LOG_BYTES), "read the log")
    said = _SOCKET.sub("", ffi.string(text).decode(errors="replace"))
    return [line for line in said.splitlines() if line.strip()]


def first_words(count: int = 2) -> str:
    """The first lines of the log, for the text of an error whose cause comes before what it led to."""
    return _words(slice(count))


def last_words(count: int = 2) -> str:
    """The last lines of the log, for the text of an error."""
    return _words(slice(-count, None))


def _words(which: slice) -> str:
    lines = [_NOISE.sub("", line).strip() for line in take_log()]
    return "; ".join(dict.fromkeys(lines[which])) or "SPDK gives no reason"
