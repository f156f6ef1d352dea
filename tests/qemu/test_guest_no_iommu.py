# SPDX-License-Identifier: Apache-2.0
"""A machine without an IOMMU: vfio-pci is refused, uio is there for who asks by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from drives import MIB, Drive, host, in_child, record, state
from test_guest_bind import same_but_for
from test_guest_spdk import through_spdk

from dualblade.host import bind as binding

UIO = ("--driver", "uio_pci_generic")
pytestmark = [pytest.mark.needs("qemu"), pytest.mark.machine("no-iommu")]


def test_vfio_is_refused_and_the_way_out_is_named(blank: Drive) -> None:
    before = state()
    told = host("bind", blank.block, "--serial", "BLANK0", "--yes", code=1)
    assert "no IOMMU" in told
    assert "--driver uio_pci_generic" in told
    assert state() == before


def test_what_the_kernel_refuses_after_all_is_undone(blank: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    """vfio-pci's probe fails here, whatever we think of the machine."""
    before = state()
    monkeypatch.setattr(binding, "unfit", lambda *words: [])
    told = host("bind", blank.block, "--serial", "BLANK0", "--yes", code=1)
    assert "vfio-pci did not take" in told
    blank.wait()
    assert same_but_for(before, blank)


def test_uio_by_its_flag_with_its_warning(blank: Drive) -> None:
    digest, node = blank.digest(), blank.block
    told = record("bind", node, "--serial", "BLANK0", "--yes", *UIO, program=host)
    assert "no protection" in told["notes"][0]
    assert blank.driver == "uio_pci_generic"
    assert Path("/dev/uio0").is_char_device()
    host("unbind", node)
    blank.wait()
    assert blank.digest() == digest


@pytest.mark.needs("spdk")
def test_spdk_through_uio(blank: Drive) -> None:
    offset, first, second = 16 * MIB, os.urandom(MIB), os.urandom(MIB)
    blank.write(offset, first)
    host("hugepages", "--reserve", "128M")
    record("bind", blank.block, "--serial", "BLANK0", "--yes", *UIO, program=host)
    assert in_child(lambda: through_spdk(blank, offset, second, first, True)) == 0
    host("unbind", blank.address)
    blank.wait()
    host("hugepages", "--release")
    assert blank.bytes_of(offset, MIB) == second
