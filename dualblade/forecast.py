# SPDX-License-Identifier: Apache-2.0
"""One run in numbers before anything is loaded: the prefill chunk, the plan, what the device holds, and
up to which context the page cache holds all KV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dualblade.errors import BudgetError
from dualblade.layers import kept_bytes, kv_specs
from dualblade.models import activation_bytes
from dualblade.offload import make_request
from dualblade.planner import RunPlan, make_plan
from dualblade.residency import MemorySnapshot
from dualblade.settings import CacheSettings
from dualblade.tensors import PathKind
from dualblade.units import format_size

PREFILL_CHUNK, SMALLEST_CHUNK = 2048, 16
# A longer chunk saves reading the cache once more, but every byte of it is one less for the page cache.
ACTIVATIONS_PART = 4
LONGEST_CONTEXT = 1 << 24  # of a model that names no end


@dataclass(frozen=True, slots=True)
class Forecast:
    """settings: with the weights' bytes. chunk: --prefill-chunk, None to let the budget decide.
    all_logits: the model gives those of every position. limit: positions it has, None without end."""

    config: Any
    settings: CacheSettings
    batch: int
    itemsize: int
    attention: str
    chunk: int | None
    all_logits: bool
    limit: int | None

    def chunk_for(self, context: int, prompt: int, snapshot: MemorySnapshot) -> int:
        """Tokens of one forward pass: the most that leaves the page cache its due, if they fit at all."""
        spare = (self.settings.budget - self.settings.weights) // ACTIVATIONS_PART
        *longer, shortest = self._chunks(prompt)
        for chunk in longer:
            if self._activations(context, chunk) <= spare and self._fits(context, chunk, snapshot):
                return chunk
        return shortest

    def _chunks(self, prompt: int) -> Iterator[int]:
        chunk = PREFILL_CHUNK if self.chunk is None else self.chunk
        while self.chunk is None and chunk > SMALLEST_CHUNK:
            if chunk < 2 * prompt:
                yield min(chunk, prompt)
            chunk //= 2
        yield min(chunk, prompt)

    def settings_for(self, context: int, chunk: int) -> CacheSettings:
        """The settings of a run of `context` tokens whose prompt goes through in chunks."""
        return replace(self.settings, activations=self._activations(context, chunk), loaded=False)

    def _activations(self, context: int, chunk: int) -> int:
        passing = activation_bytes(
            self.config, self.batch, chunk, context, self.itemsize, self.attention, self.all_logits
        )
        return passing + kept_bytes(self.config, self.batch, context, self.itemsize)

    def plan(self, context: int, chunk: int, snapshot: MemorySnapshot) -> RunPlan:
        """By arithmetic alone. Raises BudgetError."""
        settings = self.settings_for(context, chunk)
        specs = kv_specs(self.config, self.batch, context, self.itemsize)
        return make_plan(specs, make_request(settings, snapshot, mapped=0), snapshot)

    def _fits(self, context: int, chunk: int, snapshot: MemorySnapshot) -> bool:
        try:
            self.plan(context, chunk, snapshot)
        except BudgetError:
            return False
        return True

    def all_cached_up_to(self, snapshot: MemorySnapshot) -> int | None:
        """The longest context whose KV the page cache holds entirely, 0 for none; None where --kv-path
        decides."""
        if self.settings.forced is not None:
            return None
        low, high = 0, (self.limit or LONGEST_CONTEXT) + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._all_cached(middle, snapshot) else (low, middle)
        return low

    def _all_cached(self, context: int, snapshot: MemorySnapshot) -> bool:
        try:
            made = self.plan(context, self.chunk_for(context, max(1, context - 1), snapshot), snapshot)
        except BudgetError:
            return False
        return not made.bytes_on(PathKind.DIRECT)


def check_machine(plan: RunPlan, snapshot: MemorySnapshot) -> None:
    """Raises BudgetError where the budget is enough but the machine has not that much to give."""
    held = snapshot.process_anon + snapshot.process_hugetlb
    missing = plan.footprint.total - held
    if missing > snapshot.headroom:
        raise BudgetError(
            f"{format_size(missing)} more are needed ({plan.footprint.describe()}), and "
            f"{snapshot.headroom_source} gives {format_size(snapshot.headroom)}",
            "end other programs, take a smaller model, batch or context, or --weights dummy",
        )


def device_bytes(plan: RunPlan) -> dict[str, Any]:
    """What lies on the device that computes. On the CPU the KV ring is the staging memory."""
    return {
        "name": "cpu",
        "weights_bytes": plan.footprint.weights_bytes,
        "activation_bytes": plan.footprint.reserve_bytes,
        "kv_ring_bytes": plan.footprint.staging_bytes,
    }
