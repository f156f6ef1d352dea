# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was measured."""

from __future__ import annotations

from io import BytesIO

from dualblade.trace import Trace


def timeline_png(trace: Trace, title: str) -> bytes:
    """A bar a span, a row a lane."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lanes = trace.lanes
    start = min((span.begin for span in trace.spans), default=0.0)
    figure = Figure(figsize=(12, 1 + 0.6 * len(lanes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, lane in enumerate(lanes):
        bars = [((span.begin - start) * 1e3, span.seconds * 1e3) for span in trace.spans if span.lane == lane]
        axes.broken_barh(bars, (row - 0.35, 0.7), facecolor=f"C{row}", edgecolor="white", linewidth=0.3)
    axes.set_yticks(range(len(lanes)), lanes)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title)
    out = BytesIO()
    figure.savefig(out, format="png", dpi=120)
    return out.getvalue()
