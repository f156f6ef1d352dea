# SPDX-License-Identifier: Apache-2.0
"""Dirty pages of a buffered file go to the medium when they are told to, not half a minute later."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
import pytest
from media import CAPACITY, array, noise, open_file

from spdk_glue import PAGE, WRITE, WRITE_BACK, GlueError, Piece, Queue, QueueOptions, cached_pages, plain

GIB = 1 << 30
HALF = CAPACITY // 2


def settles(fd: int, dirty: int) -> bool:
    """So much at most is dirty, pages under way included. The kernel of its own accord would take longer."""
    deadline = time.monotonic() + 4
    while cached_pages(fd).dirty > dirty and time.monotonic() < deadline:
        time.sleep(0.005)
    return cached_pages(fd).dirty <= dirty


@pytest.mark.needs("o_direct")
@pytest.mark.parametrize("workers", [False, True])
@pytest.mark.parametrize("engine", [pytest.param("uring", marks=pytest.mark.needs("uring")), "posix"])
def test_what_was_written_goes_to_the_medium(tmp_path: Path, regions, engine: str, workers: bool) -> None:
    """It waits for writes that were submitted before it. A large folio goes as a whole."""
    region = regions(CAPACITY)
    array(region)[:] = noise(CAPACITY)
    options = QueueOptions(queue_depth=8, command_bytes=4 * PAGE, workers=workers)
    with open_file(tmp_path, flags=0) as fd, Queue.files([fd], options, engine=engine) as queue:
        os.fsync(fd)
        tags = [
            queue.submit(WRITE, [plain(0, region.address, CAPACITY)]),
            queue.submit(WRITE_BACK, [plain(0, 0, HALF // 2), plain(HALF // 2, 0, HALF // 2)]),
        ]
        assert [queue.wait(tag).result for tag in tags] == [CAPACITY, 0]
        assert settles(fd, CAPACITY - HALF)
        queue.run(WRITE_BACK, [plain(HALF, 0, 5 * CAPACITY)])  # past the end there is nothing to do
        assert settles(fd, 0)
        assert np.array_equal(np.fromfile(tmp_path / "medium", np.uint8), array(region))


@pytest.mark.needs("o_direct")
@pytest.mark.parametrize(
    "piece", [plain(0, 0, GIB + PAGE), plain(0, 0, 0), Piece(0, 0, 0, 0, PAGE, 2, 1, 0, 4 * PAGE)]
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, piece: Piece) -> None:
    with open_file(tmp_path, flags=0) as fd, Queue.files([fd], QueueOptions(), engine="posix") as queue:
        with pytest.raises(GlueError) as caught:
            queue.submit(WRITE_BACK, [piece])
        assert caught.value.errno == errno.EINVAL


def test_a_medium_without_a_page_cache_has_no_such_command() -> None:
    with Queue.memory(CAPACITY) as queue, pytest.raises(GlueError) as caught:
        queue.submit(WRITE_BACK, [plain(0, 0, PAGE)])
    assert caught.value.errno == errno.ENOTSUP
