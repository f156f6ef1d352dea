# SPDX-License-Identifier: Apache-2.0
"""Rows that are streamed chunk after chunk are those that were appended, whatever happened in between."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import MemPath, Shape, change_pace, make_store

from dualblade.adaptive import StoreShare
from dualblade.device import CpuDevice
from dualblade.errors import ConfigError, StorageError
from dualblade.paths.pagecache import PageCachePath
from dualblade.pipeline import Mode
from dualblade.streamed_store import StreamedStore
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import PAGE, READ, WRITE, MemOptions, QueueOptions, Region, plain

BLOCK = 16  # tokens, of the default shape
CHUNK = 2 * BLOCK
OPTIONS = QueueOptions(command_bytes=PAGE, drain_ms=100)


def shape_of(**more: object) -> Shape:
    """As many tokens a slot as two blocks have; room for all on the medium comes as tensors grow."""
    return Shape(**({"layers": 3, "tokens": BLOCK, "capacity": CHUNK, "spare": 6} | more))


class Streamed:
    """A streamed store beside all that was appended to it."""

    def __init__(self, shape: Shape, paths: dict, seed: int = 0, device: CpuDevice | None = None):
        self.shape = shape
        self.device = device or CpuDevice(shape.dtype)
        store = make_store(shape, paths, device=self.device, kind=StreamedStore)
        assert isinstance(store, StreamedStore)
        self.store = store
        self.random = torch.Generator().manual_seed(seed)
        self.rows = {spec.key: self.new_rows(0) for spec in shape.specs}

    def new_rows(self, count: int) -> torch.Tensor:
        size = (self.shape.batch, self.shape.heads, count, self.shape.head_dim)
        return torch.randint(0, 250, size, generator=self.random).to(self.shape.dtype)

    def tokens(self, layer: int) -> int:
        return self.rows[TensorKey(layer, "K")].shape[2]

    def append(self, layer: int, count: int) -> None:
        for kind in "KV":
            key, new = TensorKey(layer, kind), self.new_rows(count)
            self.store.append_rows(key, new, count)
            self.rows[key] = torch.cat([self.rows[key], new], 2)

    def check(self, layer: int, tokens: int | None = None) -> None:
        """Every part as it comes, and that together they are all."""
        at = 0
        for part in self.store.stream(layer, tokens):
            assert part.begin == at
            assert 0 < part.tokens <= self.store.capacity
            self.compare(layer, part)
            at += part.tokens
        assert at == (self.tokens(layer) if tokens is None else tokens)

    def compare(self, layer: int, part) -> None:
        for kind, view in (("K", part.keys), ("V", part.values)):
            want = self.rows[TensorKey(layer, kind)][:, :, part.begin : part.begin + part.tokens]
            got = self.device.rows(view, self.shape.batch, self.shape.heads, part.tokens)
            assert torch.equal(got, want), f"layer {layer} {kind} from token {part.begin} on"

    def pass_(self, layer: int, count: int) -> None:
        """What a layer does in a forward pass: new rows, then the older ones."""
        before = self.tokens(layer)
        self.append(layer, count)
        self.check(layer, before)

    def step(self, count: int) -> None:
        for layer in range(self.shape.layers):
            self.pass_(layer, count)

    def crop(self, tokens: int) -> None:
        for key, rows in self.rows.items():
            self.store.crop(key, tokens)
            self.rows[key] = rows[:, :, :tokens]

    def flip(self) -> None:
        """The sequences of the batch in reverse order."""

        def change(view: torch.Tensor, tokens: int) -> None:
            rows = view.view(self.shape.batch, -1, *view.shape[1:])[:, :, :tokens]
            rows.copy_(rows.flip(0))

        for key, rows in self.rows.items():
            self.store.rewrite(key, change)
            self.rows[key] = rows.flip(0)

    def reset(self) -> None:
        self.store.reset()
        self.rows = {key: rows[:, :, :0] for key, rows in self.rows.items()}


OPERATIONS = st.one_of(
    st.tuples(st.just("step"), st.integers(1, 5 * BLOCK)),
    st.tuples(st.just("step"), st.just(1)),
    st.tuples(st.just("by layers"), st.integers(1, 3 * BLOCK)),
    st.tuples(st.just("pass_"), st.integers(0, 2), st.integers(1, 2 * BLOCK)),
    st.tuples(st.just("stop half-way"), st.integers(0, 2)),
    st.tuples(st.just("crop"), st.integers(0, 100)),
    st.tuples(st.just("flip")),
    st.tuples(st.just("reset")),
    st.tuples(st.just("pace"), st.integers(0, 3), st.integers(1, 6), st.integers(1, 9)),
    st.tuples(st.just("store slots"), st.sampled_from([2, 4, 6])),
    st.tuples(st.just("flush")),
)


def carry_out(streamed: Streamed, operation: tuple) -> None:
    name, *arguments = operation
    if name == "by layers":
        for layer in range(streamed.shape.layers):
            for _ in range(3):
                streamed.pass_(layer, arguments[0])
    elif name == "stop half-way":
        for part in streamed.store.stream(arguments[0]):
            streamed.compare(arguments[0], part)
            break
    elif name == "crop":
        streamed.crop(min(streamed.tokens(layer) for layer in range(3)) * arguments[0] // 100)
    elif name == "flush":
        streamed.store.flush()
    elif name == "pace":
        change_pace(streamed.store, *arguments)
    elif name == "store slots":
        streamed.store.scheduler.store_share = StoreShare(arguments[0], 2, 6)
    else:
        getattr(streamed, name)(*arguments)


@given(
    operations=st.lists(OPERATIONS, min_size=1, max_size=12),
    slots=st.sampled_from([2, 4, 6, 10]),
    batch=st.sampled_from([1, 3]),
    capacity=st.sampled_from([1, CHUNK, 3 * BLOCK]),
    both=st.booleans(),
    mode=st.sampled_from(Mode),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_any_schedule(
    operations: list[tuple], slots: int, batch: int, capacity: int, both: bool, mode: Mode, seed: int
) -> None:
    """With slow and reordered completions, few slots and many, one path and both."""
    kinds = list(PathKind) if both else [PathKind.DIRECT]
    script = MemOptions(latency_us=200, reorder_seed=seed)
    paths = {kind: MemPath(OPTIONS, script, kind=kind) for kind in kinds}
    shape = shape_of(batch=batch, capacity=capacity, spare=slots, checksum=True, mode=mode)
    streamed = Streamed(shape, paths, seed)
    try:
        for operation in operations:
            carry_out(streamed, operation)
        for layer in range(shape.layers):
            streamed.check(layer)
        assert streamed.store.pool.region.size == (2 + slots) * streamed.store.pool.slot_bytes
    finally:
        streamed.store.close()


@pytest.mark.needs("uring")
def test_on_files(tmp_path: Path) -> None:
    paths = {PathKind.PAGE_CACHE: PageCachePath(tmp_path), PathKind.DIRECT: MemPath(OPTIONS)}
    streamed = Streamed(shape_of(), paths)
    for count in (100, 1, 1, 30, 1):
        streamed.step(count)
    streamed.store.close()


# ahead --------------------------------------------------------------------------------------


@pytest.fixture
def path() -> MemPath:
    return MemPath(OPTIONS, timeout_s=0.3)


@pytest.fixture
def streamed(path: MemPath) -> Iterator[Streamed]:
    made = Streamed(shape_of(), {PathKind.DIRECT: path})
    yield made
    made.store.close()


def ahead(streamed: Streamed) -> set[tuple[int, int]]:
    return set(streamed.store._chunks)


def test_the_next_chunks_are_under_way(streamed: Streamed) -> None:
    """Of this layer, then of the next one, past the last layer to the first: 8 slots are one pair in use,
    two ahead, and one for new rows."""
    streamed.step(3 * CHUNK)
    streamed.store.pool.drain()  # or the last writes may still hold slots
    seen = []
    for layer in range(3):
        for part in streamed.store.stream(layer):
            seen.append((layer, part.begin // CHUNK, sorted(ahead(streamed))))
    assert seen[:3] == [(0, 0, [(0, 1), (0, 2)]), (0, 1, [(0, 2), (1, 0)]), (0, 2, [(1, 0), (1, 1)])]
    assert seen[8] == (2, 2, [(0, 0), (0, 1)])


def test_a_layer_that_is_passed_again_is_fetched_again(streamed: Streamed) -> None:
    for count in (CHUNK, CHUNK, CHUNK):
        streamed.store.pool.drain()
        streamed.pass_(0, count)
    assert ahead(streamed) == {(0, 0), (0, 1)}


def test_every_chunk_is_read_once(path: MemPath) -> None:
    """A decode step reads each whole block of each tensor once, and what was fetched ahead is used."""
    streamed = Streamed(shape_of(), {PathKind.DIRECT: path})
    streamed.step(5 * BLOCK + 3)
    streamed.store.flush()
    before = path.queue.stats().read_bytes
    for _ in range(4):
        streamed.step(1)
    block_bytes = next(iter(streamed.store.tensors.values())).layout.block_bytes
    read = path.queue.stats().read_bytes - before
    ahead_of_the_next = 2 * 4 * block_bytes  # two chunks of K and V
    assert 0 <= read - 4 * 6 * 5 * block_bytes <= ahead_of_the_next
    streamed.store.close()


# misuse -------------------------------------------------------------------------------------


def test_a_stream_ends_when_the_store_goes_on(streamed: Streamed) -> None:
    streamed.step(3 * CHUNK)
    for go_on in (lambda: streamed.append(1, 1), lambda: next(streamed.store.stream(2)), streamed.flip):
        old = streamed.store.stream(0)
        next(old)
        go_on()
        with pytest.raises(ConfigError, match="gone on to others"):
            next(old)
    streamed.check(0)


def test_what_it_cannot_give(streamed: Streamed) -> None:
    streamed.step(CHUNK)
    with pytest.raises(ConfigError, match="in one piece"):
        streamed.store.load(TensorKey(0, "K"))
    for tokens in (CHUNK + 1, -1):
        with pytest.raises(ConfigError, match="were asked for"):
            streamed.check(0, tokens)
    streamed.store.append_rows(TensorKey(0, "K"), streamed.new_rows(1), 1)
    with pytest.raises(ConfigError, match="33 keys and 32 values"):
        next(streamed.store.stream(0, CHUNK))


# faults -------------------------------------------------------------------------------------


def steps(streamed: Streamed, *counts: int) -> None:
    for count in counts:
        streamed.step(count)


def assert_dead(streamed: Streamed, error: BaseException) -> None:
    store, key = streamed.store, TensorKey(0, "K")
    calls: list[Callable[[], object]] = [
        store.flush,
        store.reset,
        lambda: list(store.stream(2)),
        lambda: store.append_rows(key, streamed.new_rows(1), 1),
        lambda: store.crop(key, 0),
        lambda: store.rewrite(key, lambda view, tokens: None),
    ]
    for call in calls:
        with pytest.raises(StorageError) as caught:
            call()
        assert caught.value is error


def script(streamed: Streamed, path: MemPath, kind: str, op: int, key: TensorKey, page: int = 1) -> int:
    """The fault hits a page of the tensor's first room; its LBA."""
    offset = streamed.store.tensors[key].segments[0].room.offset + page * PAGE
    path.queue.fault(kind, op, lo=offset, hi=offset + PAGE, sct=2, sc=0x81, count=1 << 30)
    return offset // PAGE


@pytest.mark.parametrize("key", [TensorKey(0, "K"), TensorKey(1, "V"), TensorKey(2, "V")])
def test_a_failed_read(streamed: Streamed, path: MemPath, key: TensorKey) -> None:
    """Also one that was fetched ahead."""
    streamed.step(3 * CHUNK)
    streamed.store.flush()
    lba = script(streamed, path, "error", READ, key)
    with pytest.raises(StorageError) as caught:
        streamed.step(1)
    assert (caught.value.tensor, caught.value.lba, caught.value.sc) == (str(key), lba, 0x81)
    assert_dead(streamed, caught.value)


@pytest.mark.parametrize("kind", ["error", "torn"])
@pytest.mark.parametrize("key", [TensorKey(0, "K"), TensorKey(1, "V")])
def test_a_failed_write(streamed: Streamed, path: MemPath, kind: str, key: TensorKey) -> None:
    """Its block is read back as if nothing had happened; it is not served."""
    streamed.step(BLOCK)
    streamed.store.flush()
    lba = script(streamed, path, kind, WRITE, key)
    streamed.crop(0)
    with pytest.raises(StorageError) as caught:
        steps(streamed, BLOCK, BLOCK)
    error = caught.value
    assert (error.tensor, error.lba, error.sct, error.sc, error.errno) == (str(key), lba, 2, 0x81, errno.EIO)
    assert_dead(streamed, error)


def test_a_failed_write_of_a_block_with_older_rows(streamed: Streamed, path: MemPath) -> None:
    """Rows that were in memory, and are to be read from the block that new rows made whole."""
    streamed.step(BLOCK)
    streamed.crop(BLOCK - 1)
    lba = script(streamed, path, "error", WRITE, TensorKey(0, "V"))
    with pytest.raises(StorageError) as caught:
        streamed.step(1)
    assert (caught.value.tensor, caught.value.lba) == ("layer 0 V", lba)


def test_new_rows_on_their_way_are_not_waited_for(path: MemPath) -> None:
    """Only older rows are read, so the write of whole new blocks may hang for as long as the pass lasts."""
    streamed = Streamed(shape_of(), {PathKind.DIRECT: path})
    streamed.step(BLOCK)
    streamed.store.flush()
    path.queue.fault("hang", WRITE, count=1)
    streamed.pass_(0, BLOCK)
    with pytest.raises(StorageError, match="no answer"):
        streamed.store.flush()
    streamed.store.close()


def test_a_lying_drive(streamed: Streamed, path: MemPath) -> None:
    """A bit that flips on the medium is caught by its checksum, in a chunk behind the first."""
    made = Streamed(shape_of(checksum=True), {PathKind.DIRECT: path})
    made.step(3 * CHUNK)
    made.store.flush()
    key = TensorKey(1, "K")
    tensor = made.store.tensors[key]
    flipped = Region(PAGE)
    path.queue.run(READ, [plain(tensor.offset_of(3), flipped.address, PAGE)])
    flipped.buffer()[77] ^= 1
    path.queue.run(WRITE, [plain(tensor.offset_of(3), flipped.address, PAGE)])
    with pytest.raises(StorageError, match=r"block 3 of layer 1 K .* is not what was written") as caught:
        made.step(1)
    assert_dead(made, caught.value)
    made.store.close()


class InterruptedDevice(CpuDevice):
    """Ctrl-C comes while rows are copied."""

    armed = False

    def write_rows(self, *args, **options) -> None:
        if self.armed:
            raise KeyboardInterrupt
        super().write_rows(*args, **options)


def test_ctrl_c_in_an_append(path: MemPath) -> None:
    device = InterruptedDevice(shape_of().dtype)
    streamed = Streamed(shape_of(), {PathKind.DIRECT: path}, device=device)
    streamed.step(BLOCK)
    device.armed = True
    with pytest.raises(KeyboardInterrupt):
        streamed.append(1, BLOCK)
    device.armed = False
    with pytest.raises(StorageError, match="left half-way") as caught:
        streamed.check(1)
    assert_dead(streamed, caught.value)
    streamed.store.close()


def test_an_error_in_attention_leaves_the_store_well(streamed: Streamed) -> None:
    streamed.step(2 * CHUNK)
    parts = streamed.store.stream(0)
    next(parts)
    with pytest.raises(ZeroDivisionError):
        parts.throw(ZeroDivisionError)
    streamed.step(1)
