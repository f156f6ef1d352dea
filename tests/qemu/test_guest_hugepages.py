# SPDX-License-Identifier: Apache-2.0
"""Hugepages: what is granted is what the kernel says, and they go back."""

from __future__ import annotations

from pathlib import Path

import pytest
from drives import MIB, host, record

pytestmark = [pytest.mark.needs("qemu"), pytest.mark.machine("iommu")]
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def granted() -> int:
    return int((POOL / "nr_hugepages").read_text())


def test_hugepages_are_reserved_and_given_back() -> None:
    assert granted() == 0
    change = record("hugepages", "--reserve", "64M", program=host)["change"]
    assert change == {"before_bytes": 0, "after_bytes": 64 * MIB, "wanted_bytes": 64 * MIB}
    assert granted() == 32
    assert record("hugepages", "--reserve", "32M", program=host)["change"]["after_bytes"] == 64 * MIB
    host("hugepages", "--release")
    assert granted() == 0


def test_more_than_the_machine_has_is_refused() -> None:
    assert "are too much" in host("hugepages", "--reserve", "64G", code=1)
    assert granted() == 0
