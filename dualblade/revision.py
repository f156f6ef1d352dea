# SPDX-License-Identifier: Apache-2.0
"""How placements follow the memory while a run goes on. Pure policy: no I/O, no clock; the same arguments
give the same decision, so a recorded trace can be replayed.

A decision says how many blocks of which tensor shall lie in the page cache. Less memory is answered at once,
more of it only after it has lasted; between the two lies a band in which nothing moves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dualblade.cycle import Cycle, Move, TensorState
from dualblade.governor import Policy
from dualblade.tensors import PathKind, Placement, TensorKey
from dualblade.units import format_size

SOME_PRESSED = 20.0  # per cent of the time since the last look in which some task waited for memory
FULL_PRESSED = 5.0  # in which all of them did
REST_PRESSED = 10  # times the patience: the kernel takes pages for reasons that no file tells
REFAULT_PART = 16  # of the resident pages, read back since the last look, is pressure too
MARGIN_PART = 8  # of the band, by which more is given up than was asked for
MISSING_PART = 8  # pages that the kernel took: below this part of what we wrote it is noise
FEWEST_STEPS = 8  # a copy into the page cache pays only if it is read so often
FEW_PART = 16  # so small a part comes from the drive sooner than attention is through the others
FEWEST_STEPS_OF_FEW = 64  # so that a copy of it, which nothing waits for, seldom pays
WAITED_PART = 0.2  # of a step; where less is waited for the drive, a copy for every token costs what it saves


@dataclass(frozen=True, slots=True)
class Facts:
    """One look at the memory, in bytes. number: counts the looks.

    budget: of the process. cap: --page-cache-budget. footprint: what is planned for all but cached KV; held:
    what the process holds beside cached KV, with what is to come of the buffers that were planned. room:
    what machine and cgroups give the page-cache path, with what it has. resident: our pages that are in
    memory. refaulted: pages read back since the last look. some, full: per cent of the time since then in
    which tasks waited for memory (PSI). steps_left: forward passes to come, None if unknown. waited: the
    part of a decoding step that was waited for storage, None where it was not measured.
    """

    number: int
    budget: int
    cap: int | None
    footprint: int
    held: int
    room: int
    room_source: str
    resident: int
    refaulted: int = 0
    some: float = 0.0
    full: float = 0.0
    steps_left: int | None = None
    waited: float | None = None

    @property
    def pressed(self) -> bool:
        refaults = self.refaulted * REFAULT_PART > max(self.resident, 1 << 20)
        return self.full >= FULL_PRESSED or self.some >= SOME_PRESSED or refaults


@dataclass(frozen=True, slots=True)
class Limits:
    """demote, promote: bytes copied for one decision. band: bytes by which memory must have grown before more
    is cached; patience: for how many looks. policy: which tensors are cached. in_place: those that are cached
    as a whole are read where they lie, and all others copied."""

    demote: int
    promote: int
    band: int
    patience: int
    policy: str = Policy.SPREAD
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class GovernorState:
    """What is kept from decision to decision. number: the last look. footprint: planned then. own, room: in
    force, see Facts. better_*: looks for which there was more. rest: nothing is promoted before this
    look."""

    number: int = -1
    footprint: int | None = None
    own: int | None = None
    room: int | None = None
    better_own: int = 0
    better_room: int = 0
    rest: int | None = None

    @property
    def waiting(self) -> bool:
        """More looks are needed for a decision."""
        return (
            self.better_own > 0 or self.better_room > 0 or (self.rest is not None and self.number < self.rest)
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """share: bytes that may be cached. more: the limits held moves back."""

    share: int
    reason: str
    moves: tuple[Move, ...]
    more: bool
    state: GovernorState


def revise(tensors: Sequence[TensorState], facts: Facts, state: GovernorState, limits: Limits) -> Decision:
    """What shall move now. `tensors` in the order of decoding."""
    state = _look(facts, state, limits)
    share, reason = _share(tensors, facts, state)
    room = share - sum(tensor.cached * tensor.block_bytes for tensor in tensors)
    if room < 0:
        moves, more = _demote(tensors, -room, limits, reason)
        state = _rested(facts, state, limits) if moves else state
    elif crumbs := _crumbs(tensors, room, facts, limits):
        moves, more = _demote([crumbs], crumbs.cached * crumbs.block_bytes, limits, CRUMBS)
    elif _may_promote(facts, state):
        moves, more = _promote(tensors, room, facts, limits, reason)
    else:
        moves, more = [], False
    return Decision(share, reason, tuple(moves), more, state)


def fill(
    placements: Sequence[Placement],
    blocks: Mapping[TensorKey, int],
    share: int,
    policy: str,
    in_place: bool = False,
) -> list[Placement]:
    """What whole tensors leave of the share goes to the first blocks of one more, whose placement becomes
    two; to none where tensors are read in place and nearly all are cached. blocks: bytes of a block."""
    if in_place and _few(sum(item.path is PathKind.DIRECT for item in placements), len(placements)):
        return list(placements)
    states = [
        TensorState(item.key, blocks[item.key], item.bytes // blocks[item.key], 0, cached, 0)
        for item in placements
        for cached in [item.bytes // blocks[item.key] if item.path is PathKind.PAGE_CACHE else 0]
    ]
    cycle = Cycle(states, policy)
    room = share - sum(item.bytes for item in placements if item.path is PathKind.PAGE_CACHE)
    found = cycle.next_to_promote()
    part = room // cycle.tensors[found].block_bytes if found is not None else 0
    if found is None or part <= 0:
        return list(placements)
    item, whole = placements[found], cycle.tensors[found].blocks
    reason = f"what is left of the share holds {part} of its {whole} blocks"
    nbytes = part * blocks[item.key]
    first = Placement(item.key, PathKind.PAGE_CACHE, nbytes, reason)
    rest = Placement(item.key, PathKind.DIRECT, item.bytes - nbytes, reason)
    return [*placements[:found], first, rest, *placements[found + 1 :]]


# the share ----------------------------------------------------------------------------------


def _look(facts: Facts, state: GovernorState, limits: Limits) -> GovernorState:
    """Take in a new look; one that was seen before changes nothing."""
    if facts.number == state.number:
        return state
    margin = limits.band // MARGIN_PART
    state = _freed(facts, state, margin)
    own, better_own = _settle(
        -_rounded(facts, margin), None if state.own is None else -state.own, state.better_own, limits, 0
    )
    # what others leave is an estimate, good to some pages; the budget is exact
    room, better_room = _settle(facts.room, state.room, state.better_room, limits, margin, slack=margin)
    grown = state.room is not None and room > state.room
    return replace(
        state, number=facts.number, own=-own, room=room, better_own=better_own, better_room=better_room,
        rest=None if grown else state.rest,
    )  # fmt: skip


def _freed(facts: Facts, state: GovernorState, margin: int) -> GovernorState:
    """A plan that takes less from now on, as after a prompt, is no change that has to last first."""
    freed = 0 if state.footprint is None else state.footprint - facts.footprint
    state = replace(state, footprint=facts.footprint)
    if freed <= margin or state.own is None or state.room is None:
        return state
    return replace(state, own=state.own - freed, room=state.room + freed)


def _rounded(facts: Facts, step: int) -> int:
    """What the process takes beside cached KV; what goes beyond the plan in steps."""
    beyond = facts.held - facts.footprint
    return facts.footprint + (-(-beyond // max(1, step)) * max(1, step) if beyond > 0 else 0)


def _settle(
    seen: int, current: int | None, better: int, limits: Limits, margin: int, slack: int = 0
) -> tuple[int, int]:
    """The value in force, and for how many looks there has been more. Less by more than `slack` counts at
    once, with a margin below it, so that the next small change is none."""
    if current is None:
        return seen, 0
    if seen < current - slack:
        return seen - margin, 0
    if seen < current + limits.band:
        return current, 0
    return (seen - margin, 0) if better + 1 >= limits.patience else (current, better + 1)


def _share(tensors: Sequence[TensorState], facts: Facts, state: GovernorState) -> tuple[int, str]:
    assert state.own is not None
    assert state.room is not None
    left = facts.budget - state.own
    choices = [(left, f"--mem-budget {format_size(facts.budget)} leaves {format_size(max(0, left))}")]
    if facts.cap is not None:
        choices.append((facts.cap, f"--page-cache-budget {format_size(facts.cap)}"))
    choices.append((state.room, f"{facts.room_source} leaves {format_size(max(0, state.room))}"))
    if facts.pressed and (kept := _kept(tensors, facts)) is not None:
        choices.append((kept, f"under memory pressure the kernel keeps {format_size(facts.resident)}"))
    share, reason = min(choices, key=lambda choice: choice[0])
    return max(0, share), reason


def _kept(tensors: Sequence[TensorState], facts: Facts) -> int | None:
    """The share less what of it the kernel took away; None where that is next to nothing."""
    written = sum(tensor.cached_written * tensor.block_bytes for tensor in tensors)
    missing = written - facts.resident
    if missing * MISSING_PART <= written:
        return None
    return sum(tensor.cached * tensor.block_bytes for tensor in tensors) - missing


def _rested(facts: Facts, state: GovernorState, limits: Limits) -> GovernorState:
    """After a demotion: longer under pressure, whose end nothing foretells but more room."""
    looks = limits.patience * (REST_PRESSED if facts.pressed else 1)
    return replace(state, rest=max(facts.number + looks, state.rest or 0))


def _may_promote(facts: Facts, state: GovernorState) -> bool:
    return not facts.pressed and (state.rest is None or facts.number >= state.rest)


# which tensors ------------------------------------------------------------------------------

CRUMBS = "a part of a tensor would be copied for every token, and all of it is soon read"


def _few(apart: int, total: int) -> bool:
    return apart * FEW_PART <= total


def _few_apart(tensors: Sequence[TensorState], limits: Limits) -> bool:
    """Nearly all are cached as a whole, and read in place."""
    apart = sum(tensor.cached < tensor.blocks for tensor in tensors)
    return limits.in_place and _few(apart, len(tensors))


def _helps(tensors: Sequence[TensorState], old: int, facts: Facts, limits: Limits) -> bool:
    """To cache one more part of a tensor, which is copied for every token then, and `old` blocks of it now.
    Not where what lies apart comes from the drive while attention is through the rest."""
    idle = limits.in_place and facts.waited is not None and facts.waited < WAITED_PART
    return not (_few_apart(tensors, limits) or (idle and old))


def _crumbs(tensors: Sequence[TensorState], room: int, facts: Facts, limits: Limits) -> TensorState | None:
    """A tensor in part that `room` cannot complete, where nearly all others are read in place: its copy takes
    the CPU from attention, which the drive would not."""
    parts = [tensor for tensor in tensors if tensor.stuck < tensor.cached < tensor.blocks]
    if not (parts and _few_apart(tensors, limits)):
        return None
    least = min(parts, key=lambda tensor: tensor.cached / tensor.blocks)
    completed = (least.blocks - least.cached) * least.block_bytes <= room
    idle = least.cached_written and not _pays(facts)
    return None if completed or idle else least


def _pays(facts: Facts, steps: int = FEWEST_STEPS) -> bool:
    return facts.steps_left is None or facts.steps_left >= steps


def _demote(
    tensors: Sequence[TensorState], excess: int, limits: Limits, reason: str
) -> tuple[list[Move], bool]:
    """First the rooms of tokens to come, which costs nothing, and then what must be copied. One tensor after
    the other where a block that leaves ends reading in place."""
    cycle = Cycle(tensors, limits.policy)
    while excess > 0 and (found := cycle.next_to_demote(free=True)) is not None:
        tensor = cycle.tensors[found]
        wanted = min(-(-excess // tensor.block_bytes), tensor.free, tensor.cached - tensor.stuck)
        excess -= cycle.take(found, PathKind.DIRECT, wanted, 0, reason)
    cycle, moves, allowed = Cycle(cycle.tensors, limits.policy), cycle.moves, limits.demote
    while excess > 0 and (found := cycle.next_to_demote()) is not None:
        tensor = cycle.tensors[found]
        wanted = min(-(-excess // tensor.block_bytes), tensor.cached - tensor.stuck)
        free, first = tensor.free, not (moves or cycle.moves)
        blocks = min(wanted, free + max(allowed // tensor.block_bytes, int(first and not free)))
        copies = max(0, blocks - free)
        excess -= cycle.take(found, PathKind.DIRECT, blocks, copies, reason) if blocks else 0
        allowed -= copies * tensor.block_bytes
        if blocks < wanted:
            return moves + cycle.moves, True
    return moves + cycle.moves, False


def _promote(
    tensors: Sequence[TensorState], room: int, facts: Facts, limits: Limits, reason: str
) -> tuple[list[Move], bool]:
    pays = _pays(facts)
    if all(tensor.block_bytes > room or tensor.cached >= tensor.blocks for tensor in tensors):
        return [], False
    cycle, allowed = Cycle(tensors, limits.policy), limits.promote if pays else 0
    while (found := cycle.next_to_promote()) is not None:
        tensor = cycle.tensors[found]
        wanted = min(room // tensor.block_bytes, tensor.blocks - tensor.cached)
        old = tensor.written - tensor.cached_written
        completes = _completes(tensor, wanted, old, facts)
        if not wanted or not (completes or _helps(cycle.tensors, old, facts, limits)):
            break
        copies = min(wanted, old, max(allowed // tensor.block_bytes, int(pays and not cycle.moves)))
        blocks = wanted if copies == old else copies
        room -= cycle.take(found, PathKind.PAGE_CACHE, blocks, copies, reason) if blocks else 0
        allowed -= copies * tensor.block_bytes
        if blocks < wanted:
            return cycle.moves, pays
    return cycle.moves, False


def _completes(tensor: TensorState, wanted: int, old: int, facts: Facts) -> bool:
    """Where nearly all are cached, no tensor is left in part, and none begun whose copy does not pay."""
    whole = wanted == tensor.blocks - tensor.cached
    return whole and (tensor.cached > 0 or not old or _pays(facts, FEWEST_STEPS_OF_FEW))
