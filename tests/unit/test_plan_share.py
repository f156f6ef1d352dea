# SPDX-License-Identifier: Apache-2.0
"""What a plan takes of the budget beside cached KV: layers ahead and unfinished blocks, as needed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualblade.errors import BudgetError
from dualblade.pipeline import plan_pipeline
from dualblade.planner import BudgetRequest, RunPlan, make_plan, make_specs
from dualblade.tensors import PathKind
from dualblade.units import MIB

SPECS = make_specs(16, 1, 8, 128, 2, 5000)
KV = sum(spec.tokens * spec.token_bytes for spec in SPECS)


def plan(budget: int, **more: object) -> RunPlan:
    return make_plan(SPECS, BudgetRequest(budget, 0, 0, 0, **more), None)


def charged(made: RunPlan) -> int:
    return made.footprint.total + made.bytes_on(PathKind.PAGE_CACHE)


def whole(made: RunPlan) -> int:
    """Tensors of which nothing is on the direct path."""
    return len(SPECS) - len({item.key for item in made.placements if item.path is PathKind.DIRECT})


@given(st.integers(60 * MIB, 2 * KV), st.sampled_from(["spread", "first-fit"]), st.booleans())
@settings(deadline=None)
def test_the_budget_holds_all_that_is_planned(budget: int, policy: str, live: bool) -> None:
    copied = plan(budget, policy=policy, live=live)
    in_place = plan(budget, policy=policy, live=live, in_place=True)
    assert max(charged(copied), charged(in_place)) <= budget
    assert whole(in_place) >= whole(copied)
    if whole(in_place) < len(SPECS) - 2:  # of the last two none is cached in part
        assert in_place.bytes_on(PathKind.PAGE_CACHE) >= copied.bytes_on(PathKind.PAGE_CACHE)


def test_only_tensors_that_are_copied_have_unfinished_blocks_in_memory() -> None:
    made = plan(KV // 2, in_place=True)
    direct = {item.key for item in made.placements if item.path is PathKind.DIRECT}
    assert 0 < len(direct) < len(SPECS)
    assert made.footprint.tails_bytes == sum(made.layouts[key].block_bytes for key in direct)
    assert plan(KV // 2).footprint.tails_bytes > made.footprint.tails_bytes


def test_none_where_all_is_read_in_place() -> None:
    made = plan(2 * KV, in_place=True)
    assert (made.footprint.tails_bytes, made.bytes_on(PathKind.DIRECT)) == (0, 0)


def layers_read(made: RunPlan) -> list[int]:
    """Once for each tensor of which something is on the direct path."""
    return sorted(item.key.layer for item in made.placements if item.path is PathKind.DIRECT)


@given(st.integers(60 * MIB, 2 * KV), st.integers(0, 64 * MIB), st.booleans())
@settings(deadline=None)
def test_a_slot_less_where_no_layer_reads_two_tensors(budget: int, more: int, live: bool) -> None:
    made, four = (plan(budget, in_place=True, live=live, prefetch_depth=depth) for depth in (None, 1))
    if made.pipeline.slots == 3:
        assert len(layers_read(made)) == len(set(layers_read(made)))
        assert four.pipeline.slots == 4
        assert made.bytes_on(PathKind.PAGE_CACHE) > four.bytes_on(PathKind.PAGE_CACHE)
    larger = plan(budget + more, in_place=True, live=live)
    if made.pipeline.prefetch_depth == larger.pipeline.prefetch_depth == 1:
        assert len(layers_read(larger)) <= len(layers_read(made)), "monotone in the budget"


def test_what_three_slots_leave_holds_another_tensor() -> None:
    three, four = (plan(KV * 3 // 4, in_place=True, prefetch_depth=depth) for depth in (None, 1))
    assert (three.pipeline.slots, four.pipeline.slots) == (3, 4)
    assert len(layers_read(three)) == len(layers_read(four)) - 1
    assert plan(KV // 4, in_place=True).pipeline.slots == 4, "there layers read both of theirs"
    assert plan(2 * KV, in_place=True).pipeline.slots % 2 == 0, "nothing to gain"


@pytest.mark.parametrize("layers", [2, 16, 80])
def test_one_layer_ahead_wherever_it_fits(layers: int) -> None:
    assert plan_pipeline(layers, MIB, 2 * MIB).prefetch_depth == 0
    assert plan_pipeline(layers, MIB, 4 * MIB).prefetch_depth == 1


def test_more_layers_ahead_take_little_of_what_is_left() -> None:
    depths = [plan_pipeline(80, MIB, room * MIB).prefetch_depth for room in (8, 32, 63, 64, 95, 96, 1000)]
    assert depths == [1, 1, 1, 2, 2, 3, 3]


def test_as_many_as_were_asked_for_and_fit() -> None:
    assert plan_pipeline(80, MIB, 8 * MIB, 10).prefetch_depth == 3
    assert plan_pipeline(3, MIB, 100 * MIB, 10).prefetch_depth == 2
    assert plan_pipeline(80, MIB, 100 * MIB, 0).prefetch_depth == 0
    assert plan_pipeline(1, MIB, 100 * MIB).prefetch_depth == 0


def test_not_even_one_layer() -> None:
    with pytest.raises(BudgetError, match="one layer's keys and values take 2 MiB"):
        plan_pipeline(8, MIB, 2 * MIB - 1)
