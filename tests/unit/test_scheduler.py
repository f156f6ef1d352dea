# SPDX-License-Identifier: Apache-2.0
"""The scheduler with a clock of its own: steps, distances, and that only the adaptive mode decides."""

from __future__ import annotations

from collections import Counter

import pytest

from dualblade.adaptive import Climb, DriveSetting, StoreShare
from dualblade.pipeline import Mode
from dualblade.scheduler import Scheduler, Traffic
from dualblade.units import MIB

LAYER = 64 * MIB


class Steps:
    """Plays steps: every layer computes `compute_s` and waits `stall_s`, on a drive of `speed` bytes/s."""

    def __init__(self, mode: Mode, limit: int = 3, layers: int = 4):
        self.now = self.stall_s = 0.0
        self.layers = layers
        self.traffic = Traffic()
        self.scheduler = Scheduler(mode, limit, clock=lambda: self.now)

    def run(
        self, count: int, compute_s: float, speed: float, stall_s: float = 0.0, prompt: bool = False
    ) -> None:
        for _ in range(count):
            for layer in range(self.layers):
                if self.scheduler.enter(layer, self.stall_s):
                    reads = [Counter({"direct": LAYER})] * self.layers
                    self.scheduler.step_ended({"direct": self.traffic}, lambda reads=reads: reads, prompt)
                self.traffic = Traffic(self.traffic.nbytes + LAYER, self.traffic.busy_s + LAYER / speed)
                self.now += compute_s + stall_s
                self.stall_s += stall_s


@pytest.mark.parametrize(("mode", "depth"), [(Mode.NONE, 0), (Mode.INTRA_LAYER, 0), (Mode.CROSS_LAYER, 3)])
def test_a_fixed_mode_stays_as_it_is(mode: Mode, depth: int) -> None:
    steps = Steps(mode)
    steps.scheduler.climb = Climb(DriveSetting(32, MIB), DriveSetting(64, MIB))
    steps.run(40, 0.1, LAYER)
    assert (steps.scheduler.depth, steps.scheduler.decisions) == (depth, [])
    assert steps.scheduler.steps == 39


def test_the_distance_becomes_what_it_takes() -> None:
    steps = Steps(Mode.ADAPTIVE)
    steps.run(3, 0.1, 5 * LAYER, stall_s=0.1)
    assert steps.scheduler.depth == 1
    decision = steps.scheduler.decisions[0]
    assert (decision.step, decision.setting, decision.before, decision.after) == (
        1,
        "prefetch_depth",
        "3",
        "1",
    )
    assert decision.reason == "loads 0.8 s, compute 0.4 s a step"


def test_nothing_is_fetched_ahead_where_loads_take_no_time() -> None:
    steps = Steps(Mode.ADAPTIVE)
    steps.run(3, 1.0, 1000 * LAYER)
    assert steps.scheduler.depth == 0


def test_a_prompt_says_nothing_of_decoding() -> None:
    """Its last chunk ends with the first pass that decodes, which would wait for every layer."""
    steps = Steps(Mode.ADAPTIVE)
    steps.run(1, 100.0, LAYER)
    steps.run(9, 100.0, LAYER, prompt=True)
    steps.run(1, 0.1, LAYER, prompt=True)
    assert (steps.scheduler.steps, steps.scheduler.depth) == (10, 3)
    steps.run(1, 0.1, LAYER)
    assert steps.scheduler.depth == 1, "the first pass that decodes does"


def test_what_part_of_a_step_was_waited_for() -> None:
    """From the second that decodes on: the first waits for what the prompt still writes."""
    steps = Steps(Mode.ADAPTIVE)
    steps.run(3, 0.1, LAYER, stall_s=0.3, prompt=True)
    steps.run(1, 0.1, LAYER, stall_s=0.3, prompt=True)
    steps.run(1, 0.1, LAYER, stall_s=0.3)
    assert steps.scheduler.waited == 0.0
    steps.run(1, 0.1, LAYER, stall_s=0.1)
    assert steps.scheduler.waited == pytest.approx(0.75)
    steps.run(1, 0.1, LAYER)
    assert steps.scheduler.waited == pytest.approx(0.5)
    other = Steps(Mode.CROSS_LAYER)
    other.run(4, 0.1, LAYER, stall_s=0.3)
    assert other.scheduler.waited is None


def test_a_change_of_speed_is_noticed() -> None:
    steps = Steps(Mode.ADAPTIVE)
    steps.run(20, 1.0, 1000 * LAYER)
    assert steps.scheduler.depth == 0
    steps.run(40, 1.0, LAYER)
    assert steps.scheduler.depth == 1


@pytest.mark.parametrize(("compute_s", "settled"), [(0.01, True), (10.0, False)])
def test_the_drive_is_tried_only_where_it_is_waited_for(compute_s: float, settled: bool) -> None:
    steps = Steps(Mode.ADAPTIVE)
    steps.scheduler.climb = climb = Climb(DriveSetting(32, MIB), DriveSetting(64, MIB))
    steps.run(60, compute_s, LAYER, stall_s=1.0)
    assert climb.settled == settled
    assert climb.setting == DriveSetting(32, MIB)
    tried = [decision for decision in steps.scheduler.decisions if decision.setting == "drive"]
    assert bool(tried) == settled


def test_the_same_measurements_give_the_same_decisions() -> None:
    def decisions() -> object:
        steps = Steps(Mode.ADAPTIVE)
        steps.scheduler.climb = Climb(DriveSetting(32, MIB), DriveSetting(64, MIB))
        for speed in (1.0, 3.0, 0.5, 2.0):
            steps.run(25, 0.3, speed * LAYER)
        return steps.scheduler.decisions

    assert decisions() == decisions() != []


def test_stores_are_given_slots_in_the_adaptive_mode_alone() -> None:
    for mode, slots in ((Mode.ADAPTIVE, 4), (Mode.CROSS_LAYER, 2)):
        scheduler = Scheduler(mode, 0)
        scheduler.store_share = StoreShare(2, 2, 6)
        scheduler.share_stores(0.0, 1.0, 2.0)
        assert scheduler.store_share.slots == slots
