# SPDX-License-Identifier: Apache-2.0
"""What is fetched ahead: the layers that follow, in the cyclic order of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dualblade.errors import BudgetError
from dualblade.units import format_size

# A layer further ahead than this hides no more latency; it only holds memory.
MOST_AHEAD = 3


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """prefetch_depth: layers fetched ahead. slots: staging slots, two a layer."""

    prefetch_depth: int
    slots: int


def plan_pipeline(
    num_layers: int, slot_bytes: int, available: int, wanted: int | None = None
) -> PipelinePlan:
    """As far ahead as a third of `available` bytes allows, at least nothing ahead (two slots).

    Raises BudgetError where not even one layer fits.
    """
    layer_bytes = 2 * slot_bytes
    if layer_bytes > available:
        raise BudgetError(
            f"one layer's keys and values take {format_size(layer_bytes)} of staging memory, "
            f"and the budget leaves {format_size(max(0, available))}",
            "raise --mem-budget, or lower the context or the batch",
        )
    most = min(MOST_AHEAD if wanted is None else wanted, max(0, num_layers - 1))
    fits = available // layer_bytes - 1 if wanted is not None else available // 3 // layer_bytes - 1
    depth = max(0, min(most, fits))
    return PipelinePlan(depth, 2 * (depth + 1))


def layers_ahead(layer: int, num_layers: int, depth: int) -> Iterator[int]:
    """The next `depth` layers after `layer`, past the last one to the next step's first."""
    for step in range(1, min(depth, num_layers - 1) + 1):
        yield (layer + step) % num_layers
