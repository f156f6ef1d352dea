# SPDX-License-Identifier: Apache-2.0
"""SPDK's driver beside the rest of a process: threads, output, SIGBUS, fork, the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from media import noise, python, read_back, write_bytes

from dualblade.emulate import free_hugepages
from spdk_glue import PAGE, Environment, NvmeOptions, Queue

pytestmark = pytest.mark.needs("spdk")

START = """
import errno, gc, os, sys, threading
from spdk_glue import *
IMPATIENT = NvmeOptions(timeout_s=2, admin_s=0.5)
def start():
    return start_environment(64 << 20, hugepages=False, pci=False)
"""
OPEN = START + """
start()
queue = Queue.nvme({target!r}, nvme=IMPATIENT)
region = Region(1 << 20, of_env=True)
whole = [plain(0, region.address, region.size)]
"""  # fmt: skip


def run(code: str, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False
    )


# threads, output --------------------------------------------------------------------------------


def test_no_thread_is_pinned(target: str) -> None:
    code = START + f"""
before = os.sched_getaffinity(0)
start()
queue = Queue.nvme({target!r}, nvme=IMPATIENT)
later = []
thread = threading.Thread(target=lambda: later.append(os.sched_getaffinity(0)))
thread.start()
thread.join()
assert os.sched_getaffinity(0) == before == later[0], (before, later)
queue.close()
print("free")
"""  # fmt: skip
    assert python(code) == "free\n"


def test_nothing_is_printed(target: str) -> None:
    """Not while starting, failing to connect, transferring and closing. What is there to say is kept."""
    code = START + f"""
start()
told = []
nowhere = [
    "trtype:VFIOUSER traddr:/nowhere",
    "trtype:TCP adrfam:IPv4 traddr:127.0.0.1 trsvcid:1 subnqn:nqn.2016-06.io.spdk:x",
    "nonsense",
]
for name in nowhere:
    try:
        Queue.nvme(name, nvme=IMPATIENT)
    except GlueError as error:
        told.append(str(error))
assert len(told) == len(nowhere)
with Queue.nvme({target!r}, nvme=IMPATIENT) as queue, Region(PAGE, of_env=True) as region:
    for offset in (0, 1 << 40):
        try:
            queue.run(READ, [plain(offset, region.address, PAGE)])
        except TransferError:
            assert offset
"""  # fmt: skip
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_second_start_returns_the_first() -> None:
    code = START + """
first = start()
second = start_environment(1 << 20, hugepages=True, pci=True)
print(second is first is environment(), second.nbytes >> 20, second.hugepages)
"""  # fmt: skip
    assert python(code) == "True 64 False\n"


def test_no_folder_is_left() -> None:
    code = START + 'start()\nprint(os.getpid(), os.environ.get("XDG_RUNTIME_DIR", "/tmp"))'
    pid, runtime = python(code).split()
    left = [
        path
        for base in ("/run/dpdk", "/var/run/dpdk", f"{runtime}/dpdk")
        for path in Path(base).glob(f"*{pid}*")
    ]
    assert left == []


# SIGBUS -----------------------------------------------------------------------------------------

TRUNCATED = """
import mmap, os, sys, tempfile
with tempfile.TemporaryFile() as file:
    file.truncate(8192)
    view = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    view[4096]
"""
BEFORE = {
    "imported": "import spdk_glue\n",
    "started": START + "start()\n",
    "faulthandler": "import faulthandler; faulthandler.enable()\n" + START + "start()\n",
    "faulthandler after": START + "start()\nimport faulthandler; faulthandler.enable()\n",
}


@pytest.mark.parametrize("before", BEFORE)
def test_a_truncated_mapping_ends_the_process(before: str) -> None:
    """SPDK's handler would return to the access that fails, for ever."""
    done = run(BEFORE[before] + TRUNCATED, timeout=20)
    assert done.returncode == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in done.stderr) == before.startswith("faulthandler")


def test_a_truncated_mapping_ends_a_process_with_a_queue(target: str) -> None:
    assert run(OPEN.format(target=target) + TRUNCATED, timeout=20).returncode == -signal.SIGBUS


# fork -------------------------------------------------------------------------------------------

FORK = OPEN + """
region.buffer()[:] = b"p" * region.size
queue.run(WRITE, whole)
child = os.fork()
if not child:
    for use in (lambda: queue.run(READ, whole), queue.stats, queue.flush, queue.poll, queue.medium):
        try:
            use()
            os._exit(1)
        except GlueError as error:
            if error.errno != errno.ECHILD:
                os._exit(2)
    for use in (lambda: Region(PAGE, of_env=True), lambda: Queue.nvme({target!r}, nvme=IMPATIENT)):
        try:
            use()
            os._exit(3)
        except GlueError as error:
            if error.errno != errno.ECHILD:
                os._exit(4)
    queue.close()
    region.close()
    del queue, region, use
    gc.collect()
    {end}
assert os.waitpid(child, 0)[1] == 0
assert bytes(region.buffer()) == b"p" * region.size
with Region(region.size, of_env=True) as other:  # not the same memory again
    other.buffer()[:] = b"o" * other.size
    assert bytes(region.buffer()) == b"p" * region.size
region.buffer()[:] = bytes(region.size)
queue.run(READ, whole)
assert bytes(region.buffer()) == b"p" * region.size
assert queue.close() == 0
print("parent is well")
"""  # fmt: skip


@pytest.mark.parametrize("end", ["os._exit(0)", "sys.exit(0)"])
def test_a_child_leaves_the_parent_alone(target: str, end: str) -> None:
    assert python(FORK.format(target=target, end=end)) == "parent is well\n"


# the end ----------------------------------------------------------------------------------------


def test_a_process_may_end_with_transfers_in_flight(target: str) -> None:
    code = OPEN.format(target=target) + """
for _ in range(200):
    queue.submit(READ, whole)
print("end", flush=True)
"""  # fmt: skip
    begun = time.monotonic()
    done = run(code, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")
    assert time.monotonic() - begun < 10


def test_a_killed_process_leaves_the_target_usable(target: str, spdk_env: Environment) -> None:
    code = OPEN.format(target=target) + """
print("busy", flush=True)
while True:
    queue.submit(READ, whole)
"""  # fmt: skip
    free = free_hugepages()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "busy\n"
        time.sleep(0.1)
        other.kill()
    data = noise(64 * PAGE).tobytes()
    with Queue.nvme(target, nvme=NvmeOptions(timeout_s=2, admin_s=0.5)) as queue:
        write_bytes(queue, 0, data)
        assert read_back(queue, 0, len(data)) == data
    assert free_hugepages() == free
