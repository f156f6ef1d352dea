# SPDX-License-Identifier: Apache-2.0
"""Targets as users write them."""

from __future__ import annotations

import pytest

from dualblade.errors import UsageError
from dualblade.extents import LBA
from dualblade.targets import TargetKind, parse_target


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("kv.img", TargetKind.FILE),
        ("/mnt/nvme/kv.img", TargetKind.FILE),
        ("/dev/shm/kv.img", TargetKind.FILE),
        ("./01:00.0", TargetKind.FILE),
        ("/dev/nvme1n1", TargetKind.BLOCK),
        ("/dev/nvme1n1p2", TargetKind.BLOCK),
        ("/dev/disk/by-id/nvme-X", TargetKind.BLOCK),
        ("/dev/ng1n1", TargetKind.PASSTHROUGH),
        ("0000:01:00.0", TargetKind.PCI),
        ("trtype:VFIOUSER traddr:/run/vfio", TargetKind.TRANSPORT),
        ("mem:64M", TargetKind.MEMORY),
    ],
)
def test_kinds(text: str, kind: TargetKind) -> None:
    assert parse_target(text).kind is kind
    assert parse_target(text).text == text


def test_parts_of_a_target() -> None:
    tcp = parse_target(
        "trtype:TCP adrfam:IPv6 traddr:fe80::1 trsvcid:4420 subnqn:nqn.2016-06.io.spdk:cnode1 ns:3"
    )
    assert (tcp.namespace, tcp.address.split()[2]) == (3, "traddr:fe80::1")
    assert "subnqn:nqn.2016-06.io.spdk:cnode1" in tcp.address
    assert "ns:" not in tcp.address
    for text in ("0000:AF:00.1 ns:2", "af:00.1 ns:2"):  # as `bind` takes it, and lspci shows it
        pci = parse_target(text)
        assert (pci.address, pci.namespace) == ("trtype:PCIe traddr:0000:af:00.1", 2)
    assert parse_target("mem:5.5K").capacity == LBA


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a target"),
        ("a\0b", "not a target"),
        ("mem:", "not a size"),
        ("mem:64", "not a size"),
        ("mem:1K", "too small"),
        ("trtype:TCP traddr:10.0.0.1", "lacks adrfam, subnqn, trsvcid"),
        ("trtype:FLOPPY traddr:a", "none of PCIE"),
        ("trtype:VFIOUSER", "lacks traddr"),
        ("trtype:VFIOUSER traddr:/a traddr:/b", "makes no sense"),
        ("trtype:VFIOUSER traddr:/a colour:red", "makes no sense"),
        ("trtype:VFIOUSER traddr:/a ns:0", "not a namespace"),
        ("trtype:VFIOUSER traddr:/a ns:²", "not a namespace"),
        ("0000:01:00.0 ns:0", "not a namespace"),
    ],
)
def test_nonsense_is_a_usage_error(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_target(text)
