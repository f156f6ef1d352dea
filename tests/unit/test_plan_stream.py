# SPDX-License-Identifier: Apache-2.0
"""One piece where a layer's K and V fit the budget, else chunks of them, and never more than there is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.errors import BudgetError, UsageError
from dualblade.pipeline import STREAM_CHUNK, STREAM_SLOTS, plan_stream
from dualblade.planner import BudgetRequest, RunPlan, make_plan, make_specs
from dualblade.settings import CacheSettings
from dualblade.units import GIB, KIB, MIB, parse_size

# Llama-3-8B's shape, 32K tokens, batch 4: a layer is 512 MiB, the shortest chunk of all of its K 128 KiB.
SPECS = make_specs(num_layers=8, batch=4, heads=8, head_dim=128, itemsize=2, tokens=32768)
LAYER = 512 * MIB


def plan(budget: int, stream: str) -> RunPlan:
    return make_plan(SPECS, BudgetRequest(budget, 0, 0, 0, page_cache=0, stream=stream), None)


@given(
    budget=st.integers(1, 4 * GIB) | st.integers(1, 8 * MIB),
    stream=st.sampled_from(["auto", "never", "always"]),
)
def test_within_the_budget(budget: int, stream: str) -> None:
    try:
        made = plan(budget, stream)
    except BudgetError:
        made = None
    if made is None:
        assert budget < (LAYER * 4 // 3 + MIB if stream == "never" else 8 * MIB)
        return
    taken = made.pipeline.slots * made.slot_bytes
    assert taken == made.footprint.staging_bytes
    assert taken + made.footprint.tails_bytes <= budget
    whole = made.pipeline.attention == "one-piece"
    assert whole == (made.pipeline.chunk_tokens is None)
    assert whole == (made.capacity >= 32768) or stream == "always"
    assert whole <= (stream != "always")
    assert whole >= (stream == "never")


@given(budget=st.integers(16 * MIB, 4 * GIB))
def test_what_a_slot_holds_lies_together(budget: int) -> None:
    """A whole layer, or a chunk of it: one sequential range of the medium and of memory."""
    made = plan(budget, "auto")
    for layout in made.layouts.values():
        assert layout.group * layout.block_tokens == made.capacity
        assert layout.group * layout.block_bytes == made.slot_bytes


def test_one_piece_is_the_default_where_it_fits() -> None:
    assert plan(2 * LAYER, "auto") == plan(2 * LAYER, "auto")
    assert plan(2 * LAYER, "auto").pipeline == plan(2 * LAYER, "never").pipeline
    assert plan(LAYER, "auto").pipeline.attention == "streamed"


@given(
    available=st.integers(-GIB, GIB),
    tokens=st.integers(1, 1 << 20),
    unit=st.integers(1, 64),
    kib=st.integers(4, 65536),
)
def test_slots_and_chunks(available: int, tokens: int, unit: int, kib: int) -> None:
    made = plan_stream(tokens, unit, kib * KIB, available)
    if made is None:
        assert available < STREAM_SLOTS[-1] * kib * KIB
        return
    assert made.slots in STREAM_SLOTS
    assert made.chunk_tokens is not None
    units, rest = divmod(made.chunk_tokens, unit)
    assert rest == 0
    assert made.slots * units * kib * KIB <= available
    assert units == 1 or units * kib * KIB <= STREAM_CHUNK
    assert (units - 1) * unit < tokens


@given(available=st.integers(STREAM_SLOTS[-1] * MIB, GIB))
def test_fewer_slots_only_where_more_do_not_fit(available: int) -> None:
    made = plan_stream(1 << 20, 16, MIB, available)
    assert made is not None
    more = STREAM_SLOTS[: STREAM_SLOTS.index(made.slots)]
    assert all(slots * MIB > available // 3 for slots in more)


@given(taken=st.integers(0, GIB), budget=st.integers(1, GIB), stream=st.sampled_from(["auto", "always"]))
def test_the_hint_is_enough(taken: int, budget: int, stream: str) -> None:
    """Whatever of the budget is taken before."""
    with pytest.raises(BudgetError) as caught:
        make_plan(SPECS, BudgetRequest(budget, taken + budget, 0, 0, page_cache=0, stream=stream), None)
    found = re.search(r"--mem-budget (\w+)", caught.value.hint or "")
    assert found
    enough = parse_size(found[1], "budget")
    make_plan(SPECS, BudgetRequest(enough, taken + budget, 0, 0, page_cache=0, stream=stream), None)


def test_what_is_no_such_mode() -> None:
    with pytest.raises(UsageError, match="stream 'maybe' is none of auto, faster, never, always"):
        CacheSettings.checked(mem_budget="1G", stream="maybe")
