# SPDX-License-Identifier: Apache-2.0
"""A transfer sees every earlier one that touches the same bytes, whatever order the medium answers in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media import CAPACITY, array, open_file, read_back

from spdk_glue import PAGE, READ, WRITE, MemOptions, Piece, Queue, QueueOptions, Region, plain

PAGES = 8
overlapping = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass(frozen=True)
class Step:
    op: int
    ranges: tuple[tuple[int, int], ...]  # pages of the medium, one piece each


ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4)).map(
    lambda at: (at[0], min(at[1], PAGES - at[0]))
)
steps = st.lists(
    st.builds(Step, st.sampled_from([READ, WRITE]), st.lists(ranges, min_size=1, max_size=2).map(tuple)),
    min_size=2,
    max_size=40,
)


def disjoint(step: Step) -> bool:
    """Pieces of one write that overlap have no order among themselves."""
    pages = [page for first, count in step.ranges for page in range(first, first + count)]
    return len(pages) == len(set(pages))


def submit(queue: Queue, step: Step, address: int) -> int:
    pieces = []
    for first, count in step.ranges:
        pieces.append(plain(first * PAGE, address, count * PAGE))
        address += count * PAGE
    return queue.submit(step.op, pieces)


def model(medium: np.ndarray, step: Step, stamp: int) -> np.ndarray:
    """What the step's memory holds in the end, a number a page; a write changes the medium."""
    pages = np.concatenate([np.arange(first, first + count) for first, count in step.ranges])
    if step.op == WRITE:
        medium[pages] = stamp
    return medium[pages].copy()


@overlapping
@given(
    steps=steps.map(lambda found: [step for step in found if disjoint(step)]),
    depth=st.integers(1, 12), command_pages=st.integers(1, 4), seed=st.integers(0, 99),
    latency=st.sampled_from([0, 30, 200]),
)  # fmt: skip
def test_everything_submitted_without_waiting(opened, steps, depth, command_pages, seed, latency) -> None:
    options = QueueOptions(depth, command_pages * PAGE, max_transfers=64)
    medium = np.zeros(PAGES, np.uint8)
    script = MemOptions(latency_us=latency, reorder_seed=seed)
    with Region(max(1, len(steps)) * 8 * PAGE) as region, opened(options, script=script) as queue:
        memory = array(region).reshape(-1, 8, PAGE)
        tags, expected = [], []
        for number, step in enumerate(steps):
            if step.op == WRITE:
                memory[number] = number + 1
            expected.append(model(medium, step, number + 1))
            tags.append(submit(queue, step, region.address + number * 8 * PAGE))
        for tag in tags:
            queue.wait(tag)
        for number, pages in enumerate(expected):
            got = memory[number, : len(pages)]
            assert (got == pages[:, None]).all(), f"step {number} of {steps}"
        left = np.frombuffer(read_back(queue, 0, PAGES * PAGE), np.uint8).reshape(PAGES, PAGE)
        assert (left == medium[:, None]).all()


def test_a_long_read_sees_each_of_the_writes_before_it(regions) -> None:
    """Strided pieces overlap, too; the medium answers the newest first."""
    region = regions(CAPACITY)
    pages = CAPACITY // PAGE
    out = regions(CAPACITY)
    with Queue.memory(CAPACITY, QueueOptions(64, PAGE), MemOptions(latency_us=2000, reorder_seed=5)) as queue:
        for stamp in (1, 2, 3):
            array(region)[:] = stamp
            tags = [queue.submit(WRITE, [plain(n * PAGE, region.address, PAGE)]) for n in range(0, pages, 3)]
            read = queue.submit(READ, [Piece(0, out.address, 16 * PAGE, PAGE, PAGE, 16, 16)])
            queue.wait(read)
            by_block = array(out).reshape(16, 16, PAGE).transpose(1, 0, 2).reshape(pages, PAGE)
            assert (by_block[::3] == stamp).all()
            for tag in tags:
                queue.wait(tag)


def test_the_medium_does_shuffle(regions) -> None:
    """Else the tests above would prove nothing."""
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(), MemOptions(latency_us=1000, reorder_seed=1)) as queue:
        tags = [queue.submit(READ, [plain(n * PAGE, region.address, PAGE)]) for n in range(30)]
        while not all(queue.is_done(tag) for tag in tags):
            pass
        order = list(queue._done)
    assert sorted(order) == tags != order


def test_reads_do_not_wait_for_reads(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(drain_ms=0)) as queue:
        queue.fault("hang", READ)
        queue.submit(READ, [plain(0, region.address, PAGE)])
        assert queue.run(READ, [plain(0, region.address, PAGE)]).result == PAGE


def test_nobody_waits_for_other_bytes(regions) -> None:
    region = regions(PAGE)
    with Queue.memory(CAPACITY, QueueOptions(queue_depth=2, drain_ms=0)) as queue:
        queue.fault("hang", WRITE)
        queue.submit(WRITE, [plain(0, region.address, PAGE)])
        blocked = queue.submit(READ, [plain(0, region.address, PAGE)])
        for number in range(1, 20):
            queue.run(WRITE, [plain(number * PAGE, region.address, PAGE)])
        assert not queue.is_done(blocked)


@pytest.mark.needs("uring")
def test_the_same_bytes_of_another_file_are_others(tmp_path: Path, regions) -> None:
    """A pipe that nobody writes to holds up its own readers alone."""
    region = regions(PAGE)
    read_end, write_end = os.pipe()
    with open_file(tmp_path) as fd, Queue.files([read_end, fd], QueueOptions(drain_ms=0)) as queue:
        queue.submit(READ, [plain(0, region.address, PAGE, 0)])
        assert queue.run(WRITE, [plain(0, region.address, PAGE, 1)]).result == PAGE
    for end in (read_end, write_end):
        os.close(end)
