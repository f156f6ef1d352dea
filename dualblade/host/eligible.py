# SPDX-License-Identifier: Apache-2.0
"""Can this PCI function be handed to a userspace driver at all, whatever lies on the drive?"""

from __future__ import annotations

from collections.abc import Sequence

from dualblade.host.command import as_root, host_command
from dualblade.host.inuse import Refusal
from dualblade.host.nvme import Controller, controllers
from dualblade.host.pci import PciDevice, obstacles_in_group
from dualblade.host.sysfs import Host

VFIO, UIO = "vfio-pci", "uio_pci_generic"


def unfit(
    host: Host,
    device: PciDevice,
    controller: Controller,
    driver: str,
    then: frozenset[str] = frozenset(),
    words: Sequence[str] = (),
) -> list[Refusal]:
    """What of the hardware speaks against `driver`, the weightiest first. then: drives that follow.
    words: the command line that asks."""
    words = words or ("bind", device.bdf)
    return [
        *_shared(host, controller),
        *_virtual(device),
        *_vmd(device),
        *_state(controller),
        *(_iommu(host, device, then, words) if driver == VFIO else []),
    ]


def warnings(device: PciDevice, driver: str) -> list[str]:
    """What the user should know, although nothing is refused."""
    if driver == VFIO:
        return []
    told = [
        f"{UIO} has no protection: whoever drives the drive can have it write to any memory of the machine. "
        "Only root can use it"
    ]
    if device.group_type.startswith("DMA"):
        told.append(
            f"an IOMMU translates for this drive, and SPDK does not get past it through {UIO}: use {VFIO}, "
            "or boot with iommu=pt"
        )
    return told


def _shared(host: Host, controller: Controller) -> list[Refusal]:
    others = [
        f"{other.name} at {other.bdf or other.transport}"
        for other in controllers(host)
        if other.name != controller.name and controller.subsystem and other.subsystem == controller.subsystem
    ]
    if not others:
        return []
    return [
        Refusal(
            "multipath", f"the kernel reaches the same drive in another way, too: {', '.join(others)}",
            "a drive with several paths stays with the kernel; take another one",
        )
    ]  # fmt: skip


def _virtual(device: PciDevice) -> list[Refusal]:
    if not device.virtual_functions:
        return []
    switch = f"/sys/bus/pci/devices/{device.bdf}/sriov_numvfs"
    return [
        Refusal(
            "virtual-functions",
            f"{device.virtual_functions} virtual functions of it are switched on, and depend on it",
            f"if nothing uses them: echo 0 | {as_root(['tee', switch])}",
        )
    ]


def _vmd(device: PciDevice) -> list[Refusal]:
    if not device.behind_vmd:
        return []
    return [
        Refusal(
            "vmd",
            "it is behind Intel's Volume Management Device, which drives it for the kernel",
            "switch VMD off for this slot in the firmware's settings",
        )
    ]


def _state(controller: Controller) -> list[Refusal]:
    if controller.state not in ("live", ""):
        reason = f"the controller is {controller.state}, not live: what is on it cannot be seen"
        return [Refusal("state", reason, f"dmesg | grep {controller.name}")]
    if not controller.namespaces:
        return [
            Refusal(
                "empty",
                "it has no namespace to use",
                "nvme-cli can make one (nvme create-ns); or take another drive",
            )
        ]
    return []


def _iommu(host: Host, device: PciDevice, then: frozenset[str], words: Sequence[str]) -> list[Refusal]:
    if device.group is None:
        return [
            Refusal(
                "no-iommu", "this machine has no IOMMU switched on, which vfio-pci needs", _no_iommu(words)
            )
        ]
    others = [other for other in obstacles_in_group(host, device) if other.bdf not in then]
    if not others:
        return []
    names = ", ".join(f"{other.bdf} (class {other.pci_class}, {other.driver})" for other in others)
    return [
        Refusal(
            "iommu-group",
            f"it shares IOMMU group {device.group} with {names}: only all of them together can be handed out",
            _apart(others, words),
        )
    ]


def _no_iommu(words: Sequence[str]) -> str:
    uio = host_command(*words, "--driver", UIO)
    return (
        "switch it on (the iommu line of dualblade-spdk doctor says how) and bind again; or, where all that "
        f"runs as root may be trusted: {uio}"
    )


def _apart(others: list[PciDevice], words: Sequence[str]) -> str:
    """A group of drives can be bound one after the other; nothing else is ours to take."""
    if not all(other.is_nvme for other in others):
        return "move the drive to another slot"
    first = host_command(*words, *(word for other in others for word in ("--then", other.bdf)))
    return f"move the drive to another slot, or bind them one after the other: {first}"
