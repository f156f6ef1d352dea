# SPDX-License-Identifier: Apache-2.0
"""Who has what open: every process's descriptors, as /proc shows them to root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dualblade.host.sysfs import Host

_VFIO_DEVICE = "anon_inode:[vfio-device]"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has `path` open."""

    pid: int
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name or '?'} (pid {self.pid})"


def printable(text: str) -> str:
    """Names that others chose, in one line and without commands to the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def pids(host: Host) -> list[int]:
    """Every process but this one."""
    found = (int(name) for name in host.names("/proc") if name.isdecimal())
    return [pid for pid in found if pid != os.getpid()]


def holders_of_nodes(host: Host, nodes: set[str], numbers: set[str]) -> list[Holder]:
    """Processes with one of the device nodes open, by whatever name. nodes: below /dev. numbers: as
    Host.device_number() gives them. What may not be looked at is passed over."""

    def is_one(link: str, descriptor: str) -> bool:
        if link in nodes:
            return True
        # other files are not looked at: one on a network share that is gone would block
        return link.startswith("/dev/") and host.device_number(descriptor) in numbers

    return _holders(host, is_one)


def holders_of_vfio(host: Host, bdf: str, group: str | None) -> list[Holder]:
    """Processes that drive the device from userspace: they have its group, its own vfio node, the
    device itself, or its uio node open."""
    nodes = set(userspace_nodes(host, bdf, group))

    def is_one(link: str, descriptor: str) -> bool:
        return link in nodes or (link == _VFIO_DEVICE and bdf in _syspath(host, descriptor))

    return _holders(host, is_one)


def userspace_nodes(host: Host, bdf: str, group: str | None) -> list[str]:
    """Nodes through which a process gets at a bound device, whether they are there or not."""
    folder = f"/sys/bus/pci/devices/{bdf}"
    cdevs = [f"/dev/vfio/devices/{name}" for name in host.names(f"{folder}/vfio-dev")]
    uios = [f"/dev/{name}" for name in host.names(f"{folder}/uio")]
    return ([f"/dev/vfio/{group}", f"/dev/vfio/noiommu-{group}"] if group else []) + cdevs + uios


def _syspath(host: Host, descriptor: str) -> str:
    """Linux 6.17 and later tell there which device it is."""
    text = host.attribute(descriptor.replace("/fd/", "/fdinfo/", 1))
    rows = [line for line in text.splitlines() if line.startswith("vfio-device-syspath")]
    return rows[0] if rows else ""


def _holders(host: Host, is_one: Callable[[str, str], bool]) -> list[Holder]:
    found = {
        (pid, link): Holder(pid, printable(host.attribute(f"/proc/{pid}/comm")), printable(link))
        for pid in pids(host)
        for link, descriptor in _descriptors(host, pid)
        if is_one(link, descriptor)
    }
    return list(found.values())


def _descriptors(host: Host, pid: int) -> Iterator[tuple[str, str]]:
    """(what it is open on, its path in /proc)."""
    folder = f"/proc/{pid}/fd"
    for name, link in host.links(folder):
        yield link, f"{folder}/{name}"
