# SPDX-License-Identifier: Apache-2.0
"""Every NVMe drive of the machine: who drives it, who has it open, what is left of an interrupted bind."""

from __future__ import annotations

import pwd
from dataclasses import asdict, dataclass
from typing import Any

from dualblade.host import journal
from dualblade.host.contents import VOLUME, contents_within
from dualblade.host.hugepages import pools
from dualblade.host.nvme import Controller, Namespace, controller_at
from dualblade.host.pci import PciDevice, nvme_devices
from dualblade.host.processes import holders_of_vfio, userspace_nodes
from dualblade.host.sysfs import Host

_READ_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Leftover:
    """A bind or unbind that did not come to its end. problem: one line."""

    bdf: str
    serial: str
    state: str
    steps: tuple[str, ...]
    problem: str


def status(host: Host) -> dict[str, Any]:
    """One record, for text and JSON. Reads alone; what only root may see is null."""
    drives = [_drive(host, device) for device in nvme_devices(host)]
    return {
        "drives": drives,
        "leftovers": [asdict(leftover) for leftover in leftovers(host)],
        "hugepages": [
            {"node": pool.node, "page_bytes": pool.page, "total": pool.total, "free": pool.free}
            for pool in pools(host)
        ],
        "iommu": bool(host.names("/sys/kernel/iommu_groups")),
    }


def leftovers(host: Host) -> list[Leftover]:
    found = ((entry, _problem(host, entry)) for entry in journal.entries(host))
    return [
        Leftover(entry.bdf, entry.serial, entry.state, entry.steps, problem)
        for entry, problem in found
        if problem
    ]


def _problem(host: Host, entry: journal.Entry) -> str | None:
    """None where all is as the journal says."""
    if not host.exists(f"{journal.DEVICES}/{entry.bdf}"):
        return f"{entry.bdf} was bound, and is gone from the machine"
    driver = journal.driver_of(entry.bdf, host)
    has = f"is with {driver}" if driver else "has no driver"
    if entry.state == journal.BOUND:
        return None if driver == entry.driver else f"{entry.bdf} was bound to {entry.driver}, and {has} now"
    did = "bind" if entry.state == journal.BINDING else "unbind"
    last = f"after the step {entry.steps[-1]!r}" if entry.steps and did == "bind" else "before it was done"
    return f"{did} of {entry.bdf} was interrupted {last}: it {has}"


def _drive(host: Host, device: PciDevice) -> dict[str, Any]:
    entry = journal.entry_of(device.bdf, host)
    controller = controller_at(host, device.bdf)
    bound = device.driver in journal.USERSPACE_DRIVERS
    return {
        "bdf": device.bdf,
        "driver": device.driver,
        "bound": bound,
        "model": controller.model if controller else entry.model if entry else None,
        "serial": controller.serial if controller else entry.serial if entry else None,
        "iommu_group": device.group,
        "numa_node": device.numa_node,
        "namespaces": _namespaces(host, controller),
        "was": sorted(entry.nodes) if entry and bound else [],
        "renamed": [node for node in sorted(entry.nodes) if host.exists(node)] if entry and bound else [],
        "bound_by": entry.by if entry and bound else None,
        "since": entry.since if entry and bound else None,
        "usable_by": _users(host, device) if bound else [],
        "held_by": [asdict(holder) for holder in holders_of_vfio(host, device.bdf, device.group)],
    }


def _namespaces(host: Host, controller: Controller | None) -> list[dict[str, Any]]:
    return [_namespace(host, space) for space in controller.namespaces] if controller else []


def _namespace(host: Host, space: Namespace) -> dict[str, Any]:
    """contents: "empty", "volume" (ours), "data", or "unknown": it may not be read, or does not answer."""
    found = contents_within(host, space, _READ_SECONDS)
    return {
        "node": space.node,
        "nsid": space.nsid,
        "size_bytes": space.size,
        "contents": found.state,
        "volume": found.uuid if found.state == VOLUME else None,
    }


def _users(host: Host, device: PciDevice) -> list[str]:
    """Who may open a bound drive: root always."""
    nodes = userspace_nodes(host, device.bdf, device.group)
    uids = {host.owner(node) for node in nodes if host.exists(node)}
    return ["root", *(user_name(uid) for uid in sorted(uids - {0}))]


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
