# SPDX-License-Identifier: Apache-2.0
"""A change of the machine in steps: told before it is made, verified after each, undone as a whole."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Step:
    """says: what it does, for the user. apply, verify: raise DualBladeError or OSError."""

    name: str
    says: str
    apply: Callable[[], None]
    verify: Callable[[], None] = _nothing


def carry_out(steps: Sequence[Step], done: Callable[[str], None], undo: Callable[[], None]) -> None:
    """Each step with its verification, then `done` with its name. After any failure, Ctrl-C among
    them, `undo`, which must cope with whatever has been done so far; then the failure goes on."""
    try:
        with _signals(_interrupt):
            for step in steps:
                step.apply()
                step.verify()
                done(step.name)
    except BaseException:
        with _signals(signal.SIG_IGN, signal.SIGINT):
            undo()
        raise


@contextmanager
def _signals(handler: Any, *more: signal.Signals) -> Iterator[None]:
    """What asks a process to end is handled so meanwhile."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGHUP, *more)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
