# SPDX-License-Identifier: Apache-2.0
"""A drive that stays the kernel's: io_uring with O_DIRECT on its block device."""

from __future__ import annotations

import os

import pytest
from drives import MIB, Drive, dualblade, record

pytestmark = [pytest.mark.needs("qemu", "uring"), pytest.mark.machine("iommu")]


def test_the_engine_reads_what_it_wrote(spare: Drive) -> None:
    from spdk_glue import READ, WRITE, Queue, Region, plain

    noise = os.urandom(3 * MIB)
    fd = os.open(spare.block, os.O_RDWR | os.O_DIRECT)
    with Region(len(noise)) as region, Queue.files([fd], engine="uring") as queue:
        region.buffer(0, len(noise))[:] = noise
        queue.run(WRITE, [plain(20 * MIB, region.address, len(noise))])
        region.buffer(0, len(noise))[:] = bytes(len(noise))
        queue.run(READ, [plain(20 * MIB, region.address, len(noise))])
        assert bytes(region.buffer(0, len(noise))) == noise
    os.close(fd)
    assert spare.bytes_of(20 * MIB, len(noise)) == noise


def test_a_volume_is_made_checked_and_wiped(spare: Drive) -> None:
    assert "volume create" in dualblade("volume", "check", spare.block, code=1)
    assert record("volume", "create", spare.block)["serial"] == "SPARE0"
    assert record("volume", "check", spare.block)["problems"] == []
    assert any(spare.bytes_of(0, MIB))
    dualblade("volume", "wipe", spare.block)
    assert not any(spare.bytes_of(0, MIB))
