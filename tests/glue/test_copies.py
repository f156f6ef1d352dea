# SPDX-License-Identifier: Apache-2.0
"""Copiers from Python, on the emulated CUDA driver: states, lifetimes, the end of the process. The order of
copies and transfers is tested in tests/c and tests/paths."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from emulated_cuda import Driver

from spdk_glue import (
    READ,
    TO_DEVICE,
    TO_HOST,
    WRITE,
    Copier,
    Copies,
    DevicePiece,
    GlueError,
    MemOptions,
    NotBuiltError,
    Piece,
    Queue,
    Region,
    TransferError,
    all_done,
    plain,
)

pytestmark = pytest.mark.needs("cc")
SIZE = 1 << 21


@pytest.fixture
def copier(cuda: Driver) -> Iterator[Copier]:
    with Copier(library=cuda.library) as made:
        yield made


def test_there_and_back(cuda: Driver, copier: Copier) -> None:
    """Runs of two heads, at other strides on either side."""
    device = cuda.allocate(SIZE)
    with Region(SIZE) as region, copier.register(region, SIZE):
        memory = region.buffer()
        memory[:65536] = os.urandom(65536)
        pieces = [Piece(0, region.address, 16384, 4096, 4096, 2, 3)]
        there = [DevicePiece(device, 32768, 4096)]
        back = [pieces[0]._replace(address=region.address + 65536)]
        copier.copy(TO_DEVICE, copier.loads, pieces, there)
        copied = copier.recorded(copier.loads)
        copier.wait(copier.stores, copied)
        copier.copy(TO_HOST, copier.stores, back, there)
        copier.recorded(copier.stores).wait()
        for head in (0, 16384):
            assert memory[head : head + 12288] == memory[65536 + head : 65536 + head + 12288]
        assert not any(memory[65536 + 12288 : 65536 + 16384]), "between the heads nothing was copied"
        del memory
    cuda.free(device)


def test_states(cuda: Driver) -> None:
    copier = Copier(library=cuda.library)
    region = Region(SIZE)
    registration = copier.register(region)
    event = copier.event()
    assert repr(copier) == f"<Copier emulated GPU 0, 1 events, {SIZE} bytes pinned>"
    assert all_done([event, event])
    registration.close()
    registration.close()
    assert copier.counts() == (1, 0)
    assert copier.close()
    assert copier.close()
    assert repr(copier) == "<Copier emulated GPU 0, closed>"
    with pytest.raises(GlueError, match="closed"):
        event.record(0)
    region.close()


def test_a_driver_that_is_not_there() -> None:
    with pytest.raises(NotBuiltError, match="no CUDA driver"):
        Copier(library="/nowhere/libcuda.so.1")


def test_memory_that_is_not_pinned_is_refused(cuda: Driver, copier: Copier) -> None:
    with Region(SIZE) as region, pytest.raises(GlueError, match="not registered"):
        copier.copy(TO_DEVICE, copier.loads, [plain(0, region.address, 4096)], [DevicePiece(0, 0, 0)])


def test_no_copy_reaches_over_the_end_of_a_chunk(
    cuda: Driver, copier: Copier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spdk_glue.cuda.CHUNK_BYTES", 8192)
    with Region(65536) as region, copier.register(region, 4096):
        assert cuda.counts()["pinned"] == 8
        with pytest.raises(GlueError, match="not registered"):
            copier.copy(
                TO_DEVICE, copier.loads, [plain(0, region.address + 4096, 8192)], [DevicePiece(0, 0, 0)]
            )


def test_the_drivers_words_are_in_the_error(cuda: Driver, copier: Copier) -> None:
    device = cuda.allocate(SIZE)
    with Region(SIZE) as region, copier.register(region), Queue.memory(SIZE) as queue:
        pieces = [plain(0, region.address, 65536)]
        queue.run(WRITE, pieces)
        cuda.fail("cuMemcpyHtoDAsync_v2")
        copies = Copies(copier, copier.loads, [DevicePiece(device, 0, 0)], copier.event())
        tag = queue.submit(READ, pieces, copies=copies)
        with pytest.raises(TransferError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"):
            queue.wait(tag)
    copier.close()
    cuda.free(device)


def test_a_forgotten_copier_closes_itself(cuda: Driver) -> None:
    region = Region(SIZE)
    copier = Copier(library=cuda.library)
    copier.register(region)
    event = copier.event()
    del copier
    gc.collect()
    assert cuda.counts()["pinned"] == 1, "the event still has it"
    del event
    gc.collect()
    assert cuda.counts()["pinned"] == 0
    region.close()


def test_a_child_leaves_its_parents_copier_alone(cuda: Driver) -> None:
    copier = Copier(library=cuda.library)
    child = os.fork()
    if not child:
        signal.alarm(20)
        copier.close()
        del copier
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert cuda.counts()["streams"] == 3
    copier.close()


LEAVING = """
import sys
from spdk_glue import *
copier = Copier(library=sys.argv[1])
region = Region(1 << 21)
copier.register(region)
queue = Queue.memory(1 << 21, QueueOptions(command_bytes=4096), MemOptions(latency_us=3000))
import ctypes
emulator = ctypes.CDLL(sys.argv[1])
emulator.emu_set(ctypes.c_uint64(2000), ctypes.c_uint64(0), 0)
device = ctypes.c_uint64()
emulator.cuMemAlloc_v2(ctypes.byref(device), ctypes.c_size_t(1 << 21))
event, last = copier.event(), []
for number in range(60):
    copies = Copies(copier, copier.loads, [DevicePiece(device.value, 0, 0)], copier.event())
    queue.submit(READ, [plain(0, region.address, 65536)], copies=copies, after=last)
    last = [copies.event]
for kept in (queue, queue._queue, copier, copier.handle, region, region._owner, *last):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # nobody closes or forgets them
print("leaving", flush=True)
"""


@pytest.mark.parametrize("seconds", [0, 0.02, 0.1])
def test_leaving_with_everything_under_way(cuda: Driver, seconds: float) -> None:
    """The emulator ends the process with 97 where it is called after its own exit handler has run."""
    code = LEAVING + f"import time; time.sleep({seconds})"
    done = subprocess.run(
        [sys.executable, "-c", code, cuda.library], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\n", "")


def test_a_reader_that_is_late(cuda: Driver, copier: Copier) -> None:
    """A transfer that waits for a copy keeps no other one waiting."""
    device = cuda.allocate(SIZE)
    with Region(SIZE) as region, copier.register(region), Queue.memory(SIZE, script=MemOptions()) as queue:
        cuda.script(delay_us=100_000)
        copies = Copies(copier, copier.loads, [DevicePiece(device, 0, 0)], copier.event())
        queue.wait(queue.submit(READ, [plain(0, region.address, 65536)], copies=copies))
        held = queue.submit(READ, [plain(0, region.address, 65536)], after=[copies.event])
        queue.run(READ, [plain(SIZE // 2, region.address + SIZE // 2, 65536)])
        assert not queue.is_done(held)
        queue.wait(held)
        assert copies.event.done()
    copier.close()
    cuda.free(device)
