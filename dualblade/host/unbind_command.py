# SPDX-License-Identifier: Apache-2.0
"""`unbind`: gives a drive back to the kernel."""

from __future__ import annotations

import argparse
from typing import Any

from dualblade.host.command import host_command
from dualblade.host.journal import entries
from dualblade.host.nvme import Controller, controller_at
from dualblade.host.report import check_root, emit, errors_told
from dualblade.host.sysfs import Host
from dualblade.host.unbind import Binding, find_binding, unbind

SUMMARY = "Give a drive back to the kernel; also after a bind that was interrupted."
DEVICE_HELP = "Its PCI address, its serial number, or the name it had, such as /dev/nvme1n1."
JSON_HELP = "One JSON object on stdout."
EXAMPLE = "sudo dualblade-spdk unbind /dev/nvme1n1"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The subcommand, whose `run` does it."""
    made: argparse.ArgumentParser = subparsers.add_parser(
        "unbind", help=SUMMARY, description=SUMMARY,
        epilog="Example: sudo python3 -m dualblade.host unbind /dev/nvme1n1",
    )  # fmt: skip
    made.add_argument("device", metavar="DEV", help=DEVICE_HELP)
    made.add_argument("--json", dest="as_json", action="store_true", help=JSON_HELP)
    made.set_defaults(run=run)
    return made


def run(args: argparse.Namespace, host: Host = Host()) -> int:
    """The exit code. Raises BindError."""
    args.words = ["unbind", args.device, *(["--json"] if args.as_json else [])]
    with errors_told(args.as_json):
        check_root(args)
        binding = find_binding(host, args.device)
        controller = controller_at(host, binding.bdf)
        done = binding.entry is not None or not binding.at_home
        if done or controller is None:
            controller = unbind(host, binding)
        record = _record(binding, controller, done)
        record["others"] = _others_of_that_name(host, args.device, binding.bdf)
        emit(record, args.as_json, _lines)
    return 0


def _others_of_that_name(host: Host, device: str, bdf: str) -> list[str]:
    """Drives that had the name when they were bound, which the kernel has given to another since."""
    return [entry.bdf for entry in entries(host) if device in entry.nodes and entry.bdf != bdf]


def _record(binding: Binding, controller: Controller, done: bool) -> dict[str, Any]:
    return {
        "ok": True,
        "changed": done,
        "bdf": binding.bdf,
        "model": controller.model,
        "serial": controller.serial,
        "driver": binding.old_driver,
        "known": binding.entry is not None,
        "nodes": [space.node for space in controller.namespaces],
        "was": _had(binding),
    }


def _had(binding: Binding) -> list[str]:
    """The block devices that the drive was when it was bound."""
    known = binding.entry.nodes if binding.entry else {}
    return sorted(node for node, nsid in known.items() if nsid and node.startswith("/dev/nvme"))


def _lines(record: dict[str, Any]) -> list[str]:
    nodes = ", ".join(record["nodes"]) or "no namespace"
    what = f"{record['bdf']} ({record['model']}, serial {record['serial']})"
    other = [f"the one bound under that name: {host_command('unbind', bdf)}" for bdf in record["others"]]
    if not record["changed"]:
        return [f"{what} is not bound: it is with {record['driver']}, as {nodes}", *other]
    lines = [f"{what} is back with {record['driver']}, as {nodes}"]
    if moved := [node for node in record["was"] if node not in record["nodes"]]:
        lines.append(f"note: it was {', '.join(moved)}, which may be the name of another drive now")
    if not record["known"]:
        lines.append(f"it was not bound by this program; what is: {host_command('status')}")
    return lines
