# SPDX-License-Identifier: Apache-2.0
"""Every way in which a controller can fail ends in an error, or in the bytes that were written."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from traces import Traces

from dualblade.emulate import EmulatedTarget
from dualblade.targets import parse_target
from dualblade.units import MIB
from spdk_glue import (
    READ,
    WRITE,
    Completion,
    NvmeOptions,
    Queue,
    QueueOptions,
    Region,
    TransferError,
    plain,
    start_environment,
)

pytestmark = pytest.mark.needs("spdk")

NBYTES = 8 * MIB
TIMEOUT_S = 1.5
BOTH = pytest.mark.parametrize("transport", ["vfio-user", "tcp"])
Build = Callable[[EmulatedTarget], str]


def disk(emulated: EmulatedTarget) -> str:
    return emulated.malloc("m0", 32 * MIB)


def slow_disk(emulated: EmulatedTarget) -> str:
    return emulated.delay("d0", disk(emulated), 10)


def failing_disk(emulated: EmulatedTarget) -> str:
    return emulated.error(disk(emulated))


class Client:
    """A queue on a fresh target, and bytes that were written and read back once."""

    def __init__(self, emulated: EmulatedTarget, build: Build, transport: str):
        self.emulated = emulated
        self.bdev = build(emulated)
        self.target = emulated.export(self.bdev, transport)
        start_environment(768 * MIB, hugepages=False, pci=False)
        nvme = NvmeOptions(timeout_s=TIMEOUT_S, admin_s=0.5)
        self.queue = Queue.nvme(parse_target(self.target).address, QueueOptions(drain_ms=2000), nvme)
        self.region = Region(NBYTES, of_env=True)
        self.bytes = np.frombuffer(self.region.buffer(), np.uint8)
        self.written = np.random.default_rng(5).integers(0, 256, NBYTES, np.uint8)
        self.bytes[:] = self.written
        self.queue.run(WRITE, [plain(0, self.region.address, NBYTES)])
        self.must_be_right()

    def read(self) -> None:
        self.bytes[:] = 0
        self.queue.run(READ, [plain(0, self.region.address, NBYTES)], 40)

    def must_be_right(self) -> None:
        self.read()
        assert (self.bytes == self.written).all()

    def must_fail(self, says: str) -> Completion:
        with pytest.raises(TransferError, match=says) as caught:
            self.read()
        return caught.value.completion

    def must_be_over(self) -> None:
        """It stays so, and says so at once."""
        begun = time.monotonic()
        with pytest.raises(TransferError):
            self.read()
        assert time.monotonic() - begun < 1

    def close(self) -> None:
        self.region.abandon() if self.queue.close() else self.region.close()

    @property
    def nqn(self) -> str:
        return f"nqn.2016-06.io.spdk:dualblade-{self.bdev}"


@pytest.fixture
def client(fresh_target: EmulatedTarget) -> Iterator[Callable[..., Client]]:
    made: list[Client] = []

    def make(transport: str, build: Build = disk) -> Client:
        made.append(Client(fresh_target, build, transport))
        return made[-1]

    yield make
    for one in made:
        one.close()


# the target ---------------------------------------------------------------------------------


def test_a_vfio_user_target_that_is_killed(client: Callable[..., Client], nothing_left: Traces) -> None:
    """Nothing answers; the kernel's list of sockets tells. Its process is gone, but that is not known
    of a device in general, so the memory stays where it is."""
    held = client("vfio-user")
    held.emulated.kill()
    begun = time.monotonic()
    assert held.must_fail("does not answer any more").memory_at_risk
    assert time.monotonic() - begun < TIMEOUT_S
    held.must_be_over()
    assert held.queue.close() == 1


def test_a_tcp_target_that_is_killed(client: Callable[..., Client]) -> None:
    held = client("tcp")
    held.queue.flush()
    held.emulated.kill()
    assert not held.must_fail("does not answer any more").memory_at_risk
    held.must_be_over()


@BOTH
def test_a_target_that_stops_and_goes_on(client: Callable[..., Client], transport: str) -> None:
    held = client(transport)
    held.emulated.stop()
    threading.Timer(0.6, held.emulated.cont).start()
    held.must_be_right()


@BOTH
def test_a_target_that_stops_for_good(client: Callable[..., Client], transport: str) -> None:
    """What was under way may still be carried out once it goes on: vfio-user writes to our memory."""
    held = client(transport)
    held.queue.flush()
    held.emulated.stop()
    try:
        begun = time.monotonic()
        completion = held.must_fail("does not answer any more")
        assert time.monotonic() - begun < 20
        assert completion.memory_at_risk == (transport == "vfio-user")
        held.must_be_over()
        assert held.queue.close() == (1 if transport == "vfio-user" else 0)
    finally:
        held.emulated.cont()


def test_a_connection_that_comes_back(client: Callable[..., Client]) -> None:
    """The writes were flushed before, in a pause, so what is there is what was written."""
    held = client("tcp")
    time.sleep(0.5)
    address = {**_listener(held), "trtype": "TCP"}
    held.emulated.rpc.nvmf_subsystem_remove_listener(nqn=held.nqn, listen_address=address)
    threading.Timer(
        0.3, lambda: held.emulated.rpc.nvmf_subsystem_add_listener(nqn=held.nqn, listen_address=address)
    ).start()
    held.must_be_right()
    medium = held.queue.medium()
    assert medium is not None
    assert medium.recoveries >= 1


def test_a_connection_that_is_lost_before_the_writes_are_durable(client: Callable[..., Client]) -> None:
    held = client("tcp")
    held.bytes[:] = held.written
    held.queue.run(WRITE, [plain(0, held.region.address, NBYTES)])
    address = {**_listener(held), "trtype": "TCP"}
    held.emulated.rpc.nvmf_subsystem_remove_listener(nqn=held.nqn, listen_address=address)
    held.must_fail("before the last writes were durable")
    held.must_be_over()


def test_a_target_that_was_started_anew(client: Callable[..., Client]) -> None:
    """Same address, same name, same size: but its memory is all zeros, which is never served."""
    held = client("tcp")
    held.queue.flush()
    held.emulated.restart()
    held.must_fail("leads elsewhere now|does not answer")
    held.must_be_over()


def test_a_vfio_user_listener_that_is_removed(client: Callable[..., Client]) -> None:
    held = client("vfio-user")
    address = {"trtype": "VFIOUSER", "traddr": str(held.emulated.folder / "c0"), "trsvcid": "0"}
    held.emulated.rpc.nvmf_subsystem_remove_listener(nqn=held.nqn, listen_address=address)
    held.must_fail("does not answer any more")
    held.must_be_over()


def _listener(held: Client) -> dict[str, str]:
    parts = dict(word.split(":", 1) for word in held.target.split())
    return {key: parts[key] for key in ("adrfam", "traddr", "trsvcid")}


# the namespace ------------------------------------------------------------------------------


@BOTH
def test_a_namespace_that_goes_and_comes_back(client: Callable[..., Client], transport: str) -> None:
    """What came back may be another one, so this queue is over; a new one may open it."""
    held = client(transport)
    held.emulated.rpc.nvmf_subsystem_remove_ns(nqn=held.nqn, nsid=1)
    held.must_fail("the namespace is gone")
    held.emulated.rpc.nvmf_subsystem_add_ns(nqn=held.nqn, namespace={"bdev_name": held.bdev, "nsid": 1})
    held.must_be_over()
    held.queue.close()
    held.queue = Queue.nvme(parse_target(held.target).address)
    held.must_be_right()


@BOTH
def test_a_namespace_that_becomes_another_one(client: Callable[..., Client], transport: str) -> None:
    """Same number, same size, other bytes: noticed before anything is served."""
    held = client(transport)
    other = held.emulated.malloc("m1", 32 * MIB)
    held.emulated.rpc.nvmf_subsystem_remove_ns(nqn=held.nqn, nsid=1)
    held.emulated.rpc.nvmf_subsystem_add_ns(nqn=held.nqn, namespace={"bdev_name": other, "nsid": 1})
    held.must_fail("is another one now")
    held.must_be_over()


# commands -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("injected", "status"),
    [
        ({"error_type": "nvme_failure", "nvme_sct": 2, "nvme_sc": 0x81}, (2, 0x81)),
        ({"error_type": "failure"}, (0, 0x06)),
    ],
    ids=["media error", "failure"],
)
def test_a_status_is_told_and_the_next_command_works(
    client: Callable[..., Client], transport: str, injected: dict[str, object], status: tuple[int, int]
) -> None:
    held = client(transport, failing_disk)
    held.emulated.rpc.bdev_error_inject_error(name=held.bdev, io_type="read", num=1, **injected)
    completion = held.must_fail("Input/output error")
    assert (completion.sct, completion.sc) == status
    assert 0 <= completion.offset < NBYTES
    held.must_be_right()


@BOTH
def test_a_command_that_is_too_slow_is_aborted(client: Callable[..., Client], transport: str) -> None:
    held = client(transport, slow_disk)
    held.queue.flush()
    _latency(held, 60_000_000)
    begun = time.monotonic()
    completion = held.must_fail("took too long and was aborted")
    assert time.monotonic() - begun < 6 * TIMEOUT_S
    assert not completion.memory_at_risk
    _latency(held, 10)


@BOTH
def test_a_command_that_is_slow_but_not_too_slow(client: Callable[..., Client], transport: str) -> None:
    held = client(transport, slow_disk)
    _latency(held, 200_000)
    held.must_be_right()


def _latency(held: Client, microseconds: int) -> None:
    for kind in ("avg_read", "p99_read"):
        held.emulated.rpc.bdev_delay_update_latency(
            delay_bdev_name="d0", latency_type=kind, latency_us=microseconds
        )


def test_a_command_that_nothing_aborts_ends_with_a_reset(client: Callable[..., Client]) -> None:
    """The target keeps it for ever; only the reset of its controller lets go of the memory."""
    held = client("vfio-user", failing_disk)
    held.emulated.rpc.bdev_error_inject_error(name=held.bdev, io_type="read", error_type="pending", num=1)
    completion = held.must_fail("took too long")
    assert not completion.memory_at_risk
    held.must_be_right()
    medium = held.queue.medium()
    assert medium is not None
    assert medium.recoveries == 1
