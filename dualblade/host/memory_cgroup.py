# SPDX-License-Identifier: Apache-2.0
"""The files of one memory cgroup, whichever version: its limit, what is charged, who is in it."""

from __future__ import annotations

import os
import time

from dualblade.host.sysfs import Host

_PATIENCE_S = 5.0
_UNLIMITED = 1 << 62  # v1 writes "no limit" as a number beyond it
_V1 = {"limit": "limit_in_bytes", "usage": "usage_in_bytes", "peak": "max_usage_in_bytes"}
_V2 = {"limit": "max", "usage": "current", "peak": "peak"}


class MemoryCgroup:
    """directory: where it is mounted. version: 1 or 2; None looks."""

    def __init__(self, directory: str, host: Host, version: int | None = None):
        self.directory = directory
        self._host = host
        self.v1 = host.exists(f"{directory}/memory.{_V1['limit']}") if version is None else version == 1
        self._names = _V1 if self.v1 else _V2

    @property
    def limit(self) -> int | None:
        """Bytes that the kernel enforces now; None for no limit."""
        nbytes = self._number("limit")
        return nbytes if nbytes is not None and nbytes < _UNLIMITED else None

    def set(self, nbytes: int | None) -> None:
        """The limit, None for none; also while processes run in it. Raises OSError: EBUSY where they hold
        more than they can give."""
        none = "-1" if self.v1 else "max"
        self.write(self._names["limit"], none if nbytes is None else nbytes)

    @property
    def usage(self) -> int:
        """Bytes charged now; 0 where the kernel does not tell."""
        return self._number("usage") or 0

    @property
    def peak(self) -> int | None:
        """The most that was charged, bytes; None where the kernel does not tell."""
        return self._number("peak")

    def forget_peak(self) -> None:
        """Raises OSError; no v2 kernel before 6.12 can."""
        self.write(self._names["peak"], 0)

    def enter(self) -> None:
        """This process, and all that it holds from now on, is charged to it. Raises OSError."""
        self._host.write_text(f"{self.directory}/cgroup.procs", str(os.getpid()))

    def remove(self) -> None:
        """Its processes have ended; the kernel may take a moment to see that. Raises OSError."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._host.remove_cgroup(self.directory)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def write(self, name: str, value: int | str) -> None:
        """`memory.name`. Raises OSError."""
        self._host.write_text(f"{self.directory}/memory.{name}", str(value))

    def _number(self, what: str) -> int | None:
        text = self._host.attribute(f"{self.directory}/memory.{self._names[what]}")
        return int(text) if text.isdecimal() else None
