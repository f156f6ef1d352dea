# SPDX-License-Identifier: Apache-2.0
"""The policy of a run that goes on: within the memory, monotone, at rest under a constant memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualblade.cycle import Move, TensorState
from dualblade.errors import ConfigError
from dualblade.governor import place
from dualblade.governor_trace import encode, replay
from dualblade.planner import make_specs
from dualblade.revision import (
    FEWEST_STEPS,
    FEWEST_STEPS_OF_FEW,
    WAITED_PART,
    Decision,
    Facts,
    GovernorState,
    Limits,
    fill,
    revise,
)
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import GIB, MIB

BLOCK = MIB
KEYS = [TensorKey(layer, kind) for layer in range(8) for kind in "KV"]
LIMITS = Limits(demote=64 * MIB, promote=16 * MIB, band=8 * MIB, patience=4)
FACTS = Facts(
    number=0, budget=GIB, cap=None, footprint=512 * MIB, held=400 * MIB, room=4 * GIB,
    room_source="available memory", resident=0,
)  # fmt: skip


def tensor(key: TensorKey, blocks: int, written: int, cached: int, block: int = BLOCK) -> TensorState:
    """The first `cached` blocks are in the page cache."""
    return TensorState(key, block, blocks, written, cached, min(written, cached))


def tensors(cached: list[int], blocks: int = 32, written: int = 32) -> list[TensorState]:
    return [tensor(key, blocks, written, count) for key, count in zip(KEYS, cached, strict=False)]


def apply(states: list[TensorState], decision: Decision) -> list[TensorState]:
    moved = {move.key: move.cached for move in decision.moves}
    return [
        replace(item, cached=moved[item.key], cached_written=min(item.written, moved[item.key]))
        if item.key in moved
        else item
        for item in states
    ]


def cached_bytes(states: list[TensorState]) -> int:
    return sum(item.cached * item.block_bytes for item in states)


def settle(
    states: list[TensorState], facts: Facts, state: GovernorState, limits: Limits, looks: int = 200
) -> tuple[list[TensorState], GovernorState, list[Move]]:
    """Look after look at the same memory."""
    moves: list[Move] = []
    for _ in range(looks):
        facts = replace(facts, number=facts.number + 1)
        decision = revise(states, facts, state, limits)
        states, state = apply(states, decision), decision.state
        moves += decision.moves
    return states, state, moves


# single decisions ---------------------------------------------------------------------------


def test_nothing_moves_where_everything_fits() -> None:
    decision = revise(tensors([32] * 16), FACTS, GovernorState(), LIMITS)
    assert decision.moves == ()
    assert decision.share == 512 * MIB


def test_the_share_is_used_to_the_last_block() -> None:
    """What `place` leaves over goes to one tensor, on both paths."""
    specs = make_specs(4, 1, 8, 128, 2, 4096)
    sizes = {spec.key: 8 * BLOCK for spec in specs}
    placed = place(specs, sizes, 29 * BLOCK, "spread")
    filled = fill(placed, dict.fromkeys(sizes, BLOCK), 29 * BLOCK + 5, "spread")
    assert sum(item.bytes for item in filled) == 8 * 8 * BLOCK
    assert sum(item.bytes for item in filled if item.path is PathKind.PAGE_CACHE) == 29 * BLOCK
    assert len(filled) == len(placed) + 1
    states = [tensor(item.key, 8, 0, 8 if item.path is PathKind.PAGE_CACHE else 0) for item in placed]
    assert cached_bytes(states) == 24 * BLOCK
    facts = replace(FACTS, cap=29 * BLOCK + 5)
    after = apply(states, revise(states, facts, GovernorState(), LIMITS))
    assert cached_bytes(after) == 29 * BLOCK
    assert sorted(item.cached for item in after) == [0] * 4 + [5] + [8] * 3


def test_less_memory_demotes_at_once_and_no_more_than_allowed() -> None:
    facts = replace(FACTS, room=256 * MIB)
    decision = revise(tensors([32] * 16), facts, GovernorState(), LIMITS)
    assert {move.to for move in decision.moves} == {PathKind.DIRECT}
    assert sum(move.copied for move in decision.moves) == LIMITS.demote
    assert decision.more
    after, _, moves = settle(tensors([32] * 16), facts, GovernorState(), LIMITS)
    assert cached_bytes(after) == decision.share == 256 * MIB
    less = revise(after, replace(facts, number=1, room=250 * MIB), decision.state, LIMITS)
    assert less.share == 249 * MIB, "with a margin, so that the next small change is none"
    assert {move.to for move in moves} == {PathKind.DIRECT}


def test_a_little_less_of_what_others_leave_moves_nothing() -> None:
    """It is an estimate; the budget is not."""
    states, state, _ = settle(tensors([32] * 16), replace(FACTS, room=512 * MIB), GovernorState(), LIMITS)
    less = replace(FACTS, number=1000, room=511 * MIB)
    assert not revise(states, less, state, LIMITS).moves
    assert revise(states, replace(less, room=510 * MIB), state, LIMITS).share == 509 * MIB
    held = replace(FACTS, number=1000, budget=FACTS.budget - MIB // 2)
    assert revise(states, held, state, LIMITS).share < 512 * MIB


def test_the_cached_ones_stay_spread() -> None:
    after, _, _ = settle(tensors([32] * 16), replace(FACTS, cap=256 * MIB), GovernorState(), LIMITS)
    assert [item.cached for item in after] == [32, 0] * 8


def test_first_fit_keeps_the_first() -> None:
    limits = replace(LIMITS, policy="first-fit")
    after, _, _ = settle(tensors([32] * 16), replace(FACTS, cap=100 * MIB), GovernorState(), limits)
    assert [item.cached for item in after] == [32, 32, 32, 4] + [0] * 12


def test_blocks_that_are_not_written_yet_go_for_nothing() -> None:
    """Rooms for tokens to come are given up before anything is copied."""
    limits = replace(LIMITS, demote=0)
    states = tensors([32] * 16, written=8)
    decision = revise(states, replace(FACTS, cap=300 * MIB), GovernorState(), limits)
    assert cached_bytes(apply(states, decision)) == 300 * MIB
    assert all(move.copied == 0 for move in decision.moves)


def test_tensors_that_are_read_in_place_leave_one_after_the_other() -> None:
    """What loses a block is copied from then on: better few of them."""
    states = [replace(item, in_place=True) for item in tensors([32] * 16, written=8)]
    after, _, moves = settle(states, replace(FACTS, cap=300 * MIB), GovernorState(), LIMITS)
    assert cached_bytes(after) == 300 * MIB
    assert sorted(item.cached for item in after) == [0] * 6 + [12] + [32] * 9
    assert sum(move.copied for move in moves) == 6 * 8 * MIB


def test_more_memory_must_last() -> None:
    states, state, _ = settle(tensors([32] * 16), replace(FACTS, room=256 * MIB), GovernorState(), LIMITS)
    facts = replace(FACTS, number=1000)
    decisions = []
    for _ in range(LIMITS.patience):
        facts = replace(facts, number=facts.number + 1)
        decisions.append(revise(states, facts, state, LIMITS))
        state = decisions[-1].state
    assert [bool(decision.moves) for decision in decisions] == [False] * (LIMITS.patience - 1) + [True]
    assert {move.to for move in decisions[-1].moves} == {PathKind.PAGE_CACHE}
    after, _, _ = settle(states, facts, state, LIMITS)
    assert cached_bytes(after) == 512 * MIB


def test_the_same_look_counts_once() -> None:
    """Decisions may be more frequent than looks."""
    states, state, _ = settle(tensors([32] * 16), replace(FACTS, room=256 * MIB), GovernorState(), LIMITS)
    facts = replace(FACTS, number=1000)
    for _ in range(10 * LIMITS.patience):
        decision = revise(states, facts, state, LIMITS)
        state = decision.state
        assert not decision.moves


def test_a_wobble_within_the_band_moves_nothing() -> None:
    """Below the least that was seen there is a margin, and above it the band."""
    states, state, _ = settle(tensors([32] * 16), replace(FACTS, room=256 * MIB), GovernorState(), LIMITS)
    states, state, _ = settle(states, replace(FACTS, number=500, room=253 * MIB), state, LIMITS)
    for number, wobble in enumerate([0, 3, -3, 2, 3, -4, 0, 3] * 20, 1000):
        decision = revise(states, replace(FACTS, number=number, room=256 * MIB + wobble * MIB), state, LIMITS)
        state = decision.state
        assert not decision.moves


def test_what_a_prompt_had_reserved_is_there_at_once() -> None:
    """A plan that takes less is nothing that has to last first."""
    facts = replace(FACTS, budget=FACTS.footprint + 256 * MIB, room=256 * MIB)
    states, state, _ = settle(tensors([32] * 16), facts, GovernorState(), LIMITS)
    freed = 48 * MIB
    after = replace(facts, number=900, footprint=facts.footprint - freed, room=facts.room + freed)
    decision = revise(states, after, state, LIMITS)
    assert decision.share == (256 + 48) * MIB
    assert {move.to for move in decision.moves} == {PathKind.PAGE_CACHE}
    again = revise(states, replace(after, number=901, footprint=facts.footprint), decision.state, LIMITS)
    assert again.share == 256 * MIB, "the next prompt takes it back"


def test_no_copy_for_the_last_tokens() -> None:
    facts = replace(FACTS, steps_left=3)
    assert revise(tensors([0] * 16), facts, GovernorState(), LIMITS).moves == ()
    fresh = revise(tensors([0] * 16, written=0), facts, GovernorState(), LIMITS)
    assert sum(move.bytes for move in fresh.moves) == 512 * MIB
    assert sum(move.copied for move in fresh.moves) == 0


def test_under_pressure_nothing_is_promoted() -> None:
    for pressure in ({"some": 20.0}, {"full": 5.0}, {"refaulted": 64 * MIB}):
        facts = replace(FACTS, **pressure)
        assert facts.pressed
        assert revise(tensors([0] * 16), facts, GovernorState(), LIMITS).moves == ()


def test_what_the_kernel_took_is_demoted_under_pressure_alone() -> None:
    """Dropped caches come back with the next pass; under pressure they would go again."""
    taken = replace(FACTS, resident=256 * MIB)
    assert revise(tensors([32] * 16), taken, GovernorState(), LIMITS).moves == ()
    after, _, _ = settle(tensors([32] * 16), replace(taken, full=5.0), GovernorState(), LIMITS)
    assert 256 * MIB <= cached_bytes(after) <= 256 * MIB * 8 / 7


@pytest.mark.parametrize(("full", "rests"), [(0.0, 4), (20.0, 40)])
def test_after_a_demotion_more_memory_has_to_last(full: float, rests: int) -> None:
    """Longer where pressure was the reason, unless more of it is to be seen."""
    taken = replace(FACTS, number=9, resident=400 * MIB, room=384 * MIB, full=full)
    went = revise(tensors([32] * 16), taken, GovernorState(), LIMITS)
    assert went.state.rest == 9 + rests
    states = apply(tensors([32] * 16), went)
    ways, state = [], went.state
    for number in range(10, 10 + LIMITS.patience):  # the room is back
        decision = revise(states, replace(FACTS, number=number), state, LIMITS)
        ways.append({move.to for move in decision.moves})
        states, state = apply(states, decision), decision.state
    assert not any(PathKind.PAGE_CACHE in way for way in ways[:-1])
    assert ways[-1] == {PathKind.PAGE_CACHE}


def test_what_has_no_room_on_the_direct_path_stays() -> None:
    states = [replace(item, stuck=30) for item in tensors([32] * 16)]
    after, _, _ = settle(states, replace(FACTS, cap=0), GovernorState(), LIMITS)
    assert [item.cached for item in after] == [30] * 16


def test_a_process_larger_than_planned_leaves_less() -> None:
    after, _, _ = settle(tensors([32] * 16), replace(FACTS, held=712 * MIB), GovernorState(), LIMITS)
    assert cached_bytes(after) == 312 * MIB


# read in place ------------------------------------------------------------------------------

IN_PLACE = replace(LIMITS, in_place=True)


def memory_for(blocks: int) -> Facts:
    return replace(FACTS, budget=FACTS.footprint + blocks * BLOCK)


@pytest.mark.parametrize(
    ("room", "kept"), [(0, 0), (5, 0), (11, 0), (12, 32), (20, 32)], ids=lambda value: f"{value}"
)
def test_nearly_all_are_cached_as_a_whole_or_not_at_all(room: int, kept: int) -> None:
    """20 of the last one's 32 blocks would be copied for every token."""
    states, facts = tensors([32] * 15 + [20]), memory_for(15 * 32 + 20 + room)
    after, _, _ = settle(states, facts, GovernorState(), IN_PLACE)
    assert [item.cached for item in after] == [32] * 15 + [kept]
    after, _, _ = settle(states, facts, GovernorState(), LIMITS)
    assert [item.cached for item in after] == [32] * 15 + [min(32, 20 + room)]


def test_less_memory_takes_a_whole_tensor() -> None:
    after, _, moves = settle(tensors([32] * 16), memory_for(16 * 32 - 3), GovernorState(), IN_PLACE)
    assert sorted(item.cached for item in after) == [0] + [32] * 15
    assert len({move.key for move in moves}) == 1


def test_of_many_on_the_drive_one_is_cached_in_part() -> None:
    after, _, _ = settle(tensors([32] * 16), memory_for(16 * 32 - 40), GovernorState(), IN_PLACE)
    assert sorted(item.cached for item in after) == [0, 24] + [32] * 14


def test_no_copy_to_be_rid_of_a_part_for_the_last_tokens() -> None:
    states, facts = tensors([32] * 15 + [20]), replace(memory_for(15 * 32 + 21), steps_left=7)
    assert settle(states, facts, GovernorState(), IN_PLACE)[0] == states


@pytest.mark.parametrize(
    ("steps_left", "written", "cached"),
    [(FEWEST_STEPS_OF_FEW - 1, 32, 0), (FEWEST_STEPS_OF_FEW, 32, 32), (None, 32, 32), (1, 0, 32)],
)
def test_the_last_tensor_is_copied_only_for_many_tokens(
    steps_left: int | None, written: int, cached: int
) -> None:
    """Attention does not wait for it, but would for the copy; a room without rows takes none."""
    states = [*tensors([32] * 15), tensor(KEYS[15], 32, written, 0)]
    facts = replace(FACTS, steps_left=steps_left)
    after, _, _ = settle(states, facts, GovernorState(), IN_PLACE)
    assert [item.cached for item in after] == [32] * 15 + [cached]


def test_a_few_tokens_are_enough_where_many_lie_on_the_drive() -> None:
    states = tensors([32] * 12 + [0] * 4)
    facts = replace(FACTS, steps_left=FEWEST_STEPS)
    after, _, _ = settle(states, facts, GovernorState(), IN_PLACE)
    assert sum(item.cached == 32 for item in after) == 15, "but for the last one"


@pytest.mark.parametrize(
    ("waited", "written", "cached"),
    [(0.0, 32, 0), (WAITED_PART, 32, 20), (None, 32, 20), (0.0, 0, 20)],
)
def test_a_part_is_copied_only_where_the_drive_is_waited_for(
    waited: float | None, written: int, cached: int
) -> None:
    """Else the copy, now and for every token, takes the CPU from attention and saves nothing; a room without
    rows takes none."""
    states = [*tensors([32] * 12), *(tensor(key, 32, written, 0) for key in KEYS[12:])]
    facts = replace(memory_for(12 * 32 + 20), waited=waited)
    after, _, _ = settle(states, facts, GovernorState(), IN_PLACE)
    assert sorted(item.cached for item in after) == sorted([0, 0, 0, cached] + [32] * 12)
    after, _, _ = settle(states, facts, GovernorState(), LIMITS)
    assert cached_bytes(after) == (12 * 32 + 20) * BLOCK, "where all is copied anyway"


def test_a_whole_tensor_is_worth_it_also_where_nobody_waits() -> None:
    states = tensors([32] * 12 + [0] * 3 + [20])
    after, _, _ = settle(states, replace(memory_for(14 * 32 + 9), waited=0.0), GovernorState(), IN_PLACE)
    assert sorted(item.cached for item in after) == [0] * 2 + [32] * 14


def test_a_plan_leaves_out_a_part_where_nearly_all_fit() -> None:
    specs = make_specs(8, 1, 8, 128, 2, 4096)
    sizes = {spec.key: 8 * BLOCK for spec in specs}
    for share, parts in ((15 * 8 + 4, 0), (14 * 8 + 4, 1)):
        placed = place(specs, sizes, share * BLOCK, "spread")
        filled = fill(placed, dict.fromkeys(sizes, BLOCK), share * BLOCK, "spread", in_place=True)
        assert len(filled) == len(placed) + parts


# properties ---------------------------------------------------------------------------------

sizes = st.integers(0, 64)


@st.composite
def states_of(draw) -> list[TensorState]:
    block = draw(st.sampled_from([BLOCK, BLOCK // 4]))
    blocks = draw(st.integers(1, 40))
    made = []
    most_whole = draw(st.booleans())
    for key in KEYS[: draw(st.integers(1, len(KEYS)))]:
        written, cached = draw(st.integers(0, blocks)), draw(st.integers(0, blocks))
        if most_whole and key != KEYS[3]:
            written = cached = blocks
        item = tensor(key, blocks, written, cached, block)
        made.append(replace(item, in_place=cached == blocks and draw(st.booleans())))
    return made


memories = st.builds(
    Facts,
    number=st.integers(0, 50),
    budget=st.integers(0, 2048).map(lambda size: size * MIB),
    cap=st.one_of(st.none(), sizes.map(lambda size: size * 16 * MIB)),
    footprint=st.integers(0, 1024).map(lambda size: size * MIB),
    held=st.integers(0, 1200).map(lambda size: size * MIB + size),
    room=st.integers(0, 1024).map(lambda size: size * MIB + size),
    room_source=st.just("a cgroup"),
    resident=st.integers(0, 1024).map(lambda size: size * MIB),
    refaulted=st.sampled_from([0, 0, 512 * MIB]),
    some=st.sampled_from([0.0, 0.0, 50.0]),
    full=st.sampled_from([0.0, 0.0, 20.0]),
    steps_left=st.one_of(st.none(), st.integers(0, 100)),
    waited=st.sampled_from([None, 0.0, 0.1, 0.5]),
)
bounds = st.builds(
    Limits,
    demote=sizes.map(lambda size: size * MIB),
    promote=sizes.map(lambda size: size * MIB),
    band=st.integers(0, 64).map(lambda size: size * MIB),
    patience=st.integers(1, 8),
    policy=st.sampled_from(["spread", "first-fit"]),
    in_place=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(states_of(), memories, bounds)
def test_never_over_what_there_is(states, facts, limits) -> None:
    """Moves lead to the share and never beyond it, nor beyond what one decision may copy."""
    decision = revise(states, facts, GovernorState(), limits)
    after = apply(states, decision)
    most = min(facts.budget - facts.footprint, facts.budget - facts.held, facts.room)
    assert decision.share <= max(0, most if facts.cap is None else min(most, facts.cap))
    assert cached_bytes(after) <= max(decision.share, cached_bytes(states))
    if any(move.to is PathKind.PAGE_CACHE for move in decision.moves):
        assert cached_bytes(after) <= decision.share
    paths = {move.to for move in decision.moves}
    assert len(paths) <= 1
    allowed = max(limits.demote, limits.promote, *(item.block_bytes for item in states))
    assert sum(move.copied for move in decision.moves) <= allowed


@settings(max_examples=100, deadline=None)
@given(states_of(), memories, bounds)
def test_at_rest_under_a_constant_memory(states, facts, limits) -> None:
    """Within as many looks as the limits ask for; then never again, and no block goes there and back."""
    limits = replace(limits, demote=max(limits.demote, 16 * MIB), promote=max(limits.promote, 16 * MIB))
    settled, state, moves = settle(states, facts, GovernorState(), limits)
    assert len({move.to for move in moves}) <= 1
    later = replace(facts, number=facts.number + 1000)
    again, _, more = settle(settled, later, state, limits, 30)
    assert more == []
    assert again == settled
    decision = revise(settled, replace(facts, number=9999), state, limits)
    assert cached_bytes(settled) <= max(decision.share, 0) or not decision.moves


@settings(max_examples=100, deadline=None)
@given(states_of(), st.lists(memories, min_size=1, max_size=4), bounds)
def test_a_decision_that_is_not_waiting_needs_no_look_at_the_same_memory(states, looks, limits) -> None:
    """The watch may sleep then: however often the same was seen, nothing would move."""
    state, number = GovernorState(), 0
    for facts in looks:
        for _ in range(60):
            number += 1
            decision = revise(states, replace(facts, number=number), state, limits)
            states, state = apply(states, decision), decision.state
            if not decision.moves and not state.waiting:
                break
        else:
            continue
        later = replace(facts, number=number + 1)
        assert settle(states, later, state, limits, 3 * limits.patience + 50)[2] == []


@settings(max_examples=200, deadline=None)
@given(states_of(), memories, bounds, st.integers(0, 512))
def test_monotone_in_the_budget(states, facts, limits, extra) -> None:
    """A larger budget never caches less, at any moment of the way."""
    larger = replace(facts, budget=facts.budget + extra * MIB)
    sides = [(states, GovernorState(), facts), (states, GovernorState(), larger)]
    one, two = (revise(states, side, state, limits) for states, state, side in sides)
    assert one.share <= two.share
    assert cached_bytes(apply(states, one)) <= cached_bytes(apply(states, two))
    if facts.pressed:  # what the kernel keeps has the last word then, and here it keeps it whatever is moved
        return
    ends = [settle(*side[:1], side[2], side[1], limits)[0] for side in sides]
    assert cached_bytes(ends[0]) <= cached_bytes(ends[1])


@settings(max_examples=100, deadline=None)
@given(states_of(), st.lists(memories, min_size=1, max_size=12), bounds)
def test_a_recorded_trace_replays(states, looks, limits) -> None:
    lines, state = [], GovernorState()
    for step, facts in enumerate(looks):
        decision = revise(states, replace(facts, number=step), state, limits)
        lines.append(encode(step, states, replace(facts, number=step), state, limits, decision))
        states, state = apply(states, decision), decision.state
    replayed = list(replay(lines))
    assert [item.step for item in replayed] == list(range(len(looks)))
    assert all(item.same for item in replayed)


def test_a_replay_sees_another_decision() -> None:
    """So it is no comparison of a thing with itself."""
    states = tensors([32] * 16)
    facts = replace(FACTS, room=256 * MIB)
    decision = revise(states, facts, GovernorState(), LIMITS)
    line = encode(0, states, facts, GovernorState(), LIMITS, decision)
    assert not next(replay([line.replace(f'"room":{256 * MIB}', f'"room":{400 * MIB}')])).same
    with pytest.raises(ConfigError, match="line 2"):
        list(replay([line, "{}"]))
