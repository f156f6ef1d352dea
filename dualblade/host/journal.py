# SPDX-License-Identifier: Apache-2.0
"""What was bound, in /run: written before the kernel is told anything, so that whatever happens next
can be told and mended. It goes with the machine's uptime, as a binding does."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

from dualblade.errors import BindError
from dualblade.host.sysfs import Host

FOLDER = "/run/dualblade-spdk"
BINDING, BOUND, UNBINDING = "binding", "bound", "unbinding"
USERSPACE_DRIVERS = frozenset({"vfio-pci", "uio_pci_generic"})
DEVICES = "/sys/bus/pci/devices"
_LOCK = f"{FOLDER}/lock"
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One drive that was taken from the kernel.

    bdf: its PCI address. old_driver: what it goes back to. driver: what it was to get. owner: the
    user that may open it, None for root alone. state: BINDING, BOUND or UNBINDING, with the `steps`
    that are done. sizes: bytes by namespace id. nodes: the namespace id by each name that the drive
    had below /dev, links included; 0 for the controller itself. by: who did it. boot: of this uptime.
    """

    bdf: str
    serial: str
    model: str
    old_driver: str
    driver: str
    owner: str | None
    state: str
    steps: tuple[str, ...]
    sizes: dict[str, int]
    nodes: dict[str, int]
    group: str | None
    by: str
    pid: int
    since: str
    boot: str

    def save(self, host: Host) -> None:
        """Raises BindError."""
        try:
            host.save(_file(self.bdf), json.dumps(asdict(self), indent=2) + "\n")
        except OSError as error:
            raise BindError(f"the journal {_file(self.bdf)} cannot be written: {error.strerror}") from error

    def after(self, step: str, host: Host) -> Entry:
        """The entry with one more step done, saved."""
        done = replace(self, steps=(*self.steps, step))
        done.save(host)
        return done

    def in_state(self, state: str, host: Host) -> Entry:
        """The entry in another state, saved."""
        changed = replace(self, state=state)
        changed.save(host)
        return changed

    def remove(self, host: Host) -> None:
        host.remove(_file(self.bdf))


def entries(host: Host) -> list[Entry]:
    """All that were made since the machine was started; a damaged file is passed over."""
    found = (_load(host, name) for name in host.names(FOLDER) if name.endswith(".json"))
    return [entry for entry in found if entry is not None and entry.boot == boot_id(host)]


def entry_of(bdf: str, host: Host) -> Entry | None:
    return next((entry for entry in entries(host) if entry.bdf == bdf), None)


def entry_named(host: Host, name: str) -> Entry | None:
    """By the drive's serial number, or by a name that it had below /dev and that is no other's now."""
    for entry in entries(host):
        if name == entry.serial or (name in entry.nodes and not host.exists(name)):
            return entry
    return None


def boot_id(host: Host) -> str:
    return host.attribute("/proc/sys/kernel/random/boot_id")


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# what others ask --------------------------------------------------------------------------------


def bound_address(node: str, host: Host = Host()) -> str | None:
    """The PCI address that a node such as /dev/nvme1n1 stood for before it was bound, or None.

    None also where the node is there (again), or where the drive is with the kernel: then the node
    means what the kernel says. bound_namespace() tells which namespace of the controller it was.
    """
    found = bound_namespace(node, host)
    return found[0] if found else None


def bound_namespace(node: str, host: Host = Host()) -> tuple[str, int] | None:
    """(PCI address, namespace id) as bound_address(); the namespace of a controller's own node is 1."""
    if host.exists(node):
        return None
    for entry in entries(host):
        if node in entry.nodes and driver_of(entry.bdf, host) in USERSPACE_DRIVERS:
            return entry.bdf, entry.nodes[node] or 1
    return None


def driver_of(bdf: str, host: Host) -> str | None:
    """The driver that has the PCI device now."""
    return host.link_name(f"{DEVICES}/{bdf}/driver")


# one at a time ----------------------------------------------------------------------------------


@contextmanager
def locked(host: Host) -> Iterator[None]:
    """One bind or unbind of the machine at a time. Raises BindError where another takes too long."""
    host.make_folder(FOLDER)
    fd = host.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
    try:
        _wait_for_lock(fd)
        yield
    finally:
        os.close(fd)


def _wait_for_lock(fd: int) -> None:
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise BindError("another bind or unbind is at work", "wait for it to end") from error
            time.sleep(0.05)
        else:
            return


def _file(bdf: str) -> str:
    return f"{FOLDER}/{bdf}.json"


def _load(host: Host, name: str) -> Entry | None:
    try:
        record = json.loads(host.read_text(f"{FOLDER}/{name}"))
        known = {field.name: record[field.name] for field in fields(Entry)}
        return Entry(**(known | {"steps": tuple(record["steps"])}))
    except (OSError, ValueError, KeyError, TypeError):
        return None
