# SPDX-License-Identifier: Apache-2.0
"""Queues of every engine, and numpy's idea of what a transfer does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from needs import spare_namespace
from numpy.typing import NDArray

from spdk_glue import PAGE, READ, WRITE, MemOptions, Piece, Queue, QueueOptions, Region, plain

Bytes = NDArray[np.uint8]
CAPACITY = 256 * PAGE
SHUFFLED = MemOptions(latency_us=50, reorder_seed=7)


@contextmanager
def open_file(folder: Path, nbytes: int = CAPACITY, flags: int = os.O_DIRECT) -> Iterator[int]:
    """A file of `nbytes` zeros."""
    path = folder / "medium"
    path.write_bytes(bytes(nbytes))
    fd = os.open(path, os.O_RDWR | flags)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def open_queue(
    engine: str, folder: Path, options: QueueOptions = QueueOptions(), capacity: int = CAPACITY,
    script: MemOptions = SHUFFLED,
) -> Iterator[Queue]:  # fmt: skip
    """On a medium of zeros: a file, "uring" past the page cache or "buffered" through it, the spare
    namespace ("uring_cmd") or "mem"."""
    with (
        open_medium(engine, folder, capacity) as fd,
        new_queue(engine, fd, options, capacity, script) as queue,
    ):
        yield queue


@contextmanager
def open_medium(engine: str, folder: Path, capacity: int = CAPACITY) -> Iterator[int]:
    """A descriptor of `capacity` zeros; "mem" has none."""
    if engine == "mem":
        yield -1
    elif engine == "uring_cmd":
        with open_namespace(capacity) as fd:
            yield fd
    else:
        with open_file(folder, capacity, os.O_DIRECT if engine == "uring" else 0) as fd:
            yield fd


@contextmanager
def open_namespace(capacity: int = CAPACITY) -> Iterator[int]:
    """The spare namespace's generic device, with zeros in front."""
    fd = os.open(spare_namespace(), os.O_RDWR)
    try:
        with Queue.nvme_generic(fd) as queue:
            write_bytes(queue, 0, bytes(capacity))
        yield fd
    finally:
        os.close(fd)


def new_queue(
    engine: str, fd: int, options: QueueOptions = QueueOptions(), capacity: int = CAPACITY,
    script: MemOptions = SHUFFLED,
) -> Queue:  # fmt: skip
    if engine == "mem":
        return Queue.memory(capacity, options, script)
    return Queue.nvme_generic(fd, options) if engine == "uring_cmd" else Queue.files([fd], options, "uring")


def array(region: Region) -> Bytes:
    return np.frombuffer(region.buffer(), np.uint8)


def noise(nbytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@st.composite
def geometries(draw: st.DrawFn) -> list[Piece]:
    """Up to three pieces, apart from each other in memory and on the medium; addresses from 0 on."""
    pieces, offset, address = [], 0, 0
    for _ in range(draw(st.integers(1, 3))):
        heads, blocks = draw(st.integers(1, 5)), draw(st.integers(1, 4))
        run = PAGE * draw(st.integers(1, 4))
        offset += PAGE * draw(st.integers(0, 3))
        address += PAGE * draw(st.integers(0, 3))
        gap = PAGE * draw(st.integers(0, 2))
        head_stride, block_stride = draw(
            st.sampled_from(
                [(blocks * run + gap, run), (run, heads * run + gap), (run + gap, heads * (run + gap))]
            )
        )
        piece = Piece(offset, address, head_stride, block_stride, run, heads, blocks)
        if draw(st.booleans()):
            apart = run + PAGE * draw(st.integers(0, 2))
            piece = piece._replace(blocks=1, medium_stride=apart)
            offset += heads * apart
        pieces.append(piece)
        offset += piece.nbytes
        address += (heads - 1) * head_stride + (blocks - 1) * block_stride + run
    return draw(st.permutations(pieces))


def at(pieces: list[Piece], base: int) -> list[Piece]:
    return [piece._replace(address=piece.address + base) for piece in pieces]


def runs(pieces: Sequence[Piece], base: int) -> Iterator[tuple[slice, slice]]:
    """(bytes of the medium, bytes of the memory from address `base` on) of every run."""
    for piece in pieces:
        for block in range(piece.blocks):
            for head in range(piece.heads):
                stride = piece.medium_stride or piece.run_bytes
                offset = piece.offset + block * piece.heads * piece.run_bytes + head * stride
                at = piece.address - base + block * piece.block_stride + head * piece.head_stride
                yield slice(offset, offset + piece.run_bytes), slice(at, at + piece.run_bytes)


def gather(medium: Bytes, memory: Bytes, pieces: Sequence[Piece], base: int) -> None:
    """What a write does."""
    for on_medium, in_memory in runs(pieces, base):
        medium[on_medium] = memory[in_memory]


def scatter(medium: Bytes, memory: Bytes, pieces: Sequence[Piece], base: int) -> None:
    """What a read does."""
    for on_medium, in_memory in runs(pieces, base):
        memory[in_memory] = medium[on_medium]


def read_back(queue: Queue, offset: int = 0, nbytes: int = CAPACITY) -> bytes:
    with Region(nbytes, of_env=queue.needs_env_memory) as region:
        queue.run(READ, [plain(offset, region.address, nbytes)])
        return bytes(region.buffer(0, nbytes))


def write_bytes(queue: Queue, offset: int, data: bytes) -> None:
    with Region(len(data), of_env=queue.needs_env_memory) as region:
        region.buffer(0, len(data))[:] = data
        queue.run(WRITE, [plain(offset, region.address, len(data))])


def python(code: str, *, timeout: float = 60.0, **options: object) -> str:
    """stdout of a Python process that runs `code`. Fails where it fails."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)
