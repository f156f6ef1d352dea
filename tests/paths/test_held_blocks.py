# SPDX-License-Identifier: Apache-2.0
"""A prompt that passes a layer part by part is written many parts at once, the rest of it with the layer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import test_store
from dropping import DroppingPath
from hypothesis import given, settings
from hypothesis import strategies as st
from random_moves import RandomMoves
from stores import Checked, MemPath, Shape
from test_in_part import placed
from test_migration import CACHE, DIRECT, K0, NO_CHECKS, OPTIONS, move, one_tensor, store_with
from test_store import mem_store

from dualblade.errors import StorageError
from dualblade.kv_tensor import Segment
from dualblade.layout import BEST_COPY, BEST_RUN
from dualblade.paths.base import Room
from dualblade.store import LONGEST_DECODE
from dualblade.tensors import TensorKey
from spdk_glue import PAGE, WRITE, MemOptions, QueueOptions

PART = 3 * LONGEST_DECODE // 2  # tokens: three blocks of the default shape
LONG = Shape(layers=2, tokens=20 * PART, capacity=20 * PART, group=5, depth=1)


def written(checked: Checked) -> int:
    return sum(path.queue.stats().write_bytes for path in checked.store.paths.values())


def test_groups_are_written_as_they_become_whole() -> None:
    with one_tensor(written=0, blocks=60) as (checked, _, tensor):
        block, seen = tensor.layout.block_bytes, []
        for _ in range(6):
            checked.append(K0, PART)
            assert tensor.full - tensor.stored == tensor.held < tensor.layout.group
            for ticket in tensor.writes:
                ticket.wait()
            seen.append(written(checked) // block)
        assert tensor.layout.group == 3
        assert seen == [3, 6, 9, 12, 15, 18]
        checked.append(K0, LONGEST_DECODE + 1)
        assert tensor.held == 2
        checked.load(TensorKey(0, "V"))
        checked.store.flush()
        assert (tensor.held, written(checked) // block) == (0, 20)


@pytest.mark.parametrize("checksum", [False, True])
def test_a_prompt_in_parts_takes_few_commands(checksum: bool) -> None:
    options = QueueOptions(command_bytes=1 << 20)
    commands = []
    for parts in (1, 20):
        shape = replace(LONG, checksum=checksum)
        with mem_store(shape, options, placed=True) as checked:
            for layer in range(shape.layers):
                for _ in range(parts):
                    for kind in "KV":
                        checked.append(TensorKey(layer, kind), 20 * PART // parts)
            checked.store.flush()
            commands.append(sum(path.queue.stats().commands for path in checked.store.paths.values()))
            checked.step(1)
    assert commands[0] <= commands[1] <= 60, "at once it is 60 blocks of 4 tensors, in groups of 5"


def test_a_token_is_not_held() -> None:
    with one_tensor(written=0) as (checked, _, tensor):
        for count in (LONGEST_DECODE + 1, LONGEST_DECODE):
            checked.append(K0, count)
        assert (tensor.held, tensor.full) == (0, 4)


@pytest.mark.parametrize("change", ["crop", "flip", "reset", "flush", "other layer"])
def test_what_ends_the_wait(change: str) -> None:
    with mem_store(LONG, placed=True) as checked:
        tensor = checked.store.tensors[K0]
        checked.append(K0, PART)
        assert tensor.held == 3
        if change == "crop":
            checked.crop(K0, PART - 7)
        elif change == "flip":
            checked.flip(K0)
        elif change == "reset":
            checked.reset()
        elif change == "flush":
            checked.store.flush()
        else:
            checked.append(TensorKey(1, "K"), 1)
        assert tensor.held == 0
        checked.append(K0, PART)
        checked.append(TensorKey(1, "V"), PART)
        checked.load(K0)


@settings(max_examples=60, deadline=None, suppress_health_check=NO_CHECKS)
@given(
    test_store.shapes, test_store.queues, test_store.scripts, st.booleans(), st.integers(0, 999),
    st.lists(st.one_of(st.integers(1, 90), test_store.operations), min_size=2, max_size=14),
)  # fmt: skip
def test_parts_of_a_prompt_between_any_operations(shape, options, script, placed, seed, steps) -> None:
    """A number is a part that passes the layer in use; rows move all the while."""
    paths = {CACHE: DroppingPath(options, script), DIRECT: MemPath(options, script)}
    with store_with(shape, paths, placed) as checked:
        RandomMoves(checked.store, seed, often=0.7)
        layer = 0
        for step in steps:
            if isinstance(step, int):
                for kind in "KV":
                    checked.append(TensorKey(layer, kind), step)
                continue
            layer = (layer + 1) % shape.layers
            test_store.carry_out(checked, step)
        for key in reversed(checked.rows):
            checked.load(key)


@pytest.mark.parametrize("to", [CACHE, DIRECT])
def test_held_blocks_change_paths_without_a_copy(to: object) -> None:
    """They go where they belong by the time they are written; what is on the medium is copied."""
    with one_tensor(written=0, blocks=30, on=CACHE if to is DIRECT else DIRECT) as (checked, moves, tensor):
        for _ in range(3):
            checked.append(K0, PART)
        checked.append(K0, LONGEST_DECODE + 1)
        assert (tensor.stored, tensor.held) == (9, 2)
        move(moves, K0, 0 if to is DIRECT else 30)
        assert moves.migrator.copied_bytes == 9 * tensor.layout.block_bytes
        checked.load(TensorKey(0, "V"))
        checked.store.flush()
        checked.load(K0)
        assert tensor.blocks_on(to) == 30


@pytest.mark.needs("o_direct", "uring")
@pytest.mark.parametrize("parts", [(1, 1, 1, 1), (0.4, 0, 0.7, 1), (0, 0, 0, 0)])
def test_on_real_files(tmp_path: Path, parts: tuple[float, ...]) -> None:
    with placed(tmp_path, parts) as checked:
        for layer in range(checked.shape.layers):
            for count in (48, 48, 48, 70, 33):
                for kind in "KV":
                    checked.append(TensorKey(layer, kind), count)
        for _ in range(3):
            checked.step(1)


def test_a_failed_write_ends_the_run_with_the_layer() -> None:
    paths = {CACHE: DroppingPath(OPTIONS, MemOptions()), DIRECT: MemPath(OPTIONS, MemOptions())}
    with store_with(LONG, paths) as checked:
        tensor = checked.store.tensors[K0]
        checked.append(K0, PART)
        room = tensor.segments[0].room
        paths[room.path].queue.fault("error", WRITE, room.offset, room.offset + room.nbytes)
        with pytest.raises(StorageError, match="writing layer 0 K"):
            checked.store.flush()


def test_closing_writes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    real = MemPath.transfer

    def noted(path: MemPath, op: int, *words, **more):
        begun.append(op)
        return real(path, op, *words, **more)

    monkeypatch.setattr(MemPath, "transfer", noted)
    with mem_store(LONG, placed=True) as checked:
        checked.append(K0, PART)
        queues = [path.queue for path in checked.store.paths.values()]
        before = written(checked)
        assert checked.store.tensors[K0].held == 3
        checked.store.close()
        assert before == 0
        assert begun == []
        assert all(queue.closed for queue in queues)


def test_longer_runs_are_copied_to_the_page_cache_than_written_to_the_drive() -> None:
    with one_tensor(written=0, blocks=30) as (_, _, tensor):
        drive, cache = BEST_RUN // tensor.layout.run_bytes, BEST_COPY // tensor.layout.run_bytes
        # of a group that is hardly longer, too, little is left for the layer's end
        tensor.layout = replace(tensor.layout, group=cache + 1)
        for kind, most in ((DIRECT, drive), (CACHE, cache)):
            room = Room(K0, kind, 0, 0, 1000 * tensor.layout.block_bytes)
            tensor.segments = [Segment(0, 1000, room, cache + 1, 0)]
            ends = [tensor.end_to_write(0, end) for end in (most - 1, most, most + 1, 2 * most)]
            assert ends == [0, most, most, 2 * most]
        tensor.segments = []


def test_where_what_is_written_together_ends() -> None:
    """Counted from where a segment's room begins, and at the end of a segment."""
    with one_tensor(written=0, blocks=30) as (_, _, tensor):
        room, other = (Room(K0, kind, 0, 0, 30 * PAGE) for kind in (CACHE, DIRECT))
        tensor.segments = [Segment(0, 7, room, 30, 0), Segment(7, 8, other, 3, 5)]
        assert tensor.layout.group == 3
        ends = {end: tensor.end_to_write(0, end) for end in range(1, 16)}
        assert ends == {
            1: 0, 2: 0, 3: 3, 4: 3, 5: 3, 6: 6, 7: 7,
            8: 8, 9: 8, 10: 8, 11: 11, 12: 11, 13: 11, 14: 14, 15: 15,
        }  # fmt: skip
        assert tensor.end_to_write(9, 10) == 9
        tensor.segments = []
