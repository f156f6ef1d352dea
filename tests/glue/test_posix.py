# SPDX-License-Identifier: Apache-2.0
"""The posix engine: the suites of every engine, and what is its own: threads, descriptors, choice."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from leftovers import ended, tasks
from media import CAPACITY, array, noise, open_file, python, read_back, write_bytes
from test_faults import failure
from test_order import test_everything_submitted_without_waiting  # noqa: F401
from test_process import test_two_threads_with_a_queue_each  # noqa: F401
from test_queue import (  # noqa: F401
    test_a_full_queue_says_none_and_recovers,
    test_a_record_is_handed_out_once,
    test_what_makes_no_sense_is_refused,
)
from test_same_bytes import (  # noqa: F401
    test_more_segments_than_the_kernel_takes,
    test_strided_pieces,
    test_thousands_of_small_transfers,
)

from spdk_glue import (
    PAGE,
    READ,
    WRITE,
    Completion,
    GlueError,
    Piece,
    Queue,
    QueueOptions,
    TransferTimeout,
    engines,
    plain,
)

BUFFERED_OR_DIRECT = pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
FORBID = str(Path(__file__).parents[1] / "forbid_uring.py")

pytestmark = pytest.mark.needs("o_direct")


def posix(*fds: int, **options: int) -> Queue:
    return Queue.files(fds, QueueOptions(**options), engine="posix")


@contextmanager
def open_queue(
    folder: Path,
    flags: int,
    options: QueueOptions = QueueOptions(),
    capacity: int = CAPACITY,
    script: object = None,
) -> Iterator[Queue]:
    with open_file(folder, capacity, flags) as fd, Queue.files([fd], options, engine="posix") as queue:
        yield queue


@pytest.fixture(params=[os.O_DIRECT, 0], ids=["posix", "posix-buffered"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., AbstractContextManager[Queue]]:
    """In place of the fixture of the same name, for the suites named above."""
    return partial(open_queue, tmp_path, request.param)


# bytes --------------------------------------------------------------------------------------


@BUFFERED_OR_DIRECT
def test_every_engine_reads_what_it_wrote(tmp_path: Path, regions, flags: int) -> None:
    data = noise(CAPACITY).tobytes()
    strided = Piece(PAGE, 0, 64 * PAGE, 4 * PAGE, 3 * PAGE, 4, 16)
    seen = []
    with open_file(tmp_path, flags=flags) as fd, posix(fd, command_bytes=5 * PAGE) as queue:
        write_bytes(queue, 0, data)
        queue.flush()
        assert (tmp_path / "medium").read_bytes() == data
        with Queue.files([fd]) as other, Queue.memory(CAPACITY) as memory:
            write_bytes(memory, 0, data)
            for each in (queue, other, memory):
                region = regions(CAPACITY)
                each.run(READ, [strided._replace(address=region.address)])
                seen.append(bytes(region.buffer()))
    assert seen[0] == seen[1] == seen[2] != bytes(CAPACITY)


def test_several_files(tmp_path: Path, regions) -> None:
    region = regions(3 * PAGE)
    array(region)[:] = noise(region.size)
    for name in "abc":
        (tmp_path / name).mkdir()
    with (
        open_file(tmp_path / "a") as a,
        open_file(tmp_path / "b", flags=0) as b,
        open_file(tmp_path / "c") as c,
        posix(a, b, c) as queue,
    ):
        queue.run(WRITE, [plain(PAGE, region.address + n * PAGE, PAGE, n) for n in range(3)])
        queue.flush()
        assert queue.stats().commands == 6
    for number, name in enumerate("abc"):
        data = (tmp_path / name / "medium").read_bytes()
        assert data[PAGE : 2 * PAGE] == bytes(region.buffer(number * PAGE, PAGE))


@pytest.mark.parametrize("workers", [False, True])
@BUFFERED_OR_DIRECT
@pytest.mark.parametrize("size", [16 * PAGE, 16 * PAGE + 100, 15 * PAGE + 512, 0])
def test_a_read_across_the_end_of_a_file_fails(
    tmp_path: Path, regions, size: int, flags: int, workers: bool
) -> None:
    """Also where the file ends within a command, whose first part then comes back short."""
    region = regions(32 * PAGE)
    with open_file(tmp_path, size, flags) as fd, posix(fd, command_bytes=3 * PAGE, workers=workers) as queue:
        record = failure(queue, READ, [plain(0, region.address, 32 * PAGE)])
        assert record.result in (-errno.ENODATA, -errno.EINVAL)
        assert record.offset >= size // (3 * PAGE) * (3 * PAGE)
        record = failure(queue, READ, [plain(32 * PAGE, region.address, PAGE)])
        assert (record.result, record.offset) == (-errno.ENODATA, 32 * PAGE)
        if size >= 15 * PAGE:
            assert queue.run(READ, [plain(0, region.address, 15 * PAGE)]).result == 15 * PAGE


def test_what_the_kernel_refuses_is_the_transfers_error(tmp_path: Path, regions) -> None:
    region = regions(PAGE)
    with open_file(tmp_path, flags=0):
        fd = os.open(tmp_path / "medium", os.O_RDONLY)
        with posix(fd) as queue:
            wrong = failure(queue, WRITE, [plain(PAGE, region.address, PAGE)])
            assert wrong == Completion(1, -errno.EBADF, PAGE)
            assert failure(queue, READ, [plain(0, PAGE, PAGE)]).result == -errno.EFAULT
            assert queue.run(READ, [plain(0, region.address, PAGE)]).result == PAGE
            queue.flush()
        os.close(fd)


def test_a_full_disk(regions) -> None:
    region = regions(PAGE)
    fd = os.open("/dev/full", os.O_RDWR)
    with posix(fd) as queue:
        assert failure(queue, WRITE, [plain(0, region.address, PAGE)]).result == -errno.ENOSPC
    os.close(fd)


# threads ------------------------------------------------------------------------------------


def cpu_ns(threads: set[int]) -> list[int]:
    return [int(Path(f"/proc/self/task/{task}/schedstat").read_text().split()[0]) for task in threads]


def endless(queue: Queue, address: int, mib: int) -> int:
    """A read of so many MiB of zeros into the same MiB: a medium that takes its time."""
    return queue.submit(READ, [Piece(0, address, 0, 0, 1 << 20, mib)])


@pytest.fixture
def zeros() -> Iterator[int]:
    fd = os.open("/dev/zero", os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("depth", "workers", "threads"), [(1, False, 1), (5, False, 5), (64, False, 16), (64, True, 4)]
)
def test_its_threads_end_with_it(zeros: int, depth: int, workers: bool, threads: int) -> None:
    before, fds = tasks(), len(os.listdir("/proc/self/fd"))
    with posix(zeros, queue_depth=depth, workers=workers):
        assert len(tasks() - before) == 1 + threads
    assert ended(before)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_no_thread_spins(opened, regions) -> None:
    region = regions(CAPACITY)
    before = tasks()
    with opened() as queue:
        for _ in range(20):
            queue.run(READ, [plain(0, region.address, CAPACITY)])
        threads = tasks() - before
        begun = cpu_ns(threads)
        time.sleep(0.5)
        spent = [now - then for now, then in zip(cpu_ns(threads), begun, strict=True)]
    assert max(spent) < 0.02e9, spent


def test_copies_are_made_side_by_side(zeros: int, regions) -> None:
    region = regions(1 << 20)
    before = tasks()
    with posix(zeros, queue_depth=16, workers=True) as queue:
        queue.wait(endless(queue, region.address, 4096))
        busy = [spent for spent in cpu_ns(tasks() - before) if spent > 0.01e9]
        assert queue.stats().max_in_flight == 16
    assert len(busy) > 1


def test_a_timeout_loses_nothing(zeros: int, regions) -> None:
    region = regions(1 << 20)
    with posix(zeros, queue_depth=2) as queue:
        tag = endless(queue, region.address, 8192)
        with pytest.raises(TransferTimeout):
            queue.wait(tag, timeout=0.001)
        assert queue.wait(tag).result == 8192 << 20


@pytest.mark.parametrize("drain_ms", [0, 10_000])
def test_nothing_moves_after_closing(zeros: int, regions, drain_ms: int) -> None:
    """Commands are in flight, more wait for a thread, others are not even cut."""
    region = regions(1 << 20)
    before = tasks()
    queue = posix(zeros, queue_depth=64, drain_ms=drain_ms)
    for _ in range(3):
        endless(queue, region.address, 1 << 16)
    while not queue.stats().commands:
        queue.poll()
    assert queue.close() <= (0 if drain_ms else 3)
    assert ended(before)
    array(region)[:] = 7
    time.sleep(0.05)
    assert (array(region) == 7).all()


# descriptors --------------------------------------------------------------------------------


def test_a_descriptor_that_the_caller_closes_stays_this_file(tmp_path: Path, regions) -> None:
    region = regions(PAGE)
    array(region)[:] = noise(PAGE)
    with open_file(tmp_path, flags=0) as fd:
        mine = os.dup(fd)
        with posix(mine) as queue:
            os.close(mine)
            assert os.open("/dev/full", os.O_RDWR) == mine
            queue.run(WRITE, [plain(0, region.address, PAGE)])
            assert read_back(queue, 0, PAGE) == bytes(region.buffer())
        os.close(mine)
    assert (tmp_path / "medium").read_bytes()[:PAGE] == bytes(region.buffer())


@pytest.mark.parametrize("engine", ["posix", "auto"])
def test_descriptors_that_are_none(engine: str) -> None:
    for fds, code in (([9999], errno.EBADF), ([], errno.EINVAL)):
        with pytest.raises(GlueError) as caught:
            Queue.files(fds, engine=engine)
        assert caught.value.errno == code


# choice -------------------------------------------------------------------------------------

CHOOSE = """
import errno, sys
from spdk_glue import *
with open(sys.argv[1], "r+b") as file:
    fd = file.fileno()
    with Queue.files([fd]) as queue, Region(PAGE) as region:
        region.buffer()[:] = b"x" * PAGE
        queue.run(WRITE, [plain(PAGE, region.address, PAGE)])
        queue.flush()
        print(queue.engine)
        print(queue.reason)
    try:
        Queue.files([fd], engine="uring").close()
    except GlueError as error:
        print(errno.errorcode[error.errno])
"""


def under(code: str, *words: object) -> str:
    """stdout of CHOOSE where io_uring's calls are answered with an error."""
    program = [sys.executable, "-c", CHOOSE, *map(str, words)]
    return python(f"import os; os.execv({sys.executable!r}, {[sys.executable, FORBID, code, *program]})")


def test_by_name_it_needs_no_reason(zeros: int) -> None:
    assert "posix" in engines()
    with posix(zeros) as queue:
        assert (queue.engine, queue.reason) == ("posix", None)
        assert repr(queue) == "<Queue posix, depth 32, 0 under way>"


@pytest.mark.needs("uring")
def test_where_there_is_a_choice_it_is_io_uring(zeros: int) -> None:
    with Queue.files([zeros]) as queue:
        assert (queue.engine, queue.reason) == ("uring", None)


@pytest.mark.needs("uring", "seccomp")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("EPERM", "io_uring is forbidden here (EPERM): seccomp profile or kernel.io_uring_disabled"),
        ("ENOSYS", "the kernel has no io_uring (ENOSYS): seccomp profile, or Linux before 5.1"),
        ("ENOMEM", "io_uring may not lock memory (ENOMEM): RLIMIT_MEMLOCK, on Linux before 5.12"),
    ],
)
def test_where_io_uring_is_refused(tmp_path: Path, code: str, reason: str) -> None:
    """And whoever asks for io_uring by name gets the error."""
    file = tmp_path / "medium"
    file.write_bytes(bytes(2 * PAGE))
    assert under(code, file).splitlines() == ["posix", reason, code]
    assert file.read_bytes() == bytes(PAGE) + b"x" * PAGE


def test_rows_of_numbers_survive_the_round_trip(tmp_path: Path, regions) -> None:
    """Head-major in memory, block-major on the medium: what a KV tensor does, seen as numpy sees it."""
    region = regions(CAPACITY)
    heads, blocks, run = 4, 8, 2 * PAGE
    rows = array(region)[: heads * blocks * run].reshape(heads, blocks, run)
    rows[:] = noise(rows.size).reshape(rows.shape)
    with open_file(tmp_path) as fd, posix(fd, command_bytes=3 * PAGE) as queue:
        queue.run(WRITE, [Piece(0, region.address, blocks * run, run, run, heads, blocks)])
        stored = np.frombuffer(read_back(queue, 0, rows.size), np.uint8).reshape(blocks, heads, run)
    assert np.array_equal(stored.transpose(1, 0, 2), rows)
