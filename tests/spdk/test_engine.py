# SPDX-License-Identifier: Apache-2.0
"""SPDK's driver as an engine, over vfio-user and TCP: the same bytes as numpy, order, and what is refused."""

from __future__ import annotations

import errno
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from leftovers import descriptors, ended, tasks
from media import CAPACITY, array, at, gather, geometries, noise, read_back, scatter, write_bytes

from dualblade.units import MIB
from spdk_glue import (
    PAGE,
    READ,
    WRITE,
    Environment,
    GlueError,
    NvmeOptions,
    Piece,
    Queue,
    QueueOptions,
    Region,
    TransferError,
    plain,
)

pytestmark = pytest.mark.needs("spdk")
DISK = 64 * MIB
IMPATIENT = NvmeOptions(timeout_s=2, admin_s=0.5)
MEMORY = 512 * PAGE
same_disk = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

OpenQueue = Callable[..., Queue]
Regions = Callable[[int], Region]


# bytes ------------------------------------------------------------------------------------------


@same_disk
@given(pieces=geometries())
@pytest.mark.parametrize("options", [QueueOptions(), QueueOptions(3, 3 * PAGE)], ids=["usual", "small"])
def test_strided_pieces(opened: OpenQueue, options: QueueOptions, pieces: list[Piece]) -> None:
    with (
        opened(options) as queue,
        Region(MEMORY, of_env=True) as source,
        Region(MEMORY, of_env=True) as sink,
    ):
        write_bytes(queue, 0, bytes(CAPACITY))
        array(source)[:] = noise(source.size)
        array(sink)[:] = 0
        writes, reads = at(pieces, source.address), at(pieces, sink.address)
        medium, memory = np.zeros(CAPACITY, np.uint8), np.zeros(sink.size, np.uint8)
        gather(medium, array(source), writes, source.address)
        scatter(medium, memory, reads, sink.address)
        total = sum(piece.nbytes for piece in pieces)
        assert queue.run(WRITE, writes).result == total
        assert read_back(queue) == medium.tobytes()
        assert queue.run(READ, reads).result == total
        assert np.array_equal(array(sink), memory)


def test_larger_than_a_command(queue: Queue, regions: Regions) -> None:
    nbytes = 20 * MIB + 3 * PAGE
    source, sink = regions(nbytes), regions(nbytes)
    array(source)[:] = noise(nbytes)
    queue.run(WRITE, [plain(5 * PAGE, source.address, nbytes)])
    before = queue.stats()
    assert queue.run(READ, [plain(5 * PAGE, sink.address, nbytes)]).result == nbytes
    assert np.array_equal(array(sink), array(source))
    after = queue.stats()
    assert after.commands - before.commands == -(-nbytes // queue.options.command_bytes)
    assert after.read_bytes - before.read_bytes == nbytes
    assert after.max_in_flight > 1


def test_scattered_pages(queue: Queue, regions: Regions) -> None:
    """Runs of 4 KiB, every other page of the memory: more segments than a command of either transport."""
    pages = 1024
    source, sink = regions(2 * pages * PAGE), regions(2 * pages * PAGE)
    array(source)[:] = noise(source.size)
    array(sink)[:] = 7
    every_other = Piece(MIB, source.address, 2 * PAGE, 0, PAGE, pages)
    queue.run(WRITE, [every_other])
    expected = array(source).reshape(pages, 2, PAGE)[:, 0]
    assert read_back(queue, MIB, pages * PAGE) == expected.tobytes()
    queue.run(READ, [every_other._replace(address=sink.address + PAGE)])
    found = array(sink).reshape(pages, 2, PAGE)
    assert np.array_equal(found[:, 1], expected)
    assert (found[:, 0] == 7).all()


def test_many_small_transfers_in_flight(opened: OpenQueue, regions: Regions) -> None:
    queue = opened(QueueOptions(max_transfers=48))
    source, sink = regions(CAPACITY), regions(CAPACITY)
    array(source)[:] = noise(CAPACITY)
    pages = np.random.default_rng(1).permutation(np.repeat(np.arange(CAPACITY // PAGE), 4)).tolist()
    tags = []
    for page in pages:
        tags.append(queue.submit(WRITE, [plain(page * PAGE, source.address + page * PAGE, PAGE)]))
        tags.append(queue.submit(READ, [plain(page * PAGE, sink.address + page * PAGE, PAGE)]))
    assert [queue.wait(tag).result for tag in tags] == [PAGE] * len(tags)
    assert bytes(sink.buffer()) == bytes(source.buffer())
    assert queue.stats().commands == len(tags)


def test_both_transports_lead_to_one_disk(spdk_env: Environment, targets: dict[str, str]) -> None:
    data = noise(CAPACITY).tobytes()
    with (
        Queue.nvme(targets["vfio-user"], nvme=IMPATIENT) as one,
        Queue.nvme(targets["tcp"], nvme=IMPATIENT) as other,
    ):
        write_bytes(one, MIB, data)
        assert read_back(other, MIB) == data


def test_what_was_written_is_there_for_the_next_client(opened: OpenQueue) -> None:
    data = noise(CAPACITY, 5).tobytes()
    with opened() as queue:
        write_bytes(queue, 0, data)
    with opened() as queue:
        assert read_back(queue) == data


# order, flush, trim -------------------------------------------------------------------------------


def test_a_read_sees_the_write_before_it(queue: Queue, regions: Regions) -> None:
    nbytes = MIB
    source, sink = regions(nbytes), regions(nbytes)
    for number in range(1, 20):
        array(source)[:] = number
        write = queue.submit(WRITE, [plain(0, source.address, nbytes)])
        read = queue.submit(READ, [plain(nbytes - PAGE, sink.address, PAGE)])
        assert queue.wait(read).result == PAGE
        assert (array(sink)[:PAGE] == number).all()
        queue.wait(write)


def test_flush(queue: Queue, regions: Regions) -> None:
    region = regions(4 * MIB)
    array(region)[:] = noise(region.size)
    tag = queue.submit(WRITE, [plain(0, region.address, region.size)])
    queue.flush()
    assert queue.is_done(tag)
    queue.flush()


def test_trimmed_bytes_read_as_zeros(queue: Queue) -> None:
    medium = queue.medium()
    assert medium is not None
    assert medium.can_trim
    data = noise(CAPACITY)
    write_bytes(queue, 0, data.tobytes())
    ranges = [(PAGE, 3 * PAGE), (17 * PAGE, 100 * PAGE)]
    queue.trim(ranges)
    for offset, nbytes in ranges:
        data[offset : offset + nbytes] = 0
    assert read_back(queue) == data.tobytes()
    queue.trim([(0, DISK)])
    assert read_back(queue) == bytes(CAPACITY)


# options and memory -------------------------------------------------------------------------------


def test_the_medium_and_the_options_in_force(opened: OpenQueue, transport: str) -> None:
    with opened(QueueOptions(32, MIB)) as queue:
        medium = queue.medium()
        assert medium is not None
        assert (medium.nbytes, medium.lba_bytes, medium.recoveries) == (DISK, PAGE, 0)
        assert medium.transport == transport.replace("-", "").upper()
        assert medium.serial == "EMULATED-test_engine"
        assert medium.uuid
        assert medium.any_memory == (transport == "tcp")
        assert queue.options.command_bytes == medium.max_command_bytes == 131072
        assert queue.options.queue_depth == 128  # as many bytes in flight as were asked for, up to this
    with opened(QueueOptions(5, 3 * PAGE)) as queue:
        assert (queue.options.queue_depth, queue.options.command_bytes) == (5, 3 * PAGE)


def test_a_full_queue_says_none_and_recovers(opened: OpenQueue, regions: Regions) -> None:
    queue = opened(QueueOptions(max_transfers=4))
    region = regions(8 * PAGE)
    pages = [plain(n * PAGE, region.address + n * PAGE, PAGE) for n in range(8)]
    tags = [queue.try_submit(WRITE, [page]) for page in pages]
    assert None not in tags[:4]
    assert tags[4:] == [None] * 4
    for tag in tags[:4]:
        assert tag is not None
        queue.wait(tag)
    assert queue.run(READ, pages).result == 8 * PAGE


def test_memory_of_others(queue: Queue, transport: str) -> None:
    """A vfio-user controller cannot reach it; over TCP it is as good as any."""
    data = noise(PAGE).tobytes()
    write_bytes(queue, 0, data)
    assert queue.needs_env_memory == (transport == "vfio-user")
    with Region(PAGE) as region:
        if transport == "tcp":
            queue.run(READ, [plain(0, region.address, PAGE)])
            assert bytes(region.buffer()) == data
        else:
            with pytest.raises(TransferError, match=r"cannot reach this memory at byte 0") as caught:
                queue.run(READ, [plain(0, region.address, PAGE)])
            assert caught.value.errno == errno.EFAULT
            assert not caught.value.completion.memory_at_risk
            assert bytes(region.buffer()) == bytes(PAGE)
    assert read_back(queue, 0, PAGE) == data


def test_past_the_end(queue: Queue, regions: Regions) -> None:
    region = regions(2 * PAGE)
    with pytest.raises(TransferError) as caught:
        queue.run(READ, [plain(DISK - PAGE, region.address, 2 * PAGE)])
    completion = caught.value.completion
    assert (completion.result, completion.sct, completion.sc) == (-errno.EIO, 0, 0x80)  # LBA out of range
    assert queue.run(READ, [plain(DISK - PAGE, region.address, PAGE)]).result == PAGE


def test_the_environments_memory_runs_out(queue: Queue, spdk_env: Environment) -> None:
    for _ in range(3):
        with pytest.raises(GlueError, match="SPDK's memory") as caught:
            Region(spdk_env.nbytes + MIB, of_env=True)
        assert caught.value.errno == errno.ENOMEM
    with ExitStack() as taken, pytest.raises(GlueError, match="SPDK's memory"):  # noqa: PT012
        for _ in range(spdk_env.nbytes // (64 * MIB) + 1):
            taken.enter_context(Region(64 * MIB, of_env=True))
    data = noise(CAPACITY, 3).tobytes()
    write_bytes(queue, 0, data)
    assert read_back(queue) == data


def test_memory_of_the_environment_is_zero_again(regions: Regions) -> None:
    for _ in range(3):
        with Region(MIB, of_env=True) as region:
            assert not array(region).any()
            assert region.address % (1 << 12) == 0
            array(region)[:] = 1


# open errors --------------------------------------------------------------------------------------


def refusal(target: str, nvme: NvmeOptions = IMPATIENT) -> GlueError:
    """After it no thread and no descriptor is left, but for what the first of a kind opens for good."""
    with pytest.raises(GlueError) as caught:
        Queue.nvme(target, nvme=nvme)
    before, fds = tasks(), descriptors()
    with pytest.raises(GlueError, match=re.escape(str(caught.value))):
        Queue.nvme(target, nvme=nvme)
    assert ended(before)
    assert descriptors() == fds
    return caught.value


def test_no_such_namespace(opened: OpenQueue, target: str) -> None:
    error = refusal(target, NvmeOptions(nsid=9, timeout_s=2, admin_s=0.5))
    assert (error.errno, error.strerror) == (errno.ENXIO, "the controller has no active namespace 9")
    assert read_back(opened(), 0, PAGE)


def test_one_process_opens_a_target_once(queue: Queue, opened: OpenQueue, target: str) -> None:
    error = refusal(target)
    assert (error.errno, error.strerror) == (errno.EBUSY, "this process has the controller open already")
    assert read_back(queue, 0, PAGE)
    queue.close()
    assert read_back(opened(), 0, PAGE)


def test_a_folder_with_nothing_in_it(spdk_env: Environment) -> None:
    with tempfile.TemporaryDirectory() as folder:
        error = refusal(f"trtype:VFIOUSER traddr:{folder}")
    assert error.errno == errno.ENOTCONN
    assert str(error.strerror).startswith(f"cannot connect: Access path {folder}/cntrl failed")


def test_nobody_listens(spdk_env: Environment) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        error = refusal(
            f"trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:{port} subnqn:nqn.2016-06.io.spdk:nothing"
        )
    assert error.errno == errno.ENOTCONN
    assert str(error.strerror).startswith("cannot connect: ")
    assert "Connection refused" in str(error)


@pytest.mark.parametrize("nonsense", ["nonsense", "trtype", "traddr:/tmp nsid"])
def test_nonsense(spdk_env: Environment, nonsense: str) -> None:
    error = refusal(nonsense)
    assert (error.errno, error.strerror) == (errno.EINVAL, "SPDK cannot read the transport id, or a key")


@pytest.mark.parametrize("unknown", ["", "trtype:CARRIERPIGEON traddr:1.2.3.4"], ids=["none", "unknown"])
def test_a_transport_that_is_not_there(spdk_env: Environment, unknown: str) -> None:
    assert re.search(r"cannot connect: .*NVMe trtype .* not available", str(refusal(unknown)))


HOLD = """
import sys
from spdk_glue import *
start_environment(64 << 20, hugepages=False, pci=False)
queue = Queue.nvme({target!r})
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process(opened: OpenQueue, transport: str, target: str) -> None:
    """TCP serves any number of clients, a vfio-user controller one."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD.format(target=target)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as other:  # fmt: skip
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        if transport == "tcp":
            assert read_back(opened(), 0, PAGE)
        else:
            begun = time.monotonic()
            with pytest.raises(
                GlueError, match=r"no connection within 1\.5 s; .* serves one client"
            ) as caught:
                opened(nvme=NvmeOptions(timeout_s=2, admin_s=0.5, open_s=1.5))
            assert caught.value.errno == errno.ETIMEDOUT
            assert 1.4 < time.monotonic() - begun < 4
        other.stdin.close()
        assert other.wait(30) == 0
    if transport == "vfio-user":
        assert opens_at_last(opened)


def opens_at_last(opened: OpenQueue) -> bool:
    """The attempt that was given up has the controller for a moment once it is free."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            return bool(read_back(opened(), 0, PAGE))
        except GlueError as error:
            assert error.errno == errno.EBUSY  # noqa: PT017
            time.sleep(0.05)
    return False


# nothing is left ----------------------------------------------------------------------------------


def test_opening_and_closing_leaves_nothing(opened: OpenQueue, regions: Regions) -> None:
    region = regions(MIB)
    opened().close()
    before, fds = tasks(), descriptors()
    for _ in range(20):
        with opened() as queue:
            queue.submit(READ, [plain(0, region.address, MIB)])
    assert ended(before)
    assert descriptors() == fds


# an idle queue ------------------------------------------------------------------------------------


def test_an_idle_queue_takes_no_cpu(queue: Queue) -> None:
    read_back(queue)
    time.sleep(0.3)  # the flush in the pause
    before = queue.stats().cpu_s
    time.sleep(2)
    assert queue.stats().cpu_s - before < 0.05 * 2


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp"])
def test_a_connection_is_kept_alive(queue: Queue) -> None:
    """A target forgets a client that is silent for 10 s."""
    read_back(queue)
    time.sleep(12)
    assert read_back(queue, 0, PAGE)
    medium = queue.medium()
    assert medium is not None
    assert medium.recoveries == 0
