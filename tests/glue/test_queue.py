# SPDX-License-Identifier: Apache-2.0
"""A queue's states: full, waited for, flushed, registered, closed, forgotten."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest
from leftovers import ended, tasks
from media import (
    CAPACITY,
    array,
    new_queue,
    noise,
    open_file,
    open_medium,
    python,
    read_back,
    write_bytes,
)

from spdk_glue import (
    FLUSH,
    PAGE,
    READ,
    WRITE,
    GlueError,
    MemOptions,
    Queue,
    QueueOptions,
    Region,
    TransferTimeout,
    plain,
)

SLOW = MemOptions(latency_us=20_000)
SILENT = MemOptions(latency_us=3600e6)


# full ---------------------------------------------------------------------------------------


def test_a_full_queue_says_none_and_recovers(opened, regions) -> None:
    region = regions(8 * PAGE)
    pages = [plain(n * PAGE, region.address + n * PAGE, PAGE) for n in range(8)]
    with opened(QueueOptions(max_transfers=4)) as queue:
        tags = [queue.try_submit(WRITE, [page]) for page in pages]
        assert None not in tags[:4]
        assert tags[4:] == [None] * 4
        assert queue.try_submit(WRITE, pages) is None
        queue.wait(tags[0])  # takes in every other one that is done by now, too
        assert queue.try_submit(WRITE, [pages[4]]) is not None
        assert [queue.wait(tag).result for tag in tags[1:4]] == [PAGE] * 3
        for _ in range(100):
            queue.run(READ, pages)


def test_submit_waits_for_room(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(max_transfers=2), SLOW) as queue:
        tags = [queue.submit(READ, [plain(0, region.address, PAGE)]) for _ in range(7)]
        assert len(set(tags)) == 7
        assert [queue.wait(tag).tag for tag in reversed(tags)] == tags[::-1]


def test_submit_gives_up_on_a_queue_that_stays_full(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(max_transfers=1, drain_ms=0), SILENT) as queue:
        queue.submit(READ, [plain(0, region.address, PAGE)])
        with pytest.raises(TransferTimeout, match=r"mem queue stayed full for 0\.05 s"):
            queue.submit(READ, [plain(0, region.address, PAGE)], timeout=0.05)


def test_a_small_depth_bounds_what_is_in_flight(regions) -> None:
    region = regions(CAPACITY)
    with Queue.memory(CAPACITY, QueueOptions(3, PAGE), MemOptions(latency_us=500, reorder_seed=1)) as queue:
        queue.run(WRITE, [plain(0, region.address, 64 * PAGE)])
        assert queue.stats().max_in_flight == 3


# wait ---------------------------------------------------------------------------------------


def test_is_done_and_poll(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(drain_ms=0), SILENT) as queue:
        tag = queue.submit(READ, [plain(0, region.address, PAGE)])
        queue.poll()
        assert not queue.is_done(tag)
        with pytest.raises(TransferTimeout, match=r"no answer from the mem engine for 0\.02 s"):
            queue.wait(tag, timeout=0.02)
        assert "1 under way" in repr(queue)


def test_a_timeout_loses_nothing(regions) -> None:
    """What answers late is still there for the next wait."""
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(), MemOptions(latency_us=100_000)) as queue:
        tag = queue.submit(READ, [plain(0, region.address, PAGE)])
        with pytest.raises(TransferTimeout):
            queue.wait(tag, timeout=0.001)
        assert queue.wait(tag).result == PAGE


def test_a_record_is_handed_out_once(opened, regions) -> None:
    """A tag that nothing is under way for is refused, not waited for."""
    region = regions(PAGE)
    with opened() as queue:
        tag = queue.submit(READ, [plain(0, region.address, PAGE)])
        queue.wait(tag)
        assert not queue.is_done(tag)
        for unknown in (tag, 4711):
            with pytest.raises(GlueError) as caught:
                queue.wait(unknown, timeout=5)
            assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("op", "pieces"),
    [
        (READ, []),
        (READ, [plain(0, 4096, 0)]),
        (READ, [plain(0, 4096, PAGE, file=1)]),
        (READ, [plain((1 << 63) - PAGE, 4096, 2 * PAGE)]),
        (9, [plain(0, 4096, PAGE)]),
    ],
    ids=["no pieces", "no bytes", "no such file", "past the largest offset", "no such operation"],
)
def test_what_makes_no_sense_is_refused(opened, op: int, pieces: list) -> None:
    with opened() as queue:
        with pytest.raises(GlueError) as caught:
            queue.try_submit(op, pieces)
        assert caught.value.errno == errno.EINVAL
        assert "0 under way" in repr(queue)


@pytest.mark.parametrize(
    "options",
    [
        QueueOptions(queue_depth=0),
        QueueOptions(queue_depth=5000),
        QueueOptions(command_bytes=PAGE + 1),
        QueueOptions(command_bytes=0),
        QueueOptions(max_transfers=0),
    ],
    ids=str,
)
def test_impossible_options(options: QueueOptions) -> None:
    before = tasks()
    with pytest.raises(GlueError) as caught:
        Queue.memory(CAPACITY, options)
    assert caught.value.errno == errno.EINVAL
    assert ended(before)


# flush --------------------------------------------------------------------------------------


def test_flush_waits_for_the_writes_before_it_alone(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(drain_ms=0)) as queue:
        queue.fault("hang", READ)
        queue.submit(READ, [plain(0, region.address, PAGE)])
        queue.flush()
        queue.fault("hang", WRITE)
        queue.submit(WRITE, [plain(PAGE, region.address, PAGE)])
        with pytest.raises(TransferTimeout):
            queue.flush(timeout=0.1)


@pytest.mark.needs("uring")
def test_flush_means_every_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    with (
        open_file(tmp_path / "a", flags=0) as a,
        open_file(tmp_path / "b", flags=0) as b,
        Queue.files([a, b]) as queue,
    ):
        queue.flush()
        assert queue.stats().commands == 2


def test_flush_of_a_read_only_file_that_was_never_written(tmp_path: Path) -> None:
    with open_file(tmp_path) as _:
        fd = os.open(tmp_path / "medium", os.O_RDONLY)
        with Queue.files([fd]) as queue:
            tag = queue.submit(FLUSH, [plain(0, 0, 0)])
            assert queue.wait(tag).result == 0
        os.close(fd)


# memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [0, 3 * PAGE], ids=["whole hugepages", "and some pages"])
def test_registered_memory_moves_the_same_bytes(opened, engine: str, regions, more: int) -> None:
    data = noise(CAPACITY).tobytes()
    region = regions((4 << 20) + more)
    begin = region.size - PAGE - CAPACITY  # across what is registered apart
    with opened() as queue:
        assert queue.register(region) == (0 if engine == "mem" else region.size)
        assert queue.stats().registered_bytes == (0 if engine == "mem" else 4 << 20)
        write_bytes(queue, 0, data)
        for _ in range(3):
            array(region)[:] = 0
            queue.run(READ, [plain(0, region.address + begin, CAPACITY)])
            assert bytes(region.buffer(begin, CAPACITY)) == data
            queue.unregister(region)
            assert queue.stats().registered_bytes == 0


def test_more_regions_than_the_engine_has_places_for(opened, regions) -> None:
    many = [regions(PAGE) for _ in range(70)]
    with opened() as queue:
        registered = [queue.register(region) for region in many]
        data = noise(PAGE).tobytes()
        write_bytes(queue, 0, data)
        for region in many:
            queue.run(READ, [plain(0, region.address, PAGE)])
            assert bytes(region.buffer()) == data
        if any(registered):
            assert registered[-1] == 0
            queue.unregister(many[0])
            assert queue.register(many[-1]) == PAGE


def test_registered_memory_that_went_away_catches_no_bytes(opened) -> None:
    """New memory at the address of a closed region must not be taken for it: the engine would read
    into pages that nobody sees."""
    data = noise(CAPACITY).tobytes()
    with opened() as queue:
        write_bytes(queue, 0, data)
        for _ in range(4):
            gone = Region(CAPACITY)
            queue.register(gone)
            gone.close()
            with Region(CAPACITY) as region:
                queue.run(READ, [plain(0, region.address, CAPACITY)])
                assert bytes(region.buffer()) == data


LITTLE_MEMLOCK = """
import os, resource, sys
from spdk_glue import *
resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
queue = Queue.files([{fd}])
small, large = Region(4 * PAGE, best="thp"), Region(4 << 20)
print(queue.register(small), queue.register(large))
large.buffer()[:] = b"y" * large.size
queue.run(WRITE, [plain(0, large.address, 256 * PAGE)])
queue.run(READ, [plain(PAGE, small.address, 4 * PAGE)])
assert bytes(small.buffer()) == b"y" * 4 * PAGE
queue.close()
"""


@pytest.mark.needs("uring", "o_direct")
def test_memory_beyond_the_lock_limit_works_unregistered(tmp_path: Path) -> None:
    with open_file(tmp_path) as fd:
        small, large = python(LITTLE_MEMLOCK.format(fd=fd), pass_fds=(fd,)).split()
    assert int(small) == 4 * PAGE
    assert int(large) == 0


# closed -------------------------------------------------------------------------------------


def test_a_closed_queue_refuses_everything(opened, regions) -> None:
    region = regions(PAGE)
    before = tasks()
    with opened() as queue:
        assert len(tasks() - before) == 1
        tag = queue.submit(READ, [plain(0, region.address, PAGE)])
        assert queue.close() == 0
        assert queue.closed
        assert ended(before)
        for use in (
            lambda: queue.try_submit(READ, [plain(0, region.address, PAGE)]),
            lambda: queue.submit(READ, [plain(0, region.address, PAGE)]),
            lambda: queue.wait(tag),
            lambda: queue.is_done(tag),
            queue.poll,
            queue.flush,
            queue.stats,
            lambda: queue.register(region),
            lambda: queue.fault("error", READ),
        ):
            with pytest.raises(GlueError) as caught:
                use()
            assert caught.value.errno == errno.EBADF
        assert queue.close() == 0
        assert "closed" in repr(queue)


def test_closing_waits_for_what_is_in_flight(regions) -> None:
    """Afterwards the medium touches no memory: a write is there, a read came before close()."""
    region = regions(2 * PAGE)
    with Queue.memory(CAPACITY, QueueOptions(), SLOW) as queue:
        array(region)[:PAGE] = 9
        queue.run(WRITE, [plain(0, region.address, PAGE)])
        queue.submit(READ, [plain(0, region.address + PAGE, PAGE)])
        while queue.stats().commands < 1:
            queue.poll()
        queue.submit(READ, [plain(PAGE, region.address, PAGE)])
        assert queue.close() == 0
    before = bytes(region.buffer())
    assert before[PAGE:] in (bytes(PAGE), b"\x09" * PAGE)
    assert before == bytes(region.buffer())


def test_a_forgotten_queue_ends_its_thread_and_its_descriptors(tmp_path: Path, engine: str) -> None:
    before, fds = tasks(), len(os.listdir("/proc/self/fd"))
    with open_medium(engine, tmp_path) as fd:
        queue = new_queue(engine, fd)
        assert read_back(queue, 0, PAGE) == bytes(PAGE)
        assert tasks() != before
        del queue
        gc.collect()
        assert ended(before)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_hundreds_of_queues_leave_nothing(opened, regions) -> None:
    region = regions(CAPACITY)
    before, fds = tasks(), len(os.listdir("/proc/self/fd"))
    for number in range(100):
        with opened(QueueOptions(queue_depth=2, command_bytes=PAGE)) as queue:
            for _ in range(number % 5):
                queue.submit(READ, [plain(0, region.address, CAPACITY)])
    assert ended(before)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_two_queues_on_one_file_see_each_other(tmp_path: Path, regions) -> None:
    region = regions(PAGE)
    with open_file(tmp_path) as fd, Queue.files([fd]) as one, Queue.files([fd]) as other:
        for number in range(1, 50):
            array(region)[:] = number
            one.run(WRITE, [plain(0, region.address, PAGE)])
            assert np.frombuffer(read_back(other, 0, PAGE), np.uint8).max() == number


# statistics ---------------------------------------------------------------------------------


def test_a_queue_that_is_never_idle_counts_its_busy_time(regions) -> None:
    region = regions(8 * PAGE)
    with Queue.memory(CAPACITY, QueueOptions(queue_depth=2, command_bytes=PAGE), SLOW) as queue:
        tags = [queue.submit(READ, [plain(n * PAGE, region.address + n * PAGE, PAGE)]) for n in range(8)]
        for tag in tags[:6]:
            queue.wait(tag)
        stats = queue.stats()
        for tag in tags[6:]:
            queue.wait(tag)
        ended = queue.stats()
    assert stats.read_busy_s >= 0.05, "three pairs of 20 ms each, and the fourth under way"
    assert stats.busy_s == stats.read_busy_s
    assert stats.write_busy_s == 0
    assert ended.read_busy_s > stats.read_busy_s
