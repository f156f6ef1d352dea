# SPDX-License-Identifier: Apache-2.0
"""`hugepages`: show the kernel's pools, reserve, give back."""

from __future__ import annotations

import argparse
import errno
from typing import Any

from dualblade.errors import ConfigError, UsageError
from dualblade.host.command import host_command
from dualblade.host.hugepages import PAGE, Change, Pool, forget, pools, pools_of, release, reserve
from dualblade.host.hugepages_boot import check_can_persist, ours, persist, persisted, unpersist
from dualblade.host.report import emit, errors_told
from dualblade.host.sysfs import Host
from dualblade.units import format_size, parse_size

SUMMARY = "Show the pools of hugepages by NUMA node; reserve, or give back what was reserved."
RESERVE_HELP = (
    "Grow the pool of 2 MiB pages until it holds SIZE in all. Pages that are there count, whoever "
    "reserved them, and a larger pool is left as it is."
)
NODE_HELP = "Show or reserve on this NUMA node alone."
PERSIST_HELP = "With --reserve: again at every boot. Names the file that it writes."
RELEASE_HELP = "Give back what --reserve has added, and remove the files of --persist."
EXAMPLE = "sudo dualblade-spdk hugepages --reserve 1G"


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """The subcommand, whose `run` does it."""
    made: argparse.ArgumentParser = subparsers.add_parser(
        "hugepages",
        help=SUMMARY,
        description=SUMMARY,
        epilog="Example: sudo python3 -m dualblade.host hugepages --reserve 1G",
    )
    made.add_argument("--reserve", metavar="SIZE", help=RESERVE_HELP)
    made.add_argument("--node", type=int, metavar="N", help=NODE_HELP)
    made.add_argument("--persist", action="store_true", help=PERSIST_HELP)
    made.add_argument("--release", action="store_true", help=RELEASE_HELP)
    made.add_argument("--json", dest="as_json", action="store_true", help="One JSON object on stdout.")
    made.set_defaults(run=run)
    return made


def run(args: argparse.Namespace, host: Host = Host()) -> int:
    """The exit code. Raises UsageError, ConfigError; where the kernel grants less, after the record."""
    with errors_told(args.as_json):
        record, short = _do(args, host)
    emit({"ok": short is None} | record, args.as_json, _lines)
    if short:
        raise _too_few(short)
    return 0


def _do(args: argparse.Namespace, host: Host) -> tuple[dict[str, Any], Change | None]:
    """The record, and the change where it fell short."""
    _check_options(args)
    if not args.release and args.reserve is None:
        return _record(host, args.node), None
    try:
        return (_release(host), None) if args.release else _reserve(args, host)
    except OSError as error:
        raise _refused(error, args) from error


def _refused(error: OSError, args: argparse.Namespace) -> ConfigError:
    if isinstance(error, PermissionError):
        return ConfigError("the pool of hugepages is root's to change", _again(args))
    hint = None
    if error.errno == errno.EROFS:
        hint = "in a container the pool is the host's: reserve hugepages there"
    return ConfigError(f"{error.filename} cannot be written: {error.strerror}", hint)


def _again(args: argparse.Namespace) -> str:
    """The same command, as root."""
    words = ["--release"] if args.release else ["--reserve", args.reserve]
    words += [] if args.node is None else ["--node", str(args.node)]
    words += ["--persist"] if args.persist else []
    return host_command("hugepages", *words)


def _check_options(args: argparse.Namespace) -> None:
    if args.release and (args.reserve or args.persist or args.node is not None):
        raise UsageError("--release gives back all that was reserved", "leave the other options out")
    if args.persist and not args.reserve:
        raise UsageError("--persist goes with --reserve", "write e.g. --reserve 1G --persist")


# reserve and release ------------------------------------------------------------------------


def _reserve(args: argparse.Namespace, host: Host) -> tuple[dict[str, Any], Change | None]:
    nbytes = parse_size(args.reserve, "--reserve")
    if args.persist:
        check_can_persist(host, args.node)
    change = reserve(host, nbytes, args.node, ours(host))
    written = {"written": _persist(host, args.node, nbytes)} if args.persist else {}
    record = _record(host, args.node) | {"change": _as_record(change)} | written
    return record, change if change.short else None


def _persist(host: Host, node: int | None, nbytes: int) -> str:
    """What was asked for, or the pool as it is where that is more: booting must not shrink it."""
    seen = pools_of(host, node)
    kept = sum(pool.kept for pool in seen)
    added = ours(host)
    mine = sum(one.pages for place, one in added.items() if node in (None, place))
    return persist(host, node, max(kept, -(-nbytes // PAGE)), max(0, kept - mine)).path


def _too_few(change: Change) -> ConfigError:
    back = host_command("hugepages", "--release")
    return ConfigError(
        f"the kernel granted {format_size(change.after)} of {format_size(change.wanted)} in hugepages: its "
        "memory is in too small pieces",
        "what came is kept. Make room as root (echo 3 > /proc/sys/vm/drop_caches; "
        "echo 1 > /proc/sys/vm/compact_memory) and reserve again, or reboot and reserve at once, "
        "or do with fewer; "
        f"to give them back: {back}",
    )


def _release(host: Host) -> dict[str, Any]:
    change = release(host, ours(host))
    files = unpersist(host)
    forget(host)
    return _record(host, None) | {"change": _as_record(change), "removed": files}


# record -------------------------------------------------------------------------------------


def _record(host: Host, node: int | None) -> dict[str, Any]:
    if node is not None:
        pools_of(host, node)  # is there such a node?
    found = [pool for pool in pools(host) if node is None or pool.node == node]
    return {
        "pools": [_pool_record(pool) for pool in found],
        "added": [{"node": place, "bytes": one.pages * PAGE} for place, one in ours(host).items()],
        "persisted": [{"node": one.node, "pages": one.pages, "file": one.path} for one in persisted(host)],
    }


def _pool_record(pool: Pool) -> dict[str, Any]:
    return {
        "node": pool.node,
        "page_bytes": pool.page,
        "total_bytes": pool.nbytes,
        "free_bytes": pool.free * pool.page,
        "surplus_bytes": pool.surplus * pool.page,
    }


def _as_record(change: Change) -> dict[str, int]:
    return {"before_bytes": change.before, "after_bytes": change.after, "wanted_bytes": change.wanted}


# text ---------------------------------------------------------------------------------------


def _lines(record: dict[str, Any]) -> list[str]:
    lines = [_pool_line(pool) for pool in record["pools"]] or ["this kernel has no hugepages"]
    lines += _change_lines(record)
    if mine := sum(one["bytes"] for one in record["added"]):
        lines.append(
            f"{format_size(mine)} was added here; back with: {host_command('hugepages', '--release')}"
        )
    lines += [
        f"at every boot: {one['pages']} pages of 2 MiB, by {one['file']}" for one in record["persisted"]
    ]
    lines += [f"removed {file}" for file in record.get("removed", ())]
    return lines


def _pool_line(pool: dict[str, Any]) -> str:
    where = "machine" if pool["node"] is None else f"node {pool['node']}"
    size = format_size(pool["page_bytes"])
    if not pool["total_bytes"]:
        return f"{where}, pages of {size}: none"
    total, free = format_size(pool["total_bytes"]), format_size(pool["free_bytes"])
    return f"{where}, pages of {size}: {total}, {free} of it free"


def _change_lines(record: dict[str, Any]) -> list[str]:
    if "change" not in record:
        return []
    before, after, wanted = (record["change"][f"{name}_bytes"] for name in ("before", "after", "wanted"))
    if "removed" in record:
        lines = [f"given back: {format_size(before - after)}" if after < before else "nothing to give back"]
        if after > wanted:
            lines.append(f"{format_size(after - wanted)} is in use, and goes when its process ends")
        return lines
    if after == before and after >= wanted:
        return [f"it holds {format_size(wanted)} already: nothing was changed"]
    return [f"reserved: {format_size(after - before)} more, as read back"]
