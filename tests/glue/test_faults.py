# SPDX-License-Identifier: Apache-2.0
"""What a medium can do wrong, and what the caller then learns."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from leftovers import ended, tasks
from media import CAPACITY, array, noise, open_file, read_back, write_bytes

from spdk_glue import (
    PAGE,
    READ,
    WRITE,
    Completion,
    GlueError,
    MemOptions,
    Piece,
    Queue,
    QueueOptions,
    TransferError,
    TransferTimeout,
    plain,
)

PAGE_COMMANDS = QueueOptions(command_bytes=PAGE, drain_ms=200)


def failure(queue: Queue, op: int, pieces: list[Piece]) -> Completion:
    with pytest.raises(TransferError) as caught:
        queue.run(op, pieces)
    assert caught.value.errno == -caught.value.completion.result
    return caught.value.completion


# the end of the medium ----------------------------------------------------------------------


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("size", [16 * PAGE, 16 * PAGE + 100, 15 * PAGE + 512, 0])
def test_a_read_across_the_end_of_a_file_fails(
    tmp_path: Path, regions, size: int, flags: int, workers: bool
) -> None:
    region = regions(32 * PAGE)
    options = QueueOptions(command_bytes=32 * PAGE, workers=workers)
    with open_file(tmp_path, size, flags) as fd, Queue.files([fd], options) as queue:
        record = failure(queue, READ, [plain(0, region.address, 32 * PAGE)])
        assert record.result in (-errno.ENODATA, -errno.EINVAL)
        assert record.offset == size
        record = failure(queue, READ, [plain(32 * PAGE, region.address, PAGE)])
        assert record.result == -errno.ENODATA
        assert record.offset == 32 * PAGE
        if size >= 15 * PAGE:
            assert queue.run(READ, [plain(0, region.address, 15 * PAGE)]).result == 15 * PAGE


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_a_file_that_shrinks(tmp_path: Path, regions, flags: int) -> None:
    """The second read fails: the first one's bytes in memory are never taken for it."""
    region = regions(8 * PAGE)
    with open_file(tmp_path, 8 * PAGE, flags) as fd, Queue.files([fd], PAGE_COMMANDS) as queue:
        queue.run(READ, [plain(0, region.address, 8 * PAGE)])
        os.truncate(tmp_path / "medium", 5 * PAGE)
        record = failure(queue, READ, [plain(0, region.address, 8 * PAGE)])
        assert (record.result, record.offset) == (-errno.ENODATA, 5 * PAGE)


def test_past_the_end_of_a_medium_in_ram(regions) -> None:
    region = regions(2 * PAGE)
    with Queue.memory(CAPACITY) as queue:
        for op in (READ, WRITE):
            record = failure(queue, op, [plain(CAPACITY - PAGE, region.address, 2 * PAGE)])
            assert (record.result, record.offset, record.sct, record.sc) == (
                -errno.EIO,
                CAPACITY - PAGE,
                0,
                0x80,
            )
        assert read_back(queue) == bytes(CAPACITY)


@pytest.mark.needs("uring")
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_the_wrong_kind_of_descriptor(tmp_path: Path, regions, flags: int) -> None:
    region = regions(PAGE)
    with open_file(tmp_path):
        fd = os.open(tmp_path / "medium", flags)
        with Queue.files([fd]) as queue:
            wrong = WRITE if flags == os.O_RDONLY else READ
            assert failure(queue, wrong, [plain(PAGE, region.address, PAGE)]) == Completion(
                1, -errno.EBADF, PAGE
            )
            queue.run(READ + WRITE - wrong, [plain(0, region.address, PAGE)])
        os.close(fd)


@pytest.mark.needs("uring")
def test_memory_that_is_not_there(tmp_path: Path) -> None:
    """The kernel says so; nobody crashes."""
    with open_file(tmp_path, flags=0) as fd, Queue.files([fd]) as queue:
        for op in (WRITE, READ):
            assert failure(queue, op, [plain(0, PAGE, PAGE)]).result == -errno.EFAULT


# scripted faults ----------------------------------------------------------------------------


def test_the_record_names_the_command_that_failed(regions) -> None:
    region = regions(16 * PAGE)
    with Queue.memory(CAPACITY, PAGE_COMMANDS) as queue:
        queue.fault("error", READ, lo=7 * PAGE, hi=8 * PAGE, sct=2, sc=0x81)
        tag = queue.submit(
            READ, [plain(4 * PAGE, region.address, 2 * PAGE), plain(6 * PAGE, region.address, 9 * PAGE)]
        )
        with pytest.raises(TransferError, match=r"at byte 28672, NVMe status sct=0x2 sc=0x81") as caught:
            queue.wait(tag)
        assert caught.value.completion == Completion(tag, -errno.EIO, 7 * PAGE, 2, 0x81)
        assert queue.run(READ, [plain(0, region.address, 16 * PAGE)]).result == 16 * PAGE


def test_a_transfer_that_failed_starts_nothing_more(regions) -> None:
    region = regions(16 * PAGE)
    with Queue.memory(CAPACITY, QueueOptions(queue_depth=1, command_bytes=PAGE)) as queue:
        queue.fault("error", READ, lo=2 * PAGE, hi=3 * PAGE)
        assert failure(queue, READ, [plain(0, region.address, 16 * PAGE)]).offset == 2 * PAGE
        assert queue.stats().commands == 3


def test_skip_and_count(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, PAGE_COMMANDS) as queue:
        queue.fault("error", WRITE, lo=PAGE, hi=2 * PAGE, skip=2, count=3)
        seen = []
        for _ in range(8):
            queue.run(WRITE, [plain(0, region.address, PAGE)])
            tag = queue.submit(WRITE, [plain(PAGE, region.address, PAGE)])
            try:
                queue.wait(tag)
                seen.append(True)
            except TransferError:
                seen.append(False)
        assert seen == [True, True, False, False, False, True, True, True]


def test_others_are_unharmed(regions) -> None:
    """Among a hundred transfers in flight exactly the ones that were hit fail."""
    region = regions(CAPACITY)
    array(region)[:] = noise(CAPACITY)
    with Queue.memory(CAPACITY, PAGE_COMMANDS, MemOptions(latency_us=100, reorder_seed=2)) as queue:
        for page in (5, 50, 90):
            queue.fault("error", WRITE, lo=page * PAGE, hi=(page + 1) * PAGE, sc=page)
        tags = [queue.submit(WRITE, [plain(n * PAGE, region.address + n * PAGE, PAGE)]) for n in range(100)]
        failed = {}
        for tag in tags:
            try:
                queue.wait(tag)
            except TransferError as error:
                failed[error.completion.offset // PAGE] = error.completion.sc
        assert failed == {5: 5, 50: 50, 90: 90}
        written = bytearray(region.buffer(0, 100 * PAGE))
        for page in failed:
            written[page * PAGE : (page + 1) * PAGE] = bytes(PAGE)
        assert read_back(queue, 0, 100 * PAGE) == written


def test_a_torn_write_leaves_half(regions) -> None:
    region = regions(2 * PAGE)
    old, new = b"o" * 2 * PAGE, b"n" * 2 * PAGE
    with Queue.memory(CAPACITY) as queue:
        write_bytes(queue, 0, old)
        queue.fault("torn", WRITE)
        region.buffer()[:] = new
        record = failure(queue, WRITE, [plain(0, region.address, 2 * PAGE)])
        assert (record.sct, record.sc) == (2, 0x81)
        assert read_back(queue, 0, 2 * PAGE) == new[:PAGE] + old[PAGE:]


def test_only_the_mem_engine_takes_a_script(tmp_path: Path) -> None:
    with Queue.null() as queue, pytest.raises(GlueError) as caught:
        queue.fault("error", READ)
    assert caught.value.errno == errno.ENOTSUP


def test_a_script_has_an_end() -> None:
    with Queue.memory(CAPACITY) as queue:
        for _ in range(16):
            queue.fault("error", READ)
        with pytest.raises(GlueError) as caught:
            queue.fault("error", READ)
        assert caught.value.errno == errno.ENOSPC


# silence ------------------------------------------------------------------------------------


def test_a_hang_is_a_timeout_and_close_counts_it(regions) -> None:
    region = regions(8 * PAGE)
    before = tasks()
    with Queue.memory(CAPACITY, PAGE_COMMANDS) as queue:
        queue.fault("hang", WRITE, lo=PAGE, hi=2 * PAGE)
        queue.fault("hang", READ, lo=6 * PAGE, hi=7 * PAGE)
        first = queue.submit(WRITE, [plain(0, region.address, 3 * PAGE)])
        second = queue.submit(READ, [plain(5 * PAGE, region.address, 2 * PAGE)])
        never_begun = queue.submit(READ, [plain(0, region.address, PAGE)])
        assert queue.run(WRITE, [plain(4 * PAGE, region.address, PAGE)]).result == PAGE
        for tag in (first, second, never_begun):
            with pytest.raises(TransferTimeout):
                queue.wait(tag, timeout=0.05)
        begun = time.monotonic()
        assert queue.close() == 2
        assert time.monotonic() - begun >= 0.2  # drain_ms: it may still have answered
    assert ended(before)


def test_closing_at_once_gives_up_what_is_slow(regions) -> None:
    region = regions(PAGE)
    hours = MemOptions(latency_us=3600e6)
    with Queue.memory(CAPACITY, QueueOptions(queue_depth=2, drain_ms=0), hours) as queue:
        tags = [queue.submit(READ, [plain(number * PAGE, region.address, PAGE)]) for number in range(5)]
        with pytest.raises(TransferTimeout):
            queue.wait(tags[0], timeout=0.1)
        assert queue.close() == 2


def test_a_hung_command_does_not_hold_the_others(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(queue_depth=4, drain_ms=0), MemOptions(reorder_seed=1)) as queue:
        for number in range(3):
            queue.fault("hang", READ, lo=number * PAGE, hi=(number + 1) * PAGE)
            queue.submit(READ, [plain(number * PAGE, region.address, PAGE)])
        for number in range(500):
            queue.run(READ, [plain((3 + number % 100) * PAGE, region.address, PAGE)])
        assert queue.close() == 3
