# SPDX-License-Identifier: Apache-2.0
"""What happened when: spans on lanes, for a timeline that a person can look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """begin, end: seconds, as time.monotonic()."""

    lane: str
    name: str
    begin: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


class Trace:
    """Spans in the order in which they were noted."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, lane: str, name: str, begin: float, end: float) -> None:
        self.spans.append(Span(lane, name, begin, end))

    @contextmanager
    def span(self, lane: str, name: str) -> Iterator[None]:
        begin = monotonic()
        yield
        self.add(lane, name, begin, monotonic())

    @property
    def lanes(self) -> list[str]:
        return list(dict.fromkeys(span.lane for span in self.spans))

    def busy(self, lane: str) -> float:
        """Seconds in which at least one span of the lane was under way."""
        total, until = 0.0, float("-inf")
        for span in sorted((span for span in self.spans if span.lane == lane), key=lambda span: span.begin):
            total += max(0.0, span.end - max(span.begin, until))
            until = max(until, span.end)
        return total

    def chrome(self) -> dict[str, Any]:
        """In the Trace Event Format, which Perfetto and chrome://tracing show. Microseconds."""
        start = min((span.begin for span in self.spans), default=0.0)
        lanes = {lane: number for number, lane in enumerate(self.lanes)}
        names = [
            {"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": lane}}
            for lane, number in lanes.items()
        ]
        spans = [
            {
                "ph": "X", "pid": 0, "tid": lanes[span.lane], "name": span.name,
                "ts": (span.begin - start) * 1e6, "dur": span.seconds * 1e6,
            }
            for span in self.spans
        ]  # fmt: skip
        return {"traceEvents": names + spans, "displayTimeUnit": "ms"}

    def text(self, width: int = 72) -> list[str]:
        """A line a lane: how much of every column it was at work, from . to #."""
        if not self.spans:
            return []
        start = min(span.begin for span in self.spans)
        column = (max(span.end for span in self.spans) - start) / width or 1.0
        longest = max(map(len, self.lanes))
        return [
            f"{lane:{longest}} |{''.join(self._columns(lane, start, column, width))}|" for lane in self.lanes
        ]

    def _columns(self, lane: str, start: float, column: float, width: int) -> list[str]:
        filled = [0.0] * width
        for span in self.spans:
            if span.lane != lane:
                continue
            first = int((span.begin - start) / column)
            for at in range(first, min(width, int((span.end - start) / column) + 1)):
                left, right = start + at * column, start + (at + 1) * column
                filled[at] += max(0.0, min(span.end, right) - max(span.begin, left)) / column
        return [" .:+#"[min(4, int(part * 4 + 0.999))] for part in filled]


def combined(timelines: Sequence[tuple[Trace, str]]) -> dict[str, Any]:
    """Several traces, each with its title, in one file of the Trace Event Format."""
    events = []
    for number, (trace, title) in enumerate(timelines):
        name = {"ph": "M", "pid": number, "name": "process_name", "args": {"name": title}}
        events += [name, *({**event, "pid": number} for event in trace.chrome()["traceEvents"])]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
