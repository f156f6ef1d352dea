# SPDX-License-Identifier: Apache-2.0
"""A drive that takes no more of what the page cache holds: the kernel goes on as if it had been written, and
reads zeros once it has dropped the pages. Nobody may take those for KV."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from loop_devices import loop_device, mounted
from stores import Checked, Shape, make_store

from dualblade.errors import StorageError
from dualblade.paths.pagecache import PageCachePath
from dualblade.tensors import PathKind, Placement, TensorKey
from dualblade.units import GIB, MIB
from spdk_glue import READ, WRITE, Region, plain

CACHE = PathKind.PAGE_CACHE
K0 = TensorKey(0, "K")
pytestmark = pytest.mark.needs("loop")


@pytest.fixture
def overbooked(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 GiB on a drive that has 24 MiB: like a thinly provisioned volume."""
    with mounted(tmp_path / "memory", "-t", "tmpfs", "-o", "size=24M", "none") as memory:
        image = memory / "drive"
        with loop_device(image, 4 * GIB) as node:
            # without a journal, whose failure would stop the filesystem as a whole
            subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", node], check=True)
            with mounted(tmp_path / "files", node) as files:
                yield files


@contextmanager
def opened(folder: Path) -> Iterator[PageCachePath]:
    path = PageCachePath(folder)
    try:
        yield path
    finally:
        path.close()


def drop(path: PageCachePath) -> None:
    """What the kernel does in its own time: write the pages, and take them."""
    for fd in path.fds:
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)  # fsync tells an open file of its own, too
        with suppress(OSError):
            os.fsync(other)
        os.posix_fadvise(other, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(other)


def test_what_is_copied_from_the_page_cache(overbooked: Path) -> None:
    with opened(overbooked) as path, Region(64 * MIB, best="thp") as region:
        room = path.allocate([(K0, 64 * MIB)])[0]
        region.buffer()[:] = os.urandom(64) * MIB
        pieces = [plain(room.offset, region.address, room.nbytes, room.file)]
        path.transfer(WRITE, K0, pieces).wait()
        path.transfer(READ, K0, pieces).wait()
        drop(path)
        for _ in range(2):  # whoever reads next is told, too, though the kernel tells once
            ticket = path.transfer(READ, K0, pieces)
            for _ in range(2):
                with pytest.raises(StorageError, match="layer 0 K may be lost: KV in the page cache could"):
                    ticket.wait()
        assert bytes(MIB) in region.buffer().tobytes(), "the kernel itself had told of nothing"


@pytest.fixture
def store(overbooked: Path) -> Iterator[Checked]:
    """40 MB of KV, all of it read in place."""
    shape = Shape(layers=1, batch=2, tokens=20_000, capacity=20_000)
    made = make_store(shape, {CACHE: PageCachePath(overbooked)})
    made.place([
        Placement(tensor.spec.key, CACHE, tensor.whole_blocks * tensor.layout.block_bytes, "a test")
        for tensor in made.tensors.values()
    ])  # fmt: skip
    assert all(tensor.mapped for tensor in made.tensors.values())
    yield Checked(made, shape)
    with suppress(StorageError):
        made.close()


def test_what_is_read_in_place(store: Checked) -> None:
    """And nothing is served afterwards, though the kernel tells of a lost page once."""
    store.step(19_000)
    store.step(1)
    path = store.store.paths[CACHE]
    assert isinstance(path, PageCachePath)
    store.store.flush()
    drop(path)
    for key in (K0, TensorKey(0, "V"), K0):
        with pytest.raises(StorageError, match="could not be written to the drive of"):
            store.load(key, 1)


def test_a_drive_that_takes_all_loses_nothing(tmp_path: Path) -> None:
    with opened(tmp_path) as path, Region(MIB, best="thp") as region:
        room = path.allocate([(K0, MIB)])[0]
        pieces = [plain(room.offset, region.address, room.nbytes, room.file)]
        path.transfer(WRITE, K0, pieces).wait()
        drop(path)
        path.transfer(READ, K0, pieces).wait()
