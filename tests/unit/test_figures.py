# SPDX-License-Identifier: Apache-2.0
"""From single runs to rows: what is a median, a ratio, a bound, and what counts as the same numbers."""

from __future__ import annotations

from typing import Any

import pytest

from dualblade.bench.figures import bootstrap, mean_compute, paired_ratio, reference_digests, summarise
from dualblade.units import GIB


def run(baseline: str, number: int, decode: float, **more: Any) -> dict[str, Any]:
    return {
        "baseline": baseline,
        "round": number,
        "fraction": 0.5,
        "budget_bytes": 3 * GIB,
        "prefill_s": 2 * decode,
        "decode_s_per_token": decode,
        "read_bytes_per_token": 2 * GIB,
        "read_busy_s_per_token": 1.0,
        "peak_bytes": GIB + number,
        "cgroup_peak_bytes": None,
        "hugetlb_bytes": 5,
        "limit_read_gib_s": LIMITS[number % 3],
        "limit_write_gib_s": 1.0,
        "limit_computing_gib_s": 1.5,
        "compute_s_per_token": 0.1,
        "compute_prefill_s": 1.0,
        "logits_digest": "a",
        "kv_digest": "b",
        "facts": {},
    } | more


LIMITS = [2.0, 4.0, 4.0]
COMPUTES = [{"decode_s_per_token": 0.1, "prefill_s": 1.0}] * 3


def rows_of(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["baseline"]: row for row in summarise(2 * GIB, runs, COMPUTES)["rows"]}


def test_a_row_holds_what_the_contract_names() -> None:
    record = summarise(2 * GIB, [run("dual", n, 0.5) for n in range(3)], COMPUTES)
    assert (record["ssd_limit_gib_s"], record["ssd_limit_computing_gib_s"]) == (4.0, 1.5)
    names = (
        "baseline", "budget_bytes", "kv_bytes", "prefill_s", "decode_s_per_token", "compute_s_per_token",
        "read_gib_s", "ssd_utilisation", "peak_bytes", "ssd_limit_gib_s",
    )  # fmt: skip
    assert all(record["rows"][0][name] is not None for name in names)


def test_medians_and_the_largest_peak() -> None:
    row = rows_of([run("dual", n, seconds) for n, seconds in enumerate((0.9, 0.2, 0.4))])["dual"]
    assert row["decode_s_per_token"] == 0.4
    assert row["decode_spread_s"] == [0.2, 0.9]
    assert row["peak_bytes"] == GIB + 2
    assert row["rounds"] == 3


def test_the_peak_is_what_was_charged_and_hugepages_where_the_kernel_tells() -> None:
    row = rows_of([run("dual", n, 0.5, cgroup_peak_bytes=GIB // 2 + n) for n in range(3)])["dual"]
    assert row["peak_bytes"] == GIB // 2 + 2 + 5
    assert row["sampled_peak_bytes"] == GIB + 2


def test_utilisation_is_of_the_limit_just_before() -> None:
    runs = [run("dual", n, 0.5) for n in range(3)]  # 2 GiB/s: all, half and half of the limits
    row = rows_of(runs)["dual"]
    assert (row["read_gib_s"], row["ssd_utilisation"]) == (2.0, 0.5)


@pytest.mark.parametrize("more", [{"read_bytes_per_token": None}, {"read_bytes_per_token": 0.0}])
def test_what_reads_nothing_uses_nothing_of_the_drive(more: dict[str, Any]) -> None:
    row = rows_of([run("in-memory", n, 0.5, **more) for n in range(3)])["in-memory"]
    assert (row["read_gib_s"], row["ssd_utilisation"]) == (None, None)


def test_the_bound_is_the_larger_of_compute_and_what_must_be_read() -> None:
    reading = rows_of([run("dual", n, 0.5) for n in range(3)])["dual"]
    assert reading["bound_s_per_token"] == pytest.approx(0.25)  # half of 2 GiB at 4 GiB/s
    assert reading["decode_vs_bound"] == pytest.approx(2.0)
    assert reading["prefill_bound_s"] == pytest.approx(2.0)  # 2 GiB at 1 GiB/s
    fits = rows_of([run("dual", n, 0.5, fraction=1.25) for n in range(3)])["dual"]
    assert fits["uncached_bytes"] == 0
    assert fits["bound_s_per_token"] == 0.1


def test_ratios_to_the_bound_are_to_the_compute_around_the_run() -> None:
    around = mean_compute(
        {"decode_s_per_token": 0.3, "prefill_s": 3.0}, {"decode_s_per_token": 0.5, "prefill_s": 5.0}
    )
    row = rows_of([run("dual", n, 0.5, **around) for n in range(3)])["dual"]
    assert row["decode_vs_bound"] == pytest.approx(0.5 / 0.4)
    assert row["prefill_vs_bound"] == pytest.approx(1.0 / 4)


def test_the_shared_bound_reads_more_slowly_while_it_computes() -> None:
    row = rows_of([run("dual", n, 0.5) for n in range(3)])["dual"]
    shared = 0.1 + (1 - 0.1 * 1.5) / 4  # 1 GiB, of which 0.15 GiB beside 0.1 s of compute
    assert row["shared_bound_s_per_token"] == pytest.approx(shared)
    assert row["decode_vs_shared_bound"] == pytest.approx(0.5 / shared)
    fits = rows_of([run("dual", n, 0.5, fraction=0.95) for n in range(3)])["dual"]
    assert fits["shared_bound_s_per_token"] == 0.1  # less than what is read beside it


def test_ratios_are_paired_by_round() -> None:
    slow_round = [run("flexgen", 0, 1.0), run("flexgen", 1, 10.0), run("dual", 0, 0.5), run("dual", 1, 5.0)]
    row = rows_of(slow_round)["dual"]
    assert row["decode_vs_flexgen"] == {"ratio": 0.5, "low": None, "high": None}
    assert row["decode_vs_best_other"]["baseline"] == "flexgen"
    assert "decode_vs_flexgen" not in rows_of(slow_round)["flexgen"]


def test_the_best_other_is_the_fastest_in_the_same_budget() -> None:
    runs = [run("dual", 0, 0.5), run("direct", 0, 0.4), run("page-cache", 0, 0.45)]
    runs.append(run("in-memory", 0, 0.1, budget_bytes=4 * GIB))
    assert rows_of(runs)["dual"]["decode_vs_best_other"]["baseline"] == "direct"


def test_bounds_from_seven_rounds_on() -> None:
    mine = [run("dual", n, 0.5 + n / 100) for n in range(7)]
    theirs = [run("flexgen", n, 1.0) for n in range(7)]
    ratio = paired_ratio(mine, theirs, "decode_s_per_token")
    assert ratio["ratio"] == pytest.approx(0.53)
    assert 0.5 <= ratio["low"] <= 0.53 <= ratio["high"] <= 0.56  # type: ignore[operator]
    assert paired_ratio(mine[:6], theirs, "decode_s_per_token")["low"] is None
    assert paired_ratio(mine, theirs[:0], "decode_s_per_token")["ratio"] is None


def test_the_bootstrap_is_the_same_each_time_and_narrow_where_values_are() -> None:
    values = [1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap([2.0] * 7) == (2.0, 2.0)


def test_one_run_with_other_numbers_is_not_verified() -> None:
    runs = [run("dual", 0, 0.5), run("direct", 0, 0.5), run("flexgen", 0, 0.5, kv_digest="other")]
    rows = rows_of(runs)
    assert {name: row["verified"] for name, row in rows.items()} == {
        "dual": True,
        "direct": True,
        "flexgen": False,
    }


def test_transformers_own_cache_has_the_last_word() -> None:
    runs = [run("dual", n, 0.5, logits_digest="wrong") for n in range(3)] + [run("in-memory", 0, 0.5)]
    assert reference_digests(runs)["logits_digest"] == "a"
    assert not rows_of(runs)["dual"]["verified"]
