# SPDX-License-Identifier: Apache-2.0
"""Gives a drive back to the kernel; also what a bind that was killed has left half done."""

from __future__ import annotations

from dataclasses import dataclass

from dualblade.errors import BindError
from dualblade.host import driver as drivers
from dualblade.host import journal
from dualblade.host.bind import KERNEL_DRIVER
from dualblade.host.command import as_root, host_command
from dualblade.host.nvme import Controller, address_of, controller_at, controllers
from dualblade.host.pci import PciDevice, pci_device
from dualblade.host.processes import Holder, holders_of_vfio
from dualblade.host.sysfs import Host

_DEVICE_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Binding:
    """A drive to be given back. entry: None where it was not bound by us."""

    device: PciDevice
    entry: journal.Entry | None

    @property
    def bdf(self) -> str:
        return self.device.bdf

    @property
    def old_driver(self) -> str:
        return self.entry.old_driver if self.entry else KERNEL_DRIVER

    @property
    def at_home(self) -> bool:
        """Nothing is to be done, but for the journal."""
        return self.device.driver == self.old_driver and self.device.override is None


def find_binding(host: Host, device: str) -> Binding:
    """By PCI address, serial number, or a name that it had below /dev. Raises BindError."""
    by_serial = [one.bdf for one in controllers(host) if one.bdf and one.serial == device]
    bdf = by_serial[0] if len(by_serial) == 1 else address_of(host, device)
    entry = journal.entry_of(bdf, host)
    found = pci_device(host, bdf)
    if found is None:
        if entry:
            entry.remove(host)
        gone = "is gone from the machine; the record of it is removed" if entry else "is not there"
        raise BindError(f"the PCI device {bdf} {gone}", f"those there are: {host_command('status')}")
    if not found.is_nvme:
        raise BindError(f"{bdf} is no NVMe controller", f"those that are: {host_command('status')}")
    return Binding(found, entry)


def unbind(host: Host, binding: Binding) -> Controller:
    """The drive as the kernel has it again, its block devices there and its serial number the same.

    Raises BindError: at once where a process still drives it, which is then left alone.
    """
    with journal.locked(host):
        check_unheld(host, binding)
        entry = binding.entry.in_state(journal.UNBINDING, host) if binding.entry else None
        drivers.give_to(host, binding.bdf, binding.old_driver)
        controller = _wait_for_devices(host, binding.bdf, entry)
        if entry:
            entry.remove(host)
            _check_serial(controller, entry)
        return controller


def check_unheld(host: Host, binding: Binding) -> None:
    """Raises BindError. The kernel itself would wait in the midst of it until the process ends."""
    if binding.device.driver not in journal.USERSPACE_DRIVERS:
        return
    if held := holders_of_vfio(host, binding.bdf, binding.device.group):
        raise held_error(binding.bdf, held)


def held_error(bdf: str, held: list[Holder]) -> BindError:
    who = ", ".join(sorted({str(holder) for holder in held}))
    pids = sorted({str(holder.pid) for holder in held})
    return BindError(
        f"{bdf} is in use by {who}",
        f"wait until it ends, or end it, and unbind again: {as_root(['kill', *pids])}",
    )


def _wait_for_devices(host: Host, bdf: str, entry: journal.Entry | None) -> Controller:
    """Raises BindError where they do not come back."""
    wanted = len(entry.sizes) if entry else 0
    if not drivers.wait_until(lambda: _ready(host, bdf, wanted), _DEVICE_SECONDS):
        raise BindError(
            f"{bdf} is with the kernel again, but its block device did not appear within "
            f"{_DEVICE_SECONDS:.0f} s",
            f"dmesg | grep -e nvme -e {bdf}",
        )
    found = controller_at(host, bdf)
    assert found is not None
    return found


def _ready(host: Host, bdf: str, wanted: int) -> bool:
    found = controller_at(host, bdf)
    if found is None or found.state not in ("live", ""):
        return False
    there = [space for space in found.namespaces if host.exists(space.node)]
    return len(there) >= wanted


def _check_serial(controller: Controller, entry: journal.Entry) -> None:
    if (controller.serial or entry.bdf) != entry.serial:
        raise BindError(
            f"the drive at {entry.bdf} is another one now: serial {controller.serial}, and {entry.serial} "
            "was bound",
            "was it changed meanwhile? Nothing was written to it",
        )
