# SPDX-License-Identifier: Apache-2.0
"""What the kernel says of the machine's memory and of this process's. All in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from dualblade.errors import ConfigError
from dualblade.host.sysfs import Host
from dualblade.units import KIB

_MEMINFO = "/proc/meminfo"
_STATUS = "/proc/self/status"
_NODE = "/sys/devices/system/node/node{}/meminfo"


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """total, available, hugepage_bytes: bytes. hugepages_*: pages of hugepage_bytes, the default size."""

    total: int
    available: int
    hugepages_total: int
    hugepages_free: int
    hugepages_reserved: int
    hugepages_surplus: int
    hugepage_bytes: int


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident bytes of this process by kind; `swap` is anonymous memory that was swapped out,
    `hugetlb` the hugepages it holds, which no other figure includes."""

    anon: int
    file: int
    shmem: int
    swap: int
    hugetlb: int


def machine_memory(host: Host) -> MachineMemory:
    """Raises ConfigError. A kernel without hugepages shows none of them: zeros."""
    fields = _fields(host, _MEMINFO, required=("MemTotal", "MemAvailable"))
    return MachineMemory(
        total=fields["MemTotal"],
        available=fields["MemAvailable"],
        hugepages_total=fields.get("HugePages_Total", 0),
        hugepages_free=fields.get("HugePages_Free", 0),
        hugepages_reserved=fields.get("HugePages_Rsvd", 0),
        hugepages_surplus=fields.get("HugePages_Surp", 0),
        hugepage_bytes=fields.get("Hugepagesize", 0),
    )


def node_available(host: Host, node: int | None) -> tuple[int, int]:
    """(total, available) bytes of one NUMA node, or of the machine. Raises ConfigError.

    A node shows no MemAvailable: its free memory and its file pages come close to it.
    """
    if node is None:
        machine = machine_memory(host)
        return machine.total, machine.available
    names = ("MemTotal", "MemFree", "Active(file)", "Inactive(file)")
    fields = _fields(host, _NODE.format(node), names, prefix=f"Node {node} ")
    return fields["MemTotal"], sum(fields[name] for name in names[1:])


def process_memory(host: Host) -> ProcessMemory:
    """Raises ConfigError. Swap and hugepages are zero where the kernel was built without them."""
    fields = _fields(host, _STATUS, required=("RssAnon", "RssFile", "RssShmem"))
    return ProcessMemory(
        anon=fields["RssAnon"],
        file=fields["RssFile"],
        shmem=fields["RssShmem"],
        swap=fields.get("VmSwap", 0),
        hugetlb=fields.get("HugetlbPages", 0),
    )


def _fields(host: Host, path: str, required: tuple[str, ...], prefix: str = "") -> dict[str, int]:
    try:
        lines = host.read_text(path).splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    fields = dict(pair for pair in (_field(line.removeprefix(prefix)) for line in lines) if pair)
    missing = [name for name in required if name not in fields]
    if missing:
        raise ConfigError(f"cannot read {path}: it does not show {missing[0]}")
    return fields


def _field(line: str) -> tuple[str, int] | None:
    """Bytes of "MemTotal:  12 kB", the 3 of "HugePages_Free: 3"; None for lines that are no number."""
    name, _, value = line.partition(":")
    words = value.split()
    if not words or not words[0].isdecimal():
        return None
    return name, int(words[0]) * (KIB if words[1:] == ["kB"] else 1)
