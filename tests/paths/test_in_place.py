# SPDX-License-Identifier: Apache-2.0
"""Tensors that the page cache holds are read where they are, and fail with an error, never a signal."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stores import Checked, MemPath, Shape, make_store

from dualblade.errors import StorageError
from dualblade.paths.pagecache import PageCachePath
from dualblade.tensors import PathKind, TensorKey

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
        for fd in path.fds:
            os.ftruncate(fd, 0)
        with pytest.raises(StorageError, match="reading layer 0 K on the page-cache path") as caught:
            checked.store.load(K0)
        assert caught.value.errno == 5
        with pytest.raises(StorageError):
            checked.store.load(V0)


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
