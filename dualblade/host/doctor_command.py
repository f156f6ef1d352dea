# SPDX-License-Identifier: Apache-2.0
"""`doctor` without the package's own parts: what the machine offers, looked at from a bare Python."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualblade.host import checks, drive_checks, software_checks, surroundings
from dualblade.host.checks import Check

SUMMARY = "Check this machine; changes nothing. Exit 1 if a check fails."
CACHE_DIR_HELP = "Look at this folder, not the default."


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The subcommand, whose `run` does it."""
    made: argparse.ArgumentParser = subparsers.add_parser(
        "doctor",
        help=SUMMARY,
        description=f"{SUMMARY} The engine and torch are left to `dualblade-spdk doctor`.",
        epilog="Example: python3 -m dualblade.host doctor --cache-dir /mnt/nvme/dualblade",
    )
    made.add_argument("--cache-dir", type=Path, metavar="DIR", help="Look at this folder, too.")
    made.add_argument("--json", dest="as_json", action="store_true", help="One JSON object on stdout.")
    made.set_defaults(run=run)
    return made


def run(args: argparse.Namespace, host: checks.Host = checks.HOST) -> int:
    """The exit code."""
    found = [checks.python_version(), checks.memlock()]
    if args.cache_dir:
        found += folder_checks(args.cache_dir)
    record = as_record(found + machine_checks(host))
    print(json.dumps(record, indent=2) if args.as_json else "\n".join(lines(record)))
    return 0 if record["ok"] else 1


def folder_checks(cache_dir: Path) -> list[Check]:
    found = [checks.cache_folder(cache_dir)]
    if found[0].state == checks.OK:
        found += [look(cache_dir) for look in (checks.filesystem, checks.direct_io, checks.free_space)]
    return found


def machine_checks(host: checks.Host = checks.HOST) -> list[Check]:
    return [
        surroundings.kernel(host),
        surroundings.kernel_features(host),
        surroundings.container(host),
        drive_checks.iommu(host),
        drive_checks.vfio(host),
        *drive_checks.drives(host),
        checks.memory_cgroup(host),
        surroundings.enforcement(host),
        checks.hugepages(host),
        checks.swap(host),
        software_checks.cuda(host),
    ]


def as_record(found: list[Check]) -> dict[str, Any]:
    return {"checks": [asdict(check) for check in found], "ok": all(c.state != checks.FAIL for c in found)}


def lines(record: dict[str, Any]) -> list[str]:
    shown = []
    for check in record["checks"]:
        shown.append(f"{check['state']:<5} {check['name']}: {check['detail']}")
        if check["fix"]:
            shown.append(f"      fix: {check['fix']}")
    return shown
