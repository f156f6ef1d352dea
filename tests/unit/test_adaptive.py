# SPDX-License-Identifier: Apache-2.0
"""What the pipeline decides, from measurements alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.adaptive import (
    Climb,
    DriveSetting,
    LayerTimes,
    StoreShare,
    best_depth,
    neighbours,
    step_seconds,
    storage_bound,
)
from dualblade.units import KIB, MIB

seconds = st.floats(0.0, 1.0)
models = st.integers(1, 3).flatmap(
    lambda paths: st.lists(
        st.builds(LayerTimes, st.lists(seconds, min_size=paths, max_size=paths).map(tuple), seconds, seconds),
        min_size=1,
        max_size=9,
    )
)


def busiest(layers: list[LayerTimes]) -> float:
    loads = max(sum(times) for times in zip(*(layer.loads for layer in layers), strict=True))
    return max(loads, sum(layer.copy for layer in layers), sum(layer.compute for layer in layers))


def longest(layers: list[LayerTimes]) -> float:
    return sum(max(layer.loads) + layer.copy + layer.compute for layer in layers)


@given(models, st.integers(0, 3))
def test_a_step_takes_at_least_its_busiest_part_and_at_most_all_of_them(layers, depth) -> None:
    depth = min(depth, len(layers) - 1)
    taken = step_seconds(layers, depth)
    assert 0.95 * busiest(layers) <= taken + 1e-6, "what lies ahead at the end is not quite what did before"
    assert taken <= longest(layers) + 1e-6


@given(models)
def test_with_nothing_ahead_the_parts_add_up(layers) -> None:
    assert step_seconds(layers, 0) == pytest.approx(longest(layers))


@given(models)
def test_more_distance_never_takes_longer(layers) -> None:
    times = [step_seconds(layers, depth) for depth in range(min(4, len(layers)))]
    assert all(later <= 1.05 * sooner + 1e-9 for sooner, later in pairwise(times))


@pytest.mark.parametrize(("load", "compute"), [(2.0, 1.0), (1.0, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize("count", [2, 7, 32])
def test_even_layers_need_one_layer_ahead(count: int, load: float, compute: float) -> None:
    layers = [LayerTimes((load,), compute)] * count
    assert step_seconds(layers, 1) == pytest.approx(count * max(load, compute))
    assert best_depth(layers, 3, current=3) == 1


def test_layers_on_one_path_in_turn_need_more() -> None:
    """Every fourth layer is on the slow path: it must be under way for as long as the others compute."""
    layers = [LayerTimes((0.0, 3.0), 1.0), *[LayerTimes((0.1, 0.0), 1.0)] * 3] * 4
    assert best_depth(layers, 3, current=1) == 3
    assert step_seconds(layers, 3) == pytest.approx(16.0)


def test_a_longer_distance_has_to_gain_something() -> None:
    layers = [LayerTimes((0.01,), 1.0)] * 8
    assert step_seconds(layers, 1) < step_seconds(layers, 0)
    assert best_depth(layers, 3, current=0) == 0


def test_chunks_let_the_copy_run_beside_the_storage() -> None:
    layers = [LayerTimes((1.0,), 0.0, copy=1.0)]
    assert step_seconds(layers, 0) == pytest.approx(2.0)
    assert step_seconds(layers, 0, chunks=10) == pytest.approx(1.1)


@given(models, st.integers(0, 3))
def test_the_distance_is_within_its_limit_and_the_same_again(layers, current) -> None:
    limit = min(3, len(layers) - 1)
    depth = best_depth(layers, limit, current)
    assert 0 <= depth <= limit
    assert depth == best_depth(layers, limit, depth), "no going to and fro"


# the drive ----------------------------------------------------------------------------------

LIMITS = DriveSetting(64, MIB)


def climb(speed, steps: int = 100) -> Climb:
    made = Climb(DriveSetting(32, MIB), LIMITS)
    for _ in range(steps):
        made.observe(int(speed(made.setting) * 10), 10.0)
    return made


def test_a_drive_that_wants_more_in_flight_gets_it() -> None:
    made = climb(lambda setting: 10 * MIB * setting.queue_depth)
    assert (made.setting, made.settled) == (DriveSetting(64, MIB), True)


def test_a_drive_that_likes_shorter_commands_gets_them() -> None:
    made = climb(lambda setting: 1e9 / (setting.command_bytes / (128 * KIB)))
    assert made.setting.command_bytes == 128 * KIB
    assert made.settled


def test_what_is_as_fast_stays_as_it_was() -> None:
    assert climb(lambda setting: 1e9).setting == DriveSetting(32, MIB)


@given(st.dictionaries(st.sampled_from([4, 8, 16, 32, 64]), st.floats(1e8, 1e10)))
def test_it_settles_on_the_fastest_it_tried(speeds) -> None:
    def speed(setting: DriveSetting) -> float:
        return speeds.get(setting.queue_depth, 1e9)

    made = climb(speed)
    assert made.settled
    near = [*neighbours(made.setting, LIMITS), made.setting]
    assert speed(made.setting) * 1.04 >= max(map(speed, near))
    assert all(4 <= one.queue_depth <= 64 and 128 * KIB <= one.command_bytes <= MIB for one in near)


def test_steps_that_read_little_say_nothing() -> None:
    made = Climb(DriveSetting(32, MIB), LIMITS)
    assert [made.observe(MIB, 1.0) for _ in range(20)] == [None] * 20
    assert not made.settled


def test_a_drive_that_slows_down_is_tried_again() -> None:
    made = climb(lambda setting: 1e9)
    for _ in range(2):
        made.observe(int(2e9), 10.0)
    assert not made.settled


# stores -------------------------------------------------------------------------------------


@given(st.lists(st.tuples(seconds, seconds)))
def test_the_stores_share_stays_within_bounds(stalls) -> None:
    share = StoreShare(2, 2, 6)
    for loads, stores in stalls:
        share = share.after(loads, stores, 2.0)
        assert share.slots in (2, 4, 6)


def test_who_is_waited_for_gets_more() -> None:
    share = StoreShare(2, 2, 6)
    assert share.after(0.1, 0.5, 1.0).slots == 4
    assert share.after(0.1, 0.5, 1.0).after(0.5, 0.0, 1.0).slots == 2
    assert share.after(0.0, 0.01, 1.0).slots == 2


def test_storage_bound_is_about_the_slowest_path() -> None:
    assert storage_bound([LayerTimes((1.0, 3.0), 2.0)])
    assert not storage_bound([LayerTimes((1.0, 1.0), 2.0)])
    assert not storage_bound([LayerTimes((1.0, 1.0), 0.5, copy=2.0)])
