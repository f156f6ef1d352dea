# SPDX-License-Identifier: Apache-2.0
"""Which KV tensor goes over which path, and how much memory the page-cache path may fill. Pure policy:
no I/O, no clock; the same arguments give the same answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import gcd
from typing import TYPE_CHECKING

from dualblade.errors import BudgetError
from dualblade.tensors import PathKind, Placement, TensorKey, TensorSpec
from dualblade.units import MIB, format_size, round_up

if TYPE_CHECKING:
    from dualblade.residency import MemorySnapshot

_HINT_STEP = 64 * MIB


class Policy(StrEnum):
    """first-fit: the paper's; tensors are cached in order of allocation until one does not fit.
    spread: the cached ones lie evenly over the decode cycle, so that the two paths alternate."""

    FIRST_FIT = "first-fit"
    SPREAD = "spread"


@dataclass(frozen=True, slots=True)
class Footprint:
    """What of the budget is taken before any KV is cached, in bytes.

    weights_bytes: weights on the host by size, anonymous or mapped; never given up. runtime_bytes:
    interpreter and libraries. staging_bytes: pinned slots. tails_bytes: the unfinished
    block of every tensor. migration_bytes: what blocks change paths through. reserve_bytes: kept free for
    what a forward pass holds.
    """

    weights_bytes: int = 0
    runtime_bytes: int = 0
    staging_bytes: int = 0
    tails_bytes: int = 0
    migration_bytes: int = 0
    reserve_bytes: int = 0

    @property
    def total(self) -> int:
        return sum(self._parts().values())

    def describe(self) -> str:
        """E.g. "weights 1 GiB, runtime 300 MiB"; parts of nothing are left out."""
        parts = [f"{name} {format_size(size)}" for name, size in self._parts().items() if size]
        return ", ".join(parts) or "nothing"

    def _parts(self) -> dict[str, int]:
        return {
            "weights": self.weights_bytes,
            "runtime": self.runtime_bytes,
            "staging": self.staging_bytes,
            "tails": self.tails_bytes,
            "migrations": self.migration_bytes,
            "activations": self.reserve_bytes,
        }


@dataclass(frozen=True, slots=True)
class Share:
    """Bytes that the page-cache path may fill, and what set them."""

    bytes: int
    reason: str


def page_cache_share(
    budget: int, footprint: Footprint, snapshot: MemorySnapshot | None = None, override: int | None = None
) -> Share:
    """What `budget` bytes leave after `footprint`, or `override` bytes (--page-cache-budget), but never
    more than the machine and its cgroups can give at `snapshot`.

    Raises BudgetError where the footprint does not fit the budget, or the override what is left.
    """
    left = budget - footprint.total
    if left < 0:
        raise _budget_too_small(budget, footprint)
    if override is not None and override > left:
        raise _override_too_big(budget, footprint, override)
    if override is None:
        wanted = Share(left, f"what --mem-budget {format_size(budget)} leaves after {footprint.describe()}")
    else:
        wanted = Share(override, f"--page-cache-budget {format_size(override)}")
    return wanted if snapshot is None else _within_machine(wanted, footprint, snapshot)


def _within_machine(wanted: Share, footprint: Footprint, snapshot: MemorySnapshot) -> Share:
    room = max(0, snapshot.headroom - _still_to_take(footprint, snapshot))
    if room >= wanted.bytes:
        return wanted
    source, headroom = snapshot.headroom_source, format_size(snapshot.headroom)
    return Share(room, f"{source} ({headroom} can still be taken) allows less than {wanted.reason}")


def _still_to_take(footprint: Footprint, snapshot: MemorySnapshot) -> int:
    """Bytes of the footprint that are not in the process yet. The reserve never will be."""
    taken = snapshot.process_anon + snapshot.process_hugetlb
    return max(footprint.reserve_bytes, footprint.total - taken)


def _budget_too_small(budget: int, footprint: Footprint) -> BudgetError:
    return BudgetError(
        f"a memory budget of {format_size(budget)} is too small: {format_size(footprint.total)} is needed "
        f"before any KV is cached ({footprint.describe()})",
        f"pass --mem-budget {as_option(footprint.total)} or more",
    )


def _override_too_big(budget: int, footprint: Footprint, override: int) -> BudgetError:
    left = budget - footprint.total
    return BudgetError(
        f"a page-cache budget of {format_size(override)} is too large: a memory budget of "
        f"{format_size(budget)} leaves {format_size(left)} after {footprint.describe()}",
        f"leave --page-cache-budget out, or pass --mem-budget {as_option(footprint.total + override)}",
    )


def as_option(nbytes: int) -> str:
    """A size that the command line takes and that is enough."""
    return f"{max(round_up(nbytes, _HINT_STEP), _HINT_STEP) // MIB}M"


def place(
    specs: Sequence[TensorSpec],
    sizes: Mapping[TensorKey, int],
    share_bytes: int,
    policy: str,
    forced: PathKind | None = None,
) -> list[Placement]:
    """One placement for each of `specs`, in their order.

    sizes: bytes that each takes on its path, whole blocks. The cached ones take at most `share_bytes`,
    unless `forced` (--kv-path) sends all one way. Raises ValueError where `policy` is no Policy.
    """
    choose = {Policy.FIRST_FIT: _first_fit, Policy.SPREAD: _spread}[Policy(policy)]
    keys = [spec.key for spec in specs]
    if forced is not None:
        return [Placement(key, forced, sizes[key], _forced(forced)) for key in keys]
    return choose(keys, sizes, share_bytes)


def place_segment(
    key: TensorKey, nbytes: int, used: int, share: int, forced: PathKind | None = None
) -> Placement:
    """One more segment, `nbytes`, of a tensor that grows without a known end, where `used` bytes of the
    `share` are cached already."""
    if forced is not None:
        return Placement(key, forced, nbytes, _forced(forced))
    if used + nbytes <= share:
        return Placement(key, PathKind.PAGE_CACHE, nbytes, _fits(used + nbytes, share))
    return Placement(key, PathKind.DIRECT, nbytes, _full(nbytes, used, share))


def _first_fit(keys: Sequence[TensorKey], sizes: Mapping[TensorKey, int], share: int) -> list[Placement]:
    placements: list[Placement] = []
    used, first_direct = 0, None
    for key in keys:
        placement = place_segment(key, sizes[key], used, share)
        if first_direct is not None and placement.path is PathKind.PAGE_CACHE:
            reason = f"first-fit: all are direct from {first_direct} on"
            placement = Placement(key, PathKind.DIRECT, sizes[key], reason)
        if placement.path is PathKind.PAGE_CACHE:
            used += sizes[key]
        else:
            first_direct = first_direct or key
        placements.append(placement)
    return placements


def _spread(keys: Sequence[TensorKey], sizes: Mapping[TensorKey, int], share: int) -> list[Placement]:
    cycle = sorted(keys)  # decode reads by layer, whatever the order of allocation
    cached = {cycle[index] for index in _spread_indices([sizes[key] for key in cycle], share)}
    used = sum(sizes[key] for key in cached)
    hit, miss = _spread_reasons(len(cached), len(keys), used, share)
    return [
        Placement(key, PathKind.PAGE_CACHE, sizes[key], hit)
        if key in cached
        else Placement(key, PathKind.DIRECT, sizes[key], miss)
        for key in keys
    ]


def _spread_indices(sizes: Sequence[int], share: int) -> set[int]:
    """The largest even choice that fits; where sizes differ it may leave room for more, which then go
    as far from the others as they can."""
    total = len(sizes)
    even = (set(_evenly(count, total)) for count in range(total, -1, -1))
    chosen = next(choice for choice in even if not choice or sum(sizes[i] for i in choice) <= share)
    room = share - sum(sizes[i] for i in chosen)
    while fitting := [i for i in range(total) if i not in chosen and sizes[i] <= room]:
        index = max(fitting, key=lambda i: (_distance(i, chosen, total), -i))
        chosen.add(index)
        room -= sizes[index]
    return chosen


def _evenly(count: int, total: int) -> list[int]:
    """`count` of range(total) whose gaps, the one round the end included, differ by at most one."""
    return [i for i in range(total) if (i + 1) * count // total > i * count // total]


def _distance(index: int, chosen: Iterable[int], total: int) -> int:
    """Steps round the cycle to the nearest chosen one; `total` where there is none."""
    return min((min((index - i) % total, (i - index) % total) for i in chosen), default=total)


def _spread_reasons(cached: int, total: int, used: int, share: int) -> tuple[str, str]:
    """For the cached tensors and for the direct ones."""
    if not cached:
        return "", f"spread: a share of {format_size(share)} holds none of the tensors"
    if cached == total:
        return f"spread: all tensors fit ({format_size(used)} of {format_size(share)} used)", ""
    divisor = gcd(cached, total)
    part, whole = cached // divisor, total // divisor
    ratio = f"spread: {part} of every {whole} tensors {'fits' if part == 1 else 'fit'}"
    return f"{ratio} ({format_size(used)} of {format_size(share)} used)", f"{ratio}, this one not"


def _forced(path: PathKind) -> str:
    return f"--kv-path {path.value}"


def _fits(used: int, share: int) -> str:
    return f"fits the page-cache share ({format_size(used)} of {format_size(share)} used)"


def _full(needed: int, used: int, share: int) -> str:
    return f"share is full ({format_size(used)} of {format_size(share)} used, {format_size(needed)} needed)"
