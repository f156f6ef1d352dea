# SPDX-License-Identifier: Apache-2.0
"""The policy: shares, placements and their reasons."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.errors import BudgetError
from dualblade.governor import Footprint, Policy, page_cache_share, place, place_segment
from dualblade.residency import MemorySnapshot
from dualblade.tensors import PathKind, Placement, TensorKey, TensorSpec
from dualblade.units import GIB, MIB, parse_size

CACHED, DIRECT = PathKind.PAGE_CACHE, PathKind.DIRECT
FOOTPRINT = Footprint(
    weights_bytes=GIB, runtime_bytes=300 * MIB, staging_bytes=128 * MIB, reserve_bytes=64 * MIB
)


def snapshot(available: int, cgroup: int | None = None, anon: int = 0, hugetlb: int = 0) -> MemorySnapshot:
    limit = None if cgroup is None else "/sys/fs/cgroup/a/memory.high"
    return MemorySnapshot(64 * GIB, available, cgroup, limit, anon, hugetlb, cached=0)


def tensors(sizes: list[int]) -> tuple[list[TensorSpec], dict[TensorKey, int]]:
    """K and V of layer after layer, as they are allocated."""
    keys = [TensorKey(index // 2, "KV"[index % 2]) for index in range(len(sizes))]
    return [TensorSpec(key, 1, 1, 64, 2, 32) for key in keys], dict(zip(keys, sizes, strict=True))


def placed(sizes: list[int], share: int, policy: str, forced: PathKind | None = None) -> list[Placement]:
    specs, by_key = tensors(sizes)
    return place(specs, by_key, share, policy, forced)


def flags(placements: list[Placement]) -> str:
    return "".join("c" if placement.path is CACHED else "." for placement in placements)


def cached_sum(placements: list[Placement]) -> int:
    return sum(placement.bytes for placement in placements if placement.path is CACHED)


def test_share_is_what_the_budget_leaves() -> None:
    share = page_cache_share(2 * GIB, FOOTPRINT)
    assert share.bytes == 2 * GIB - FOOTPRINT.total == 532 * MIB
    assert share.reason == (
        "what --mem-budget 2 GiB leaves after weights 1 GiB, runtime 300 MiB, "
        "staging 128 MiB, activations 64 MiB"
    )


def test_share_of_a_budget_that_just_holds_the_footprint() -> None:
    assert page_cache_share(FOOTPRINT.total, FOOTPRINT).bytes == 0


def test_budget_below_the_footprint_says_what_is_needed() -> None:
    with pytest.raises(BudgetError) as caught:
        page_cache_share(GIB, FOOTPRINT)
    assert str(caught.value) == (
        "a memory budget of 1 GiB is too small: 1.48 GiB is needed before any KV is cached "
        "(weights 1 GiB, runtime 300 MiB, staging 128 MiB, activations 64 MiB)"
    )
    assert caught.value.hint == "pass --mem-budget 1536M or more"


@given(weights=st.integers(1, 1 << 40), short=st.integers(1, 1 << 40))
def test_the_hinted_budget_is_enough(weights: int, short: int) -> None:
    footprint = Footprint(weights_bytes=weights, tails_bytes=12345)
    with pytest.raises(BudgetError) as caught:
        page_cache_share(footprint.total - short, footprint)
    number = str(caught.value.hint).split()[2]
    assert 0 <= page_cache_share(parse_size(number), footprint).bytes < 64 * MIB


def test_override_within_what_is_left() -> None:
    share = page_cache_share(2 * GIB, FOOTPRINT, None, 256 * MIB)
    assert (share.bytes, share.reason) == (256 * MIB, "--page-cache-budget 256 MiB")
    assert page_cache_share(2 * GIB, FOOTPRINT, None, 0).bytes == 0


def test_override_above_what_is_left() -> None:
    with pytest.raises(BudgetError, match="a memory budget of 2 GiB leaves 532 MiB after weights") as caught:
        page_cache_share(2 * GIB, FOOTPRINT, None, GIB)
    number = str(caught.value.hint).split()[-1]
    assert page_cache_share(parse_size(number), FOOTPRINT, None, GIB).bytes == GIB


def test_plenty_of_memory_changes_nothing() -> None:
    assert page_cache_share(2 * GIB, FOOTPRINT, snapshot(32 * GIB)) == page_cache_share(2 * GIB, FOOTPRINT)


def test_available_memory_limits() -> None:
    share = page_cache_share(8 * GIB, FOOTPRINT, snapshot(2 * GIB, cgroup=3 * GIB))
    assert share.bytes == 2 * GIB - FOOTPRINT.total
    assert share.reason.startswith(
        "available memory (2 GiB can still be taken) allows less than what --mem-budget"
    )


def test_a_cgroup_limits() -> None:
    share = page_cache_share(8 * GIB, FOOTPRINT, snapshot(32 * GIB, cgroup=2 * GIB), 4 * GIB)
    assert share.bytes == 2 * GIB - FOOTPRINT.total
    assert share.reason == (
        "/sys/fs/cgroup/a/memory.high (2 GiB can still be taken) allows less than --page-cache-budget 4 GiB"
    )


def test_what_the_process_holds_already_is_not_subtracted_twice() -> None:
    held = snapshot(2 * GIB, anon=GIB, hugetlb=128 * MIB)
    assert page_cache_share(8 * GIB, FOOTPRINT, held).bytes == 2 * GIB - (FOOTPRINT.total - GIB - 128 * MIB)


def test_the_reserve_stays_free_whatever_the_process_holds() -> None:
    assert page_cache_share(8 * GIB, FOOTPRINT, snapshot(GIB, anon=5 * GIB)).bytes == GIB - 64 * MIB


def test_no_memory_left_on_the_machine() -> None:
    assert page_cache_share(8 * GIB, FOOTPRINT, snapshot(100 * MIB)).bytes == 0


def test_first_fit_fills_then_goes_direct() -> None:
    placements = placed([2 * MIB] * 6, 7 * MIB, Policy.FIRST_FIT)
    assert flags(placements) == "ccc..."
    assert placements[2].reason == "fits the page-cache share (6 MiB of 7 MiB used)"
    assert placements[3].reason == "share is full (6 MiB of 7 MiB used, 2 MiB needed)"


def test_first_fit_never_goes_back_to_the_page_cache() -> None:
    placements = placed([4 * MIB, 8 * MIB, MIB, 4 * MIB], 7 * MIB, "first-fit")
    assert flags(placements) == "c..."
    assert placements[2].reason == "first-fit: all are direct from layer 0 V on"


def test_spread_alternates_the_paths() -> None:
    placements = placed([MIB] * 12, 4 * MIB, Policy.SPREAD)
    assert flags(placements) == "..c" * 4
    assert placements[2].reason == "spread: 1 of every 3 tensors fits (4 MiB of 4 MiB used)"
    assert placements[0].reason == "spread: 1 of every 3 tensors fits, this one not"
    assert flags(placed([MIB] * 12, 6 * MIB, "spread")) == ".c" * 6


def test_spread_of_all_and_of_none() -> None:
    every = placed([MIB] * 4, 9 * MIB, "spread")
    assert (flags(every), every[0].reason) == ("cccc", "spread: all tensors fit (4 MiB of 9 MiB used)")
    none = placed([2 * MIB] * 4, MIB, "spread")
    assert (flags(none), none[0].reason) == ("....", "spread: a share of 1 MiB holds none of the tensors")


def test_spread_follows_the_decode_cycle_not_the_allocation() -> None:
    """All K first, then all V; decode still reads K and V of layer after layer."""
    specs, sizes = tensors([MIB] * 8)
    by_kind = sorted(specs, key=lambda spec: (spec.key.kind, spec.key.layer))
    placements = place(by_kind, sizes, 4 * MIB, "spread")
    assert [placement.key for placement in placements] == [spec.key for spec in by_kind]
    assert {placement.key.kind for placement in placements if placement.path is CACHED} == {"V"}


def test_spread_fills_the_room_that_uneven_sizes_leave() -> None:
    sizes = [MIB, 8 * MIB] * 3
    placements = placed(sizes, 12 * MIB, "spread")
    assert cached_sum(placements) == 11 * MIB


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="best-fit"):
        placed([MIB], MIB, "best-fit")


def test_segments() -> None:
    key = TensorKey(3, "K")
    fits = Placement(key, CACHED, 4 * MIB, "fits the page-cache share (16 MiB of 16 MiB used)")
    assert place_segment(key, 4 * MIB, 12 * MIB, 16 * MIB) == fits
    full = Placement(key, DIRECT, 4 * MIB, "share is full (13 MiB of 16 MiB used, 4 MiB needed)")
    assert place_segment(key, 4 * MIB, 13 * MIB, 16 * MIB) == full
    assert place_segment(key, MIB, 0, 16 * MIB, DIRECT) == Placement(key, DIRECT, MIB, "--kv-path direct")
    assert place_segment(key, MIB, 9, 0, CACHED) == Placement(key, CACHED, MIB, "--kv-path page-cache")


policies = st.sampled_from(list(Policy))
size_lists = st.lists(st.integers(1, 20), max_size=40)
shares = st.integers(0, 400)


@given(sizes=size_lists, share=shares, policy=policies)
def test_each_is_placed_once_in_order_and_within_the_share(
    sizes: list[int], share: int, policy: Policy
) -> None:
    placements = placed(sizes, share, policy)
    specs, by_key = tensors(sizes)
    assert [(item.key, item.bytes) for item in placements] == [(spec.key, by_key[spec.key]) for spec in specs]
    assert cached_sum(placements) <= share
    assert all(item.reason for item in placements)
    assert placements == placed(sizes, share, policy)


@given(sizes=size_lists, policy=policies)
def test_a_share_of_nothing_caches_nothing(sizes: list[int], policy: Policy) -> None:
    assert "c" not in flags(placed(sizes, 0, policy))


@given(sizes=size_lists, extra=st.integers(0, 50), policy=policies)
def test_a_share_for_all_caches_all(sizes: list[int], extra: int, policy: Policy) -> None:
    assert "." not in flags(placed(sizes, sum(sizes) + extra, policy))


@given(sizes=size_lists, share=shares, policy=policies, forced=st.sampled_from(PathKind))
def test_a_forced_path_takes_all(sizes: list[int], share: int, policy: Policy, forced: PathKind) -> None:
    placements = placed(sizes, share, policy, forced)
    assert len(placements) == len(sizes)
    assert all(item.path is forced and item.reason == f"--kv-path {forced.value}" for item in placements)


@given(sizes=size_lists, share=shares)
def test_first_fit_caches_the_longest_prefix(sizes: list[int], share: int) -> None:
    prefix = max(count for count in range(len(sizes) + 1) if sum(sizes[:count]) <= share)
    assert flags(placed(sizes, share, "first-fit")) == "c" * prefix + "." * (len(sizes) - prefix)


@given(size=st.integers(1, 20), count=st.integers(1, 60), share=st.integers(0, 1300))
def test_spread_of_equal_sizes_is_even_and_uses_as_much_as_first_fit(
    size: int, count: int, share: int
) -> None:
    placements = placed([size] * count, share, "spread")
    assert cached_sum(placements) == cached_sum(placed([size] * count, share, "first-fit"))
    at = [index for index, flag in enumerate(flags(placements)) if flag == "c"]
    gaps = [(after - before) % count or count for before, after in zip(at, [*at[1:], *at[:1]], strict=True)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(sizes=size_lists, share=shares)
def test_spread_leaves_no_room_for_one_more(sizes: list[int], share: int) -> None:
    placements = placed(sizes, share, "spread")
    room = share - cached_sum(placements)
    assert all(item.bytes > room for item in placements if item.path is DIRECT)


def test_policy_needs_no_engine_and_no_torch() -> None:
    code = "import sys, dualblade.governor; print({'torch', 'spdk_glue'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"
