# SPDX-License-Identifier: Apache-2.0
"""PCI functions as sysfs shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dualblade.host.journal import DEVICES
from dualblade.host.sysfs import Host

NVME_CLASS = "0x010802"
_BRIDGE_CLASSES = ("0x0600", "0x0601", "0x0604")
# What else may be in a group that VFIO takes: nothing at all, itself, and drivers that do no DMA.
_HARMLESS_DRIVERS = frozenset({"vfio-pci", "pci-stub", "pcieport"})
_ADDRESS = re.compile(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}):([01][0-9a-f])\.([0-7])", re.IGNORECASE)
_VMD_DOMAINS = 0x10000


@dataclass(frozen=True, slots=True)
class PciDevice:
    """One function. bdf: e.g. "0000:01:00.0". group: number of its IOMMU group, None without an IOMMU.

    numa_node: None where the machine has but one, or does not tell. virtual_functions: how many it has
    switched on.
    """

    bdf: str
    pci_class: str
    vendor: str
    device: str
    driver: str | None
    override: str | None
    group: str | None
    group_type: str
    numa_node: int | None
    virtual_functions: int

    @property
    def is_nvme(self) -> bool:
        return self.pci_class == NVME_CLASS

    @property
    def behind_vmd(self) -> bool:
        """Intel's Volume Management Device numbers its own domains above all others."""
        return int(self.bdf.split(":")[0], 16) >= _VMD_DOMAINS


def parse_address(text: str) -> str | None:
    """ "0000:01:00.0" of that or of "01:00.0"; None where it is no PCI address."""
    match = _ADDRESS.fullmatch(text)
    return f"{match[1] or '0000'}:{match[2]}:{match[3]}.{match[4]}".lower() if match else None


def pci_device(host: Host, bdf: str) -> PciDevice | None:
    """None where there is no such device."""
    folder = f"{DEVICES}/{bdf}"
    if not host.exists(folder):
        return None
    group = host.link_name(f"{folder}/iommu_group")
    return PciDevice(
        bdf, host.attribute(f"{folder}/class"), host.attribute(f"{folder}/vendor"),
        host.attribute(f"{folder}/device"), host.link_name(f"{folder}/driver"), _override(host, folder),
        group, host.attribute(f"/sys/kernel/iommu_groups/{group}/type") if group else "",
        _numa_node(host, folder), int(host.attribute(f"{folder}/sriov_numvfs") or 0),
    )  # fmt: skip


def nvme_devices(host: Host) -> list[PciDevice]:
    found = (pci_device(host, bdf) for bdf in host.names(DEVICES))
    return [device for device in found if device is not None and device.is_nvme]


def obstacles_in_group(host: Host, device: PciDevice) -> list[PciDevice]:
    """Other functions of its IOMMU group that keep VFIO from handing the group out."""
    names = host.names(f"/sys/kernel/iommu_groups/{device.group}/devices") if device.group else []
    others = (pci_device(host, name) for name in names if name != device.bdf)
    return [other for other in others if other is not None and not _harmless(other)]


def _harmless(device: PciDevice) -> bool:
    bridge = device.pci_class.startswith(_BRIDGE_CLASSES)
    return device.driver is None or device.driver in _HARMLESS_DRIVERS or bridge


def _override(host: Host, folder: str) -> str | None:
    value = host.attribute(f"{folder}/driver_override")
    return value if value not in ("", "(null)") else None


def _numa_node(host: Host, folder: str) -> int | None:
    text = host.attribute(f"{folder}/numa_node")
    return int(text) if text.isdecimal() else None
