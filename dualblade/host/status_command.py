# SPDX-License-Identifier: Apache-2.0
"""`status`: which drive is bound, and to whom; changes nothing."""

from __future__ import annotations

import argparse
import os
from typing import Any

from dualblade.host.command import host_command
from dualblade.host.report import emit, errors_told
from dualblade.host.status import status
from dualblade.host.sysfs import Host
from dualblade.units import format_size

SUMMARY = "Show every NVMe drive, who drives it and who has it open, hugepages, and what is left half done."
JSON_HELP = "One JSON object on stdout."
EXAMPLE = "sudo dualblade-spdk status"
_CONTENTS = {"empty": "empty at both ends", "data": "data", "unknown": "not to be read"}


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The subcommand, whose `run` does it."""
    made: argparse.ArgumentParser = subparsers.add_parser(
        "status", help=SUMMARY, description=SUMMARY,
        epilog="Example: sudo python3 -m dualblade.host status --json",
    )  # fmt: skip
    made.add_argument("--json", dest="as_json", action="store_true", help=JSON_HELP)
    made.set_defaults(run=run)
    return made


def run(args: argparse.Namespace, host: Host = Host()) -> int:
    """The exit code."""
    with errors_told(args.as_json):
        record = {"ok": True, "privileged": os.geteuid() == 0} | status(host)
        emit(record, args.as_json, _lines)
    return 0


def _lines(record: dict[str, Any]) -> list[str]:
    lines = [line for drive in record["drives"] for line in _drive_lines(drive)]
    lines = lines or ["this machine has no NVMe drive on PCI"]
    lines += [line for leftover in record["leftovers"] for line in _leftover_lines(leftover)]
    lines.append(f"IOMMU: {'on' if record['iommu'] else 'off'}")
    lines += [_pool_line(pool) for pool in record["hugepages"]]
    if not record["privileged"]:
        lines.append(f"root sees who has a drive open, and what is on it: {host_command('status')}")
    return lines


def _drive_lines(drive: dict[str, Any]) -> list[str]:
    name = f"{drive['model'] or 'NVMe drive'}, serial {drive['serial'] or 'unknown'}"
    lines = [f"{drive['bdf']}: {name}: {drive['driver'] or 'no driver'}"]
    if drive["bound"]:
        lines += _bound_lines(drive)
    for space in drive["namespaces"]:
        what = f"volume {space['volume']}" if space["volume"] else _CONTENTS[space["contents"]]
        lines.append(f"  {space['node']}, {format_size(space['size_bytes'])}: {what}")
    return lines


def _bound_lines(drive: dict[str, Any]) -> list[str]:
    names = [node for node in drive["was"] if not node.startswith("/dev/disk/")]
    was = f", was {' '.join(names)}" if names else ""
    if renamed := [node for node in drive["renamed"] if node in names]:
        was += f" ({' '.join(renamed)}: another drive now)"
    by = (
        f"bound by {drive['bound_by']}, {drive['since']}"
        if drive["bound_by"]
        else "not bound by this program"
    )
    lines = [f"  {by}{was}; open to {', '.join(drive['usable_by'])}"]
    lines += [f"  held by {holder['name'] or '?'} (pid {holder['pid']})" for holder in drive["held_by"]]
    return lines


def _leftover_lines(leftover: dict[str, Any]) -> list[str]:
    mend = host_command("unbind", leftover["bdf"])
    return [f"left over: {leftover['problem']}", f"  mend it with: {mend}"]


def _pool_line(pool: dict[str, Any]) -> str:
    where = "" if pool["node"] is None else f", node {pool['node']}"
    size = format_size(pool["page_bytes"])
    return f"hugepages of {size}{where}: {pool['total']}, {pool['free']} of them free"
