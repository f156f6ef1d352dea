# SPDX-License-Identifier: Apache-2.0
"""What is fetched ahead: the layers that follow, in the cyclic order of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from dualblade.errors import BudgetError
from dualblade.units import MIB, format_size

# A layer further ahead than this hides no more latency; it only holds memory.
MOST_AHEAD = 3

# Slots of a streamed run: K and V of a chunk in use, of the chunks fetched ahead, and of new rows. With the
# fewest nothing is fetched ahead.
STREAM_SLOTS = (10, 6, 4)
STORE_SLOTS = 2  # of these, that chunks fetched ahead leave to new rows on their way out
STREAM_CHUNK = 8 * MIB  # a longer chunk is read no faster
STAGING_PART = 3  # of the memory that is left; the page cache has the rest
AHEAD_PART = 16  # the same, for layers ahead


class Mode(StrEnum):
    """What may travel while a layer computes.

    none: nothing; a layer is read when it is asked for. intra-layer: the next chunks of the same layer (where
    attention takes a layer whole, on the CPU, that is nothing). cross-layer: the layers that follow too, as
    many as were planned. adaptive: the same, as many as measurements say that it takes, with the drive's
    commands and the stores' share of the slots fitted as well.
    """

    NONE = "none"
    INTRA_LAYER = "intra-layer"
    CROSS_LAYER = "cross-layer"
    ADAPTIVE = "adaptive"

    @property
    def crosses_layers(self) -> bool:
        return self in (Mode.CROSS_LAYER, Mode.ADAPTIVE)


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """prefetch_depth: layers fetched ahead. slots: staging slots, two a layer, or one less where no layer
    reads both of its tensors. chunk_tokens: of a slot where a layer is streamed in chunks, None where it is
    whole."""

    prefetch_depth: int
    slots: int
    chunk_tokens: int | None = None

    @property
    def attention(self) -> str:
        return "one-piece" if self.chunk_tokens is None else "streamed"


def plan_pipeline(
    num_layers: int, slot_bytes: int, available: int, wanted: int | None = None
) -> PipelinePlan:
    """One layer ahead wherever it fits: what travels while another computes is worth more than what its slots
    would cache. More of them, which even out layers on different paths, as far as a 16th of `available` bytes
    allows. At least nothing ahead (two slots).

    Raises BudgetError where not even one layer fits.
    """
    layer_bytes = 2 * slot_bytes
    if layer_bytes > available:
        raise BudgetError(
            f"one layer's keys and values take {format_size(layer_bytes)} of staging memory, "
            f"and the budget leaves {format_size(max(0, available))}",
            "raise --mem-budget, or lower the context or the batch",
        )
    fits = available // layer_bytes - 1
    if wanted is None:
        wanted = max(1, min(MOST_AHEAD, available // AHEAD_PART // layer_bytes))
    depth = min(wanted, num_layers - 1, fits)
    return PipelinePlan(depth, 2 * (depth + 1))


def plan_stream(tokens: int, unit_tokens: int, unit_bytes: int, available: int) -> PipelinePlan | None:
    """Chunks of a layer, as long as a third of `available` bytes allows and `tokens` asks for; None where not
    even the shortest fit. unit: the shortest chunk, tokens and bytes of its K or V."""
    for slots in STREAM_SLOTS:
        room = available if slots == STREAM_SLOTS[-1] else available // STAGING_PART
        units = min(room // slots, max(STREAM_CHUNK, unit_bytes)) // unit_bytes
        if units > 0:
            return PipelinePlan(0, slots, min(units, -(-tokens // unit_tokens)) * unit_tokens)
    return None
