# SPDX-License-Identifier: Apache-2.0
"""What little the last group of a tensor lacks is read with it, and nothing of it is seen."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from random_moves import RandomMoves
from stores import Checked, MemPath, Shape
from test_migration import CACHE, DIRECT, K0, store_with, two_paths
from test_store import mem_store

from dualblade import kv_tensor
from dualblade.kv_tensor import Segment, Tensor
from dualblade.layout import READ_THROUGH, Layout
from dualblade.paths.base import Room
from dualblade.tensors import PathKind, TensorKey, TensorSpec
from spdk_glue import PAGE, WRITE, MemOptions, QueueOptions

BLOCK = 16  # tokens: a page of each head
K1 = TensorKey(1, "K")
SHAPE = Shape(layers=2, tokens=48 * BLOCK, capacity=48 * BLOCK, group=16)
LONG_COMMANDS = QueueOptions(command_bytes=1 << 20)


def loaded(checked: Checked) -> tuple[int, int]:
    """Commands and bytes of one load of K0 from the medium."""
    checked.load(K1)
    before = [path.queue.stats() for path in checked.store.paths.values()]
    checked.load(K0)
    after = [path.queue.stats() for path in checked.store.paths.values()]
    return (
        sum(new.commands - old.commands for old, new in zip(before, after, strict=True)),
        sum(new.read_bytes - old.read_bytes for old, new in zip(before, after, strict=True)),
    )


@pytest.mark.parametrize(
    ("blocks", "lacks", "commands"), [(32, 0, 1), (31, 1, 1), (30, 2, 1), (14, 2, 1), (29, 0, 3)]
)
@pytest.mark.parametrize("checksum", [False, True])
def test_a_group_is_one_range(blocks: int, lacks: int, commands: int, checksum: bool) -> None:
    shape = replace(SHAPE, checksum=checksum)
    with mem_store(shape, LONG_COMMANDS, placed=True, kinds=(DIRECT,)) as checked:
        checked.append(K0, blocks * BLOCK + 3)
        tensor, before = checked.store.tensors[K0], checked.store.read_through
        checked.store.flush()
        assert loaded(checked) == (commands, (blocks + lacks) * tensor.layout.block_bytes)
        assert checked.store.read_through - before == lacks * tensor.layout.block_bytes


def test_a_group_that_lacks_much_is_read_head_by_head() -> None:
    """More than 16 KiB, though less than an eighth."""
    shape = replace(SHAPE, tokens=80 * BLOCK, capacity=80 * BLOCK, group=40)
    with mem_store(shape, LONG_COMMANDS, placed=True, kinds=(DIRECT,)) as checked:
        checked.append(K0, 75 * BLOCK)
        checked.store.flush()
        commands, nbytes = loaded(checked)
        assert (commands, nbytes) == (1 + shape.heads, 75 * checked.store.tensors[K0].layout.block_bytes)
        assert checked.store.read_through == 0


def test_what_lies_there_is_not_seen() -> None:
    """Rows of an older, longer run, and a token at a time over them."""
    with mem_store(SHAPE, LONG_COMMANDS, placed=True, kinds=(DIRECT,)) as checked:
        checked.step(48 * BLOCK)
        checked.reset()
        checked.step(29 * BLOCK - 2)
        for _ in range(4 * BLOCK):
            checked.step(1)
        assert checked.store.read_through


def test_what_is_read_through_may_be_damaged_on_the_medium() -> None:
    """Not even a checksum is asked."""
    with mem_store(replace(SHAPE, checksum=True), placed=True, kinds=(DIRECT,)) as checked:
        checked.append(K0, 14 * BLOCK)
        checked.store.flush()
        tensor = checked.store.tensors[K0]
        noise = checked.store.pool.lease(K1, wait=True)
        assert noise is not None
        checked.store.pool.rows(noise)[:] = b"\xff" * len(checked.store.pool.rows(noise))
        pieces = tensor.pieces(noise.address, checked.store.capacity, 14, 16)
        for ticket in checked.store._start(WRITE, tensor, pieces, noise):
            ticket.wait()
        checked.store.pool.give_back(noise)
        checked.load(K0)
        assert checked.store.read_through == 2 * tensor.layout.block_bytes


def test_a_slot_is_not_left() -> None:
    """The room is for more blocks than the slot."""
    with mem_store(
        replace(SHAPE, capacity=15 * BLOCK), LONG_COMMANDS, placed=True, kinds=(DIRECT,)
    ) as checked:
        capacity = checked.store.capacity // BLOCK
        assert capacity == 15
        checked.append(K0, 14 * BLOCK)
        checked.append(K1, 14 * BLOCK)
        checked.load(K0)
        assert checked.store.read_through == 0


# which -----------------------------------------------------------------------------------------


def tensor_with(full: int, segments: list[tuple[int, int, PathKind, int, int]], group: int = 32) -> Tensor:
    """segments: first block, blocks, path, base, blocks of the room."""
    layout = Layout(2, 256, BLOCK, group)
    spec = TensorSpec(K0, 1, 2, 64, 4, 80 * BLOCK)
    tensor = Tensor(spec, layout, torch.empty(0), 0, tokens=full * BLOCK)
    for first, blocks, kind, base, room in segments:
        place = Room(K0, kind, 0, 0, room * layout.block_bytes)
        tensor.segments.append(Segment(first, blocks, place, group, base))
    return tensor


@pytest.mark.parametrize(
    ("full", "segments", "end"),
    [
        (31, [(0, 80, DIRECT, 0, 80)], 32),
        (28, [(0, 80, DIRECT, 0, 80)], 32),
        (27, [(0, 80, DIRECT, 0, 80)], 27),
        (32, [(0, 80, DIRECT, 0, 80)], 32),
        (33, [(0, 80, DIRECT, 0, 80)], 33),
        (0, [(0, 80, DIRECT, 0, 80)], 0),
        (31, [(0, 80, CACHE, 0, 80)], 31),
        (46, [(0, 48, DIRECT, 0, 48)], 48),  # what a room has of its last group
        (39, [(0, 40, DIRECT, 0, 40)], 40),
        (38, [(0, 40, DIRECT, 0, 40)], 38),  # more than an eighth of it
        (31, [(0, 31, DIRECT, 0, 80), (31, 49, CACHE, 0, 80)], 31),  # its rest lies elsewhere
        (31, [(0, 9, CACHE, 0, 80), (9, 71, DIRECT, 0, 80)], 31),  # its begin does
        (37, [(0, 6, CACHE, 0, 80), (6, 74, DIRECT, 6, 74)], 38),  # groups count from the room's begin
        (78, [(0, 64, DIRECT, 0, 80), (64, 16, DIRECT, 64, 16)], 80),
        (79, [(0, 66, DIRECT, 0, 80), (66, 20, DIRECT, 66, 20)], 79),  # a slot ends with block 80
    ],
)
def test_where_a_load_ends(full: int, segments: list, end: int) -> None:
    tensor = tensor_with(full, segments)
    assert READ_THROUGH == 4 * PAGE == 4 * tensor.layout.run_bytes
    assert tensor.end_to_read(80 * BLOCK) == end


def test_a_medium_that_reorders() -> None:
    script = MemOptions(latency_us=50, reorder_seed=5)
    paths = {DIRECT: MemPath(QueueOptions(command_bytes=PAGE), script)}
    with store_with(SHAPE, paths) as checked:
        for count in (37, 180, 1, 1, 16, 30):
            checked.step(count)
        assert checked.store.read_through


@pytest.mark.parametrize("seed", range(16))
def test_any_moves_between_any_operations(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With whatever is missing read through: an eighth is rare in groups of few blocks."""
    monkeypatch.setattr(kv_tensor, "READ_THROUGH_PART", 1)
    random = Random(seed)
    shape = replace(SHAPE, layers=3, group=3 + seed % 8, checksum=seed % 3 == 0, depth=seed % 2)
    with store_with(shape, two_paths(MemOptions(latency_us=20, reorder_seed=seed))) as checked:
        RandomMoves(checked.store, seed, often=0.3)
        checked.step(random.randint(10, 20) * BLOCK)
        for _ in range(20):
            checked.step(random.choice([1, 7, BLOCK, 2 * BLOCK + 1]))
            key = random.choice(sorted(checked.rows))
            if random.random() < 0.4:
                checked.crop(key, random.randint(8 * BLOCK, checked.store.tensors[key].tokens))
            elif random.random() < 0.4:
                checked.flip(key)
        assert checked.store.read_through
