# SPDX-License-Identifier: Apache-2.0
"""SPDK's target as a child: what it exports, how it ends, and that nothing of it is left."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from traces import Traces, folders, processes

from dualblade.emulate import EmulatedTarget, free_hugepages
from dualblade.errors import TargetError
from dualblade.targets import TargetKind, parse_target
from dualblade.units import MIB

pytestmark = pytest.mark.needs("nvmf_tgt")
SIZE = 16 * MIB


def bdev(emulated: EmulatedTarget, name: str) -> dict[str, Any]:
    (found,) = emulated.rpc.bdev_get_bdevs(name=name)
    return found


def identify(target: str) -> str:
    """What SPDK's own client says of it."""
    if not shutil.which("spdk_nvme_identify"):
        pytest.skip("needs spdk_nvme_identify in PATH")
    with tempfile.TemporaryDirectory() as runtime:  # DPDK leaves a folder there
        done = subprocess.run(
            ["spdk_nvme_identify", "--no-huge", "-s", "128", "-r", target],
            capture_output=True, text=True, timeout=60, check=False,
            env=os.environ | {"RUNTIME_DIRECTORY": runtime},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split())


# disks --------------------------------------------------------------------------------------


def test_disks_in_memory_and_above(shared_target: EmulatedTarget) -> None:
    base = shared_target.malloc("base", SIZE)
    slow = shared_target.delay("slow", base, 700)
    shared_target.malloc("half", SIZE, block_size=512)
    found = bdev(shared_target, slow)
    assert found["num_blocks"] * found["block_size"] == SIZE
    latencies = found["driver_specific"]["delay"]
    assert {value for key, value in latencies.items() if key.endswith("latency")} <= {699, 700}  # ticks
    assert (bdev(shared_target, "half")["block_size"], bdev(shared_target, base)["block_size"]) == (512, 4096)


def test_a_disk_that_fails_on_demand(shared_target: EmulatedTarget) -> None:
    name = shared_target.error(shared_target.malloc("fragile", SIZE))
    assert name == "EE_fragile"
    shared_target.rpc.bdev_error_inject_error(name=name, io_type="read", error_type="failure", num=1)


@pytest.mark.parametrize("kind", ["uring", "aio", "file"])
def test_disks_on_files(shared_target: EmulatedTarget, direct_dir: Path, kind: str) -> None:
    path = direct_dir / f"{kind}.img"
    path.write_bytes(bytes(SIZE))
    name = f"on-{kind}"
    try:
        getattr(shared_target, kind)(name, path)
    except TargetError as error:
        if kind == "uring":
            pytest.skip(f"needs io_uring in the target: {error}")
        raise
    found = bdev(shared_target, name)
    assert found["num_blocks"] * found["block_size"] == SIZE
    shared_target.rpc.call(f"bdev_{found['product_name'].split()[0].lower()}_delete", {"name": name})


def test_what_the_target_refuses_is_told_in_its_words(shared_target: EmulatedTarget) -> None:
    with pytest.raises(TargetError, match=r"refuses bdev_malloc_create: .+"):
        shared_target.malloc("too-large", 1 << 40)
    with pytest.raises(TargetError, match=r"/nowhere/x cannot be used: .*bdev_uring_create.*bdev_aio_create"):
        shared_target.file("none", "/nowhere/x")
    assert shared_target.rpc.spdk_get_version()["version"].startswith("SPDK")


# export -------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["vfio-user", "tcp"])
def test_a_client_finds_the_controller(shared_target: EmulatedTarget, transport: str) -> None:
    target = shared_target.export(shared_target.malloc(f"seen-{transport}", SIZE), transport)
    assert parse_target(target).kind is TargetKind.TRANSPORT
    said = identify(target)
    assert f"Serial Number: EMULATED-seen-{transport}"[:35] in said
    assert f"Size (in LBAs): {SIZE // 4096} " in said


def test_one_disk_through_several_doors(shared_target: EmulatedTarget) -> None:
    shared_target.malloc("open", SIZE)
    targets = [shared_target.export("open", kind) for kind in ("vfio-user", "vfio-user", "tcp", "tcp")]
    assert len(set(targets)) == 4
    (subsystem,) = [
        found for found in shared_target.rpc.nvmf_get_subsystems() if found["nqn"].endswith("dualblade-open")
    ]
    assert len(subsystem["listen_addresses"]) == 4
    assert [space["bdev_name"] for space in subsystem["namespaces"]] == ["open"]


# life ---------------------------------------------------------------------------------------


def test_it_does_not_touch_the_default_paths(fresh_target: EmulatedTarget) -> None:
    assert not Path("/var/tmp/spdk.sock").exists()
    assert fresh_target.folder.stat().st_mode & 0o777 == 0o700
    assert (fresh_target.folder / "rpc.sock").is_socket()


def test_a_target_that_died(fresh_target: EmulatedTarget) -> None:
    fresh_target.rpc.spdk_kill_instance(sig_name="SIGKILL")
    with pytest.raises(TargetError, match="nvmf_tgt was killed by signal 9"):
        fresh_target.malloc("late", SIZE)
    with pytest.raises(TargetError, match="nvmf_tgt was killed by signal 9"):
        fresh_target.wait()


def test_restart_after_a_crash(fresh_target: EmulatedTarget) -> None:
    fresh_target.malloc("m0", SIZE)
    targets = [fresh_target.export("m0", kind) for kind in ("vfio-user", "tcp")]
    first = fresh_target.pid
    fresh_target.kill()
    fresh_target.restart()
    assert fresh_target.pid != first
    for target in targets:
        assert "Serial Number: EMULATED-m0" in identify(target)


def test_a_stopped_target_goes_on(fresh_target: EmulatedTarget) -> None:
    fresh_target.stop()
    fresh_target.cont()
    assert fresh_target.rpc.spdk_get_version()


def test_a_stopped_target_is_closed(fresh_target: EmulatedTarget) -> None:
    fresh_target.stop()
    started = time.monotonic()
    fresh_target.close()
    fresh_target.close()
    assert time.monotonic() - started < 5
    assert "not running" in repr(fresh_target)


def test_in_hugepages(nothing_left: Traces) -> None:
    free = free_hugepages()
    with EmulatedTarget(memory_mib=16) as emulated:
        if not emulated.hugepages:
            pytest.skip(f"needs 136 free hugepages of 2 MiB; there are {free}")
        emulated.export(emulated.malloc("m0", 8 * MIB))
        assert free_hugepages() < free


def test_it_ends_with_its_parent(nothing_left: Traces) -> None:
    code = (
        "import time\n"
        "from dualblade.emulate import EmulatedTarget\n"
        "with EmulatedTarget(memory_mib=0, hugepages=False) as emulated:\n"
        "    print(emulated.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        pid = int(parent.stdout.readline())
        assert processes(nothing_left.base) == [pid]
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5
    while processes(nothing_left.base) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes(nothing_left.base) == []
    for folder in folders(nothing_left.base):  # nobody was left to remove it; the next target does
        shutil.rmtree(folder)
