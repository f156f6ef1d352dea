# SPDX-License-Identifier: Apache-2.0
"""Which baselines of a sweep need no further round: a third of its time tells what the first rounds told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dualblade.bench.baselines import OURS

ROUNDS = 3  # the fewest of which a median is more than a mean
FAR = 2.0  # far more than what one round differs from the next


def is_settled(runs: Iterable[Mapping[str, Any]], baseline: str, budget_bytes: int) -> bool:
    """Whether in each of its rounds, three at least, a baseline took over twice as long a token as ours did
    in the same round and budget. One that may be the best of the others is not, so bootstrap bounds beside
    that one stay those of all rounds. runs: single runs of a sweep. Pure."""
    seconds: dict[str, dict[int, float]] = {OURS: {}, baseline: {}}
    for run in runs:
        if run["budget_bytes"] == budget_bytes and run["baseline"] in seconds:
            seconds[run["baseline"]][run["round"]] = run["decode_s_per_token"]
    ours = seconds[OURS]
    ratios = [value / ours[number] for number, value in seconds[baseline].items() if number in ours]
    return len(ratios) >= ROUNDS and min(ratios) > FAR
