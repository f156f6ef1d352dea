# SPDX-License-Identifier: Apache-2.0
"""Memory that is the page cache: what of it the kernel took is counted and read in again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdk_glue import PAGE, FileRegion, GlueError

KIB = 1024
BYTES, RUNS = 64 * KIB, 4


@pytest.fixture
def taken(direct_dir: Path) -> Iterator[tuple[int, bytes]]:
    """A file of which the page cache holds nothing, and what is in it."""
    content = os.urandom(1024 * KIB)
    fd = os.open(direct_dir / "kv", os.O_RDWR | os.O_CREAT)
    os.write(fd, content)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield fd, content
    os.close(fd)


@pytest.mark.parametrize(
    ("gap", "missing"),
    [
        (0, RUNS * BYTES),
        (PAGE, RUNS * BYTES + (RUNS - 1) * PAGE),
        (64 * KIB, RUNS * BYTES + (RUNS - 1) * 64 * KIB),
        (68 * KIB, RUNS * BYTES),
    ],
)
def test_ranges_are_read_in_again(taken: tuple[int, bytes], gap: int, missing: int) -> None:
    """With what lies between them, where that is little."""
    fd, content = taken
    stride = BYTES + gap
    region = FileRegion(fd, 0, len(content))
    assert region.populate(BYTES, stride, RUNS) == missing
    assert region.populate(BYTES, stride, RUNS) == 0
    for run in range(RUNS):
        assert region.buffer(run * stride, BYTES) == content[run * stride :][:BYTES]
    region.close()


def test_ranges_that_begin_within_a_page(taken: tuple[int, bytes]) -> None:
    """Whole pages are counted, and none of them twice."""
    fd, content = taken
    region = FileRegion(fd, 0, len(content))
    assert region.populate(3 * PAGE // 2, 2 * PAGE, 3) == 6 * PAGE
    assert region.populate(1, PAGE, 1) == 0
    region.close()


def test_all_of_it_at_once(taken: tuple[int, bytes]) -> None:
    fd, content = taken
    region = FileRegion(fd, 0, len(content))
    region.prefault()
    assert region.populate(len(content), len(content), 1) == 0
    assert region.buffer() == content
    region.close()


def test_all_of_it_where_the_file_ends_before(taken: tuple[int, bytes]) -> None:
    """An error, where a touch would end the process."""
    fd, content = taken
    region = FileRegion(fd, 0, len(content))
    os.ftruncate(fd, PAGE)
    with pytest.raises(GlueError, match="map memory in"):
        region.prefault()
    region.close()
