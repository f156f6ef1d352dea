# SPDX-License-Identifier: Apache-2.0
"""NVMe commands through io_uring, beyond what every engine does: what the drive and the kernel say, seen
from the block device of the same namespace; and what is no such device."""

from __future__ import annotations

import errno
import mmap
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from leftovers import descriptors
from media import CAPACITY, array, noise, open_namespace, python, read_back, write_bytes
from needs import spare_metadata_namespace, spare_namespace

from spdk_glue import (
    PAGE,
    READ,
    WRITE,
    Completion,
    GlueError,
    Medium,
    NotBuiltError,
    Piece,
    Queue,
    QueueOptions,
    TransferError,
    engines,
    plain,
)

MIB = 1 << 20
on_a_drive = pytest.mark.needs("nvme_generic")
built = pytest.mark.skipif("uring_cmd" not in engines(), reason="this build has no uring_cmd engine")


@pytest.fixture
def generic() -> Iterator[int]:
    with open_namespace(MIB) as fd:
        yield fd


@pytest.fixture
def queue(generic: int) -> Iterator[Queue]:
    with Queue.nvme_generic(generic) as queue:
        yield queue


def name() -> str:
    """1n1 of /dev/ng1n1."""
    return Path(spare_namespace()).name.removeprefix("ng")


def kernel() -> tuple[int, ...]:
    return tuple(map(int, platform.release().split(".")[:2]))


def medium_of(queue: Queue) -> Medium:
    medium = queue.medium()
    assert medium is not None
    return medium


class Block:
    """The block device, past the page cache."""

    def __init__(self) -> None:
        self._fd = os.open(f"/dev/nvme{name()}", os.O_RDWR | os.O_DIRECT)

    def read(self, offset: int, nbytes: int) -> bytes:
        with mmap.mmap(-1, nbytes) as memory:
            assert os.preadv(self._fd, [memory], offset) == nbytes
            return memory[:]

    def write(self, offset: int, data: bytes) -> None:
        with mmap.mmap(-1, len(data)) as memory:
            memory[:] = data
            assert os.pwritev(self._fd, [memory], offset) == len(data)

    def size(self) -> int:
        return os.lseek(self._fd, 0, os.SEEK_END)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def block() -> Iterator[Block]:
    device = Block()
    yield device
    device.close()


# the same bytes as the block device -------------------------------------------------------------


@on_a_drive
def test_the_block_device_reads_what_was_written(queue: Queue, block: Block) -> None:
    data = noise(CAPACITY).tobytes()
    write_bytes(queue, 3 * PAGE, data)
    assert block.read(3 * PAGE, CAPACITY) == data
    assert block.read(0, 3 * PAGE) == bytes(3 * PAGE)


@on_a_drive
def test_what_the_block_device_wrote_is_read(queue: Queue, block: Block) -> None:
    data = noise(CAPACITY, 2).tobytes()
    block.write(5 * PAGE, data)
    assert read_back(queue, 5 * PAGE) == data


@on_a_drive
def test_larger_than_a_command(queue: Queue, block: Block, regions) -> None:
    nbytes = 20 * MIB + 3 * PAGE
    source, sink = regions(nbytes), regions(nbytes)
    array(source)[:] = noise(nbytes)
    queue.run(WRITE, [plain(5 * PAGE, source.address, nbytes)])
    before = queue.stats()
    assert queue.run(READ, [plain(5 * PAGE, sink.address, nbytes)]).result == nbytes
    assert np.array_equal(array(sink), array(source))
    assert block.read(5 * PAGE, nbytes) == bytes(source.buffer())
    after = queue.stats()
    assert after.commands - before.commands == -(-nbytes // queue.options.command_bytes)
    assert after.max_in_flight > 1


@on_a_drive
@pytest.mark.parametrize("depth", [1, 2, 5, 64])
def test_every_depth(generic: int, block: Block, regions, depth: int) -> None:
    source, sink = regions(CAPACITY), regions(CAPACITY)
    array(source)[:] = noise(CAPACITY, depth)
    order = np.random.default_rng(depth).permutation(CAPACITY // PAGE).tolist()
    with Queue.nvme_generic(generic, QueueOptions(queue_depth=depth, command_bytes=PAGE)) as queue:
        tags = []
        for page in order:
            tags.append(queue.submit(WRITE, [plain(page * PAGE, source.address + page * PAGE, PAGE)]))
            tags.append(queue.submit(READ, [plain(page * PAGE, sink.address + page * PAGE, PAGE)]))
        assert [queue.wait(tag).result for tag in tags] == [PAGE] * len(tags)
        assert queue.stats().max_in_flight <= depth
    assert bytes(sink.buffer()) == bytes(source.buffer()) == block.read(0, CAPACITY)


@on_a_drive
@pytest.mark.parametrize("shift", [512, 1024, PAGE - 512])
def test_memory_that_begins_within_a_page(queue: Queue, block: Block, regions, shift: int) -> None:
    region = regions(CAPACITY + PAGE)
    array(region)[:] = noise(region.size, shift)
    queue.run(WRITE, [plain(0, region.address + shift, CAPACITY)])
    assert block.read(0, CAPACITY) == bytes(region.buffer(shift, CAPACITY))


@on_a_drive
def test_runs_shorter_than_a_page(queue: Queue, block: Block, regions) -> None:
    """No list of pages can name them: the kernel copies."""
    run = medium_of(queue).lba_bytes
    pieces = 3 * PAGE // run
    region = regions(2 * pieces * run)
    array(region)[:] = noise(region.size)
    every_other = Piece(0, region.address, 2 * run, 0, run, pieces)
    assert queue.run(WRITE, [every_other]).result == pieces * run
    expected = array(region).reshape(-1, 2, run)[:pieces, 0].tobytes()
    assert block.read(0, pieces * run) == expected


@on_a_drive
@pytest.mark.parametrize("registered", [False, True])
def test_scattered_pages(queue: Queue, block: Block, regions, registered: bool) -> None:
    pages = 1024
    source, sink = regions(2 * pages * PAGE), regions(2 * pages * PAGE)
    if registered:
        queue.register(source)
        queue.register(sink)
    array(source)[:] = noise(source.size)
    array(sink)[:] = 7
    every_other = Piece(MIB, source.address, 2 * PAGE, 0, PAGE, pages)
    queue.run(WRITE, [every_other])
    expected = array(source).reshape(pages, 2, PAGE)[:, 0]
    assert block.read(MIB, pages * PAGE) == expected.tobytes()
    queue.run(READ, [every_other._replace(address=sink.address + PAGE)])
    found = array(sink).reshape(pages, 2, PAGE)
    assert np.array_equal(found[:, 1], expected)
    assert (found[:, 0] == 7).all()


# what the drive says ------------------------------------------------------------------------


@on_a_drive
def test_the_medium_is_the_drive_that_the_kernel_knows(queue: Queue, block: Block) -> None:
    def told(attribute: str) -> str:
        """Nothing where a subsystem of several controllers has no such thing."""
        file = Path(f"/sys/class/nvme-generic/ng{name()}/device/{attribute}")
        return file.read_text().strip() if file.exists() else ""

    medium = medium_of(queue)
    assert medium.nbytes == block.size()
    assert medium.lba_bytes == int(
        Path(f"/sys/class/block/nvme{name()}/queue/logical_block_size").read_text()
    )
    assert (medium.serial, medium.model, medium.firmware, medium.transport) == tuple(
        map(told, ("serial", "model", "firmware_rev", "transport"))
    )
    assert medium.uuid == "" or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", medium.uuid)
    assert medium.any_memory
    assert (queue.needs_env_memory, queue.polls) == (False, False)


@on_a_drive
def test_commands_are_as_large_as_the_kernel_takes_of_any_memory(generic: int) -> None:
    limits = Path(f"/sys/class/block/nvme{name()}/queue")
    with Queue.nvme_generic(generic, QueueOptions(4, 64 * MIB)) as queue:
        most = queue.options.command_bytes
        assert most == medium_of(queue).max_command_bytes
        assert most // PAGE < int((limits / "max_segments").read_text())
        assert most <= int((limits / "max_hw_sectors_kb").read_text()) * 1024
        assert most & (most - 1) == 0
        assert queue.options.queue_depth == 128  # as many bytes in flight, but no more commands than that
    with Queue.nvme_generic(generic, QueueOptions(300, 64 * MIB)) as queue:
        assert queue.options.queue_depth == 300
    with Queue.nvme_generic(generic, QueueOptions(7, PAGE)) as queue:
        assert queue.options == QueueOptions(7, PAGE)


def failure(queue: Queue, op: int, pieces: list[Piece]) -> Completion:
    with pytest.raises(TransferError) as caught:
        queue.run(op, pieces)
    return caught.value.completion


@on_a_drive
@pytest.mark.parametrize("op", [READ, WRITE])
def test_past_the_end_the_drive_says_lba_out_of_range(queue: Queue, regions, op: int) -> None:
    """Status type 0, code 80h; of a long transfer the command that crosses the end."""
    end = medium_of(queue).nbytes
    command = queue.options.command_bytes
    region = regions(3 * command)
    record = failure(queue, op, [plain(end - 2 * command + PAGE, region.address, 3 * command)])
    assert (record.result, record.sct, record.sc) == (-errno.EIO, 0, 0x80)
    assert record.offset >= end - command + PAGE
    record = failure(queue, op, [plain(end, region.address, PAGE)])
    assert (record.offset, record.sct, record.sc) == (end, 0, 0x80)
    assert queue.run(READ, [plain(end - PAGE, region.address, PAGE)]).result == PAGE


@on_a_drive
def test_what_is_not_whole_blocks_is_refused(queue: Queue, regions) -> None:
    region = regions(2 * PAGE)
    for piece in (plain(100, region.address, PAGE), plain(0, region.address, PAGE + 1)):
        assert failure(queue, WRITE, [piece]).result == -errno.EINVAL
    assert read_back(queue, 0, 2 * PAGE) == bytes(2 * PAGE)


@on_a_drive
def test_memory_that_is_not_there(queue: Queue) -> None:
    for op in (WRITE, READ):
        assert failure(queue, op, [plain(0, PAGE, PAGE)]).result == -errno.EFAULT


@on_a_drive
def test_trim_forgets_these_blocks_alone(queue: Queue, block: Block) -> None:
    data = noise(64 * PAGE).tobytes()
    write_bytes(queue, 0, data)
    queue.trim([(8 * PAGE, 16 * PAGE), (40 * PAGE, PAGE)])
    found = block.read(0, 64 * PAGE)
    for first, last in ((0, 8), (24, 40), (41, 64)):
        assert found[first * PAGE : last * PAGE] == data[first * PAGE : last * PAGE]
    for first, last in ((8, 24), (40, 41)):
        span = slice(first * PAGE, last * PAGE)
        assert found[span] in (data[span], bytes(len(found[span])))  # a drive is free to forget nothing
    write_bytes(queue, 8 * PAGE, data[:PAGE])
    assert block.read(8 * PAGE, PAGE) == data[:PAGE]


@on_a_drive
def test_flush_after_writes_in_flight(queue: Queue, block: Block, regions) -> None:
    region = regions(CAPACITY)
    array(region)[:] = noise(CAPACITY)
    tags = [queue.submit(WRITE, [plain(n * MIB, region.address, CAPACITY)]) for n in range(8)]
    queue.flush()
    assert all(queue.is_done(tag) for tag in tags)
    assert block.read(7 * MIB, CAPACITY) == bytes(region.buffer())


@on_a_drive
@pytest.mark.needs("root")
def test_a_reset_of_the_controller_loses_nothing(queue: Queue, regions) -> None:
    """Commands that it cuts off are sent again."""
    reset = Path(f"/sys/class/nvme-generic/ng{name()}/device/reset_controller")
    if not reset.exists():
        pytest.skip("several controllers lead to the namespace")
    if kernel() < (6, 12):
        pytest.skip("with older kernels QEMU's controller loses commands, those of the block device too")
    source, sink = regions(8 * MIB), regions(8 * MIB)
    array(source)[:] = noise(source.size)
    for _ in range(5):
        tags = [queue.submit(WRITE, [plain(0, source.address, source.size)])]
        tags += [queue.submit(READ, [plain(0, sink.address, sink.size)]) for _ in range(4)]
        reset.write_text("1")
        assert [queue.wait(tag).result for tag in tags] == [source.size] * 5
        assert np.array_equal(array(sink), array(source))
        array(source)[:] += 1


# end ----------------------------------------------------------------------------------------


@on_a_drive
@pytest.mark.parametrize("drain_ms", [0, 10_000])
def test_closing_with_commands_in_flight(generic: int, regions, drain_ms: int) -> None:
    region = regions(16 * MIB)
    fds = descriptors()
    for _ in range(20):
        queue = Queue.nvme_generic(generic, QueueOptions(64, drain_ms=drain_ms))
        for _ in range(4):
            queue.submit(READ, [plain(0, region.address, region.size)])
        while not queue.stats().commands:
            queue.poll()
        given_up = queue.close()
        assert given_up <= (0 if drain_ms else 4)
    assert descriptors() == fds
    if drain_ms:
        array(region)[:] = 7
        assert (array(region) == 7).all()


@on_a_drive
def test_the_descriptor_stays_the_callers(generic: int) -> None:
    Queue.nvme_generic(generic).close()
    os.fstat(generic)
    with Queue.nvme_generic(generic) as queue:
        assert read_back(queue, 0, PAGE) == bytes(PAGE)


# refused ------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("what", ["file", "folder", "/dev/null", "/dev/zero", "pipe"])
def test_what_is_no_generic_device(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").write_bytes(bytes(PAGE))
    before = descriptors()
    if what == "pipe":
        fd, other = os.pipe()
    else:
        paths = {"file": str(tmp_path / "file"), "folder": str(tmp_path)}
        fd = other = os.open(paths.get(what, what), os.O_RDONLY)
    with pytest.raises(GlueError, match="no NVMe generic device") as caught:
        Queue.nvme_generic(fd)
    assert caught.value.errno == errno.ENOTTY
    for opened in {fd, other}:
        os.close(opened)
    assert descriptors() == before


@built
def test_a_descriptor_that_is_none() -> None:
    with pytest.raises(GlueError) as caught:
        Queue.nvme_generic(9999)
    assert caught.value.errno == errno.EBADF


@pytest.mark.skipif("uring_cmd" in engines(), reason="this build has a uring_cmd engine")
def test_a_build_without_it() -> None:
    with pytest.raises(NotBuiltError, match="no engine 'uring_cmd'"):
        Queue.nvme_generic(0)


@on_a_drive
def test_its_block_device_and_its_controller_are_none() -> None:
    for path in (f"/dev/nvme{name()}", "/dev/nvme" + name().partition("n")[0]):
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(GlueError, match="no NVMe generic device"):
            Queue.nvme_generic(fd)
        os.close(fd)


@pytest.mark.needs("nvme_metadata")
def test_blocks_with_metadata_are_refused() -> None:
    fd = os.open(spare_metadata_namespace(), os.O_RDWR)
    with pytest.raises(GlueError, match="has metadata") as caught:
        Queue.nvme_generic(fd)
    assert caught.value.errno == errno.EMEDIUMTYPE
    os.close(fd)


AS_NOBODY = """
import os
from spdk_glue import *
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
region = Region(PAGE)
try:
    with Queue.nvme_generic({fd}) as queue:
        queue.run(READ, [plain(0, region.address, PAGE)])
        print("reads")
except GlueError as error:
    print(error.strerror)
"""


@on_a_drive
@pytest.mark.needs("root")
def test_a_user_whom_the_kernel_lets_send_nothing(generic: int) -> None:
    said = python(AS_NOBODY.format(fd=generic), pass_fds=(generic,)).strip()
    assert said == "reads" if kernel() >= (6, 2) else said.startswith("NVMe commands are root's")
