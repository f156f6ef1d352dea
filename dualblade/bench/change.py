# SPDX-License-Identifier: Apache-2.0
"""`bench sweep --change`: memory becomes scarce while a run decodes, and then plentiful again.

After a third of the new tokens the limit of the run's memory cgroup is lowered to what is in memory anyway
and half of what was beside it; after two thirds it is what it was. No run is told: the governor has to see.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dualblade.bench.baselines import OURS
from dualblade.bench.figures import median, paired_ratio, peak, reference_digests
from dualblade.bench.workloads import Budget, Need
from dualblade.host.memory_cgroup import MemoryCgroup

STATIC = "dual-first-fit-static"
COMPARED = (OURS, STATIC)
PHASES = ("before", "lowered", "after")
LEAST_TOKENS = 9  # a first token and two or more a phase

Run = Mapping[str, Any]


def lowered_bytes(budget: Budget, need: Need) -> int:
    return need.base + (budget.bytes - need.base) // 2


class Change:
    """Moves a limit as tokens come. refused: times that the kernel could not take a limit."""

    def __init__(self, limit: MemoryCgroup, budget: Budget, need: Need, new_tokens: int):
        third = new_tokens // 3
        self._limit = limit
        self._moves = {third: lowered_bytes(budget, need), 2 * third: budget.bytes}
        self.refused = 0

    def on_token(self, count: int) -> None:
        nbytes = self._moves.get(count)
        if nbytes is None:
            return
        try:
            self._limit.set(nbytes)
        except OSError:  # more is in use than that, and none of it can be given back now
            self.refused += 1


def phases(steps: Sequence[float]) -> dict[str, float]:
    """Seconds a token before, during and after; steps: of each token but the first."""
    third = (len(steps) + 1) // 3
    parts = (steps[: third - 1], steps[third - 1 : 2 * third - 1], steps[2 * third - 1 :])
    return {f"{name}_s": statistics.fmean(part) for name, part in zip(PHASES, parts, strict=True)}


def summarise_changes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A row for each budget and baseline."""
    exact = reference_digests(runs)
    keys = list(dict.fromkeys((run["budget_bytes"], run["baseline"]) for run in runs))
    return [_row([run for run in runs if _key(run) == key], runs, exact) for key in keys]


def _key(run: Run) -> tuple[int, str]:
    return run["budget_bytes"], run["baseline"]


def _row(mine: Sequence[Run], runs: Sequence[Run], exact: Mapping[str, Any]) -> dict[str, Any]:
    first = mine[0]
    static = [run for run in runs if _key(run) == (first["budget_bytes"], STATIC)]
    return {
        "baseline": first["baseline"],
        "budget_fraction": first["fraction"],
        "budget_bytes": first["budget_bytes"],
        "lowered_bytes": first["lowered_bytes"],
        "rounds": len(mine),
        "decode_s_per_token": median(mine, "decode_s_per_token"),
        **{f"{name}_s": median(mine, f"{name}_s") for name in PHASES},
        "limits_refused": sum(run["limits_refused"] for run in mine),
        "peak_bytes": max(peak(run) for run in mine),
        "verified": all(run[name] == value for run in mine for name, value in exact.items()),
        "decode_vs_static": paired_ratio(mine, static, "decode_s_per_token"),
    }
