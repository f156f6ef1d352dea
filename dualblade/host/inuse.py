# SPDX-License-Identifier: Apache-2.0
"""What speaks against taking a drive from the kernel: who uses it now, or is about to.

Each finding says why, and what the user can do about it. Nothing here writes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from dualblade.host.command import as_root
from dualblade.host.nvme import Controller
from dualblade.host.processes import Holder, holders_of_nodes, pids, printable
from dualblade.host.sysfs import Host

_BLOCK = "/sys/class/block"
# udev looks at a drive that has just come up, or was just written to, and is soon done
_UDEV = frozenset({"systemd-udevd", "(udev-worker)", "udevd"})
_UDEV_SECONDS = 2.0
_SYSTEM = re.compile(r"/|/(boot|usr|var|home|etc|nix)(/.*)?")
_SYSTEM_REMEDY = "take another drive; without one, `run` uses a file, and needs no bind"


@dataclass(frozen=True, slots=True)
class Refusal:
    """kind: one word, for programs. reason: completes "it is refused: ...". remedy: one line."""

    kind: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Mount:
    """dev: "259:1". where: as the process with this pid sees it."""

    dev: str
    source: str
    where: str
    pid: str


def uses(host: Host, controller: Controller) -> list[Refusal]:
    """What has the drive in use, the weightiest first."""
    parts = {part.dev: part.name for space in controller.namespaces for part in space.partitions}
    devs = {space.dev: space.name for space in controller.namespaces if space.dev} | parts
    mounts = list(all_mounts(host))
    return [
        *_system(host, devs, mounts),
        *_mounted(devs, mounts),
        *_swapped(host, devs),
        *_held(host, list(devs.values())),
        *_btrfs(host, list(devs.values())),
        *_partitioned(controller),
        *_opened(host, controller, devs),
    ]


# mounts -----------------------------------------------------------------------------------------


def all_mounts(host: Host) -> Iterator[Mount]:
    """Of every mount namespace that a process is in; the machine's own first."""
    seen: set[str] = set()
    for pid in ["1", "self", *map(str, pids(host))]:
        space = host.link_name(f"/proc/{pid}/ns/mnt") or f"unknown, of {pid}"
        if space not in seen:
            seen.add(space)
            yield from _mounts(host, pid)


def _mounts(host: Host, pid: str) -> Iterator[Mount]:
    for line in host.attribute(f"/proc/{pid}/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(" "), right.split(" ")
        if len(fields) > 4 and len(kind) > 1:
            yield Mount(fields[2], _unescape(kind[1]), printable(_unescape(fields[4])), pid)


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def _is_on(mount: Mount, devs: dict[str, str]) -> str | None:
    """The device's name. btrfs and bcachefs have device numbers of their own; their source tells."""
    sources = [part.removeprefix("/dev/") for part in mount.source.split(":")]
    named = next((name for name in devs.values() if name in sources), None)
    return devs.get(mount.dev) or named


def _mounted(devs: dict[str, str], mounts: list[Mount]) -> list[Refusal]:
    found: dict[tuple[str, str], Refusal] = {}
    for mount in mounts:
        if name := _is_on(mount, devs):
            ours = mount.pid in ("1", "self")
            seen = "" if ours else f", as process {mount.pid} sees it"
            enter = [] if ours else ["nsenter", "-t", mount.pid, "-m"]
            found[name, mount.where] = Refusal(
                "mounted", f"/dev/{name} is mounted on {mount.where}{seen}",
                f"if nothing uses it: {as_root([*enter, 'umount', mount.where])}",
            )  # fmt: skip
    return list(found.values())


# the system's own -------------------------------------------------------------------------------


def _system(host: Host, devs: dict[str, str], mounts: list[Mount]) -> list[Refusal]:
    """Is it below what the machine was started from, or will wake up from?"""
    tops = {mount.dev: mount.where for mount in mounts if _belongs_to_system(mount)}
    resume = host.attribute("/sys/power/resume")
    if resume and resume != "0:0":
        tops[resume] = "the image to resume from"
    below = {where for dev, where in tops.items() if not _ancestors(host, dev).isdisjoint(devs)}
    named = _named_at_boot(host, devs)
    return [
        Refusal("system", f"the system runs from it ({what})", _SYSTEM_REMEDY)
        for what in sorted(below | named)
    ]


def _belongs_to_system(mount: Mount) -> bool:
    return mount.pid in ("1", "self") and _SYSTEM.fullmatch(mount.where) is not None


def _ancestors(host: Host, dev: str) -> set[str]:
    """Device numbers of everything that a block device lies on, itself among them."""
    found: set[str] = set()
    todo = [dev]
    while todo:
        number = todo.pop()
        if number in found or not number:
            continue
        found.add(number)
        folder = host.resolve(f"/sys/dev/block/{number}")
        todo += [host.attribute(f"{folder}/slaves/{name}/dev") for name in host.names(f"{folder}/slaves")]
        if host.exists(f"{folder}/partition"):
            todo.append(host.attribute(f"{folder.rpartition('/')[0]}/dev"))
    return found


def _named_at_boot(host: Host, devs: dict[str, str]) -> set[str]:
    """root=/dev/nvme0n1p2, say. What is named by UUID is mounted, and found by that."""
    words = (word.partition("=") for word in host.attribute("/proc/cmdline").split())
    return {
        f"{key}={value} at boot"
        for key, _, value in words
        if key in ("root", "resume") and value.removeprefix("/dev/") in devs.values()
    }


# swap, holders, partitions, descriptors ---------------------------------------------------------


def _swapped(host: Host, devs: dict[str, str]) -> list[Refusal]:
    rows = [line.split()[0] for line in host.attribute("/proc/swaps").splitlines()[1:] if line.strip()]
    nodes = [_unescape(row) for row in rows]
    return [
        Refusal("swap", f"{node} is swap space in use", as_root(["swapoff", node]))
        for node in nodes
        if host.resolve(node).rpartition("/")[2] in devs.values()
    ]


def _held(host: Host, names: list[str]) -> list[Refusal]:
    found = []
    for name in names:
        for holder in host.names(f"{_BLOCK}/{name}/holders"):
            what, remedy = _holder(host, holder)
            found.append(Refusal("held", f"/dev/{name} is a part of {what}", remedy))
    return found


def _holder(host: Host, name: str) -> tuple[str, str]:
    """(what it is, how it lets go)."""
    label = host.attribute(f"{_BLOCK}/{name}/dm/name")
    uuid = host.attribute(f"{_BLOCK}/{name}/dm/uuid")
    if uuid.startswith("LVM-"):
        return f"the LVM volume {label}", f"if it is not needed: {as_root(['dmsetup', 'remove', label])}"
    if uuid.startswith("CRYPT-"):
        return f"the encrypted volume {label}", as_root(["cryptsetup", "close", label])
    if label:
        return f"the mapped device {label}", as_root(["dmsetup", "remove", label])
    if name.startswith("md"):
        return f"the RAID array {name}", as_root(["mdadm", "--stop", f"/dev/{name}"])
    if name.startswith("bcache"):
        return f"the cache {name}", "echo 1 | " + as_root(["tee", f"{_BLOCK}/{name}/bcache/stop"])
    return name, f"release /dev/{name} first"


def _btrfs(host: Host, names: list[str]) -> list[Refusal]:
    """A filesystem on several drives shows but one of them in the table of mounts."""
    mine = set(names)
    top = "/sys/fs/btrfs"
    return [
        Refusal("mounted", f"/dev/{name} is a part of the mounted btrfs {uuid}", "unmount it")
        for uuid in host.names(top)
        for name in host.names(f"{top}/{uuid}/devices")
        if name in mine
    ]


def _partitioned(controller: Controller) -> list[Refusal]:
    return [
        Refusal(
            "partitions",
            f"{space.node} has partitions ({', '.join(part.name for part in space.partitions)})",
            f"a whole drive is taken or none; if nothing on it is needed: {_wipe(space.node)}",
        )
        for space in controller.namespaces
        if space.partitions
    ]


def _wipe(node: str) -> str:
    return as_root(["wipefs", "--all", node])


def _opened(host: Host, controller: Controller, devs: dict[str, str]) -> list[Refusal]:
    nodes = set(controller.nodes())
    numbers = {f"b{dev}" for dev in devs} | {host.device_number(node) or "" for node in nodes} - {""}
    deadline = time.monotonic() + _UDEV_SECONDS
    found = holders_of_nodes(host, nodes, numbers)
    while any(holder.name in _UDEV for holder in found) and time.monotonic() < deadline:
        time.sleep(0.05)
        found = holders_of_nodes(host, nodes, numbers)
    return [Refusal("open", _who(holder), f"end it, or wait for it: {_show(holder)}") for holder in found]


def _who(holder: Holder) -> str:
    return f"{holder} has {holder.path} open"


def _show(holder: Holder) -> str:
    return f"ps -fp {holder.pid}"
