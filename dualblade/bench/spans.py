# SPDX-License-Identifier: Apache-2.0
"""Times that overlap, added up."""

from __future__ import annotations

from collections.abc import Iterable


def union_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds in which at least one of the (begin, end) was under way."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total
