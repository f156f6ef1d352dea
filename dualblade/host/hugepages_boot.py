# SPDX-License-Identifier: Apache-2.0
"""Hugepages that are reserved again when the machine starts.

For the whole machine it is a file for sysctl. One NUMA node has no sysctl: for that it is a file for
systemd-tmpfiles, which writes the number to sysfs at boot.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dualblade.errors import ConfigError
from dualblade.host.hugepages import PAGE, Added, recorded
from dualblade.host.meminfo import machine_memory
from dualblade.host.sysfs import Host
from dualblade.units import MIB

SYSCTL = "/etc/sysctl.d/90-dualblade-hugepages.conf"
TMPFILES = "/etc/tmpfiles.d/dualblade-hugepages.conf"
_SYSCTL_FOLDERS = ("/etc/sysctl.d", "/run/sysctl.d", "/usr/local/lib/sysctl.d", "/usr/lib/sysctl.d")
_HEAD = "# Written by `dualblade-spdk hugepages --persist`; `hugepages --release` removes it.\n"
_NODE_FILE = "/sys/devices/system/node/node{}/hugepages/hugepages-2048kB/nr_hugepages"
_SYSCTL_LINE = re.compile(r"^\s*-?\s*vm[./]nr_hugepages\s*=\s*(\d+)\s*$", re.MULTILINE)
# The comment before a line: what the pool kept before ours came.
_ENTRY = re.compile(
    r"^# before: (\d+)\n(?:vm\.nr_hugepages = (\d+)|w \S+/node(\d+)/\S+ - - - - (\d+))$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Persisted:
    """2 MiB pages that a pool gets at boot; node None for the machine. before: what it kept without us."""

    node: int | None
    pages: int
    before: int

    @property
    def path(self) -> str:
        return SYSCTL if self.node is None else TMPFILES

    def text(self) -> str:
        line = f"vm.nr_hugepages = {self.pages}"
        if self.node is not None:
            line = f"w {_NODE_FILE.format(self.node)} - - - - {self.pages}"
        return f"# before: {self.before}\n{line}\n"


def persisted(host: Host) -> list[Persisted]:
    """What our files say; a line that was changed by hand in another form is not seen."""
    return [_entry(match) for path in (SYSCTL, TMPFILES) for match in _ENTRY.finditer(host.attribute(path))]


def _entry(match: re.Match[str]) -> Persisted:
    before, machine, node, pages = match.groups()
    if machine is not None:
        return Persisted(None, int(machine), int(before))
    return Persisted(int(node), int(pages), int(before))


def check_can_persist(host: Host, node: int | None) -> None:
    """Before anything is changed. Raises ConfigError with what to do instead."""
    if node is not None:
        if not host.exists("/run/systemd/system"):
            raise ConfigError(
                "without systemd nothing sets a node's hugepages at boot",
                f"add hugepages={node}:N to the kernel's command line (Linux 5.16), N pages of 2 MiB",
            )
        return
    if machine_memory(host).hugepage_bytes != 2 * MIB:
        raise ConfigError(
            "vm.nr_hugepages counts pages of another size than 2 MiB on this machine",
            "add hugepagesz=2M hugepages=N to the kernel's command line",
        )
    for path, pages in _others(host):
        raise ConfigError(
            f"{path} sets vm.nr_hugepages = {pages} at boot, and two files would dispute it",
            f"change the number there ({PAGE // MIB} MiB a page), and leave --persist out",
        )


def _others(host: Host) -> list[tuple[str, int]]:
    """Files of other hands that set the pool at boot."""
    paths = ["/etc/sysctl.conf"]
    for folder in _SYSCTL_FOLDERS:
        paths += [f"{folder}/{name}" for name in host.names(folder) if name.endswith(".conf")]
    found = [(path, _SYSCTL_LINE.findall(host.attribute(path))) for path in paths if path != SYSCTL]
    return [(path, int(numbers[-1])) for path, numbers in found if numbers]


def persist(host: Host, node: int | None, pages: int, before: int) -> Persisted:
    """From the next boot on the pool gets `pages`. Raises OSError."""
    known = {entry.node: entry for entry in persisted(host)}
    if node in known:
        before = known[node].before
    entry = Persisted(node, pages, before)
    entries = [one for one in (known | {node: entry}).values() if one.path == entry.path]
    host.save(entry.path, "".join([_HEAD, *(one.text() for one in entries)]))
    return entry


def unpersist(host: Host) -> list[str]:
    """The files that were there. Raises OSError."""
    found = [path for path in (SYSCTL, TMPFILES) if host.exists(path)]
    for path in found:
        host.remove(path)
    return found


def ours(host: Host) -> dict[int | None, Added]:
    """What we have put into the pools since the machine started: as written down, else by our files,
    which it started with. Raises ConfigError."""
    added = recorded(host)
    if added is not None:
        return added
    return {entry.node: Added(entry.before, max(0, entry.pages - entry.before)) for entry in persisted(host)}
