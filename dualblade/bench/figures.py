# SPDX-License-Identifier: Apache-2.0
"""From single runs to rows: medians with their spread, ratios within rounds, bounds. Pure."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dualblade.units import GIB

Run = Mapping[str, Any]
RESAMPLES = 10_000
ENOUGH_ROUNDS = 7  # fewer say nothing about 95 %
REFERENCE = "flexgen"


def summarise(kv_bytes: int, runs: Sequence[Run], computes: Sequence[Run]) -> dict[str, Any]:
    """Rows, one a budget and baseline, and what holds for all of them. runs: each with the compute alone and
    the drive's limits around it. computes: compute alone, all its runs."""
    common = {
        "compute_s_per_token": median(computes, "decode_s_per_token"),
        "compute_prefill_s": median(computes, "prefill_s"),
        "ssd_limit_gib_s": median(runs, "limit_read_gib_s"),
        "ssd_write_limit_gib_s": median(runs, "limit_write_gib_s"),
        "ssd_limit_computing_gib_s": median(runs, "limit_computing_gib_s"),
    }
    exact = reference_digests(runs)
    rows = [_row(kv_bytes, group, common, exact) for group in _groups(runs).values()]
    _add_ratios(rows, runs)
    return common | {
        "rows": rows,
        "runs": [dict(run) for run in runs],
        "computes": [dict(run) for run in computes],
    }


def mean_compute(*computes: Run) -> dict[str, float]:
    """Of several runs of compute alone."""
    return {
        "compute_s_per_token": statistics.fmean(run["decode_s_per_token"] for run in computes),
        "compute_prefill_s": statistics.fmean(run["prefill_s"] for run in computes),
    }


def _groups(runs: Sequence[Run]) -> dict[tuple[int, str], list[Run]]:
    groups: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["budget_bytes"], run["baseline"]), []).append(run)
    return groups


def median(runs: Sequence[Run], name: str) -> float | None:
    """Of what was measured; None where nothing was."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return statistics.median(values) if values else None


def spread(runs: Sequence[Run], name: str) -> list[float]:
    """The smallest and the largest."""
    values = [run[name] for run in runs]
    return [min(values), max(values)]


def peak(run: Run) -> int:
    """What the kernel has charged, where it tells, and the hugepages, which it does not charge; else what was
    sampled. A sample adds up what was looked at one after the other, so it may be a little too high."""
    charged = run["cgroup_peak_bytes"]
    return int(run["peak_bytes"] if charged is None else charged + run["hugetlb_bytes"])


def reference_digests(runs: Sequence[Run]) -> dict[str, Any]:
    """The logits and the KV that all runs must have: of transformers' own where it ran, else of most."""
    own = [run for run in runs if run["baseline"] in ("in-memory", "hf-offloaded")] or runs
    return {
        name: Counter(run[name] for run in own).most_common(1)[0][0] if own else None
        for name in ("logits_digest", "kv_digest")
    }


def _row(
    kv_bytes: int,
    runs: Sequence[Run],
    common: Mapping[str, Any],
    exact: Mapping[str, Any],
) -> dict[str, Any]:
    first = runs[0]
    uncached = max(0, round(kv_bytes * (1 - first["fraction"])))
    return {
        "baseline": first["baseline"],
        "budget_fraction": first["fraction"],
        "budget_bytes": first["budget_bytes"],
        "kv_bytes": kv_bytes,
        "rounds": len(runs),
        "start_s": median(runs, "start_s"),
        "prefill_s": median(runs, "prefill_s"),
        "prefill_spread_s": spread(runs, "prefill_s"),
        "decode_s_per_token": median(runs, "decode_s_per_token"),
        "decode_spread_s": spread(runs, "decode_s_per_token"),
        "read_bytes_per_token": median(runs, "read_bytes_per_token"),
        "read_gib_s": median([_speed(run) for run in runs], "read_gib_s"),
        "ssd_utilisation": median([_speed(run) for run in runs], "ssd_utilisation"),
        "peak_bytes": max(peak(run) for run in runs),
        "sampled_peak_bytes": max(run["peak_bytes"] for run in runs),
        "verified": all(run[name] == value for run in runs for name, value in exact.items()),
        "facts": first["facts"],
        **common,
        **_bounds(kv_bytes, uncached, runs, common),
    }


def _speed(run: Run) -> dict[str, float | None]:
    """While reads were under way, also as a part of the limit around the run. None where nothing was
    read."""
    read, busy = run["read_bytes_per_token"], run["read_busy_s_per_token"]
    if not read or not busy:
        return {"read_gib_s": None, "ssd_utilisation": None}
    speed = read / GIB / busy
    return {"read_gib_s": speed, "ssd_utilisation": speed / run["limit_read_gib_s"]}


def _bounds(kv_bytes: int, uncached: int, runs: Sequence[Run], common: Mapping[str, Any]) -> dict[str, Any]:
    """No system that is exact can be faster: it computes, and reads what the budget cannot hold. Ratios are
    to the compute and the drive's limit around the run, their median."""
    compute, limit = common["compute_s_per_token"], common["ssd_limit_gib_s"]
    overall = _bound(uncached, compute, limit)
    shared = _shared_bound(uncached, compute, limit, common["ssd_limit_computing_gib_s"])
    prefill = _bound(kv_bytes, common["compute_prefill_s"], common["ssd_write_limit_gib_s"])
    decode_ratios, shared_ratios, prefill_ratios = [], [], []
    for run in runs:
        compute, limit = run["compute_s_per_token"], run["limit_read_gib_s"]
        decode_ratios.append(run["decode_s_per_token"] / _bound(uncached, compute, limit))
        bound = _shared_bound(uncached, compute, limit, run["limit_computing_gib_s"])
        shared_ratios.append(run["decode_s_per_token"] / bound)
        bound = _bound(kv_bytes, run["compute_prefill_s"], run["limit_write_gib_s"])
        prefill_ratios.append(run["prefill_s"] / bound)
    return {
        "uncached_bytes": uncached,
        "bound_s_per_token": overall,
        "decode_vs_bound": statistics.median(decode_ratios),
        "shared_bound_s_per_token": shared,
        "decode_vs_shared_bound": statistics.median(shared_ratios),
        "prefill_bound_s": prefill,
        "prefill_vs_bound": statistics.median(prefill_ratios),
    }


def _bound(nbytes: int, compute_s: float, gib_s: float) -> float:
    return max(compute_s, nbytes / GIB / gib_s)


def _shared_bound(nbytes: int, compute_s: float, gib_s: float, beside_gib_s: float) -> float:
    """While it computes the drive reads at `beside_gib_s`, what is left then at `gib_s`."""
    left = nbytes / GIB - compute_s * min(beside_gib_s, gib_s)
    return compute_s + max(0.0, left) / gib_s


# ratios -------------------------------------------------------------------------------------


def _add_ratios(rows: Sequence[dict[str, Any]], runs: Sequence[Run]) -> None:
    groups = _groups(runs)
    for row in rows:
        beside = [
            other for other in rows if other["budget_bytes"] == row["budget_bytes"] and other is not row
        ]
        mine = groups[row["budget_bytes"], row["baseline"]]
        for other in beside:
            if other["baseline"] == REFERENCE:
                theirs = groups[other["budget_bytes"], REFERENCE]
                row["decode_vs_flexgen"] = paired_ratio(mine, theirs, "decode_s_per_token")
                row["prefill_vs_flexgen"] = paired_ratio(mine, theirs, "prefill_s")
        if beside:
            best = min(beside, key=lambda other: float(other["decode_s_per_token"]))
            theirs = groups[best["budget_bytes"], best["baseline"]]
            row["decode_vs_best_other"] = paired_ratio(mine, theirs, "decode_s_per_token") | {
                "baseline": best["baseline"]
            }


def paired_ratio(mine: Sequence[Run], theirs: Sequence[Run], name: str) -> dict[str, float | None]:
    """The median of mine / theirs within each round that has both, and from seven rounds on the 95 %
    bootstrap bounds of that median."""
    ratios = ratios_within_rounds(mine, theirs, name)
    if not ratios:
        return {"ratio": None, "low": None, "high": None}
    low, high = bootstrap(ratios) if len(ratios) >= ENOUGH_ROUNDS else (None, None)
    return {"ratio": statistics.median(ratios), "low": low, "high": high}


def ratios_within_rounds(mine: Iterable[Run], theirs: Iterable[Run], name: str) -> list[float]:
    """mine / theirs, of each round that has both."""
    other = {run["round"]: run[name] for run in theirs}
    return [run[name] / other[run["round"]] for run in mine if run["round"] in other]


def bootstrap(values: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % bounds of the median, from resampled rounds; the same for the same values."""
    random = np.random.default_rng(seed)
    samples = random.choice(np.asarray(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return float(low), float(high)
