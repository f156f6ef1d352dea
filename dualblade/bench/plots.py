# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was measured."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from dualblade.trace import Trace


def timeline_png(*timelines: tuple[Trace, str]) -> bytes:
    """Below one another, each with its title: a bar a span, a row a lane."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1 + 0.6 * len(trace.lanes) for trace, _ in timelines]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(len(timelines), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (trace, title) in zip(places, timelines, strict=True):
        _draw(axes, trace, title)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()


def _draw(axes: Any, trace: Trace, title: str) -> None:
    start = min((span.begin for span in trace.spans), default=0.0)
    for row, lane in enumerate(trace.lanes):
        bars = [((span.begin - start) * 1e3, span.seconds * 1e3) for span in trace.spans if span.lane == lane]
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolor=f"C{row}", edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(trace.lanes)), trace.lanes)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title)
