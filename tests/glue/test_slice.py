# SPDX-License-Identifier: Apache-2.0
"""The I/O thread asks the kernel for short slices, and for nothing else."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from typing import NamedTuple

import pytest
from leftovers import tasks

from spdk_glue import PAGE, Queue, QueueOptions

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
LAYOUT = "IIQiIQQQ"  # struct sched_attr, its first 48 bytes

pytestmark = pytest.mark.skipif(
    os.uname().machine not in SCHED_GETATTR, reason="the number of sched_getattr is not known here"
)


class Attributes(NamedTuple):
    """As sched(7) has them; runtime: the slice in nanoseconds, 0 before Linux 6.12."""

    size: int
    policy: int
    flags: int
    nice: int
    priority: int
    runtime: int
    deadline: int
    period: int


def attributes(thread: int) -> Attributes:
    number = SCHED_GETATTR[os.uname().machine]
    into = ctypes.create_string_buffer(struct.calcsize(LAYOUT))
    assert ctypes.CDLL(None).syscall(number, thread, into, len(into), 0) == 0
    return Attributes(*struct.unpack(LAYOUT, into.raw))


def of_a_queue(nice: int) -> Attributes:
    """Of its I/O thread, where whoever opens it is that nice."""
    found: list[Attributes] = []

    def open_and_look() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        before = tasks()
        with Queue.memory(PAGE, QueueOptions()):
            (thread,) = tasks() - before
            found.append(attributes(thread))

    opener = threading.Thread(target=open_and_look)
    opener.start()
    opener.join()
    return found[0]


def test_a_slice_is_short() -> None:
    usual = attributes(threading.get_native_id())
    if not usual.runtime:
        pytest.skip("slices can be chosen from Linux 6.12 on")
    mine = of_a_queue(0)
    assert mine.runtime == 100_000 < usual.runtime
    assert mine.flags & 1, "the kernel's own threads for the ring would have it, too"
    assert attributes(threading.get_native_id()) == usual


@pytest.mark.parametrize("nice", [0, 7])
def test_it_is_as_nice_as_before(nice: int) -> None:
    mine = of_a_queue(nice)
    assert (mine.policy, mine.nice) == (os.SCHED_OTHER, nice)
