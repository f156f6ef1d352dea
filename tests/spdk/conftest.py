# SPDX-License-Identifier: Apache-2.0
"""Emulated targets for tests: one that all share, and one to break. Queues on the shared one."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from traces import Traces

from dualblade.emulate import EmulatedTarget
from dualblade.units import MIB
from spdk_glue import Environment, NvmeOptions, Queue, QueueOptions, Region, start_environment

DISK = 64 * MIB
IMPATIENT = NvmeOptions(timeout_s=2, admin_s=0.5)
OpenQueue = Callable[..., Queue]


@pytest.fixture
def nothing_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traces]:
    """Targets of this test, and of programs it starts, keep their files in a folder of their own. After
    the test no process, socket, file or hugepage of them may be left."""
    tmp_path_factory.getbasetemp()  # made now, so that it is not made below the folder
    base = Path(tempfile.mkdtemp(prefix="db-"))
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setenv("TMPDIR", str(base))
    traces = Traces(base)
    yield traces
    left = traces.left()
    shutil.rmtree(base)
    assert left == []


@pytest.fixture(scope="session")
def shared_target() -> Iterator[EmulatedTarget]:
    """For tests that leave it as it is, but for disks and exports under names of their own."""
    with EmulatedTarget(memory_mib=256, hugepages=False) as emulated:
        yield emulated


@pytest.fixture
def fresh_target(nothing_left: Traces) -> Iterator[EmulatedTarget]:
    """For tests that kill, stop or misconfigure it."""
    with EmulatedTarget(memory_mib=64, hugepages=False) as emulated:
        yield emulated


# SPDK's driver in this process ------------------------------------------------------------------


@pytest.fixture(scope="session")
def spdk_env() -> Environment:
    """The one of this process: who asks for another gets this one."""
    return start_environment(768 * MIB, hugepages=False, pci=False)


@pytest.fixture(scope="module")
def disk(shared_target: EmulatedTarget, request: pytest.FixtureRequest) -> Iterator[str]:
    """Of DISK bytes in memory, for one file of tests."""
    name = request.module.__name__.rpartition(".")[2]
    yield shared_target.malloc(name, DISK)
    shared_target.call("bdev_malloc_delete", name=name)


@pytest.fixture(params=["vfio-user", "tcp"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def targets(shared_target: EmulatedTarget, disk: str) -> dict[str, str]:
    """The disk's TARGET over each transport."""
    return {transport: shared_target.export(disk, transport) for transport in ("vfio-user", "tcp")}


@pytest.fixture
def target(targets: dict[str, str], transport: str) -> str:
    return targets[transport]


@pytest.fixture
def opened(target: str, spdk_env: Environment) -> Iterator[OpenQueue]:
    """Opens a queue, which is closed after the test at the latest."""
    with ExitStack() as stack:

        def opened(options: QueueOptions = QueueOptions(), nvme: NvmeOptions = IMPATIENT) -> Queue:
            return stack.enter_context(Queue.nvme(target, options, nvme))

        yield opened


@pytest.fixture
def queue(opened: OpenQueue) -> Queue:
    return opened()


@pytest.fixture
def regions(spdk_env: Environment) -> Iterator[Callable[[int], Region]]:
    """Makes regions of the environment's memory that live as long as the test."""
    with ExitStack() as stack:
        yield lambda nbytes: stack.enter_context(Region(nbytes, of_env=True))
