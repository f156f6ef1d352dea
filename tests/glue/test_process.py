# SPDX-License-Identifier: Apache-2.0
"""A queue beside the rest of a process: its CPU time, the GIL, signals, fork."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from leftovers import tasks
from media import CAPACITY, open_file, python

from spdk_glue import PAGE, READ, MemOptions, Queue, QueueOptions, TransferTimeout, plain

HOURS = MemOptions(latency_us=3600e6)
AT_ONCE = QueueOptions(drain_ms=0)
WATCHED_S = 0.5


# the file -------------------------------------------------------------------------------------


@pytest.mark.needs("uring")
@pytest.mark.parametrize("engine", ["uring", "posix"])
def test_a_closed_queue_lets_go_of_the_file_at_once(tmp_path: Path, regions, engine: str) -> None:
    region = regions(CAPACITY)
    with open_file(tmp_path, flags=0) as fd, Queue.files([fd], engine=engine) as queue:
        fcntl.flock(fd, fcntl.LOCK_EX)
        queue.run(READ, [plain(0, region.address, CAPACITY)])
        queue.close()
    with open(tmp_path / "medium", "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


# CPU time -----------------------------------------------------------------------------------


def share_of_cpu(task: int) -> float:
    """Of one thread, while the caller sleeps."""
    schedstat = Path(f"/proc/self/task/{task}/schedstat")  # its first number: nanoseconds on a CPU
    begun = int(schedstat.read_text().split()[0])
    time.sleep(WATCHED_S)
    return (int(schedstat.read_text().split()[0]) - begun) / 1e9 / WATCHED_S


def test_an_idle_queue_takes_no_cpu(opened, regions) -> None:
    region = regions(CAPACITY)
    before = tasks()
    with opened() as queue:
        (task,) = tasks() - before
        for _ in range(20):
            queue.run(READ, [plain(0, region.address, CAPACITY)])
        assert share_of_cpu(task) < 0.05


def test_a_slow_medium_takes_no_cpu(regions) -> None:
    """The thread sleeps while commands are in flight, others wait for them, and one hangs."""
    region = regions(CAPACITY)
    before = tasks()
    with Queue.memory(CAPACITY, AT_ONCE, HOURS) as queue:
        (task,) = tasks() - before
        queue.fault("hang", READ)
        for number in range(60):
            queue.submit(number % 2, [plain(number // 4 * PAGE, region.address + number * PAGE, PAGE)])
        assert share_of_cpu(task) < 0.05


@pytest.mark.needs("uring")
def test_a_silent_descriptor_takes_no_cpu(regions) -> None:
    """A read of a pipe that nobody writes to is in flight in the kernel."""
    region = regions(PAGE)
    read_end, write_end = os.pipe()
    before = tasks()
    with Queue.files([read_end], AT_ONCE) as queue:
        (task,) = tasks() - before
        queue.submit(READ, [plain(0, region.address, PAGE)])
        assert share_of_cpu(task) < 0.05
        assert queue.close() == 1
    for fd in (read_end, write_end):
        os.close(fd)


def test_waiting_takes_no_cpu(regions) -> None:
    """Of the caller's thread, either."""
    region = regions(PAGE)
    with Queue.memory(CAPACITY, AT_ONCE, HOURS) as queue:
        tag = queue.submit(READ, [plain(0, region.address, PAGE)])
        begun = time.thread_time()
        with pytest.raises(TransferTimeout):
            queue.wait(tag, timeout=WATCHED_S)
        assert (time.thread_time() - begun) / WATCHED_S < 0.05


# the GIL ------------------------------------------------------------------------------------


class Ticker(threading.Thread):
    """Counts milliseconds while it is let."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ticks = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.001):
            self.ticks += 1

    def __enter__(self) -> Ticker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join()

    def during(self, act: Callable[[], object]) -> int:
        begun = self.ticks
        act()
        return self.ticks - begun


def test_others_run_while_one_waits(regions) -> None:
    """Nearly as often as while it sleeps, which says what this machine has to spare. A wait is cut
    into slices of 0.2 s: whoever held the GIL within them would allow six ticks."""
    region = regions(PAGE)
    with Queue.memory(CAPACITY, AT_ONCE, HOURS) as queue, Ticker() as ticker:
        tag = queue.submit(READ, [plain(0, region.address, PAGE)])

        def wait() -> None:
            with pytest.raises(TransferTimeout):
                queue.wait(tag, timeout=1.0)

        assert ticker.during(wait) > ticker.during(lambda: time.sleep(1.0)) / 5


def test_others_run_while_one_closes(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(drain_ms=1000)) as queue, Ticker() as ticker:
        queue.fault("hang", READ)
        queue.submit(READ, [plain(0, region.address, PAGE)])
        queue.run(READ, [plain(0, region.address, PAGE)])  # so the one before has begun
        closing = ticker.during(queue.close)
        assert closing > ticker.during(lambda: time.sleep(1.0)) / 5


def test_two_threads_with_a_queue_each(opened, regions) -> None:
    region = regions(2 * CAPACITY)
    failures: list[BaseException] = []

    def work(queue: Queue, address: int) -> None:
        try:
            for _ in range(100):
                queue.run(READ, [plain(0, address, CAPACITY)])
        except BaseException as error:
            failures.append(error)

    with opened() as one, Queue.memory(CAPACITY) as other:
        pairs = [(one, region.address), (other, region.address + CAPACITY)]
        threads = [threading.Thread(target=work, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


# signals ------------------------------------------------------------------------------------

CTRL_C = """
import sys
from spdk_glue import *
queue = Queue.memory(PAGE, QueueOptions(max_transfers=1, drain_ms=100))
region = Region(PAGE)
queue.fault("hang", READ)
tag = queue.submit(READ, [plain(0, region.address, PAGE)])
try:
    print("waiting", flush=True)
    {wait}
except KeyboardInterrupt:
    print("heard;", queue.close(), "given up")
    sys.exit(7)
"""


@pytest.mark.parametrize(
    "wait",
    ["queue.wait(tag, 3600)", "queue.submit(READ, [plain(0, region.address, PAGE)], 3600)"],
    ids=["wait", "submit"],
)
def test_ctrl_c_is_heard_while_the_medium_is_silent(wait: str) -> None:
    code = CTRL_C.format(wait=wait)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        child.send_signal(signal.SIGINT)
        told, _ = child.communicate(timeout=30)
    assert (told, child.returncode) == ("heard; 1 given up\n", 7)


# fork ---------------------------------------------------------------------------------------

FORK = """
import errno, gc, os
from spdk_glue import *
queue = {queue}
forgotten = Queue.memory(PAGE)
region = Region(4 << 20)
region.buffer()[:PAGE] = b"p" * PAGE
queue.register(region)
queue.run(WRITE, [plain(0, region.address, PAGE)])
child = os.fork()
if not child:
    pieces = [plain(0, region.address, PAGE)]
    for use in (lambda: queue.run(READ, pieces), queue.stats, queue.flush, queue.poll):
        try:
            use()
            os._exit(1)
        except GlueError as error:
            assert error.errno == errno.ECHILD, error
    assert queue.close() == 0 and queue.closed
    region.close()
    del queue, forgotten, use, region
    gc.collect()
    with Queue.memory(PAGE) as own, Region(PAGE) as memory:
        assert own.run(READ, [plain(0, memory.address, PAGE)]).result == PAGE
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
region.buffer()[:PAGE] = bytes(PAGE)
queue.run(READ, [plain(0, region.address, PAGE)])
assert bytes(region.buffer(0, PAGE)) == b"p" * PAGE
assert forgotten.run(READ, [plain(0, region.address, PAGE)]).result == PAGE
assert queue.close() == forgotten.close() == 0
print("parent is well")
"""


@pytest.mark.parametrize("queue", ["Queue.memory(PAGE)", "Queue.files([{fd}])"], ids=["mem", "uring"])
@pytest.mark.needs("uring", "o_direct")
def test_a_child_leaves_the_parents_queue_alone(tmp_path: Path, queue: str) -> None:
    with open_file(tmp_path) as fd:
        code = FORK.format(queue=queue.format(fd=fd))
        assert python(code, pass_fds=(fd,)) == "parent is well\n"


def test_a_process_may_end_with_everything_open() -> None:
    """It does not hang or crash, whichever object the interpreter takes down first."""
    code = """
from spdk_glue import *
region = Region(1 << 20)
queues = [Queue.memory(1 << 20, QueueOptions(drain_ms=100), MemOptions(latency_us=1000)) for _ in range(4)]
for queue in queues:
    queue.fault("hang", WRITE)
    queue.submit(WRITE, [plain(0, region.address, PAGE)])
    queue.submit(READ, [plain(PAGE, region.address, PAGE)])
view = region.buffer()
print("end")
"""
    assert python(code) == "end\n"


def test_an_abandoned_region_outlives_the_queue_that_hangs() -> None:
    code = """
from spdk_glue import *
queue = Queue.memory(1 << 20, QueueOptions(drain_ms=0), MemOptions(latency_us=50_000))
region = Region(1 << 20)
address = region.address
queue.submit(READ, [plain(0, address, PAGE)])
region.abandon()
import gc; gc.collect()
import time; time.sleep(0.1)
assert region.address == 0
import ctypes
assert ctypes.string_at(address, PAGE) == bytes(PAGE)
queue.close()
print("fine")
"""
    assert python(code) == "fine\n"
