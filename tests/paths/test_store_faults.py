# SPDX-License-Identifier: Apache-2.0
"""When a transfer fails the store says which, serves no row any more, and still closes."""

from __future__ import annotations

import errno
import gc
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from leftovers import descriptors, ended, tasks
from stores import Checked, MemPath, Shape, make_store

from dualblade.device import CpuDevice
from dualblade.errors import CapacityError, StorageError
from dualblade.paths.base import Room
from dualblade.paths.pagecache import PageCachePath
from dualblade.store import KVStore
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import PAGE, READ, WRITE, MemOptions, QueueOptions

K0, V0, K1, V1 = (TensorKey(layer, kind) for layer in (0, 1) for kind in "KV")
BLOCK = 16  # tokens, of the default shape
SHAPE = Shape(layers=3, tokens=BLOCK)
OPTIONS = QueueOptions(command_bytes=PAGE, drain_ms=100)


@pytest.fixture
def path() -> MemPath:
    return MemPath(OPTIONS, timeout_s=0.3)


@pytest.fixture
def checked(path: MemPath) -> Iterator[Checked]:
    store = make_store(SHAPE, {PathKind.DIRECT: path})
    yield Checked(store, SHAPE)
    store.close()


def room_of(store: KVStore, key: TensorKey, segment: int = 0) -> Room:
    return store.tensors[key].segments[segment].room


def script(checked: Checked, path: MemPath, kind: str, op: int, key: TensorKey, segment: int = 0) -> int:
    """The fault hits the second page of a segment; its LBA."""
    offset = room_of(checked.store, key, segment).offset + PAGE
    path.queue.fault(kind, op, lo=offset, hi=offset + PAGE, sct=2, sc=0x81, count=1 << 30)
    return offset // PAGE


def load_all(checked: Checked, keys: Iterable[TensorKey]) -> None:
    for key in keys:
        checked.load(key)


def rewrite_and_load(checked: Checked, key: TensorKey) -> None:
    checked.crop(key, 0)
    for _ in range(2):
        checked.append(key, BLOCK)
        checked.load(TensorKey(2, "K"))


def crop_and_load(checked: Checked, key: TensorKey, tokens: int) -> None:
    checked.crop(key, tokens)
    checked.load(key)


def several_steps(checked: Checked) -> None:
    for _ in range(4):
        checked.step(BLOCK)


def assert_dead(checked: Checked, error: BaseException) -> None:
    """Every call raises that same error; rows on their way into a slot are nobody's."""
    store = checked.store
    calls: list[Callable[[], object]] = [store.flush, store.reset]
    for key in (K0, V0, K1):
        calls += [lambda key=key: store.load(key), lambda key=key: store.crop(key, 0)]
    for _ in range(2):
        for call in calls:
            with pytest.raises(StorageError) as caught:
                call()
            assert caught.value is error


# errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error", "torn"])
@pytest.mark.parametrize("key", [K0, V0, V1])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same layer", "after another layer"])
def test_a_failed_write_behind(
    checked: Checked, path: MemPath, kind: str, key: TensorKey, elsewhere: bool
) -> None:
    checked.step(BLOCK)
    checked.store.flush()
    lba = script(checked, path, kind, WRITE, key)
    checked.crop(key, 0)
    checked.append(key, BLOCK)
    with pytest.raises(StorageError) as caught:
        load_all(checked, [TensorKey(2, "K"), key] if elsewhere else [key])
    error = caught.value
    assert (error.tensor, error.lba, error.sct, error.sc, error.errno) == (str(key), lba, 2, 0x81, errno.EIO)
    assert f"writing {key} on the direct path (mem) failed at LBA {lba}" in str(error)
    assert_dead(checked, error)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_failed_read(depth: int) -> None:
    """Also one that was fetched ahead, and one that was fetched in vain."""
    path = MemPath(OPTIONS, timeout_s=5)
    shape = Shape(layers=3, tokens=BLOCK, depth=depth)
    checked = Checked(make_store(shape, {PathKind.DIRECT: path}), shape)
    checked.step(BLOCK)
    checked.store.flush()
    lba = script(checked, path, "error", READ, V1)
    checked.load(K0)
    with pytest.raises(StorageError) as caught:
        load_all(checked, [TensorKey(layer, kind) for layer in (1, 2, 0, 1) for kind in "KV"])
    assert (caught.value.tensor, caught.value.lba, caught.value.sc) == (str(V1), lba, 0x81)
    assert str(caught.value).startswith("reading layer 1 V on the direct path")
    assert_dead(checked, caught.value)
    checked.store.close()


def test_a_failed_write_is_not_forgotten_for_a_later_one_that_went_well(path: MemPath) -> None:
    """Two appends to one slot; the first write has failed by the time of the second. The layer's
    other tensor hangs, which keeps the pool from looking at any of them, and it has slots to spare."""
    shape = replace(SHAPE, spare=4, group=1)  # the first block has the second page
    checked = Checked(make_store(shape, {PathKind.DIRECT: path}), shape)
    checked.step(2 * BLOCK)
    checked.store.flush()
    for key in (K0, V0):
        checked.crop(key, 0)
    script(checked, path, "error", WRITE, V0)
    script(checked, path, "hang", WRITE, K0)
    checked.append(K0, BLOCK)
    slot = checked.load(V0, 2 * BLOCK)
    checked.write(V0, slot, BLOCK)
    while not slot.drains[0].done():
        pass
    checked.write(V0, slot, BLOCK)
    checked.load(K1)
    with pytest.raises(StorageError) as caught:
        checked.load(V0)
    assert caught.value.tensor == str(V0)
    checked.store.close()


@pytest.mark.parametrize("tokens", [5, BLOCK, BLOCK + 5])
def test_a_failed_write_does_not_come_back_as_a_tail(checked: Checked, path: MemPath, tokens: int) -> None:
    """A block that was not written is asked back by crop."""
    checked.append(K0, 2 * BLOCK)
    checked.store.flush()
    checked.crop(K0, 0)
    script(checked, path, "error", WRITE, K0)
    checked.append(K0, 2 * BLOCK)
    with pytest.raises(StorageError) as caught:
        crop_and_load(checked, K0, tokens)
    assert (caught.value.tensor, caught.value.sc) == (str(K0), 0x81)


def test_a_failure_on_one_path_stops_the_other(path: MemPath) -> None:
    other = MemPath(OPTIONS, kind=PathKind.PAGE_CACHE)
    paths = {PathKind.DIRECT: path, PathKind.PAGE_CACHE: other}
    checked = Checked(make_store(SHAPE, paths), SHAPE)
    checked.step(BLOCK)
    bad = next(key for key in checked.rows if room_of(checked.store, key).path is PathKind.PAGE_CACHE)
    checked.store.flush()
    script(checked, other, "error", READ, bad)
    with pytest.raises(StorageError, match="on the page-cache path"):
        checked.load(bad)
    with pytest.raises(StorageError, match="on the page-cache path"):
        load_all(checked, checked.rows)
    checked.store.close()
    assert path.queue.closed
    assert other.queue.closed


def test_a_failed_write_shows_in_flush_and_stays(checked: Checked, path: MemPath) -> None:
    checked.step(BLOCK)
    checked.store.flush()
    script(checked, path, "error", WRITE, K0)
    checked.crop(K0, 0)
    checked.append(K0, BLOCK)
    with pytest.raises(StorageError) as caught:
        checked.store.flush()
    assert_dead(checked, caught.value)


def test_a_full_target(checked: Checked, path: MemPath, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that found no room are not served as if they had."""
    checked.step(BLOCK - 1)

    def no_room(wanted: object) -> list[Room]:
        raise CapacityError("full")

    monkeypatch.setattr(path, "allocate", no_room)
    with pytest.raises(CapacityError, match="full"):
        checked.append(K0, 1)
    with pytest.raises(CapacityError, match="full"):
        checked.load(K0)


def test_a_queue_that_is_gone(checked: Checked, path: MemPath) -> None:
    """Whatever the engine raises arrives as a StorageError."""
    checked.step(BLOCK)
    path.queue.close()
    with pytest.raises(StorageError, match="queue is closed") as caught:
        checked.load(K1)
    assert caught.value.tensor in map(str, checked.rows)
    assert_dead(checked, caught.value)


# silence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", [READ, WRITE])
@pytest.mark.parametrize("key", [K0, V1])
def test_a_hang(checked: Checked, path: MemPath, op: int, key: TensorKey) -> None:
    checked.step(BLOCK)
    checked.store.flush()
    script(checked, path, "hang", op, key)
    with pytest.raises(StorageError) as caught:
        rewrite_and_load(checked, key)
    assert caught.value.tensor == str(key)
    assert "no answer from the mem engine for 0.3 s" in str(caught.value)
    assert_dead(checked, caught.value)


def test_a_queue_that_stays_full() -> None:
    path = MemPath(QueueOptions(command_bytes=PAGE, max_transfers=1, drain_ms=50), timeout_s=0.2)
    checked = Checked(make_store(SHAPE, {PathKind.DIRECT: path}), SHAPE)
    path.queue.fault("hang", WRITE)
    with pytest.raises(StorageError, match=r"layer 0 V.* stayed full for 0.2 s") as caught:
        checked.step(BLOCK)
    assert_dead(checked, caught.value)
    checked.store.close()


# what is left -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error", "hang"])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_closing_after_a_failure_leaves_nothing(kind: str, op: int, tmp_path: Path) -> None:
    """Beside a path that is well; memory that the medium may still write to is kept."""
    gc.collect()
    files, threads = descriptors(), tasks()
    path = MemPath(OPTIONS, timeout_s=0.2)
    paths = {PathKind.DIRECT: path, PathKind.PAGE_CACHE: PageCachePath(tmp_path)}
    checked = Checked(
        make_store(Shape(layers=3, tokens=BLOCK, depth=1), paths), Shape(layers=3, tokens=BLOCK)
    )
    path.queue.fault(kind, op)
    with pytest.raises(StorageError):
        several_steps(checked)
    address = checked.store.pool.region.address
    checked.store.close()
    checked.store.close()
    assert descriptors() == files
    assert ended(threads)
    assert list(tmp_path.iterdir()) == []
    del checked
    gc.collect()
    assert mapped(address) == (kind == "hang")


def mapped(address: int) -> bool:
    spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(begin, 16) <= address < int(end, 16) for begin, end in spans)


def test_one_path_that_cannot_be_tidied_does_not_keep_the_other_open(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {kind: MemPath(OPTIONS, kind=kind) for kind in PathKind}
    store = make_store(SHAPE, paths)
    bad = paths[PathKind.PAGE_CACHE]

    def cannot() -> int:
        bad.queue.close()
        raise StorageError("the table cannot be written")

    monkeypatch.setattr(bad, "close", cannot)
    with pytest.raises(StorageError, match="the table"):
        store.close()
    assert all(path.queue.closed for path in paths.values())


# interrupts ---------------------------------------------------------------------------------


@pytest.fixture
def interrupt_after() -> Iterator[Callable[[float], None]]:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


def test_ctrl_c_in_a_load(interrupt_after: Callable[[float], None]) -> None:
    """Whoever goes on after it gets an error, not a slot that was not yet filled."""
    path = MemPath(OPTIONS, MemOptions(latency_us=400_000))
    checked = Checked(make_store(SHAPE, {PathKind.DIRECT: path}), SHAPE)
    checked.append(K0, BLOCK)
    interrupt_after(0.1)
    with pytest.raises(KeyboardInterrupt):
        checked.load(K0)
    with pytest.raises(StorageError, match="left half-way by KeyboardInterrupt") as caught:
        checked.load(K0)
    assert_dead(checked, caught.value)
    checked.store.close()


def test_a_ticket_outlives_ctrl_c(
    path: MemPath, checked: Checked, interrupt_after: Callable[[float], None]
) -> None:
    """Its error comes with the next wait."""
    checked.append(K0, BLOCK)
    slot = checked.load(K0)
    path.queue.fault("hang", WRITE)
    tensor = checked.store.tensors[K0]
    ticket = checked.store._start(WRITE, tensor, checked.store._pieces(tensor, slot, 0, 1), slot)[0]
    interrupt_after(0.05)
    with pytest.raises(KeyboardInterrupt):
        ticket.wait()
    for _ in range(2):
        with pytest.raises(StorageError):
            ticket.wait()


class InterruptedDevice(CpuDevice):
    """Ctrl-C comes while rows are copied."""

    armed = False

    def copy_rows(self, source: torch.Tensor, start: int, out: torch.Tensor, at: int, count: int) -> None:
        if self.armed:
            raise KeyboardInterrupt
        super().copy_rows(source, start, out, at, count)


@pytest.mark.parametrize("count", [1, BLOCK + 1])
def test_ctrl_c_in_an_append(path: MemPath, count: int) -> None:
    device = InterruptedDevice(SHAPE.dtype)
    checked = Checked(make_store(SHAPE, {PathKind.DIRECT: path}, device=device), SHAPE)
    checked.step(BLOCK)
    slot = checked.load(K1, count)
    device.armed = True
    with pytest.raises(KeyboardInterrupt):
        checked.write(K1, slot, count)
    device.armed = False
    with pytest.raises(StorageError, match="left half-way") as caught:
        checked.load(K1)
    assert_dead(checked, caught.value)
    checked.store.close()


def test_ctrl_c_while_rows_are_changed(checked: Checked) -> None:
    checked.step(BLOCK)

    def change(view: torch.Tensor, tokens: int) -> None:
        view.zero_()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked.store.rewrite(K0, change)
    with pytest.raises(StorageError, match="left half-way"):
        checked.load(K0)
