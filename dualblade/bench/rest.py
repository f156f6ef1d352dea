# SPDX-License-Identifier: Apache-2.0
"""Which baselines of a sweep need no further round, because the first ones told how far behind they are."""

from __future__ import annotations

from collections.abc import Iterable

from dualblade.bench.baselines import OURS
from dualblade.bench.figures import Run, ratios_within_rounds

ROUNDS = 3  # the fewest of which a median is more than a mean
FAR = 2.0  # far more than what one round differs from the next


def is_settled(runs: Iterable[Run], baseline: str, budget_bytes: int) -> bool:
    """Whether in each of its rounds, three at least, a baseline took over twice as long a token as ours did
    in the same round and budget. A baseline nearer than that, as the best of the others is, goes on, so that
    bootstrap bounds beside it are of all rounds. runs: single runs of a sweep. Pure."""
    here = [run for run in runs if run["budget_bytes"] == budget_bytes]
    theirs, ours = ([run for run in here if run["baseline"] == name] for name in (baseline, OURS))
    ratios = ratios_within_rounds(theirs, ours, "decode_s_per_token")
    return len(ratios) >= ROUNDS and min(ratios) > FAR
