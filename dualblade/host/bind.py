# SPDX-License-Identifier: Apache-2.0
"""Takes one drive from the kernel for a userspace driver. Writes nothing to the drive."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from dualblade.errors import BindError
from dualblade.host import driver as drivers
from dualblade.host import journal
from dualblade.host.command import as_root, host_command
from dualblade.host.contents import data_on
from dualblade.host.eligible import UIO, VFIO, unfit
from dualblade.host.inuse import Refusal, uses
from dualblade.host.nvme import Controller, address_of, aliases, controller_at
from dualblade.host.pci import PciDevice, pci_device
from dualblade.host.plan import Step, carry_out
from dualblade.host.processes import userspace_nodes
from dualblade.host.sysfs import Host

KERNEL_DRIVER = "nvme"
_NODE_SECONDS = 5.0
_UDEV_SECONDS = 1.0


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Drive:
    """A drive that the kernel has."""

    device: PciDevice
    controller: Controller

    @property
    def bdf(self) -> str:
        return self.device.bdf

    @property
    def serial(self) -> str:
        """What the user confirms: the PCI address stands in for a serial number that is blank."""
        return self.controller.serial or self.device.bdf


@dataclass(frozen=True, slots=True)
class Wish:
    """What bind is to do. owner: (name, user id) that may use the drive afterwards; None: root alone.
    erase: the serial of a drive whose unknown data is not needed. by: who asks. then: addresses of drives
    in the same IOMMU group that are bound next, and so are no reason against this one. words: the command
    line, for hints that add to it."""

    driver: str = VFIO
    owner: tuple[str, int] | None = None
    erase: str | None = None
    by: str = "root"
    then: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()


class RefusedError(BindError):
    """refusals: all that speaks against it; the error tells the first."""

    def __init__(self, drive: Drive, refusals: list[Refusal]):
        first, more = refusals[0], len(refusals) - 1
        rest = f" (and {more} more: --dry-run lists all)" if more else ""
        super().__init__(f"{drive.bdf} stays with the kernel: {first.reason}{rest}", first.remedy)
        self.refusals = refusals
        self.details: dict[str, Any] = {}  # for --json


# find and judge ---------------------------------------------------------------------------------


def find_drive(host: Host, device: str) -> Drive:
    """Raises BindError where it is no NVMe drive that the kernel has."""
    bdf = address_of(host, device)
    pci = pci_device(host, bdf)
    if pci is None:
        raise BindError(f"there is no PCI device {bdf}", f"those there are: {host_command('status')}")
    if not pci.is_nvme:
        raise BindError(
            f"{bdf} is no NVMe controller (its class is {pci.pci_class})",
            f"those that are: {host_command('status')}",
        )
    controller = controller_at(host, bdf)
    if pci.driver != KERNEL_DRIVER or controller is None:
        has = f"is with {pci.driver}" if pci.driver else "has no driver"
        raise BindError(
            f"{bdf} {has}, so what is on it cannot be seen",
            f"give it to the kernel first: {host_command('unbind', bdf)}",
        )
    return Drive(pci, controller)


def refusals(host: Host, drive: Drive, wish: Wish) -> list[Refusal]:
    """All that speaks against it, the weightiest first: nobody shall switch an IOMMU on for a drive in use,
    or wipe one that could not be had. Reads alone."""
    return [
        *uses(host, drive.controller),
        *_claimed(host, drive.controller),
        *_of_its_own(host, drive, wish),
    ]


def _of_its_own(host: Host, drive: Drive, wish: Wish) -> list[Refusal]:
    """What speaks against it while nobody uses it."""
    return [
        *unfit(host, drive.device, drive.controller, wish.driver, wish.then, wish.words),
        *data_on(host, drive.controller, wish.erase, wish.words),
    ]


def _claimed(host: Host, controller: Controller) -> list[Refusal]:
    try:
        with claims(host, controller):
            return []
    except BindError as error:
        return [Refusal("busy", error.message, error.hint or "")]


@contextmanager
def claims(host: Host, controller: Controller) -> Iterator[None]:
    """Its namespaces for this process alone: nobody can mount them, or claim them, meanwhile.

    Raises BindError where somebody has.
    """
    fds: list[int] = []
    try:
        for space in controller.namespaces:
            if space.dev:
                fds.append(_claim(host, space.node))
        yield
    finally:
        for fd in fds:
            os.close(fd)


def _claim(host: Host, node: str) -> int:
    """The lock keeps udev away, and other runs of this program."""
    fd = -1
    try:
        # to read: closing what was open to write would wake udev
        fd = host.open(node, os.O_RDONLY | os.O_EXCL)
        drivers.wait_until(lambda: _locked(fd), _UDEV_SECONDS)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise BindError(
            f"{node} cannot be had alone ({error.strerror}): a filesystem, RAID, LVM, ZFS or process has it",
            f"who it is: {as_root(['lsblk', '--fs', node])}; {as_root(['lsof', node])}; zpool status",
        ) from error
    return fd


def _locked(fd: int) -> bool:
    """udev has a lock while it looks at a drive that has just come up, or was just written to."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# do ---------------------------------------------------------------------------------------------


def plan(host: Host, drive: Drive, wish: Wish, let_go: Callable[[], None] = _nothing) -> list[Step]:
    """What bind will do, in order. let_go: gives up the claims on the drive, which the step `unbind`
    still needs, and which would give it another name when it comes back."""
    bdf, driver = drive.bdf, wish.driver

    def detach() -> None:
        drivers.detach(host, bdf)
        let_go()

    load = Step(
        "load", f"load the kernel module {driver} (modprobe)", lambda: drivers.load_module(host, driver)
    )
    steps = [] if host.exists(f"/sys/bus/pci/drivers/{driver}") else [load]
    return [
        *steps,
        Step("override", f"reserve {bdf} for {driver}", lambda: drivers.set_override(host, bdf, driver)),
        Step("unbind", f"take it from {drive.device.driver}", detach),
        Step(
            "probe", f"give it to {driver}", lambda: drivers.probe(host, bdf),
            lambda: drivers.check_driver(host, bdf, driver),
        ),
        Step("clear", "clear the reservation", lambda: drivers.set_override(host, bdf, None)),
        Step("permit", _says_who(wish), lambda: permit(host, bdf, drive.device.group, wish)),
    ]  # fmt: skip


def _says_who(wish: Wish) -> str:
    return f"let {wish.owner[0]} use it" if wish.owner else "let root alone use it (--user NAME changes that)"


def bind(host: Host, drive: Drive, wish: Wish) -> journal.Entry:
    """Carry out plan(), after a last look. The drive is back with the kernel after any failure.

    Raises RefusedError, BindError.
    """
    with journal.locked(host), ExitStack() as claimed:
        claimed.enter_context(claims(host, drive.controller))
        if against := refusals_again(host, drive, wish):
            raise RefusedError(drive, against)
        entry = _entry(host, drive, wish)
        steps = plan(host, drive, wish, claimed.close)
        if steps[0].name == "load":
            load = steps.pop(0)
            load.apply()
            load.verify()
        entry.save(host)
        return _carry_out(host, steps, entry, claimed.close)


def refusals_again(host: Host, drive: Drive, wish: Wish) -> list[Refusal]:
    """As refusals(), while this process itself has the drive claimed; and is it still the same one?"""
    if find_drive(host, drive.bdf) != drive:
        return [Refusal("changed", "it has changed since it was looked at", "look again with --dry-run")]
    return [*uses(host, drive.controller), *_of_its_own(host, drive, wish)]


def _carry_out(
    host: Host, steps: list[Step], entry: journal.Entry, let_go: Callable[[], None]
) -> journal.Entry:
    now = entry

    def done(name: str) -> None:
        nonlocal now
        now = now.after(name, host)
        if name == steps[-1].name:
            now = now.in_state(journal.BOUND, host)

    def undo() -> None:
        let_go()
        _undo(host, entry)

    carry_out(steps, done, undo)
    return now


def _undo(host: Host, entry: journal.Entry) -> None:
    """The drive to its old driver. Where that fails the journal stays, for `status` and `unbind`."""
    try:
        drivers.give_to(host, entry.bdf, entry.old_driver)
    except (BindError, OSError) as error:
        raise BindError(
            f"bind failed, and {entry.bdf} could not be given back to {entry.old_driver}: {error}",
            f"nothing on the drive is lost; mend it with: {host_command('unbind', entry.bdf)}",
        ) from error
    entry.remove(host)


def _entry(host: Host, drive: Drive, wish: Wish) -> journal.Entry:
    controller = drive.controller
    nodes = controller.nodes()
    return journal.Entry(
        drive.bdf, drive.serial, controller.model, KERNEL_DRIVER, wish.driver,
        wish.owner[0] if wish.owner else None, journal.BINDING, (),
        {str(space.nsid): space.size for space in controller.namespaces},
        nodes | aliases(host, nodes), drive.device.group, wish.by, os.getpid(), journal.now(),
        journal.boot_id(host),
    )  # fmt: skip


def permit(host: Host, bdf: str, group: str | None, wish: Wish) -> None:
    """The nodes of the bound drive to the wished owner. Raises BindError."""
    if wish.driver == UIO:
        return
    node = f"/dev/vfio/{group}"
    if not drivers.wait_until(lambda: host.exists(node), _NODE_SECONDS):
        raise BindError(f"{node} did not appear", "is /dev a devtmpfs, as it should be?")
    try:
        for node in userspace_nodes(host, bdf, group):
            if wish.owner and host.exists(node):
                host.chown(node, wish.owner[1])
    except OSError as error:
        raise BindError(f"{node} cannot be given to {wish.owner}: {error.strerror}") from error
