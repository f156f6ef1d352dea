# SPDX-License-Identifier: Apache-2.0
"""The cost model, on numbers that a person can check, and what must hold of any numbers."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade.cost import (
    NOTHING,
    ComputeRates,
    Elsewhere,
    LayerShape,
    ModelShape,
    Rate,
    Run,
    StorageRates,
    combined,
    decode_cost,
    duration,
    elsewhere,
    losses,
    prefill_cost,
)

# One row of 1000 parameters takes 1 s, 16 rows 4 s; 100 bytes of K and V a second; 1000 operations a second.
COMPUTE = ComputeRates(((1, 1e-3), (16, 4e-3)), scan=100.0, attention=1000.0, layer_s=0.5, source="test")
STORAGE = StorageRates(*(Rate(value, "test") for value in (10.0, 5.0, 40.0, 20.0)))
MODEL = ModelShape(900, 100, layers=2, attention=(LayerShape(4, 8), LayerShape(4, 8, window=10)))
RUN = Run(1, 80, 20, 80, direct_bytes=1000, cached_bytes=400, reread=0, overlapped=True, copied=True)


def test_a_token() -> None:
    cost = decode_cost(MODEL, RUN, COMPUTE, STORAGE)
    assert cost.compute_s == pytest.approx(1.0 + (90 + 10) * 8 / 100 + 2 * 0.5)
    assert cost.storage_s == pytest.approx(1000 * 0.9 / 10)
    assert cost.copy_s == pytest.approx(400 * 0.9 / 40)
    assert cost.seconds == pytest.approx(90.0), "the drive decides"
    in_place = decode_cost(MODEL, replace(RUN, copied=False), COMPUTE, STORAGE)
    assert (in_place.copy_s, in_place.compute_s) == (0, cost.compute_s)
    one_by_one = decode_cost(MODEL, replace(RUN, overlapped=False), COMPUTE, STORAGE)
    assert one_by_one.seconds == pytest.approx(90 + 9 + 10)


def test_a_prompt() -> None:
    cost = prefill_cost(MODEL, RUN, COMPUTE, STORAGE)
    products = 900 * 4e-3 * 80 / 16 + 100 * 1e-3
    assert cost.compute_s == pytest.approx(products + 2 * 4 * 4 * 80 * 40 / 1000 + 2 * 0.5)
    assert cost.storage_s == pytest.approx(1000 * 0.8 / 5)
    again = prefill_cost(MODEL, replace(RUN, reread=50), COMPUTE, STORAGE)
    assert again.storage_s == pytest.approx(cost.storage_s + 1000 * 0.5 / 10)
    assert again.copy_s == pytest.approx(cost.copy_s + 400 * 0.5 / 40)
    assert again.compute_s == cost.compute_s
    in_place = prefill_cost(MODEL, replace(RUN, reread=50, copied=False), COMPUTE, STORAGE)
    assert in_place.copy_s == cost.copy_s


def test_later_chunks_attend_to_earlier_ones() -> None:
    whole, halves = (prefill_cost(MODEL, replace(RUN, chunk=chunk), COMPUTE, STORAGE) for chunk in (80, 40))
    attention = 2 * 4 * 4 * (40 * 20 + 40 * 80) / 1000
    products = 900 * 4e-3 * 80 / 16 + 2 * 100 * 1e-3
    assert halves.compute_s == pytest.approx(products + attention + 2 * 2 * 0.5)
    assert halves.compute_s > whole.compute_s
    assert halves.storage_s == whole.storage_s


def test_rows_between_and_beyond_what_was_measured() -> None:
    assert COMPUTE.seconds_a_parameter(1) == 1e-3
    assert COMPUTE.seconds_a_parameter(8.5) == pytest.approx(2.5e-3)
    assert COMPUTE.seconds_a_parameter(16) == 4e-3
    assert COMPUTE.seconds_a_parameter(64) == pytest.approx(16e-3)


RATE = st.floats(1e-3, 1e3)


@given(storage=RATE, copy=RATE, compute=RATE)
def test_overlap_never_costs_more_and_hides_no_more_than_the_shorter(storage, copy, compute) -> None:
    overlapped = combined(storage, copy, compute, True)
    one_by_one = combined(storage, copy, compute, False)
    assert max(storage, copy, compute) <= overlapped.seconds <= one_by_one.seconds
    assert one_by_one.seconds == pytest.approx(storage + copy + compute)


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=5), st.integers(1, 10_000))
def test_faster_storage_is_never_slower(speeds: list[float], nbytes: int) -> None:
    run = replace(RUN, direct_bytes=nbytes)
    times = [
        decode_cost(MODEL, run, COMPUTE, replace(STORAGE, direct_read=Rate(speed, "test"))).seconds
        for speed in sorted(speeds)
    ]
    assert all(slower >= faster for slower, faster in pairwise(times))


def test_costs_add_up() -> None:
    cost = decode_cost(MODEL, RUN, COMPUTE, STORAGE)
    total = sum((cost, cost), NOTHING)
    assert (total.seconds, total.storage_s) == (2 * cost.seconds, 2 * cost.storage_s)


def test_in_memory_only_where_it_fits() -> None:
    assert elsewhere(MODEL, RUN, COMPUTE, fits=False).in_memory_s is None
    held = elsewhere(MODEL, RUN, COMPUTE, fits=True)
    assert held.in_memory_s == decode_cost(MODEL, RUN, COMPUTE, STORAGE).compute_s
    assert held.recompute_s > held.in_memory_s


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Elsewhere(None, 10.0), []),
        (Elsewhere(None, 0.99), []),
        (Elsewhere(None, 0.5), ["whole context again"]),
        (Elsewhere(0.9, 10.0), ["holds the whole KV cache"]),
        (Elsewhere(0.1, 0.5), ["holds the whole KV cache", "whole context again"]),
    ],
)
def test_when_offloading_does_not_pay(other: Elsewhere, words: list[str]) -> None:
    said = losses(1.0, other)
    assert len(said) == len(words)
    assert all(word in line for word, line in zip(words, said, strict=True))


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.01234, 4.561, 700)] == ["12.3 ms", "4.56 s", "12 min"]
