# SPDX-License-Identifier: Apache-2.0
"""NVMe controllers that the kernel drives, their namespaces, and which PCI function is which.

With multipath the block device belongs to the subsystem: nvme1n1 is then a head, and its way
through a controller is nvme1c0n1, whose first number is the subsystem's and not the controller's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dualblade.errors import BindError
from dualblade.host.command import host_command
from dualblade.host.journal import DEVICES, entry_named
from dualblade.host.pci import parse_address
from dualblade.host.sysfs import Host

_BLOCK = "/sys/class/block"
_CONTROLLERS = "/sys/class/nvme"
_SECTOR = 512  # what sysfs counts sizes in, whatever the block size
_NODE = re.compile(r"(nvme|ng)(\d+)(?:n(\d+))?(?:p(\d+))?")
_NAMESPACE = re.compile(r"nvme\d+n\d+")
_PATH = re.compile(r"nvme(\d+)c\d+n(\d+)")
_GENERIC = re.compile(r"ng(\d+n\d+)")


@dataclass(frozen=True, slots=True)
class Partition:
    """name: e.g. "nvme1n1p1". dev: "259:1"."""

    name: str
    dev: str


@dataclass(frozen=True, slots=True)
class Namespace:
    """name: e.g. "nvme1n1". dev: "259:0"; "" where it has no block device. folder: in sysfs.
    size, block: bytes."""

    name: str
    nsid: int
    dev: str
    folder: str
    size: int
    block: int
    partitions: tuple[Partition, ...]

    @property
    def node(self) -> str:
        return f"/dev/{self.name}"

    @property
    def generic(self) -> str:
        return f"/dev/{self.name.replace('nvme', 'ng', 1)}"


@dataclass(frozen=True, slots=True)
class Controller:
    """name: e.g. "nvme1". transport: "pcie", or that of a fabric. bdf: None on a fabric."""

    name: str
    bdf: str | None
    transport: str
    state: str
    model: str
    serial: str
    firmware: str
    subsystem: str
    namespaces: tuple[Namespace, ...]

    @property
    def node(self) -> str:
        return f"/dev/{self.name}"

    @property
    def size(self) -> int:
        return sum(namespace.size for namespace in self.namespaces)

    def nodes(self) -> dict[str, int]:
        """Every node below /dev that leads to the drive, with its namespace id, 0 for the controller."""
        found = {self.node: 0}
        for space in self.namespaces:
            names = [space.node, space.generic, *(f"/dev/{part.name}" for part in space.partitions)]
            found |= dict.fromkeys(names, space.nsid)
        return found


def controllers(host: Host) -> list[Controller]:
    """All that the kernel's driver has."""
    names = [name for name in host.names(_CONTROLLERS) if re.fullmatch(r"nvme\d+", name)]
    return [_controller(host, name) for name in names]


def controller_at(host: Host, bdf: str) -> Controller | None:
    """The controller of a PCI function; None while it has no driver, or another one than nvme."""
    names = [name for name in host.names(f"{DEVICES}/{bdf}/nvme") if name.startswith("nvme")]
    return _controller(host, names[0]) if names else None


def address_of(host: Host, device: str) -> str:
    """The PCI address that a namespace, controller or generic node, a link to one, or a PCI address
    means; of a drive that is bound, a name that it had, or its serial number. Raises BindError."""
    if address := parse_address(device):
        return address
    if entry := entry_named(host, device):
        return entry.bdf
    if not host.exists(device):
        if host.exists(f"/dev/{device}"):
            raise BindError(f"there is no device {device} here", f"name the drive: /dev/{device}")
        raise BindError(f"there is no device {device}", f"those there are: {host_command('status')}")
    name = host.resolve(device).rpartition("/")[2]
    match = _NODE.fullmatch(name)
    if match is None or not _is_that_node(host, device, name):
        raise BindError(f"{device} is no NVMe drive", "name a drive such as /dev/nvme1n1, or 0000:01:00.0")
    if match[4]:
        raise BindError(f"{device} is a partition", f"name the drive: /dev/{name.rpartition('p')[0]}")
    return _address(host, device, _controllers_of(host, name))


def aliases(host: Host, nodes: dict[str, int]) -> dict[str, int]:
    """Links below /dev/disk that lead to one of the nodes, with the same namespace id."""
    folders = [f"/dev/disk/{name}" for name in host.names("/dev/disk")]
    links = [f"{folder}/{name}" for folder in folders for name in host.names(folder)]
    targets = {link: host.resolve(link) for link in links}
    return {link: nodes[target] for link, target in targets.items() if target in nodes}


def _is_that_node(host: Host, device: str, name: str) -> bool:
    """A node may have any name; its number tells what it really is."""
    folders = [f"{_BLOCK}/{name}", f"{_CONTROLLERS}/{name}", f"/sys/class/nvme-generic/{name}"]
    numbers = [host.attribute(f"{folder}/dev") for folder in folders]
    return (host.device_number(device) or "?")[1:] in filter(None, numbers)


def _address(host: Host, device: str, names: list[str]) -> str:
    found = [_controller(host, name) for name in names]
    if not found:
        raise BindError(f"no controller of {device} is to be found in {_CONTROLLERS}")
    if len(found) > 1:
        ways = ", ".join(f"{one.name} at {one.bdf or one.transport}" for one in found)
        raise BindError(
            f"{device} is reached through several controllers: {ways}",
            "a drive with several paths stays with the kernel; name another one",
        )
    if found[0].bdf is None:
        raise BindError(
            f"{device} is a namespace over {found[0].transport}, not a drive of this machine",
            "it needs no bind: name it as a TARGET, e.g. trtype:TCP adrfam:IPv4 traddr:... subnqn:...",
        )
    return found[0].bdf


def _controllers_of(host: Host, name: str) -> list[str]:
    """Names of the controllers below a node's name."""
    if "n" not in name.removeprefix("nvme").removeprefix("ng"):
        return [name]
    wanted = f"nvme{name.removeprefix('nvme').removeprefix('ng')}"
    return [one.name for one in controllers(host) if wanted in (ns.name for ns in one.namespaces)]


def _controller(host: Host, name: str) -> Controller:
    folder = f"{_CONTROLLERS}/{name}"
    transport = host.attribute(f"{folder}/transport") or "pcie"
    bdf = host.resolve(f"{folder}/device").rpartition("/")[2] if transport == "pcie" else None
    model, serial, firmware, state, subsystem = (
        host.attribute(f"{folder}/{attribute}")
        for attribute in ("model", "serial", "firmware_rev", "state", "subsysnqn")
    )
    return Controller(
        name, bdf, transport, state, model, serial, firmware, subsystem, _namespaces(host, folder)
    )


def _namespaces(host: Host, folder: str) -> tuple[Namespace, ...]:
    names: set[str] = set()
    for name in host.names(folder):
        if _NAMESPACE.fullmatch(name):
            names.add(name)
        elif path := _PATH.fullmatch(name):
            names.add(f"nvme{path[1]}n{path[2]}")
        elif generic := _GENERIC.fullmatch(name):
            names.add(f"nvme{generic[1]}")
    return tuple(_namespace(host, name) for name in sorted(names, key=_natural))


def _natural(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _namespace(host: Host, name: str) -> Namespace:
    """Of one that has a generic node alone, the kernel tells neither size nor what is on it."""
    folder = f"{_BLOCK}/{name}"
    partitions = tuple(
        Partition(entry, host.attribute(f"{folder}/{entry}/dev"))
        for entry in host.names(folder)
        if host.exists(f"{folder}/{entry}/partition")
    )
    return Namespace(
        name,
        int(host.attribute(f"{folder}/nsid") or _natural(name)[-1]),
        host.attribute(f"{folder}/dev"),
        folder,
        int(host.attribute(f"{folder}/size") or 0) * _SECTOR,
        int(host.attribute(f"{folder}/queue/logical_block_size") or _SECTOR),
        partitions,
    )
