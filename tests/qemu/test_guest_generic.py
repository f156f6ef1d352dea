# SPDX-License-Identifier: Apache-2.0
"""NVMe commands through io_uring to /dev/ng1n1, checked through the block device."""

from __future__ import annotations

import os
import sys

import pytest
from drives import MIB, Drive, call, drives

pytestmark = [pytest.mark.needs("qemu", "uring")]


@pytest.mark.machine("iommu")
def test_the_block_device_has_what_commands_wrote_and_they_read_what_it_wrote(spare: Drive) -> None:
    from spdk_glue import FLUSH, READ, WRITE, Queue, Region, plain

    sent, put = os.urandom(3 * MIB), os.urandom(MIB)
    fd = os.open(spare.generic, os.O_RDWR)
    with Region(len(sent)) as region, Queue.nvme_generic(fd) as queue:
        region.buffer(0, len(sent))[:] = sent
        queue.run(WRITE, [plain(20 * MIB, region.address, len(sent))])
        queue.run(FLUSH, [plain(0, 0, 0)])
        assert spare.bytes_of(20 * MIB, len(sent)) == sent
        spare.write(30 * MIB, put)
        queue.run(READ, [plain(30 * MIB, region.address, len(put))])
        assert bytes(region.buffer(0, len(put))) == put
    os.close(fd)


@pytest.mark.machine("no-iommu")
@pytest.mark.parametrize(
    "tests",
    [
        pytest.param(["tests/glue/test_nvme_generic.py"], id="its_own"),
        pytest.param(["tests/glue", "-k", "uring_cmd"], id="those_of_every_engine"),
        pytest.param(["tests/paths/test_target_generic.py"], id="targets", marks=pytest.mark.slow),
    ],
)
def test_the_suites_that_want_a_spare_namespace(spare: Drive, tests: list[str]) -> None:
    own = {
        "DUALBLADE_TEST_NG": str(spare.generic),
        "DUALBLADE_TEST_NG_METADATA": str(drives()["META0"].generic),
        "REQUIRE": "nvme_generic",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    print(call(*words, env=os.environ | own, seconds=600))
