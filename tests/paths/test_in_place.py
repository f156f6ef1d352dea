# SPDX-License-Identifier: Apache-2.0
"""Tensors that the page cache holds are read where they are, and fail with an error, never a signal."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import Checked, MemPath, Shape, make_store

from dualblade.errors import CapacityError, StorageError
from dualblade.in_place import LEAST_STAGED
from dualblade.paths.base import WriteLimit
from dualblade.paths.pagecache import LOST_PAGE, PageCachePath
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import MIB
from spdk_glue import PAGE, FileRegion, GlueError, cached_pages

K0, V0 = TensorKey(0, "K"), TensorKey(0, "V")
pytestmark = pytest.mark.needs("uring")


@contextmanager
def in_place(folder: Path, **more: object) -> Iterator[tuple[Checked, PageCachePath]]:
    path = PageCachePath(folder)
    shape = Shape(**({"layers": 3, "tokens": 200, "capacity": 200} | more))
    store = make_store(shape, {PathKind.PAGE_CACHE: path}, placed=True)
    try:
        yield Checked(store, shape), path
    finally:
        store.close()


def evict(path: PageCachePath) -> None:
    for fd in path.fds:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def test_nothing_is_copied(tmp_path: Path) -> None:
    with in_place(tmp_path) as (checked, path):
        for count in (50, 1, 1, 100):
            checked.step(count)
        assert all(tensor.mapped for tensor in checked.store.tensors.values())
        stats = path.queue.stats()
        assert (stats.read_bytes, stats.write_bytes) == (0, 0)
        written = sum(rows.numel() * rows.element_size() for rows in checked.rows.values())
        assert path.in_place_written == written
        assert path.in_place_read == sum(written // 152 * tokens for tokens in (0, 50, 51, 52)), (
            "every load before the new rows"
        )
        assert path.in_place_s > 0


FIRST = LEAST_STAGED // 256  # tokens of 128 bfloat16 each


def test_the_first_rows_are_written_by_the_engine(tmp_path: Path) -> None:
    """Where they are many, as those of a prompt: page faults would cost more."""
    with in_place(tmp_path, batch=2) as (checked, path):
        for layer in range(3):
            for count in (FIRST + 3, 5, 1, 30):  # pieces of a prompt that pass one layer
                for kind in "KV":
                    checked.append(TensorKey(layer, kind), count)
        tensors = checked.store.tensors.values()
        assert all(tensor.mapped for tensor in tensors)
        token = len(tensors) * 2 * 2 * 256
        checked.store.flush()  # what is under way counts when it has ended
        written = path.queue.stats().write_bytes
        assert written > FIRST * token
        assert written + path.in_place_written == (FIRST + 39) * token, "every row once"
        for count in (1, 60):
            checked.step(count)
        assert path.queue.stats().write_bytes == written, "the next ones are stored"


def test_unfinished_blocks_take_no_memory_where_they_lie_in_the_file(tmp_path: Path) -> None:
    """Nor the hugepage that they would share with those of copied tensors."""
    paths = {PathKind.PAGE_CACHE: PageCachePath(tmp_path), PathKind.DIRECT: MemPath()}
    shape = Shape(layers=4, batch=32, heads=8, tokens=1024, capacity=1024)
    store = make_store(shape, paths, placed=True)
    try:
        Checked(store, shape).step(1)
        _, tails = store.regions
        copied = [tensor for tensor in store.tensors.values() if not tensor.mapped]
        assert 0 < len(copied) < len(store.tensors)
        assert copied[0].layout.block_bytes == MIB
        assert 0 < tails.resident <= sum(tensor.layout.block_bytes for tensor in copied)
    finally:
        store.close()


def entries(address: int, nbytes: int) -> int:
    """How many of the pages have a page-table entry."""
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // PAGE * 8)
        words = array("Q", file.read(nbytes // PAGE * 8))
    return sum(word >> 63 for word in words)


def test_pages_are_there_before_the_first_row_and_take_no_fault_later(tmp_path: Path) -> None:
    with in_place(tmp_path, batch=2, layers=4) as (checked, path):
        mapped = [tensor.mapped for tensor in checked.store.tensors.values()]
        regions = [each.region for each in mapped if each]
        assert len(regions) == 8
        room = sum(region.size for region in regions)
        assert sum(cached_pages(fd).cached for fd in path.fds) >= room
        checked.append(K0, FIRST)
        checked.store.flush()
        for region in regions:
            assert entries(region.address, region.size) == region.size // PAGE
        assert checked.store.tensors[K0].tokens == FIRST


def test_pages_that_cannot_be_had_are_left_to_whom_needs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(region: FileRegion) -> None:
        raise GlueError(errno.ENOMEM, "map memory in")

    monkeypatch.setattr(FileRegion, "prefault", refused)
    with in_place(tmp_path, batch=2) as (checked, _):
        for count in (FIRST, 1, 40):
            checked.step(count)


def test_rows_taken_back_and_changed_before_they_are_read_in_place(tmp_path: Path) -> None:
    with in_place(tmp_path, batch=2) as (checked, _):
        checked.append(K0, FIRST + 11)
        checked.crop(K0, FIRST - 5)
        checked.append(K0, 9)
        checked.flip(K0)
        checked.crop(K0, FIRST + 1)
        checked.append(K0, 40)
        checked.append(TensorKey(1, "K"), 1)
        checked.append(K0, 1)
        checked.flip(K0)
        checked.reset()
        checked.forget()
        checked.step(FIRST)
        checked.step(1)


@pytest.mark.parametrize("count", [1, 2])
def test_in_a_run_with_few_slots(tmp_path: Path, count: int) -> None:
    """What finds no slot is stored."""
    with in_place(tmp_path) as (checked, _):
        taken = [checked.store.pool.lease("a test", wait=True) for _ in range(count)]
        assert all(taken)
        checked.step(FIRST + 7)
        checked.step(1)
        for slot in taken:
            checked.store.pool.give_back(slot)


def test_rows_that_may_not_be_written_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_place(tmp_path) as (checked, path):
        monkeypatch.setattr(path, "wear", WriteLimit(1000))
        with pytest.raises(CapacityError, match="more would pass the limit"):
            checked.append(K0, 100)
        monkeypatch.setattr(path, "wear", None)
        with pytest.raises(CapacityError):
            checked.store.load(V0)


def test_it_is_the_files_own_memory(tmp_path: Path) -> None:
    with in_place(tmp_path, layers=1) as (checked, path):
        checked.append(K0, 16)
        mapped = checked.store.tensors[K0].mapped
        assert mapped is not None
        room = checked.store.tensors[K0].segments[0].room
        os.pwrite(path.fds[room.file], b"\x00" * 4, room.offset)
        assert checked.store.load(K0).view.view(-1)[:2].tolist() == [0.0, 0.0]


def test_pages_that_were_taken_away_come_back(tmp_path: Path) -> None:
    with in_place(tmp_path) as (checked, path):
        for _ in range(3):
            checked.step(60)
            evict(path)


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A touch of the mapping would end the process (SIGBUS)."""
    with in_place(tmp_path) as (checked, path):
        checked.step(100)
        checked.store.flush()  # a write that came later would make the file long again
        for fd in path.fds:
            os.ftruncate(fd, 0)
        with pytest.raises(StorageError, match="reading layer 0 K on the page-cache path") as caught:
            checked.store.load(K0)
        assert caught.value.errno == 5
        with pytest.raises(StorageError):
            checked.store.load(V0)


LOST = """
import faulthandler, os, sys
from pathlib import Path
if sys.argv[2] == "faulthandler":
    faulthandler.enable()
from dualblade.paths.pagecache import PageCachePath
from dualblade.tensors import TensorKey
path = PageCachePath(Path(sys.argv[1]))
region = path.map(path.allocate([(TensorKey(0, "K"), 8192)])[0])
view = region.buffer()
view[:] = b"k" * 8192
for fd in path.fds:
    os.ftruncate(fd, 0)
view[4096]
"""


@pytest.mark.parametrize("handler", ["none", "faulthandler"])
def test_a_page_that_is_lost_at_its_touch_is_told(tmp_path: Path, handler: str) -> None:
    """Taken away after the load, and unreadable: nobody can go on or raise. Others' handlers stay."""
    words = [sys.executable, "-c", LOST, str(tmp_path), handler]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    if handler == "none":
        assert (done.returncode, done.stderr) == (1, LOST_PAGE)
    else:
        assert done.returncode == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_were_foreseen_move_it_out(tmp_path: Path) -> None:
    with in_place(tmp_path, tokens=64, capacity=64, depth=1) as (checked, path):
        checked.step(60)
        size = path.queue.stats().write_bytes
        for count in (3, 1, 1, 200, 1):
            checked.step(count)
        assert not any(tensor.mapped for tensor in checked.store.tensors.values())
        assert path.queue.stats().write_bytes > size
        checked.crop(K0, 70)
        checked.append(K0, 5)


def test_on_both_paths_at_once(tmp_path: Path) -> None:
    paths = {PathKind.PAGE_CACHE: PageCachePath(tmp_path), PathKind.DIRECT: MemPath()}
    shape = Shape(layers=4, tokens=100, capacity=100, depth=2)
    store = make_store(shape, paths, placed=True)
    checked = Checked(store, shape)
    try:
        for count in (20, 1, 30, 1, 1, 80):
            checked.step(count)
        for key in (K0, V0, TensorKey(3, "V")):
            checked.crop(key, 90)
            checked.flip(key)
            checked.append(key, 3)
        checked.reset()
        checked.forget()
        checked.step(10)
    finally:
        store.close()


def test_with_checksums_it_is_copied(tmp_path: Path) -> None:
    with in_place(tmp_path, checksum=True) as (checked, path):
        checked.step(100)
        checked.step(1)
        assert not any(tensor.mapped for tensor in checked.store.tensors.values())
        assert path.queue.stats().read_bytes > 0


def test_it_is_gone_after_close(tmp_path: Path) -> None:
    with in_place(tmp_path) as (checked, _):
        checked.step(10)
        mapped = checked.store.tensors[K0].mapped
        assert mapped is not None
    assert mapped.slot.view is None
    assert repr(mapped.region) == "<FileRegion closed>"
