# SPDX-License-Identifier: Apache-2.0
"""Tensors that the page cache holds in part from the start: read in place as soon as the rest has come."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_store
from dropping import WatchedPageCache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_moves import RandomMoves
from stores import Checked, Shape, make_store
from test_migration import finish, load_all, move, real_paths

from dualblade.errors import CapacityError
from dualblade.tensors import PathKind, Placement, TensorKey

CACHE, DIRECT = PathKind.PAGE_CACHE, PathKind.DIRECT
K0 = TensorKey(0, "K")
SHAPE = Shape(layers=2, batch=2, tokens=400, capacity=400, depth=1)
pytestmark = pytest.mark.needs("o_direct", "uring")


@contextmanager
def placed(folder: Path, parts: Sequence[float], shape: Shape = SHAPE) -> Iterator[Checked]:
    """parts: of the blocks of each tensor, those that are cached."""
    store = make_store(shape, real_paths(folder))
    placements = []
    for tensor, part in zip(store.tensors.values(), parts, strict=True):
        size, cached = tensor.layout.block_bytes, int(part * tensor.whole_blocks)
        for path, blocks in ((CACHE, cached), (DIRECT, tensor.whole_blocks - cached)):
            if blocks:
                placements.append(Placement(tensor.spec.key, path, blocks * size, "a test"))
    try:
        store.place(placements)
        yield Checked(store, shape)
    finally:
        store.close()


def test_the_rest_comes_and_nothing_is_copied_any_more(tmp_path: Path) -> None:
    with placed(tmp_path, (0.4, 0, 0, 1)) as checked:
        store = checked.store
        moves, tensor = RandomMoves(store, 0, often=0.0), store.tensors[K0]
        checked.step(300)
        checked.step(1)
        store.flush()
        assert [segment.room.path for segment in tensor.segments] == [CACHE, DIRECT]
        assert tensor.mapped is None
        for cached in (tensor.blocks, 3, tensor.blocks):
            move(moves, K0, cached)
            assert (tensor.mapped is not None) is (cached == tensor.blocks)
            checked.step(1)
            store.flush()
        reads = store.paths[CACHE].queue.stats().read_bytes
        checked.step(1)
        assert store.paths[CACHE].queue.stats().read_bytes == reads
        assert moves.migrator.refused == {}


def test_every_block_can_leave(tmp_path: Path) -> None:
    """What the page cache holds at the start gets its room on the direct path, too."""
    with placed(tmp_path, (0.4, 0.9, 0, 1)) as checked:
        moves = RandomMoves(checked.store, 0, often=0.0)
        checked.step(250)
        checked.store.flush()
        for tensor in checked.store.tensors.values():
            homes = tensor.homes[DIRECT]
            assert [home.end for home in homes] == [*(home.first for home in homes[1:]), tensor.blocks]
            assert homes[0].first == 0
            move(moves, tensor.spec.key, 0)
            assert tensor.blocks_on(DIRECT) == tensor.blocks
        load_all(checked)


def test_the_part_alone_takes_disk_space(tmp_path: Path) -> None:
    with placed(tmp_path, (0.3, 0, 0, 0)) as checked:
        tensor = checked.store.tensors[K0]
        taken = sum(os.fstat(fd).st_blocks * 512 for fd in checked.store.paths[CACHE].fds)
        part = tensor.blocks_on(CACHE) * tensor.layout.block_bytes
        assert part <= taken < part + tensor.layout.block_bytes * 2


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, room: object) -> None:
        raise CapacityError("the disk is full")

    monkeypatch.setattr(WatchedPageCache, "back", full)
    with pytest.raises(CapacityError, match="the disk is full"), placed(tmp_path, (0.3, 0, 0, 0)):
        pass
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from([0, 0.2, 0.6, 0.95, 1]), min_size=6, max_size=6),
    st.lists(test_store.operations, min_size=1, max_size=12),
    st.integers(0, 999), st.sampled_from([40, 400, 1200]),
)  # fmt: skip
def test_any_moves_of_tensors_in_part(parts, steps, seed, tokens) -> None:
    """With tokens beyond what was foreseen, too."""
    with tempfile.TemporaryDirectory() as folder:
        shape = Shape(layers=3, batch=2, tokens=tokens, depth=1, capacity=tokens)
        with placed(Path(folder), parts, shape) as checked:
            moves = RandomMoves(checked.store, seed, often=0.8)
            for operation in [("step", 40), *steps]:
                test_store.carry_out(checked, operation)
            checked.store.flush()  # a tensor that attention may be reading does not move
            finish(moves)
            load_all(checked)
            assert moves.migrator.refused == {}


def test_rows_beyond_what_was_foreseen_are_not_read_in_place(tmp_path: Path) -> None:
    """All of the room is in the page cache again, and the unfinished block has none yet."""
    shape = Shape(layers=1, tokens=48, capacity=48)
    with placed(tmp_path, (0, 0), shape) as checked:
        moves, tensor = RandomMoves(checked.store, 0, often=0.0), checked.store.tensors[K0]
        checked.step(63)
        checked.store.flush()
        move(moves, K0, tensor.blocks)
        assert tensor.mapped is None
        checked.step(1)
        load_all(checked)
