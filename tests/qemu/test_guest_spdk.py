# SPDX-License-Identifier: Apache-2.0
"""SPDK's driver on a drive that was bound, checked through the kernel's afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from drives import MIB, Drive, call, dualblade, host, in_child, record

from dualblade.host import bind as binding
from dualblade.host import unbind as unbinding
from dualblade.host.sysfs import Host

pytestmark = [pytest.mark.needs("qemu", "spdk"), pytest.mark.machine("iommu")]
HUGEPAGES = "256M"
RUN = [
    "run", "--model", "tiny", "--prompt-len", "200", "--max-new-tokens", "4", "--mem-budget", "1G",
    "--kv-path", "direct", "--seed", "7", "--json",
]  # fmt: skip


@pytest.fixture(scope="module")
def hugepages() -> Iterator[None]:
    host("hugepages", "--reserve", HUGEPAGES)
    yield
    host("hugepages", "--release")


def take(drive: Drive) -> None:
    record("bind", drive.address, "--serial", "BLANK0", "--yes", program=host)


def give_back(drive: Drive) -> None:
    host("unbind", drive.address)
    drive.wait()


def through_spdk(drive: Drive, offset: int, write: bytes, expect: bytes, huge: bool) -> None:
    """In a process of its own, since SPDK starts once: read `expect`, write, read again."""
    from spdk_glue import FLUSH, READ, WRITE, Queue, Region, plain
    from spdk_glue.env import start_environment

    start_environment((64 if huge else 128) * MIB, huge, True)
    with (
        Queue.nvme(f"trtype:PCIe traddr:{drive.address}") as queue,
        Region(len(write), of_env=True) as region,
    ):

        def read() -> bytes:
            queue.run(READ, [plain(offset, region.address, len(write))])
            return bytes(region.buffer(0, len(write)))

        assert read() == expect
        region.buffer(0, len(write))[:] = write
        queue.run(WRITE, [plain(offset, region.address, len(write))])
        queue.run(FLUSH, [plain(0, 0, 0)])
        region.buffer(0, len(write))[:] = bytes(len(write))
        assert read() == write


def test_without_hugepages_the_hint_leads_on(blank: Drive) -> None:
    take(blank)
    told = dualblade("volume", "show", blank.address, code=1)
    assert "SPDK needs" in told
    call("sh", "-c", told.partition("hint: ")[2])
    assert "volume create" in dualblade("volume", "show", blank.address, code=1)
    host("hugepages", "--release")


@pytest.mark.parametrize("huge", [True, False], ids=["hugepages", "ordinary_memory"])
def test_the_kernel_reads_what_spdk_wrote_and_spdk_what_the_kernel_wrote(
    blank: Drive, hugepages: None, huge: bool
) -> None:
    offset, first, second = 16 * MIB, os.urandom(3 * MIB), os.urandom(3 * MIB)
    blank.write(offset, first)
    take(blank)
    assert in_child(lambda: through_spdk(blank, offset, second, first, huge)) == 0
    give_back(blank)
    assert blank.bytes_of(offset, len(second)) == second


# fifty in one boot; a part at a time, since a guest that says nothing for long is taken for dead
@pytest.mark.parametrize("part", [1, *(pytest.param(part, marks=pytest.mark.slow) for part in (2, 3, 4, 5))])
def test_ten_cycles_with_transfers_in_between(blank: Drive, hugepages: None, part: int) -> None:
    offset, last = 16 * MIB, os.urandom(MIB)
    blank.write(offset, last)
    free, machine = free_hugepages(), Host()
    for _ in range(10):
        now = os.urandom(MIB)
        binding.bind(machine, binding.find_drive(machine, blank.address), binding.Wish())
        assert in_child(lambda: through_spdk(blank, offset, now, last, True)) == 0  # noqa: B023
        unbinding.unbind(machine, unbinding.find_binding(machine, blank.address))
        blank.wait()
        assert blank.bytes_of(offset, MIB) == now
        last = now
    assert free_hugepages() == free
    assert not [line for line in call("dmesg").splitlines() if "DMAR" in line and "fault" in line]


def free_hugepages() -> int:
    return int(Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").read_text())


@pytest.mark.slow  # torch alone takes a minute and more to load
def test_a_run_through_the_kernel_and_one_through_spdk(blank: Drive, hugepages: None, tmp_path: Path) -> None:
    """The same name before and after bind, and the same tokens."""
    node = blank.block

    def both() -> None:
        cli("volume", "create", str(node))
        cli(*RUN, "--nvme", str(node), "--report", str(tmp_path / "kernel"))
        take(blank)
        cli(*RUN, "--nvme", str(node), "--report", str(tmp_path / "spdk"))

    assert in_child(both) == 0
    kernel, spdk = (json.loads((tmp_path / name).read_text()) for name in ("kernel", "spdk"))
    assert [one["paths"]["direct"]["engine"] for one in (kernel, spdk)] == ["uring", "spdk"]
    assert spdk["paths"]["direct"]["write_bytes"] == kernel["paths"]["direct"]["write_bytes"] > 0
    assert spdk["token_ids"] == kernel["token_ids"]
    give_back(blank)
    assert record("volume", "check", node)["problems"] == []
    record("volume", "wipe", node)


def cli(*words: str) -> None:
    """A command of the whole program, in this process."""
    from dualblade.cli.main import main

    assert main(list(words)) == 0
