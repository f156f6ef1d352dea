# SPDX-License-Identifier: Apache-2.0
"""The kernel's pools of hugepages: looked at, filled, and given back by what we put into them.

A pool belongs to everybody. What was added is written down in /run, pool by pool, so that giving
back takes no page that was there before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from dualblade.errors import ConfigError, UsageError
from dualblade.host.journal import FOLDER
from dualblade.host.meminfo import node_available
from dualblade.host.sysfs import Host
from dualblade.units import GIB, KIB, MIB, format_size

PAGE = 2 * MIB  # the size SPDK's memory is made of here
RECORD = f"{FOLDER}/hugepages.json"
_NODES = "/sys/devices/system/node"
_MACHINE = "/sys/kernel/mm/hugepages"
_ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Pool:
    """Pages of one size on one NUMA node; node None on a kernel without NUMA.

    total: pages, `surplus` of them on loan beyond what was asked for, which the kernel takes back once
    they are unused. free: pages in nobody's use.
    """

    node: int | None
    page: int
    total: int
    free: int
    surplus: int

    @property
    def kept(self) -> int:
        """Pages that stay when nobody uses them."""
        return self.total - self.surplus

    @property
    def nbytes(self) -> int:
        return self.total * self.page


@dataclass(frozen=True, slots=True)
class Added:
    """What we put into a pool: how many pages it kept before the first time, and how many came."""

    before: int
    pages: int

    def left_of(self, kept: int) -> int:
        """How many of `kept` stay when ours are taken out, whoever has changed the pool since."""
        return min(kept, max(self.before, kept - self.pages))


@dataclass(frozen=True, slots=True)
class Change:
    """bytes of 2 MiB pages in the pools concerned, before and after. wanted: bytes."""

    before: int
    after: int
    wanted: int

    @property
    def short(self) -> bool:
        return self.after < self.wanted


# look ---------------------------------------------------------------------------------------


def nodes(host: Host) -> list[int]:
    """NUMA nodes with memory, or none where the kernel does not tell."""
    names = host.names(_NODES)
    found = [int(name[4:]) for name in names if re.fullmatch(r"node\d+", name)]
    return sorted(node for node in found if host.exists(f"{_NODES}/node{node}/hugepages"))


def pools(host: Host) -> list[Pool]:
    """Every pool there is, by node and page size. Empty on a kernel without hugepages."""
    places: list[int | None] = [*nodes(host)] or [None]
    found = [_pool(host, node, page) for node in places for page in _page_sizes(host, node)]
    return [pool for pool in found if pool is not None]


def pools_of(host: Host, node: int | None) -> list[Pool]:
    """The pools of 2 MiB pages on `node`, or on every node. Raises ConfigError, UsageError."""
    every = [pool for pool in pools(host) if pool.page == PAGE]
    if not every:
        raise ConfigError(
            "this kernel has no hugepages of 2 MiB", "run a kernel with CONFIG_HUGETLBFS, as distributions do"
        )
    found = [pool for pool in every if node is None or pool.node == node]
    if not found:
        there = ", ".join(str(pool.node) for pool in every if pool.node is not None)
        raise UsageError(f"there is no NUMA node {node}", f"nodes with memory: {there or 'none are shown'}")
    return found


def _folder(node: int | None, page: int) -> str:
    base = _MACHINE if node is None else f"{_NODES}/node{node}/hugepages"
    return f"{base}/hugepages-{page // KIB}kB"


def _page_sizes(host: Host, node: int | None) -> list[int]:
    base = _MACHINE if node is None else f"{_NODES}/node{node}/hugepages"
    found = [re.fullmatch(r"hugepages-(\d+)kB", name) for name in host.names(base)]
    sizes = sorted(int(match[1]) * KIB for match in found if match)
    return [size for size in sizes if size in (PAGE, GIB)]


def _pool(host: Host, node: int | None, page: int) -> Pool | None:
    """None where it cannot be read."""
    folder = _folder(node, page)
    try:
        total, free, surplus = (
            host.read_int(f"{folder}/{name}_hugepages") for name in ("nr", "free", "surplus")
        )
    except (OSError, ValueError):
        return None
    return Pool(node, page, total, free, surplus)


# reserve ------------------------------------------------------------------------------------


def reserve(host: Host, nbytes: int, node: int | None, added: dict[int | None, Added]) -> Change:
    """Grow the pool of 2 MiB pages until it holds `nbytes`; one that holds them is left alone.
    added: what was put into the pools before; with what comes now it is written down.

    What the kernel grants is kept, also where it is less. Raises ConfigError where memory is too short
    to be asked for, UsageError for a node that is not there, and OSError where the pool cannot be written.
    """
    seen = pools_of(host, node)
    wanted = -(-nbytes // PAGE)
    missing = wanted - _kept(seen)
    if missing > 0:
        _check_memory(host, missing * PAGE, node)
        try:
            _grow(host, seen, wanted, node)
        finally:
            now = _with(added, seen, pools_of(host, node))
            if now != added:
                _record(host, now)
    return Change(_kept(seen) * PAGE, _kept(pools_of(host, node)) * PAGE, wanted * PAGE)


def _kept(found: Iterable[Pool]) -> int:
    return sum(pool.kept for pool in found)


def _total(found: Iterable[Pool]) -> int:
    return sum(pool.total for pool in found)


def _grow(host: Host, seen: list[Pool], wanted: int, node: int | None) -> None:
    """Asked again while it helps: memory that was moved out of the way makes room for more."""
    file = f"{_folder(node, PAGE)}/nr_hugepages"
    had = _kept(seen)
    for _ in range(_ATTEMPTS):
        host.write_text(file, f"{wanted}\n")
        has = _kept(pools_of(host, node))
        if has >= wanted or has <= had:
            return
        had = has


def _check_memory(host: Host, nbytes: int, node: int | None) -> None:
    """The kernel would grant nearly all there is, and leave programs none to run in."""
    total, available = node_available(host, node)
    floor = max(total // 20, 64 * MIB)
    if available - nbytes < floor:
        where = "available" if node is None else f"available on node {node}"
        raise ConfigError(
            f"{format_size(nbytes)} more in hugepages are too much: {format_size(available)} are {where}, "
            f"and {format_size(floor)} must stay",
            "reserve less, or end programs that hold memory",
        )


# give back ----------------------------------------------------------------------------------


def release(host: Host, added: dict[int | None, Added]) -> Change:
    """Take what was `added` out of each pool again; None is all nodes together. Pages in use go when
    they are freed, so more than `wanted` may be left.

    Raises OSError where a pool cannot be written.
    """
    before, given = _total(pools_of(host, None)), 0
    for node in sorted(added, key=lambda node: (node is None, node)):
        kept = _kept(pools_of(host, node))
        left = added[node].left_of(kept)
        if left < kept:
            host.write_text(f"{_folder(node, PAGE)}/nr_hugepages", f"{left}\n")
            given += kept - left
    return Change(before * PAGE, _total(pools_of(host, None)) * PAGE, (before - given) * PAGE)


# what is ours -------------------------------------------------------------------------------


def recorded(host: Host) -> dict[int | None, Added] | None:
    """What was written down since the machine started, or None. Raises ConfigError."""
    try:
        found = json.loads(host.read_text(RECORD))
        return {item["node"]: Added(int(item["before"]), int(item["pages"])) for item in found["added"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{RECORD} cannot be read: {error}", f"rm {RECORD} to forget what it says"
        ) from error


def forget(host: Host) -> None:
    """Raises OSError."""
    host.remove(RECORD)


def _with(added: dict[int | None, Added], before: list[Pool], after: list[Pool]) -> dict[int | None, Added]:
    now = dict(added)
    for pool, grown in zip(before, after, strict=True):
        known = added.get(pool.node, Added(pool.kept, 0))
        if grown.kept > pool.kept:
            now[pool.node] = Added(known.before, known.pages + grown.kept - pool.kept)
    return now


def _record(host: Host, added: dict[int | None, Added]) -> None:
    """Raises OSError."""
    items = [{"node": node, "before": one.before, "pages": one.pages} for node, one in added.items()]
    host.save(RECORD, json.dumps({"added": items}) + "\n")
