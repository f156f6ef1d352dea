# SPDX-License-Identifier: Apache-2.0
"""Pictures of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from typing import Any

Row = Mapping[str, Any]


def sweep_pngs(record: Mapping[str, Any]) -> dict[str, bytes]:
    """PNG files by name: decode and prefill against the budget, with their bounds, and the drive's use."""
    rows = record["rows"]
    pictures = {
        "decode.png": _lines(
            rows, "decode_s_per_token", "decode_spread_s", "bound_s_per_token", "seconds a decoded token"
        ),
        "prefill.png": _lines(rows, "prefill_s", "prefill_spread_s", "prefill_bound_s", "seconds of prefill"),
    }
    if any(row["ssd_utilisation"] for row in rows):
        pictures["ssd.png"] = _draw(lambda axes: _utilisation(axes, rows))
    return pictures


def _draw(fill: Callable[[Any], None]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.subplots())
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _lines(rows: Sequence[Row], name: str, spread: str, bound: str, title: str) -> bytes:
    def fill(axes: Any) -> None:
        for color, (baseline, mine) in enumerate(by_baseline(rows).items()):
            middle = [row[name] for row in mine]
            below = [value - row[spread][0] for value, row in zip(middle, mine, strict=True)]
            above = [row[spread][1] - value for value, row in zip(middle, mine, strict=True)]
            axes.errorbar(
                [row["budget_fraction"] for row in mine], middle, yerr=(below, above), label=baseline,
                marker="o", capsize=3, color=f"C{color}",
            )  # fmt: skip
        least = {row["budget_fraction"]: row[bound] for row in rows if bound in row}
        axes.plot(sorted(least), [least[x] for x in sorted(least)], "k--", label="bound")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("part of the KV bytes that the budget can hold")
        axes.set_ylabel(title)
        axes.legend(fontsize="small", ncols=2)

    return _draw(fill)


def _utilisation(axes: Any, rows: Sequence[Row]) -> None:
    for color, (baseline, mine) in enumerate(by_baseline(rows).items()):
        read = [row for row in mine if row["ssd_utilisation"]]
        if read:
            axes.plot(
                [row["budget_fraction"] for row in read], [row["ssd_utilisation"] for row in read],
                marker="o", label=baseline, color=f"C{color}",
            )  # fmt: skip
    axes.axhline(1.0, color="k", linestyle="--")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("part of the KV bytes that the budget can hold")
    axes.set_ylabel("of the drive's limit, while decode reads")
    axes.legend(fontsize="small", ncols=2)


def by_baseline(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Each baseline's rows by rising budget, in the order of their first appearance by name."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: (row["baseline"], row["budget_bytes"])):
        found.setdefault(row["baseline"], []).append(row)
    return found
