# SPDX-License-Identifier: Apache-2.0
"""`bind`: shows what a drive is and what will happen to it, asks, and takes it."""

from __future__ import annotations

import argparse
import os
import pwd
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dualblade.errors import BindError, UsageError
from dualblade.host import journal
from dualblade.host.bind import Drive, RefusedError, Wish, bind, find_drive, permit, plan, refusals
from dualblade.host.command import host_command
from dualblade.host.eligible import UIO, VFIO, warnings
from dualblade.host.inuse import Refusal
from dualblade.host.memlock import memlock_note
from dualblade.host.nvme import Namespace, address_of
from dualblade.host.report import ask, check_root, emit, errors_told
from dualblade.host.status import user_name
from dualblade.host.sysfs import Host
from dualblade.host.unbind import find_binding
from dualblade.units import format_size

SUMMARY = "Take one NVMe drive from the kernel for the userspace driver. Writes nothing to the drive."
DEVICE_HELP = "A drive: /dev/nvme1n1, /dev/nvme1, or its PCI address."
SERIAL_HELP = "The drive's serial number, instead of typing it when asked."
YES_HELP = "Never ask; goes with --serial."
DRY_RUN_HELP = "Show what it is, what speaks against it and what would happen; change nothing."
DRIVER_HELP = f"{VFIO} (the default) needs an IOMMU; {UIO} does not, and protects nothing."
USER_HELP = "Let this user open the drive, not root alone."
ERASES_HELP = "Take a drive with this serial number although its first or last MiB hold unknown data."
THEN_HELP = "Another drive of the same IOMMU group, which you bind next; several times for several."
JSON_HELP = "One JSON object on stdout."
EXAMPLE = "sudo dualblade-spdk bind /dev/nvme1n1 --serial S64DNX0R --user $USER"
DRIVERS = (VFIO, UIO)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The subcommand, whose `run` does it."""
    made: argparse.ArgumentParser = subparsers.add_parser(
        "bind", help=SUMMARY, description=SUMMARY,
        epilog="Example: sudo python3 -m dualblade.host bind /dev/nvme1n1 --serial S64DNX0R --user $USER",
    )  # fmt: skip
    made.add_argument("device", metavar="DEV", help=DEVICE_HELP)
    made.add_argument("--serial", metavar="S", help=SERIAL_HELP)
    made.add_argument("--yes", action="store_true", help=YES_HELP)
    made.add_argument("--dry-run", action="store_true", help=DRY_RUN_HELP)
    made.add_argument("--driver", choices=DRIVERS, default=VFIO, help=DRIVER_HELP)
    made.add_argument("--user", metavar="NAME", help=USER_HELP)
    made.add_argument("--then", metavar="DEV", action="append", default=[], help=THEN_HELP)
    made.add_argument("--i-know-this-erases", dest="erases", metavar="SERIAL", help=ERASES_HELP)
    made.add_argument("--json", dest="as_json", action="store_true", help=JSON_HELP)
    made.set_defaults(run=run)
    return made


def run(args: argparse.Namespace, host: Host = Host()) -> int:
    """The exit code. Raises UsageError, BindError."""
    args.words = _words(args)
    with errors_told(args.as_json):
        if args.yes and not args.serial:
            raise UsageError("--yes needs --serial", "name the drive by its serial number: --serial S")
        if args.user and args.driver == UIO:
            raise UsageError(f"--user does not go with {UIO}", "root alone can use a drive through it")
        check_root(args)
        wish = _wish(args, host)
        if entry := _already(host, args):
            return _bound_already(args, host, entry, wish)
        drive = find_drive(host, args.device)
        if args.serial is not None:  # before any remedy is told, which may be to wipe it
            _check_serial(drive, args.serial)
        return _bind(args, host, drive, wish)


def _bind(args: argparse.Namespace, host: Host, drive: Drive, wish: Wish) -> int:
    record = _describe(host, drive, wish)
    against = refusals(host, drive, wish)
    record["refusals"] = [_as_record(refusal) for refusal in against]
    if args.dry_run:
        emit(record | {"ok": not against, "dry_run": True}, args.as_json, _dry_lines)
        return 1 if against else 0
    if against:
        raise _refused(drive, against, record)
    _confirm(args, drive, record)
    entry = _do(host, drive, wish, record)
    emit(_bound(host, record, entry, wish), args.as_json, _bound_lines)
    return 0


def _do(host: Host, drive: Drive, wish: Wish, record: dict[str, Any]) -> journal.Entry:
    try:
        return bind(host, drive, wish)
    except RefusedError as error:  # it came into use while the user was typing
        raise _refused(drive, error.refusals, record) from error


def _refused(drive: Drive, against: list[Refusal], record: dict[str, Any]) -> RefusedError:
    error = RefusedError(drive, against)
    error.details = record | {"refusals": [_as_record(refusal) for refusal in against]}
    return error


# what the user says -----------------------------------------------------------------------------


def _words(args: argparse.Namespace, flags: bool = True) -> Sequence[str]:
    """The command line again, for a hint; without its flags where they would be in the way."""
    named = {"--serial": args.serial, "--user": args.user, "--i-know-this-erases": args.erases}
    words = ["bind", args.device]
    words += [word for option, value in named.items() if value for word in (option, value)]
    words += [word for device in args.then for word in ("--then", device)]
    words += ["--driver", args.driver] if args.driver != VFIO else []
    given = {"--yes": args.yes, "--dry-run": args.dry_run, "--json": args.as_json}
    return words + [flag for flag in given if flags and given[flag]]


def _wish(args: argparse.Namespace, host: Host) -> Wish:
    """Raises UsageError, BindError."""
    by = os.environ.get("SUDO_USER") or user_name(os.geteuid())
    then = frozenset(address_of(host, device) for device in args.then)
    owner = _owner(args.user) if args.user else None
    return Wish(args.driver, owner, args.erases, by, then, tuple(_words(args, flags=False)))


def _owner(name: str) -> tuple[str, int]:
    """Raises UsageError."""
    try:
        return (user_name(int(name)), int(name)) if name.isdecimal() else (name, pwd.getpwnam(name).pw_uid)
    except KeyError as error:
        raise UsageError(f"there is no user {name!r}", "getent passwd lists those there are") from error


def _confirm(args: argparse.Namespace, drive: Drive, record: dict[str, Any]) -> None:
    """Raises BindError unless the user names the drive's serial number."""
    given = args.serial
    if given is None:
        if not args.as_json:
            emit(record, False, _plan_lines)
        given = ask(f"{drive.controller.model}: type its serial number ({drive.serial}) to take it:")
    if given is None:
        again = [*args.words, "--serial", drive.serial]
        raise BindError(
            f"nobody is here to confirm that {drive.bdf} is meant, whose serial number is {drive.serial}",
            host_command(*again),
        )
    _check_serial(drive, given)


def _check_serial(drive: Drive, given: str) -> None:
    if given != drive.serial:
        raise BindError(
            f"{drive.bdf} has the serial number {drive.serial}, not {given or 'an empty one'}: "
            "nothing was changed",
            f"is it the right drive? all of them: {host_command('status')}",
        )


# bound already ----------------------------------------------------------------------------------


def _already(host: Host, args: argparse.Namespace) -> journal.Entry | None:
    """The entry of a drive that is bound as it should be."""
    try:
        found = find_binding(host, args.device)
    except BindError:
        return None
    entry = found.entry
    whole = entry is not None and entry.state == journal.BOUND and found.device.driver == entry.driver
    return entry if whole else None


def _bound_already(args: argparse.Namespace, host: Host, entry: journal.Entry, wish: Wish) -> int:
    if args.serial not in (None, entry.serial):
        raise BindError(f"{entry.bdf} has the serial number {entry.serial}, not {args.serial}")
    if args.driver != entry.driver:
        raise BindError(
            f"{entry.bdf} is bound to {entry.driver} already", f"first: {host_command('unbind', entry.bdf)}"
        )
    if not args.dry_run and wish.owner:
        permit(host, entry.bdf, entry.group, wish)
        entry = replace(entry, owner=wish.owner[0])
        entry.save(host)
    record = {"dry_run": args.dry_run, "bdf": entry.bdf, "model": entry.model, "serial": entry.serial}
    record |= {"already": True, "driver": entry.driver, "refusals": [], "notes": []}
    emit(_bound(host, record, entry, wish), args.as_json, _bound_lines)
    return 0


# record -----------------------------------------------------------------------------------------


def _describe(host: Host, drive: Drive, wish: Wish) -> dict[str, Any]:
    device, controller = drive.device, drive.controller
    return {
        "ok": False,
        "dry_run": False,
        "already": False,
        "bdf": device.bdf,
        "controller": controller.node,
        "model": controller.model,
        "serial": drive.serial,
        "firmware": controller.firmware,
        "size_bytes": controller.size,
        "namespaces": [_namespace(space) for space in controller.namespaces],
        "old_driver": device.driver,
        "driver": wish.driver,
        "iommu_group": device.group,
        "numa_node": device.numa_node,
        "steps": [{"name": step.name, "does": step.says} for step in plan(host, drive, wish)],
        "notes": warnings(device, wish.driver),
        "refusals": [],
    }


def _namespace(space: Namespace) -> dict[str, Any]:
    return {"node": space.node, "nsid": space.nsid, "size_bytes": space.size, "block_bytes": space.block}


def _as_record(refusal: Refusal) -> dict[str, str]:
    return {"kind": refusal.kind, "reason": refusal.reason, "remedy": refusal.remedy}


def _bound(host: Host, record: dict[str, Any], entry: journal.Entry, wish: Wish) -> dict[str, Any]:
    node = f"/dev/vfio/{entry.group}" if entry.driver == VFIO else None
    notes = [*record["notes"], *_next(entry, wish), *_roots_alone(entry), *memlock_note(host, wish.owner)]
    return record | {"ok": True, "target": entry.bdf, "node": node, "user": entry.owner, "notes": notes}


def _next(entry: journal.Entry, wish: Wish) -> list[str]:
    then = sorted(wish.then - {entry.bdf})
    return [f"of no use until the rest of its group is bound: {host_command('bind', bdf)}" for bdf in then]


def _roots_alone(entry: journal.Entry) -> list[str]:
    """For whom sudo was typed, most likely wants to use it."""
    user = os.environ.get("SUDO_USER", "root")
    if entry.owner or user == "root" or entry.driver == UIO:
        return []
    return [f"root alone may use it; for {user}, too: {host_command('bind', entry.bdf, '--user', user)}"]


# text -------------------------------------------------------------------------------------------


def _drive_lines(record: dict[str, Any]) -> list[str]:
    group = record["iommu_group"]
    lines = [
        f"{record['bdf']}: {record['model']}, serial {record['serial']}, firmware {record['firmware']}, "
        f"{format_size(record['size_bytes'])}"
    ]
    lines += [
        f"  namespace {space['nsid']}: {space['node']}, {format_size(space['size_bytes'])} in blocks of "
        f"{space['block_bytes']} bytes"
        for space in record["namespaces"]
    ]
    lines.append(f"  with {record['old_driver']} now; " + (f"IOMMU group {group}" if group else "no IOMMU"))
    return lines


def _plan_lines(record: dict[str, Any]) -> list[str]:
    lines = [*_drive_lines(record), "what will happen (nothing is written to the drive):"]
    lines += [f"  {number}. {step['does']}" for number, step in enumerate(record["steps"], 1)]
    return lines + [f"note: {note}" for note in record["notes"]]


def _dry_lines(record: dict[str, Any]) -> list[str]:
    if not record["refusals"]:
        return [*_plan_lines(record), "nothing speaks against it"]
    lines = [*_drive_lines(record), "it is refused:"]
    for refusal in record["refusals"]:
        lines += [f"  {refusal['reason']}", f"    remedy: {refusal['remedy']}"]
    return lines


def _bound_lines(record: dict[str, Any]) -> list[str]:
    state = "is bound already" if record["already"] else "is bound"
    back = host_command("unbind", record["bdf"])
    return [
        f"{record['bdf']} ({record['model']}, serial {record['serial']}) {state}: {record['driver']}",
        *(f"note: {note}" for note in record["notes"]),
        f"use it as --nvme {record['target']}; give it back with: {back}",
    ]
