# SPDX-License-Identifier: Apache-2.0
"""A store returns all rows that were ever appended, whatever is fetched, written and grown meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores import Checked, MemPath, Shape, change_pace, make_store

from dualblade import store_parts
from dualblade.errors import ConfigError
from dualblade.kv_tensor import Tensor
from dualblade.paths.base import StoragePath
from dualblade.paths.direct import DirectPath
from dualblade.paths.pagecache import PageCachePath
from dualblade.pipeline import Mode
from dualblade.staging import Slot, SlotPool
from dualblade.store import KVStore
from dualblade.targets import open_target, open_volume
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import MIB
from spdk_glue import PAGE, MemOptions, QueueOptions

K0, V0, K1, V1 = (TensorKey(layer, kind) for layer in (0, 1) for kind in "KV")
DTYPES = (torch.uint8, torch.bfloat16, torch.float32)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot's old rows must not stand in for what was not read."""
    lease = SlotPool.lease

    def lease_poisoned(pool: SlotPool, owner: object, wait: bool) -> Slot | None:
        slot = lease(pool, owner, wait)
        if slot is not None:
            pool.region.buffer(slot.offset, pool.slot_bytes)[:] = b"\xab" * pool.slot_bytes
        return slot

    monkeypatch.setattr(SlotPool, "lease", lease_poisoned)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def mem_store(
    shape: Shape,
    options: QueueOptions = QueueOptions(),
    placed: bool = False,
    script: MemOptions = MemOptions(latency_us=20, reorder_seed=1),
    kinds: tuple[PathKind, ...] = tuple(PathKind),
) -> Iterator[Checked]:
    paths = {kind: MemPath(options, script, kind) for kind in kinds}
    opened = make_store(shape, paths, placed)
    try:
        yield Checked(opened, shape)
    finally:
        opened.close()


# against a model ----------------------------------------------------------------------------

shapes = st.builds(
    Shape,
    layers=st.integers(1, 4),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([8, 32, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    tokens=st.integers(1, 2000),
    tail_bytes=st.one_of(st.none(), st.integers(0, 1 << 17)),
    depth=st.integers(0, 3),
    spare=st.integers(-1, 3),
    capacity=st.integers(1, 300),
    checksum=st.booleans(),
    mode=st.sampled_from(Mode),
).filter(lambda shape: shape.depth or shape.spare >= 0)
queues = st.builds(
    QueueOptions,
    queue_depth=st.integers(1, 6),
    command_bytes=st.integers(1, 9).map(lambda pages: pages * PAGE),
    max_transfers=st.integers(1, 6),
)
scripts = st.builds(MemOptions, latency_us=st.sampled_from([0, 10, 150]), reorder_seed=st.integers(0, 99))
counts = st.one_of(st.integers(1, 4), st.integers(1, 300))
layer_numbers = st.integers(0, 3)
operations = st.one_of(
    st.tuples(st.just("step"), counts),
    st.tuples(st.just("step"), st.just(1)),
    st.tuples(st.just("append"), layer_numbers, st.sampled_from("KV"), counts),
    st.tuples(st.just("load"), layer_numbers, st.sampled_from("KV")),
    st.tuples(st.just("crop"), layer_numbers, st.sampled_from("KV"), st.floats(0, 1)),
    st.tuples(st.just("flip"), layer_numbers, st.sampled_from("KV")),
    st.tuples(st.just("pace"), st.integers(0, 3), st.integers(1, 6), st.integers(1, 9)),
    st.tuples(st.just("flush")),
    st.tuples(st.just("reset")),
)


def carry_out(checked: Checked, operation: tuple) -> None:
    name, *rest = operation
    if name == "step":
        checked.step(*rest)
    elif name == "reset":
        checked.reset()
    elif name == "flush":
        checked.store.flush()
    elif name == "pace":
        change_pace(checked.store, *rest)
    else:
        key = TensorKey(rest[0] % checked.shape.layers, rest[1])
        if name == "append":
            checked.append(key, rest[2])
        elif name == "load":
            checked.load(key)
        elif name == "crop":
            checked.crop(key, int(rest[2] * checked.rows[key].shape[2]))
        elif name == "flip":
            checked.flip(key)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=shapes, options=queues, script=scripts, placed=st.booleans(),
    steps=st.lists(operations, min_size=1, max_size=12),
)  # fmt: skip
def test_any_sequence_of_operations(shape, options, script, placed, steps) -> None:
    with mem_store(shape, options, placed, script) as checked:
        for operation in steps:
            carry_out(checked, operation)
        for key in reversed(checked.rows):
            checked.load(key)


# growth -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_growth_without_a_known_end(depth: int) -> None:
    """Slots and segments grow from next to nothing, on both paths."""
    shape = Shape(layers=4, heads=1, head_dim=64, tokens=1, depth=depth, capacity=1)
    with mem_store(shape, QueueOptions(4, 4 * PAGE, 4)) as checked:
        first = checked.store.pool.region.size
        for count in (3, 1, 40, 1, 200, 300, 1, 1, 700, 1):
            checked.step(count)
        assert checked.store.pool.region.size > 8 * first
        for tensor in checked.store.tensors.values():
            assert len(tensor.segments) > 2
            assert {segment.room.path for segment in tensor.segments} == set(PathKind)
        assert checked.store.kv_bytes == sum(
            rows.numel() * rows.element_size() for rows in checked.rows.values()
        )


def test_segments_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(layers=1, heads=1, head_dim=128, tokens=1, capacity=2048)
    monkeypatch.setattr(store_parts, "LARGEST_STEP", 16 * PAGE)
    with mem_store(shape, script=MemOptions()) as checked:
        for _ in range(64):
            checked.append(K0, 16)
        checked.append(K0, 16 * 40)
        blocks = [segment.blocks for segment in checked.store.tensors[K0].segments]
        assert blocks == [1, 1, 2, 4, 8, 16, 16, 16, 40]


def test_what_was_placed_does_not_grow() -> None:
    shape = Shape(layers=2, tokens=100)
    with mem_store(shape, placed=True) as checked:
        for _ in range(100):
            checked.step(1)
        assert [len(tensor.segments) for tensor in checked.store.tensors.values()] == [1] * 4
        assert len(checked.store.placements) == 4


# order of layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_layers_in_any_order(depth: int) -> None:
    shape = Shape(layers=4, tokens=200, depth=depth)
    with mem_store(shape) as checked:
        checked.step(70)
        for layer in (2, 1, 3, 3, 0, 2, 0, 1, 0, 3):
            checked.append(TensorKey(layer, "V"), 20)
            checked.append(TensorKey(layer, "K"), 17)
        checked.step(1)


def test_only_one_of_a_layers_tensors() -> None:
    with mem_store(Shape(layers=3, depth=2)) as checked:
        for _ in range(6):
            for layer in range(3):
                checked.append(TensorKey(layer, "V"), 16)
        for layer in range(3):
            checked.load(TensorKey(layer, "K"))


def test_the_next_layers_are_under_way_before_they_are_asked_for() -> None:
    shape = Shape(layers=4, depth=2)
    with mem_store(shape) as checked:
        checked.step(64)
        checked.store.flush()
        for key in (K0, V0, K1):
            checked.load(key)
        assert set(checked.store._fetched) == {TensorKey(layer, kind) for layer in (2, 3) for kind in "KV"}
        checked.load(V1)
        before = checked.store._fetched[TensorKey(2, "V")]
        assert checked.load(TensorKey(2, "V")) is before
        assert {key.layer for key in checked.store._fetched} == {3, 0}


def test_what_decoding_reads_first_takes_no_slot_from_a_prompt() -> None:
    """The next layer would wait for the writes of the one before, at each layer."""
    shape = Shape(layers=4, batch=2, depth=1, spare=1, tokens=256, capacity=256)
    with mem_store(shape, placed=True) as checked:
        for layer in range(4):
            for kind in "KV":
                checked.append(TensorKey(layer, kind), 200)
            assert set(checked.store._fetched) == ({K0, V0} if layer == 3 else set())
        checked.step(1)


def test_a_slot_stays_valid_within_its_layer() -> None:
    with mem_store(Shape(layers=3, depth=1)) as checked:
        checked.step(50)
        keys = checked.append(K1, 3)
        values = checked.append(V1, 3)
        checked.compare(K1, keys)
        checked.compare(V1, values)
        assert checked.load(K1) is keys
        assert checked.load(V1) is values


def test_several_appends_into_one_slot() -> None:
    with mem_store(Shape(layers=2, capacity=300)) as checked:
        slot = checked.load(K0, 200)
        for count in (1, 15, 16, 40, 1, 100):
            checked.write(K0, slot, count)
        checked.load(K1)
        checked.load(K0)


# misuse -------------------------------------------------------------------------------------


def test_a_slot_that_is_no_longer_the_tensors_is_refused() -> None:
    with mem_store(Shape(layers=2)) as checked:
        old = checked.append(K0, 20)
        checked.append(K1, 20)
        with pytest.raises(ValueError, match="was not loaded for layer 0 K"):
            checked.store.append(K0, old, 1)
        other = checked.load(V0)
        with pytest.raises(ValueError, match="was not loaded for layer 0 K"):
            checked.store.append(K0, other, 1)
        checked.step(1)


def test_more_tokens_than_the_slot_has_room_for_are_refused() -> None:
    with mem_store(Shape(layers=1, capacity=16)) as checked:
        slot = checked.append(K0, 16)
        with pytest.raises(ValueError, match="1 more tokens"):
            checked.store.append(K0, slot, 1)
        checked.append(K0, 1)


def test_too_few_slots() -> None:
    paths = {PathKind.DIRECT: MemPath()}
    opened = make_store(Shape(spare=-1), paths)
    with pytest.raises(ConfigError, match="too few slots"):
        opened.load(K0)
    opened.close()


# reset --------------------------------------------------------------------------------------


@pytest.mark.parametrize("placed", [False, True])
def test_reset_and_reuse(placed: bool) -> None:
    """The rooms are written anew; nothing of the first prompt shows."""
    with mem_store(Shape(layers=3, tokens=300, depth=2), placed=placed) as checked:
        rooms = []
        for prompt in (150, 40, 290):
            checked.step(prompt)
            checked.step(1)
            rooms.append([len(tensor.segments) for tensor in checked.store.tensors.values()])
            checked.reset()
            assert checked.store.tokens(0) == checked.store.kv_bytes == 0
        if placed:
            assert rooms[0] == rooms[2]


# the real paths -----------------------------------------------------------------------------


@contextmanager
def real_store(shape: Shape, folder: Path) -> Iterator[KVStore]:
    with ExitStack() as stack:
        paths: dict[PathKind, StoragePath] = {PathKind.PAGE_CACHE: PageCachePath(folder)}
        stack.callback(paths[PathKind.PAGE_CACHE].close)
        target = open_target(None, capacity=32 * MIB, cache_dir=folder)
        paths[PathKind.DIRECT] = DirectPath(target, open_volume(target))
        stack.callback(paths[PathKind.DIRECT].close)
        opened = make_store(shape, paths)
        stack.pop_all()
    try:
        yield opened
    finally:
        opened.close()


@pytest.mark.needs("o_direct")
@pytest.mark.parametrize("depth", [0, 2])
def test_segments_of_one_tensor_on_both_real_paths(direct_dir: Path, depth: int) -> None:
    shape = Shape(layers=3, batch=2, tokens=1, depth=depth, capacity=1)
    with real_store(shape, direct_dir) as opened:
        checked = Checked(opened, shape)
        for count in (100, 1, 1, 130, 1, 16, 16):
            checked.step(count)
        for layer in (2, 0, 1):
            checked.append(TensorKey(layer, "K"), 33)
            checked.flip(TensorKey(layer, "V"))
            checked.crop(TensorKey(layer, "K"), 37)
        checked.step(5)
        read = {kind: path.queue.stats().read_bytes for kind, path in opened.paths.items()}
        assert all(read.values())
        for tensor in opened.tensors.values():
            assert {segment.room.path for segment in tensor.segments} == set(PathKind)
    assert list(direct_dir.iterdir()) == []


def test_what_attention_holds_is_not_fetched_beside_it() -> None:
    """A copy of its rows would be stale as soon as they change."""
    shape = Shape(layers=4, batch=2, depth=2, spare=1, tokens=256, capacity=256)
    with mem_store(shape, placed=True) as checked:
        checked.step(200)
        held = TensorKey(2, "K")
        for key in (K0, K1, held):
            checked.load(key)
        checked.store.prefetch(1)
        checked.flip(held)
        checked.load(K0)
        checked.load(held)


@contextmanager
def short_of_slots() -> Iterator[tuple[Checked, list[Slot | None]]]:
    """A store whose next layers find no slot, and those that a write holds."""
    shape = Shape(layers=3, batch=2, depth=1, tokens=256, capacity=256)
    with mem_store(shape, placed=True) as checked:
        checked.step(200)
        checked.store.flush()
        yield checked, [checked.store.pool.lease("a write", wait=False) for _ in range(2)]


def test_slots_that_come_back_are_used_by_the_layer_in_use() -> None:
    """A prompt's writes hold them, and its last layer takes long: the first token would wait for reads."""
    with short_of_slots() as (checked, held):
        store = checked.store
        checked.load(TensorKey(2, "K"))
        assert not store._fetched
        for slot in held:
            assert slot
            store.pool.give_back(slot)
        checked.load(TensorKey(2, "V"))
        assert set(store._fetched) == {K0, V0}
        checked.step(1)


def test_slots_that_come_back_while_a_read_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every few tokens a block is written from each slot, which is not free before that has ended. Reads that
    found none begin before attention does, or the drive would idle meanwhile."""
    with short_of_slots() as (checked, held):
        store = checked.store
        wait = store._await

        def meanwhile(tensor: Tensor, slot: Slot) -> None:
            wait(tensor, slot)
            while held and (back := held.pop()):
                store.pool.give_back(back)

        monkeypatch.setattr(store, "_await", meanwhile)
        checked.load(TensorKey(2, "K"))
        assert set(store._fetched) == {K0, V0}
        checked.step(1)
