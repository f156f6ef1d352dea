# SPDX-License-Identifier: Apache-2.0
"""Timelines: what they add up to, and how they are shown."""

from __future__ import annotations

import pytest

from dualblade.trace import Trace


@pytest.fixture
def trace() -> Trace:
    made = Trace()
    made.add("reads", "a", 10.0, 12.0)
    made.add("compute", "b", 11.0, 14.0)
    made.add("reads", "c", 11.0, 13.0)
    made.add("reads", "d", 13.5, 14.0)
    return made


def test_busy_counts_overlapping_spans_once(trace: Trace) -> None:
    assert trace.busy("reads") == pytest.approx(3.5)
    assert trace.busy("compute") == pytest.approx(3.0)
    assert trace.busy("nothing") == 0


def test_chrome_names_lanes_and_counts_microseconds_from_the_first_span(trace: Trace) -> None:
    events = trace.chrome()["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert list(lanes.values()) == ["reads", "compute"]
    spans = [
        (lanes[event["tid"]], event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X"
    ]
    assert spans[0] == ("reads", "a", 0, pytest.approx(2e6))
    assert spans[1] == ("compute", "b", pytest.approx(1e6), pytest.approx(3e6))


def test_text_shows_how_much_of_a_column_a_lane_was_at_work(trace: Trace) -> None:
    assert trace.text(width=8) == ["reads   |###### #|", "compute |  ######|"]
    assert trace.text(width=4) == ["reads   |###+|".replace("+", ":"), "compute | ###|"]
    assert Trace().text() == []


def test_a_span_is_noted_when_it_has_ended() -> None:
    trace = Trace()
    with trace.span("lane", "it"):
        assert trace.spans == []
    (span,) = trace.spans
    assert (span.lane, span.name) == ("lane", "it")
    assert span.seconds >= 0
