# SPDX-License-Identifier: Apache-2.0
"""Loads go before stores, neither starves, and a queue takes other limits while it works."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from media import array, noise

from spdk_glue import PAGE, READ, WRITE, GlueError, MemOptions, Queue, QueueOptions, Region, plain

COMMANDS = 64
SIZE = COMMANDS * PAGE
SLOW = MemOptions(latency_us=500)


def queue(depth: int, command: int = PAGE) -> Queue:
    return Queue.memory(4 * SIZE, QueueOptions(depth, command), SLOW)


def ended(queue: Queue, *transfers: tuple[int, int]) -> list[float]:
    """When each of these (op, commands) ended, submitted in this order to bytes of their own."""
    with Region(4 * SIZE) as region:
        tags, at = [], 0
        for op, commands in transfers:
            tags.append(queue.submit(op, [plain(at, region.address + at, commands * PAGE)]))
            at += commands * PAGE
        return [queue.wait(tag).ended_s for tag in tags]


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_loads_overtake_stores(depth: int) -> None:
    with queue(depth) as opened:
        store, load = ended(opened, (WRITE, COMMANDS), (READ, COMMANDS))
        assert load < store


@pytest.mark.parametrize("depth", [2, 4, 16])
def test_stores_are_not_starved(depth: int) -> None:
    with queue(depth) as opened:
        load, store = ended(opened, (READ, 3 * COMMANDS), (WRITE, COMMANDS // 8))
        assert store < load, "a share of the depth is the stores' own"


def test_a_load_waits_for_the_store_of_the_same_bytes() -> None:
    with queue(4) as opened, Region(2 * SIZE) as region:
        content = array(region)
        content[:SIZE] = noise(SIZE, 1)
        tag = opened.submit(WRITE, [plain(0, region.address, SIZE)])
        opened.run(READ, [plain(0, region.address + SIZE, SIZE)])
        assert np.array_equal(content[:SIZE], content[SIZE:])
        assert opened.wait(tag).result == SIZE


def test_limits_are_lowered_and_raised_again() -> None:
    with queue(16, 2 * PAGE) as opened, Region(SIZE) as region:
        piece = [plain(0, region.address, SIZE)]
        opened.tune(3, PAGE)
        opened.run(READ, piece)
        stats = opened.stats()
        assert (stats.commands, stats.max_in_flight) == (COMMANDS, 3)
        opened.tune(16, 2 * PAGE)
        opened.run(READ, piece)
        stats = opened.stats()
        assert (stats.commands, stats.max_in_flight) == (COMMANDS + COMMANDS // 2, 16)
        assert opened.options == opened.limits


@pytest.mark.parametrize(("depth", "command"), [(0, PAGE), (17, PAGE), (16, 4 * PAGE), (16, 100), (16, 0)])
def test_what_is_beyond_the_limits_is_refused(depth: int, command: int) -> None:
    with queue(16, 2 * PAGE) as opened:
        with pytest.raises(GlueError) as caught:
            opened.tune(depth, command)
        assert caught.value.errno == errno.EINVAL
        assert opened.options == opened.limits


def test_limits_may_change_while_transfers_are_under_way() -> None:
    with queue(16, 4 * PAGE) as opened, Region(SIZE) as region, Region(SIZE) as back:
        content = array(region)
        content[:] = noise(SIZE, 2)
        tag = opened.submit(WRITE, [plain(0, region.address, SIZE)])
        for depth, command in ((1, PAGE), (16, 4 * PAGE), (2, 3 * PAGE)):
            opened.tune(depth, command)
        opened.wait(tag)
        opened.run(READ, [plain(0, back.address, SIZE)])
        assert np.array_equal(content, array(back))
