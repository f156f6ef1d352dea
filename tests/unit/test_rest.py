# SPDX-License-Identifier: Apache-2.0
"""Which baselines of a sweep rest after its first rounds."""

from __future__ import annotations

from typing import Any

import pytest

from dualblade.bench.rest import is_settled


def runs_of(baseline: str, *seconds: float, budget: int = 1) -> list[dict[str, Any]]:
    return [
        {"baseline": baseline, "round": number, "budget_bytes": budget, "decode_s_per_token": value}
        for number, value in enumerate(seconds)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "settled"),
    [
        ((1, 1, 1), (2.1, 3, 4), True),
        ((1, 1), (9, 9), False),  # two rounds are no median
        ((1, 1, 1), (2.0, 9, 9), False),  # one round that was not far
        ((1, 1, 1, 2), (3, 3, 3, 3), False),  # ours was slow once
        ((1, 1, 1), (9, 9, 9, 0.5), True),  # a round that ours has not run yet tells nothing
        ((), (9, 9, 9), False),
    ],
)
def test_settled_is_far_from_ours_in_each_round(
    ours: tuple[float, ...], theirs: tuple[float, ...], settled: bool
) -> None:
    runs = runs_of("flexgen", *theirs) + runs_of("dual", *ours)
    assert is_settled(runs, "flexgen", 1) is settled


def test_each_budget_by_itself() -> None:
    runs = runs_of("dual", 1, 1, 1) + runs_of("flexgen", 9, 9, 9, budget=2)
    assert not is_settled(runs, "flexgen", 1)
    assert not is_settled(runs, "flexgen", 2)


def test_ours_never_rests() -> None:
    assert not is_settled(runs_of("dual", 1, 1, 1), "dual", 1)
