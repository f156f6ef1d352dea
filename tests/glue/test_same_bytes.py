# SPDX-License-Identifier: Apache-2.0
"""Every engine moves the same bytes, whatever the geometry, as numpy does."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from media import (
    CAPACITY,
    array,
    at,
    gather,
    geometries,
    noise,
    open_file,
    python,
    read_back,
    scatter,
    write_bytes,
)

from spdk_glue import PAGE, READ, WRITE, Piece, Queue, QueueOptions, Region, plain

MEMORY = 512 * PAGE
same_medium = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@same_medium
@given(
    pieces=geometries(), command_pages=st.integers(1, 9), depth=st.integers(1, 8), seed=st.integers(0, 999),
    registered=st.booleans(),
)  # fmt: skip
def test_strided_pieces(opened, pieces, command_pages, depth, seed, registered) -> None:
    options = QueueOptions(depth, command_pages * PAGE)
    with opened(options) as queue, Region(MEMORY) as source, Region(MEMORY) as target:
        array(source)[:] = noise(source.size, seed)
        if registered:
            queue.register(target)
        writes, reads = at(pieces, source.address), at(pieces, target.address)
        medium, memory = np.zeros(CAPACITY, np.uint8), np.zeros(target.size, np.uint8)
        gather(medium, array(source), writes, source.address)
        scatter(medium, memory, reads, target.address)
        total = sum(piece.nbytes for piece in pieces)
        assert queue.run(WRITE, writes).result == total
        assert read_back(queue) == medium.tobytes()
        assert queue.run(READ, reads).result == total
        assert np.array_equal(array(target), memory)


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_an_independent_reader_sees_it_too(tmp_path: Path, flags: int) -> None:
    data = noise(CAPACITY).tobytes()
    with (
        open_file(tmp_path, flags=flags) as fd,
        Queue.files([fd], QueueOptions(command_bytes=3 * PAGE)) as queue,
    ):
        write_bytes(queue, 0, data)
        assert (tmp_path / "medium").read_bytes() == data


def test_more_segments_than_the_kernel_takes(opened) -> None:
    """1024 segments a command: a larger command is cut although its bytes would fit."""
    heads = 2500
    options = QueueOptions(command_bytes=64 << 20)
    with opened(options, heads * PAGE) as queue, Region(2 * heads * PAGE) as region:
        memory = array(region)
        memory[:] = noise(region.size)
        expected = memory.reshape(heads, 2, PAGE)[:, 0].tobytes()
        every_other = Piece(0, region.address, 2 * PAGE, 0, PAGE, heads)
        queue.run(WRITE, [every_other])
        at_most = min(1024, queue.options.command_bytes // PAGE)  # less is the controller's wish
        assert queue.stats().commands == -(-heads // at_most)
        assert read_back(queue, 0, heads * PAGE) == expected


def test_thousands_of_small_transfers(opened) -> None:
    pages = CAPACITY // PAGE
    with (
        opened(QueueOptions(max_transfers=48)) as queue,
        Region(CAPACITY) as source,
        Region(CAPACITY) as target,
    ):
        array(source)[:] = noise(source.size)
        order = np.random.default_rng(1).permutation(np.repeat(np.arange(pages), 8)).tolist()
        tags = []
        for page in order:
            tags.append(queue.submit(WRITE, [plain(page * PAGE, source.address + page * PAGE, PAGE)]))
            tags.append(queue.submit(READ, [plain(page * PAGE, target.address + page * PAGE, PAGE)]))
        assert [queue.wait(tag).result for tag in tags] == [PAGE] * len(tags)
        assert len(tags) == 4096
        assert bytes(target.buffer()) == bytes(source.buffer())
        assert queue.stats().commands == len(tags)


def test_null_answers_everything_and_moves_nothing(regions) -> None:
    region = regions(CAPACITY)
    array(region)[:] = 7
    with Queue.null(QueueOptions(queue_depth=4, command_bytes=3 * PAGE, max_transfers=8)) as queue:
        for op in [WRITE, READ] * 500:
            strided = Piece(0, region.address, 16 * PAGE, PAGE, PAGE, 4, 3)
            assert (
                queue.run(op, [strided, plain(1 << 40, region.address, CAPACITY)]).result
                == 12 * PAGE + CAPACITY
            )
        queue.flush()
        assert queue.stats().read_bytes == queue.stats().write_bytes == 500 * (12 * PAGE + CAPACITY)
    assert (array(region) == 7).all()


@pytest.mark.needs("uring")
def test_several_files(tmp_path: Path, regions) -> None:
    """One transfer touches three files; the same offset of another file is other data."""
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    region = regions(3 * PAGE)
    array(region)[:] = noise(region.size)
    with (
        open_file(folders[0]) as a,
        open_file(folders[1], flags=0) as b,
        open_file(folders[2]) as c,
        Queue.files([a, b, c]) as queue,
    ):
        queue.run(WRITE, [plain(PAGE, region.address + n * PAGE, PAGE, n) for n in range(3)])
        queue.flush()
    for number, folder in enumerate(folders):
        assert (folder / "medium").read_bytes()[PAGE : 2 * PAGE] == bytes(region.buffer(number * PAGE, PAGE))


@pytest.mark.needs("uring")
def test_a_command_that_comes_back_short_goes_on(regions) -> None:
    """A pipe answers with what is in it, which ends anywhere in a run."""
    data = noise(48 * PAGE)
    source, target = regions(48 * PAGE), regions(96 * PAGE)
    array(source)[:] = data
    read_end, write_end = os.pipe()
    with Queue.files([read_end], QueueOptions(command_bytes=48 * PAGE)) as queue:
        tag = queue.submit(READ, [Piece(0, target.address, 32 * PAGE, 4 * PAGE, 2 * PAGE, 3, 8)])
        for begin in range(0, len(data), 3000):
            os.write(write_end, data[begin : begin + 3000].tobytes())
        assert queue.wait(tag).result == len(data)
    memory = np.zeros(target.size, np.uint8)
    scatter(data, memory, [Piece(0, 0, 32 * PAGE, 4 * PAGE, 2 * PAGE, 3, 8)], 0)
    assert np.array_equal(array(target), memory)
    for fd in (read_end, write_end):
        os.close(fd)


@pytest.mark.needs("uring")
def test_workers_copy_from_a_buffered_file(tmp_path: Path, regions) -> None:
    data = noise(CAPACITY).tobytes()
    region = regions(CAPACITY)
    with (
        open_file(tmp_path, flags=0) as fd,
        Queue.files([fd], QueueOptions(16, 4 * PAGE, workers=True)) as queue,
    ):
        write_bytes(queue, 0, data)
        for _ in range(20):
            array(region)[:] = 0
            queue.run(READ, [Piece(0, region.address, 64 * PAGE, 4 * PAGE, 4 * PAGE, 4, 16)])
            blocks = np.frombuffer(data, np.uint8).reshape(16, 4, 4 * PAGE)
            assert array(region).tobytes() == blocks.transpose(1, 0, 2).tobytes()


def test_large_offsets(regions) -> None:
    """Past 4 GiB nothing wraps."""
    region = regions(2 * PAGE)
    array(region)[:] = noise(2 * PAGE)
    far = (5 << 30) + 3 * PAGE
    with Queue.memory(6 << 30) as queue:
        queue.run(WRITE, [plain(far, region.address, 2 * PAGE)])
        assert read_back(queue, far, 2 * PAGE) == bytes(region.buffer())
        assert read_back(queue, far % (1 << 32), 2 * PAGE) == bytes(2 * PAGE)


@pytest.mark.needs("uring", "o_direct")
def test_a_process_that_dies_leaves_the_file_readable(tmp_path: Path) -> None:
    """What was waited for is there although nobody closed the queue."""
    with open_file(tmp_path) as fd:
        os.set_inheritable(fd, True)
        code = f"""
import os
from spdk_glue import *
queue = Queue.files([{fd}])
region = Region(PAGE)
region.buffer()[:] = b"x" * PAGE
queue.run(WRITE, [plain(PAGE, region.address, PAGE)])
os._exit(0)
"""
        python(code, pass_fds=(fd,))
        assert os.pread(os.open(tmp_path / "medium", os.O_RDONLY), PAGE, PAGE) == b"x" * PAGE
