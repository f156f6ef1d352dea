# SPDX-License-Identifier: Apache-2.0
"""What stands between this machine's NVMe drives and the userspace driver. Reads alone."""

from __future__ import annotations

import os

from dualblade.host import journal
from dualblade.host.checks import HOST, OK, WARN, Check
from dualblade.host.command import as_root, host_command
from dualblade.host.eligible import VFIO, unfit
from dualblade.host.inuse import Refusal, uses
from dualblade.host.nvme import Controller, controller_at
from dualblade.host.pci import PciDevice, nvme_devices
from dualblade.host.status import leftovers
from dualblade.host.sysfs import Host
from dualblade.units import format_size

_GROUPS = "/sys/kernel/iommu_groups"
_GRUB = "/etc/default/grub"
_TABLES = "/sys/firmware/acpi/tables"
_INSTEAD = "without it the kernel drives it (io_uring), which needs none of this"
_FIRMWARE = (
    "switch VT-d (Intel) or AMD-Vi (AMD) on in the firmware's settings; a virtual machine needs an IOMMU "
    "from its host"
)


def iommu(host: Host = HOST) -> Check:
    groups = host.names(_GROUPS)
    if groups:
        return Check("iommu", OK, f"on, {len(groups)} groups")
    if not nvme_devices(host):
        return Check("iommu", OK, "none, and no NVMe drive that would need it")
    return Check(
        "iommu", WARN, f"none is on, and vfio-pci needs one to take a drive; {_INSTEAD}", _iommu_fix(host)
    )


def _iommu_fix(host: Host) -> str:
    """The firmware's tables tell whether the hardware is there and the kernel leaves it alone."""
    words = host.attribute("/proc/cmdline").split()
    against = [word for word in words if word in ("iommu=off", "intel_iommu=off", "amd_iommu=off")]
    if against:
        return _on_command_line(host, f"s/ *{against[0]}//", f"take {against[0]} from")
    if host.exists(f"{_TABLES}/DMAR") and "intel_iommu=on" not in words:
        return _on_command_line(host, 's/^GRUB_CMDLINE_LINUX="/&intel_iommu=on /', "add intel_iommu=on to")
    return _FIRMWARE


def _on_command_line(host: Host, pattern: str, otherwise: str) -> str:
    if not host.exists(_GRUB) or not host.program("update-grub"):
        return f"{otherwise} the kernel's command line, in the settings of its boot loader, and reboot"
    change = as_root(["sed", "-i", pattern, _GRUB])
    return f"{change} && {as_root(['update-grub'])}  # then reboot"


def vfio(host: Host = HOST) -> Check:
    """`bind` loads the module; it must be there."""
    if host.exists(f"/sys/bus/pci/drivers/{VFIO}"):
        return Check(VFIO, OK, "loaded")
    if _has_module(host, "vfio-pci") and host.program("modprobe"):
        return Check(VFIO, OK, "this kernel has it; bind loads it")
    if not nvme_devices(host):
        return Check(VFIO, OK, "not here, and no NVMe drive that would need it")
    if not _has_module(host, "vfio-pci"):
        package = as_root(["apt-get", "install", "linux-image-amd64"])
        return Check(VFIO, WARN, f"this kernel has no module {VFIO}; {_INSTEAD}", f"{package}  # then reboot")
    return Check(VFIO, WARN, "modprobe is not here to load it", as_root(["apt-get", "install", "kmod"]))


def _has_module(host: Host, name: str) -> bool:
    release = host.attribute("/proc/sys/kernel/osrelease")
    for index in ("modules.dep", "modules.builtin"):
        for line in host.attribute(f"/lib/modules/{release}/{index}").splitlines():
            if line.partition(":")[0].rpartition("/")[2].startswith(f"{name}.ko"):
                return True
    return False


# drives -------------------------------------------------------------------------------------


def drives(host: Host = HOST) -> list[Check]:
    """One check a drive: with whom it is, and whether it could be bound. What lies on it, only `bind`
    looks at."""
    devices = nvme_devices(host)
    if not devices:
        return [Check("nvme", OK, "no NVMe drive on PCI: the direct path uses a file in the cache folder")]
    broken = {leftover.bdf: leftover.problem for leftover in leftovers(host)}
    return [_drive(host, device, broken.get(device.bdf)) for device in devices]


def _drive(host: Host, device: PciDevice, problem: str | None) -> Check:
    if problem:
        return Check("nvme", WARN, problem, host_command("unbind", device.bdf))
    if device.driver in journal.USERSPACE_DRIVERS:
        return Check("nvme", OK, f"{_bound_name(host, device)} is bound to {device.driver}")
    controller = controller_at(host, device.bdf)
    if controller is None:
        has = f"with the driver {device.driver}" if device.driver else "without a driver"
        return Check("nvme", WARN, f"{device.bdf} is {has}", host_command("unbind", device.bdf))
    return _with_the_kernel(host, device, controller)


def _bound_name(host: Host, device: PciDevice) -> str:
    entry = journal.entry_of(device.bdf, host)
    names = [node for node, nsid in entry.nodes.items() if nsid and "/dev/nvme" in node] if entry else []
    return f"{names[0]} ({device.bdf})" if names else device.bdf


def _with_the_kernel(host: Host, device: PciDevice, controller: Controller) -> Check:
    against = [*uses(host, controller), *unfit(host, device, controller, VFIO)]
    name = _describe(controller)
    in_the_way = [refusal for refusal in against if refusal.kind != "no-iommu"]  # a check of its own
    if not in_the_way:
        idle = "nobody uses it" if os.geteuid() == 0 else "nobody is seen to use it (root sees more)"
        return Check("nvme", OK, f"{name}: {idle}; {_way(controller, bool(against))}")
    return Check("nvme", OK, f"{name}: the kernel's, because {in_the_way[0].reason}{_more(in_the_way)}")


def _describe(controller: Controller) -> str:
    nodes = ", ".join(space.node for space in controller.namespaces) or controller.node
    size = format_size(controller.size)
    return f"{nodes} ({controller.bdf}, {controller.model}, serial {controller.serial}, {size})"


def _way(controller: Controller, no_iommu: bool) -> str:
    node = controller.namespaces[0].node
    if no_iommu:
        return f"as a TARGET of the kernel's: dualblade-spdk volume create {node}"
    return f"could be bound: {host_command('bind', node, '--dry-run')}"


def _more(against: list[Refusal]) -> str:
    return f" (and {len(against) - 1} more)" if len(against) > 1 else ""
