# SPDX-License-Identifier: Apache-2.0
"""Where some tensors are read from the drive for every token, the cached ones go to theirs as they come."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from stores import Checked
from test_in_part import placed
from test_migration import real_paths
from test_streamed_store import BLOCK, Streamed, shape_of

from dualblade.paths import pagecache
from dualblade.paths.base import StoragePath
from dualblade.tensors import PathKind, TensorKey
from spdk_glue import PAGE, Piece, cached_pages

CACHE = PathKind.PAGE_CACHE
pytestmark = pytest.mark.needs("o_direct", "uring")


def dirty(path: StoragePath) -> int:
    assert isinstance(path, pagecache.PageCachePath)
    return sum(cached_pages(fd).dirty for fd in path.fds)


def becomes_clean(path: StoragePath) -> bool:
    """Long before the kernel would of its own accord."""
    deadline = time.monotonic() + 4
    while dirty(path) and time.monotonic() < deadline:
        time.sleep(0.005)
    return not dirty(path)


def whole_blocks(checked: Checked) -> int:
    return 20 * next(iter(checked.store.tensors.values())).layout.block_tokens


@pytest.mark.parametrize("parts", [(1, 0, 1, 0), (0.4, 0, 0, 1)], ids=["whole", "in part"])
def test_what_is_cached_of_a_prompt(tmp_path: Path, parts: tuple[float, ...]) -> None:
    with placed(tmp_path, parts) as checked:
        checked.step(whole_blocks(checked))
        checked.store.flush()
        assert becomes_clean(checked.store.paths[CACHE])
        checked.step(1)  # and it reads as before


def test_blocks_of_layers_that_are_streamed(tmp_path: Path) -> None:
    """From the first tensor on that lies on the direct path."""
    paths = real_paths(tmp_path)
    streamed = Streamed(shape_of(), paths)
    try:
        streamed.step(BLOCK)
        streamed.store.flush()
        for fd in paths[CACHE].fds:
            os.fsync(fd)
        for count in (6 * BLOCK, 3 * BLOCK):
            streamed.step(count)
        streamed.store.flush()
        assert becomes_clean(paths[CACHE])
        streamed.step(1)
    finally:
        streamed.store.close()


@pytest.fixture
def written_back(monkeypatch: pytest.MonkeyPatch) -> list[tuple[TensorKey, int]]:
    """(tensor, bytes between its first and last one) that were told to go."""
    seen: list[tuple[TensorKey, int]] = []
    real: Callable = pagecache.PageCachePath.write_back

    def noted(path: pagecache.PageCachePath, key: TensorKey, pieces: list[Piece]) -> list:
        seen.append((key, sum(piece.span for piece in pieces)))
        return real(path, key, pieces)

    monkeypatch.setattr(pagecache.PageCachePath, "write_back", noted)
    return seen


def test_the_kernel_decides_where_nothing_is_read_from_the_drive(tmp_path: Path, written_back: list) -> None:
    """A short run then writes nothing to it at all."""
    with placed(tmp_path, (1, 1, 1, 1)) as checked:
        checked.step(whole_blocks(checked))
        checked.step(1)
    assert written_back == []


def test_long_ranges_are_told_in_parts(tmp_path: Path, written_back: list, monkeypatch) -> None:
    monkeypatch.setattr(pagecache, "MOST_WRITTEN_BACK", 7 * PAGE)
    test_what_is_cached_of_a_prompt(tmp_path, (1, 0, 1, 0))
    assert {key for key, _ in written_back} == {TensorKey(0, "K"), TensorKey(1, "K")}
    assert all(span > 7 * PAGE for _, span in written_back)
