# SPDX-License-Identifier: Apache-2.0
"""Blocks that change paths while the store is used: every row stays what it was, whatever fails or
changes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_store
import test_streamed_store
from dropping import DroppingPath, WatchedPageCache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_moves import RandomMoves, move_to
from stores import Checked, MemPath, Shape, make_store
from test_streamed_store import Streamed, shape_of

from dualblade.errors import CapacityError, StorageError
from dualblade.paths.base import StoragePath, WriteLimit
from dualblade.paths.direct import DirectPath
from dualblade.targets import open_target, open_volume
from dualblade.tensors import PathKind, Placement, TensorKey
from dualblade.units import MIB
from spdk_glue import PAGE, READ, WRITE, MemOptions, QueueOptions, cached_bytes

CACHE, DIRECT = PathKind.PAGE_CACHE, PathKind.DIRECT
K0 = TensorKey(0, "K")
BLOCK = 16  # tokens of the default shape
OPTIONS = QueueOptions(command_bytes=PAGE, drain_ms=100)
NO_CHECKS = list(HealthCheck)


def two_paths(script: MemOptions = MemOptions(latency_us=20, reorder_seed=3)) -> dict:
    return {CACHE: DroppingPath(OPTIONS, script), DIRECT: MemPath(OPTIONS, script)}


@contextmanager
def store_with(shape: Shape, paths: dict, placed: bool = True) -> Iterator[Checked]:
    checked = Checked(make_store(shape, paths, placed), shape)
    try:
        yield checked
    finally:
        checked.store.close()


def finish(moves: RandomMoves) -> None:
    """Until nothing more moves."""
    moves.migrator._at_hand = None  # nothing is used meanwhile
    moves.migrator.grant = 1 << 40
    while not moves.migrator.idle or moves.migrator._leftovers:
        moves.migrator.poll()


def move(moves: RandomMoves, key: TensorKey, cached: int) -> None:
    now = moves.tensors[key].blocks_on(CACHE)
    moves.migrator.want([move_to(key, now, cached)])
    finish(moves)


def load_all(checked: Checked) -> None:
    for key in checked.rows:
        checked.load(key)


# at random ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=NO_CHECKS)
@given(
    test_store.shapes, test_store.queues, test_store.scripts, st.booleans(),
    st.lists(test_store.operations, min_size=1, max_size=12), st.integers(0, 999),
)  # fmt: skip
def test_any_moves_between_any_operations(shape, options, script, placed, steps, seed) -> None:
    paths = {CACHE: DroppingPath(options, script), DIRECT: MemPath(options, script)}
    with store_with(shape, paths, placed) as checked:
        moves = RandomMoves(checked.store, seed)
        for operation in steps:
            test_store.carry_out(checked, operation)
        for key in reversed(checked.rows):
            checked.load(key)
        finish(moves)
        load_all(checked)
        assert moves.migrator.refused == {}


@settings(max_examples=30, deadline=None, suppress_health_check=NO_CHECKS)
@given(
    st.lists(test_streamed_store.OPERATIONS, min_size=1, max_size=12),
    st.sampled_from([2, 4, 6, 10]), st.sampled_from([1, 3]), st.integers(0, 999),
)  # fmt: skip
def test_any_moves_of_a_streamed_store(steps, slots, batch, seed) -> None:
    script = MemOptions(latency_us=200, reorder_seed=seed)
    paths = {CACHE: DroppingPath(OPTIONS, script), DIRECT: MemPath(OPTIONS, script)}
    streamed = Streamed(shape_of(batch=batch, spare=slots, checksum=True), paths, seed)
    try:
        moves = RandomMoves(streamed.store, seed)
        for operation in steps:
            test_streamed_store.carry_out(streamed, operation)
        finish(moves)
        for layer in range(streamed.shape.layers):
            streamed.check(layer)
        assert moves.migrator.refused == {}
    finally:
        streamed.store.close()


@pytest.mark.needs("o_direct", "uring")
@pytest.mark.parametrize("seed", range(3))
def test_on_real_files(direct_dir: Path, seed: int) -> None:
    """A page cache that is punched, and a target past it; both ways, and with changes on the way."""
    with real_store(direct_dir, Shape(layers=3, batch=2, tokens=900, depth=2, capacity=900)) as checked:
        moves = RandomMoves(checked.store, seed)
        for count in (300, 1, 1, 130, 1, 16, 16):
            checked.step(count)
        for layer in (2, 0, 1):
            checked.append(TensorKey(layer, "K"), 33)
            checked.flip(TensorKey(layer, "V"))
            checked.crop(TensorKey(layer, "K"), 237)
        for _ in range(20):
            checked.step(7)
        load_all(checked)
        assert moves.migrator.refused == {}
        assert moves.migrator.copied_bytes > MIB
        assert checked.store.paths[CACHE].dropped_bytes > MIB
        assert any({(key, True), (key, False)} <= moves.in_place for key in checked.rows)
    assert list(direct_dir.iterdir()) == []


def real_paths(folder: Path) -> dict[PathKind, StoragePath]:
    cache = WatchedPageCache(folder)
    cache.watch()
    target = open_target(None, capacity=64 * MIB, cache_dir=folder)
    return {CACHE: cache, DIRECT: DirectPath(target, open_volume(target))}


@contextmanager
def real_store(folder: Path, shape: Shape) -> Iterator[Checked]:
    with store_with(shape, real_paths(folder)) as checked:
        yield checked


@settings(max_examples=40, deadline=None, suppress_health_check=NO_CHECKS)
@given(
    st.integers(2, 4), st.sampled_from([2, 3, 4, 6, 8]),
    st.lists(test_store.operations, min_size=1, max_size=14),
    st.integers(0, 999), st.sampled_from([16, 400, 2000]),
)  # fmt: skip
@pytest.mark.needs("o_direct", "uring")
def test_any_moves_of_tensors_that_are_read_in_place(layers, slots, steps, seed, tokens) -> None:
    """With tokens beyond what was foreseen, too, for which a tensor is taken apart; with three slots for
    layers that come to read two tensors, too."""
    with tempfile.TemporaryDirectory() as folder:
        depth = (slots - 1) // 2
        spare = slots - 2 * (depth + 1)
        shape = Shape(layers=layers, batch=2, tokens=tokens, depth=depth, spare=spare, capacity=tokens)
        with real_store(Path(folder), shape) as checked:
            moves = RandomMoves(checked.store, seed, often=0.8)
            for operation in [("step", 40), *steps]:
                test_store.carry_out(checked, operation)
            load_all(checked)
            assert moves.migrator.refused == {}


# one move -----------------------------------------------------------------------------------


@contextmanager
def one_tensor(written: int = 8, blocks: int = 8, on: PathKind = CACHE) -> Iterator[tuple]:
    """A store with one K, and one V that is in the way of nothing."""
    shape = Shape(layers=1, tokens=blocks * BLOCK, capacity=blocks * BLOCK, tail_bytes=0)
    paths = two_paths()
    store = make_store(shape, paths)
    store.place(
        [
            Placement(spec.key, on, blocks * store.tensors[spec.key].layout.block_bytes, "")
            for spec in shape.specs
        ]
    )
    checked = Checked(store, shape)
    moves = RandomMoves(store, 0, often=0.0)
    if written:
        checked.step(written * BLOCK)
        store.flush()
    yield checked, moves, store.tensors[K0]
    store.close()


def test_there_and_back() -> None:
    """Both ways; the way back again copies nothing, since the direct path kept its copy."""
    with one_tensor() as (checked, moves, tensor):
        size = 8 * tensor.layout.block_bytes
        move(moves, K0, 0)
        assert tensor.blocks_on(DIRECT) == 8
        assert moves.migrator.copied_bytes == size
        assert checked.store.paths[CACHE].dropped_bytes == size
        checked.load(K0)
        move(moves, K0, 8)
        assert tensor.blocks_on(CACHE) == 8
        assert moves.migrator.copied_bytes == 2 * size
        checked.store.flush()
        checked.load(K0)
        move(moves, K0, 3)
        assert moves.migrator.copied_bytes == 2 * size
        assert [segment.room.path for segment in tensor.segments] == [CACHE, DIRECT]
        checked.store.flush()
        load_all(checked)


def test_a_copy_of_changed_rows_is_no_copy() -> None:
    with one_tensor(on=DIRECT) as (checked, moves, tensor):
        move(moves, K0, 8)
        assert tensor.clean == set(range(8))
        checked.crop(K0, 5 * BLOCK + 3)
        assert tensor.clean == set(range(5))
        checked.append(K0, BLOCK)
        before = moves.migrator.copied_bytes
        move(moves, K0, 0)
        assert moves.migrator.copied_bytes - before == tensor.layout.block_bytes
        checked.store.flush()
        checked.load(K0)
        move(moves, K0, 6)
        checked.flip(K0)
        assert tensor.clean == set()
        checked.store.flush()
        move(moves, K0, 0)
        checked.load(K0)


def test_blocks_without_rows_change_paths_without_a_copy() -> None:
    with one_tensor(written=2) as (checked, moves, tensor):
        move(moves, K0, 2)
        assert moves.migrator.copied_bytes == 0
        checked.append(K0, 6 * BLOCK)
        checked.store.flush()
        checked.load(K0)
        assert tensor.blocks_on(DIRECT) == 6


@pytest.mark.parametrize("change", ["crop", "flip", "reset"])
@pytest.mark.parametrize("stage", ["reading", "writing"])
def test_rows_that_change_on_the_way(change: str, stage: str) -> None:
    """The chunk that was under way is dropped, and nothing of it is served."""
    with one_tensor() as (checked, moves, tensor):
        moves.migrator.grant = 1 << 30
        moves.migrator.want([move_to(K0, 8, 0)])
        moves.migrator.poll()
        while stage == "writing" and not moves.migrator._active.writing:
            moves.migrator.poll()
        if change == "crop":
            checked.crop(K0, 3 * BLOCK)
            checked.append(K0, 5 * BLOCK)
        elif change == "flip":
            checked.flip(K0)
        else:
            checked.reset()
            checked.append(K0, 8 * BLOCK)
        chunk = moves.migrator._active
        moves.migrator.want([])
        finish(moves)
        assert chunk is None or tensor.blocks_on(DIRECT) == 0
        checked.store.flush()
        load_all(checked)


def test_a_move_that_is_taken_back_writes_nothing() -> None:
    with one_tensor() as (checked, moves, tensor):
        moves.migrator.grant = 0
        moves.migrator.want([move_to(K0, 8, 0)])
        moves.migrator.poll()
        moves.migrator.want([])
        finish(moves)
        assert moves.migrator.copied_bytes == 0
        assert checked.store.paths[DIRECT].queue.stats().write_bytes == 0
        assert tensor.blocks_on(CACHE) == 8


def test_what_is_granted_bounds_what_is_copied() -> None:
    with one_tensor(written=64, blocks=64) as (checked, moves, tensor):
        moves.migrator.region.close()
        moves.migrator.region = type(moves.migrator.region)(2 * tensor.layout.block_bytes)
        for passes in range(1, 6):
            moves.migrator.want([move_to(K0, tensor.blocks_on(CACHE), 0)])
            moves.migrator.grant = 3 * tensor.layout.block_bytes
            for _ in range(1000):
                moves.migrator.poll()
                if moves.migrator._active is not None:
                    moves.migrator._active.ticket.wait()
            assert tensor.blocks_on(DIRECT) == 4 * passes  # whole chunks
        load_all(checked)


# errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error", "torn"])
@pytest.mark.parametrize("to", [DIRECT, CACHE])
def test_a_failing_target_leaves_the_rows_where_they_are(kind: str, to: PathKind) -> None:
    with one_tensor(on=CACHE if to is DIRECT else DIRECT) as (checked, moves, tensor):
        moves.migrator._reserve(tensor, 0)
        room = tensor.homes[to][0].room
        checked.store.paths[to].queue.fault(kind, WRITE, room.offset, room.offset + room.nbytes)
        move(moves, K0, 0 if to is DIRECT else 8)
        assert tensor.blocks_on(to) == 0
        assert set(moves.migrator.refused) == set(PathKind)
        reason = moves.migrator.refused[to]
        assert f"layer 0 K stays where it is: writing layer 0 K on the {to.value} path" in reason
        load_all(checked)
        move(moves, K0, 0 if to is DIRECT else 8)
        assert tensor.blocks_on(to) == 0
        for _ in range(3):
            checked.crop(K0, BLOCK)
            checked.append(K0, BLOCK)


@pytest.mark.parametrize("on", [DIRECT, CACHE])
def test_rows_that_cannot_be_read_fail_closed(on: PathKind) -> None:
    """The migration gives up; whoever asks for the rows gets the error, and nothing else ever."""
    with one_tensor(on=on) as (checked, moves, tensor):
        room = tensor.segments[0].room
        checked.store.paths[on].queue.fault("error", READ, room.offset, room.offset + room.nbytes, count=100)
        move(moves, K0, 0 if on is CACHE else 8)
        assert "reading layer 0 K" in moves.migrator.refused[DIRECT]
        assert tensor.blocks_on(on) == 8
        checked.store.flush()
        for _ in range(2):
            with pytest.raises(StorageError, match="reading layer 0 K"):
                checked.store.load(K0)


def test_rows_whose_write_failed_are_never_served() -> None:
    """Not even after a migration copied whatever lay there."""
    with one_tensor(written=0) as (checked, moves, tensor):
        room = tensor.segments[0].room
        checked.store.paths[CACHE].queue.fault("error", WRITE, room.offset, room.offset + room.nbytes)
        slot = checked.store.load(K0, 8 * BLOCK)
        checked.store.append(K0, slot, 8 * BLOCK)
        while not slot.drains[0].done():
            pass
        move(moves, K0, 0)
        with pytest.raises(StorageError, match="writing layer 0 K on the page-cache path"):
            checked.store.load(K0)


def test_corrupt_rows_are_not_moved() -> None:
    """With checksums what was read is verified before it is written anywhere."""
    shape = Shape(layers=1, tokens=8 * BLOCK, capacity=8 * BLOCK, checksum=True)
    with store_with(shape, two_paths()) as checked:
        moves = RandomMoves(checked.store, 0, often=0.0)
        checked.step(8 * BLOCK)
        checked.store.flush()
        tensor = checked.store.tensors[K0]
        cache = checked.store.paths[CACHE]
        cached = next(t for t in checked.store.tensors.values() if t.blocks_on(CACHE))
        cache.drop(cached.segments[0].room)
        move(moves, cached.spec.key, 0)
        assert "is not what was written there" in moves.migrator.refused[DIRECT]
        assert cached.blocks_on(CACHE) == 8
        with pytest.raises(StorageError, match="is not what was written there"):
            load_all(checked)
        assert tensor is not None


def test_a_target_without_room_keeps_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """As much as fits gets a room; the rest stays in the page cache."""
    shape = Shape(layers=4, tokens=8 * BLOCK, capacity=8 * BLOCK)
    paths = two_paths()
    store = make_store(shape, paths)
    store.place([Placement(spec.key, CACHE, 8 * 16 * 512, "") for spec in shape.specs])
    allocate = paths[DIRECT].allocate

    def little(wanted):
        if sum(nbytes for _, nbytes in wanted) > 3 * 8 * 16 * 512:
            raise CapacityError("full")
        return allocate(wanted)

    monkeypatch.setattr(paths[DIRECT], "allocate", little)
    moves = RandomMoves(store, 0, often=0.0)
    homes = [bool(tensor.homes.get(DIRECT)) for tensor in store.tensors.values()]
    assert sum(homes) == 2
    moves.migrator.want([move_to(key, 8, 0) for key in store.tensors])
    finish(moves)
    assert [tensor.blocks_on(CACHE) == 0 for tensor in store.tensors.values()] == homes
    store.close()


def test_a_disk_without_room_refuses_promotions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with one_tensor(on=DIRECT) as (checked, moves, _):

        def full(room: object) -> None:
            raise CapacityError("the disk is full")

        monkeypatch.setattr(checked.store.paths[CACHE], "back", full)
        move(moves, K0, 8)
        assert moves.migrator.refused == {CACHE: "the disk is full"}
        load_all(checked)


def test_a_limit_for_writes_keeps_what_the_run_needs() -> None:
    """Migrations stop before the tokens to come would not find their share; beyond it writing fails."""
    with one_tensor(written=4) as (checked, moves, tensor):
        size = tensor.layout.block_bytes
        wear = WriteLimit(9 * size)  # 8 blocks of K and V are to come
        moves.migrator.wear = wear
        for path in checked.store.paths.values():
            path.wear = wear
        move(moves, K0, 0)
        assert "--write-cap" in moves.migrator.refused[DIRECT]
        checked.append(K0, 4 * BLOCK)
        checked.append(TensorKey(0, "V"), 4 * BLOCK)
        assert wear.written == 8 * size
        checked.crop(K0, 0)
        with pytest.raises(CapacityError, match="would pass the limit"):
            checked.append(K0, 8 * BLOCK)


# memory -------------------------------------------------------------------------------------


@pytest.mark.needs("o_direct", "uring")
def test_a_demotion_gives_memory_and_disk_back(direct_dir: Path) -> None:
    shape = Shape(layers=1, heads=8, tokens=4096, capacity=4096)
    with real_store(direct_dir, shape) as checked:
        moves = RandomMoves(checked.store, 0, often=0.0)
        for _ in range(4):
            checked.step(1024)
        checked.store.flush()
        path = checked.store.paths[CACHE]
        key = next(key for key, tensor in moves.tensors.items() if tensor.blocks_on(CACHE))

        def held() -> tuple[int, int]:
            return sum(map(cached_bytes, path.fds)), sum(os.fstat(fd).st_blocks * 512 for fd in path.fds)

        assert min(held()) >= 8 * MIB
        move(moves, key, 0)
        assert max(held()) <= MIB
        move(moves, key, moves.tensors[key].blocks)
        assert min(held()) >= 8 * MIB
        checked.store.flush()
        load_all(checked)
