# SPDX-License-Identifier: Apache-2.0
"""What is promoted goes to the page cache from the slot where decoding has it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from random_moves import RandomMoves, move_to
from stores import Checked
from test_migration import BLOCK, CACHE, DIRECT, K0, finish, load_all, one_tensor

from dualblade.errors import StorageError
from spdk_glue import WRITE


@contextmanager
def one_at_hand() -> Iterator[tuple]:
    """The tensor is wanted in the page cache, from the slot it will be used in."""
    with one_tensor(on=DIRECT) as (checked, moves, tensor):
        moves.migrator._at_hand = checked.store.at_hand
        moves.migrator.grant = 1 << 30
        moves.migrator.want([move_to(K0, 0, 8)])
        yield checked, moves, tensor


def use(checked: Checked, moves: RandomMoves) -> None:
    """One pass, and until what it began to move is there."""
    load_all(checked)
    moves.migrator.poll()
    while (ticket := moves.migrator.under_way) is not None:
        with suppress(StorageError):
            ticket.wait()
        moves.migrator.poll()


def test_what_is_promoted_is_read_once() -> None:
    with one_at_hand() as (checked, moves, tensor):
        drive = checked.store.paths[DIRECT].queue
        for _ in range(5):
            moves.migrator.poll()
        assert drive.stats().read_bytes == 0
        use(checked, moves)
        size = 8 * tensor.layout.block_bytes
        assert moves.migrator.copied_bytes == size
        assert tensor.blocks_on(CACHE) == 8
        assert drive.stats().read_bytes == 2 * size  # K and V, which attention asked for
        checked.store.flush()
        load_all(checked)
        assert tensor.clean == set(range(8))


@pytest.mark.parametrize("change", ["crop", "flip"])
def test_rows_that_change_in_the_slot_they_are_written_from(change: str) -> None:
    with one_at_hand() as (checked, moves, tensor):
        checked.load(K0)
        moves.migrator.poll()
        assert moves.migrator._active.writing
        if change == "crop":
            checked.crop(K0, 3 * BLOCK)
            checked.append(K0, 5 * BLOCK)
        else:
            checked.flip(K0)
        moves.migrator.want([])
        finish(moves)
        assert tensor.blocks_on(CACHE) == 0
        checked.store.flush()
        load_all(checked)


def test_a_slot_is_free_again_when_writing_from_it_has_failed() -> None:
    with one_at_hand() as (checked, moves, tensor):
        moves.migrator._reserve(tensor, 0)
        room = tensor.homes[CACHE][0].room
        checked.store.paths[CACHE].queue.fault("error", WRITE, room.offset, room.offset + room.nbytes)
        use(checked, moves)
        assert "writing layer 0 K on the page-cache path" in moves.migrator.refused[CACHE]
        checked.store.flush()
        assert checked.store.pool.free == len(checked.store.pool.slots)
        assert tensor.blocks_on(CACHE) == 0
        load_all(checked)
