# SPDX-License-Identifier: Apache-2.0
"""Loads go before stores, neither starves, and a queue takes other limits while it works."""

from __future__ import annotations

import errno
from contextlib import suppress

import numpy as np
import pytest
from media import array, noise

from spdk_glue import (
    PAGE,
    READ,
    WRITE,
    GlueError,
    MemOptions,
    Queue,
    QueueOptions,
    Region,
    TransferError,
    plain,
)

COMMANDS = 64
SIZE = COMMANDS * PAGE
SLOW = MemOptions(latency_us=500)


def queue(depth: int, command: int = PAGE, in_flight_bytes: int = 0) -> Queue:
    return Queue.memory(4 * SIZE, QueueOptions(depth, command, in_flight_bytes=in_flight_bytes), SLOW)


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


@pytest.mark.parametrize(("command", "most"), [(PAGE, 32), (2 * PAGE, 16), (8 * PAGE, 4), (SIZE, 1)])
def test_bytes_in_flight_are_bounded_too(command: int, most: int) -> None:
    """So many short commands, or so few long ones; one may go beyond, or none would ever start."""
    with queue(32, command, in_flight_bytes=32 * PAGE) as opened, Region(SIZE) as region:
        for op in (WRITE, READ):
            opened.run(op, [plain(0, region.address, SIZE)])
        assert opened.stats().max_in_flight == most


@pytest.mark.parametrize("command", [PAGE, 4 * PAGE])
def test_loads_and_stores_share_the_bytes_in_flight(command: int) -> None:
    """In either order; what both want is more than there may be."""
    with queue(64, command, in_flight_bytes=16 * PAGE) as opened:
        load, store = ended(opened, (READ, 3 * COMMANDS), (WRITE, COMMANDS // 8))
        assert store < load
        store, load = ended(opened, (WRITE, 2 * COMMANDS), (READ, COMMANDS))
        assert load < store


def test_what_a_failed_command_was_to_move_is_in_flight_no_more() -> None:
    with queue(8, PAGE, in_flight_bytes=4 * PAGE) as opened, Region(SIZE) as region:
        for kind in ("error", "torn"):
            opened.fault(kind, READ, 0, 4 * PAGE, count=8)
            with suppress(TransferError):
                opened.run(READ, [plain(0, region.address, 8 * PAGE)])
        opened.run(READ, [plain(16 * PAGE, region.address, 32 * PAGE)])
        assert opened.stats().max_in_flight == 4


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
