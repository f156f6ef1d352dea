# SPDX-License-Identifier: Apache-2.0
"""One run in numbers before anything is loaded: how the prompt goes through, the plan, what the device
holds, and up to which context the page cache holds all KV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dualblade.config import KERNELS_KEPT
from dualblade.device_cuda import Accelerator
from dualblade.errors import BudgetError
from dualblade.handles import STREAMED
from dualblade.layers import kept_bytes, kv_specs
from dualblade.models import (
    DECODE_SLACK,
    HEAP_KEPT,
    HEAP_SLACK,
    activation_bytes,
    paused_bytes,
    repeated_bytes,
)
from dualblade.offload import make_request
from dualblade.planner import RunPlan, make_plan
from dualblade.residency import MemorySnapshot
from dualblade.settings import CacheSettings
from dualblade.tensors import PathKind
from dualblade.units import format_size

PREFILL_CHUNK, SMALLEST_CHUNK = 2048, 16
FEWEST_ROWS = 512  # of a matrix product in prefill: fewer take longer
# What prefill holds saves reading the cache again, but every byte of it is one less for the page cache.
ACTIVATIONS_PART = 4
# Streamed, the cache is read again for every chunk of the prompt: its length is worth more than pages.
STREAMED_PART = 3
KEPT_PART = 16  # the heap keeps a prompt's blocks where that takes no more of the budget beside the weights
DEVICE_PART = 0.95  # of a device's free memory: its allocator keeps some between tensors
LONGEST_CONTEXT = 1 << 24  # of a model that names no end


@dataclass(frozen=True, slots=True)
class Prefill:
    """chunk: prompt tokens of one forward pass. span: tokens that pass a layer before the next one is
    begun, a multiple of chunk; the cache is read once for every span after the first. streamed: layers are,
    and then no slot holds one while a span passes it."""

    chunk: int
    span: int
    streamed: bool = False

    def reread(self, prompt: int) -> int:
        """Tokens of K and V that are read again while a prompt goes through."""
        step = self.chunk if self.streamed else self.span
        return sum(range(step, prompt, step))


@dataclass(frozen=True, slots=True)
class Forecast:
    """settings: with the weights' bytes. chunk: --prefill-chunk, None to let the budget decide.
    all_logits: the model gives those of every position. limit: positions it has, None without end.
    can_stream: the model's attention can be streamed. accelerator: what computes, None for the CPU.
    on_device: bytes of the weights in its own memory; the settings name those that the host holds."""

    config: Any
    settings: CacheSettings
    batch: int
    itemsize: int
    attention: str
    chunk: int | None
    all_logits: bool
    limit: int | None
    can_stream: bool = False
    accelerator: Accelerator | None = None
    on_device: int = 0

    def prefill_for(self, context: int, prompt: int, snapshot: MemorySnapshot) -> Prefill:
        """How a prompt goes through: the cheapest way that reads nothing again, else the one that reads
        least, of those that leave the page cache its due. Streamed where nothing else fits."""
        *_, shortest = self._chunks(prompt)
        for streamed in self._manners():
            ways = list(self._ways(context, prompt, streamed)) or [Prefill(shortest, shortest, streamed)]
            if fitting := [way for way in ways if self.fits(context, way, snapshot)]:
                return min(fitting, key=lambda way: (way.reread(prompt), self._activations(context, way)))
        return Prefill(shortest, shortest, self._manners()[-1])

    def _manners(self) -> list[bool]:
        """Streamed or not, the better first."""
        manners = [] if self.settings.stream == "always" else [False]
        return manners + [True] * (self.can_stream and self.settings.stream != "never")

    def manners(self) -> Iterator[Forecast]:
        """The same with all layers in one piece, and with all layers streamed, where either may be."""
        for streamed in self._manners():
            yield replace(self, settings=replace(self.settings, stream="always" if streamed else "never"))

    def _ways(self, context: int, prompt: int, streamed: bool) -> Iterator[Prefill]:
        part = STREAMED_PART if streamed else ACTIVATIONS_PART
        spare = self.room // part
        token = self._paused(context)
        found = False
        for chunk in self._chunks(prompt):
            room = spare - self._activations(context, Prefill(chunk, chunk, streamed))
            if room < 0 or (found and chunk * self.batch < FEWEST_ROWS):
                continue
            found = True
            chunks = 1 if streamed else max(1, room // token // chunk)
            yield Prefill(chunk, min(prompt, chunks * chunk), streamed)

    def _chunks(self, prompt: int) -> Iterator[int]:
        chunk = PREFILL_CHUNK if self.chunk is None else self.chunk
        while self.chunk is None and chunk > SMALLEST_CHUNK:
            if chunk < 2 * prompt:
                yield min(chunk, prompt)
            chunk //= 2
        yield min(chunk, prompt)

    @property
    def _discrete(self) -> Accelerator | None:
        """The device that computes, where its memory is not the machine's."""
        return self.accelerator if self.accelerator and not self.accelerator.unified else None

    @property
    def keeps_heap(self) -> bool:
        """While a prompt passes, the heap keeps what is freed. The live governor sees to it that this stays
        within what is planned for it."""
        keeps = self.settings.live and self.accelerator is None
        return keeps and self.room >= KEPT_PART * HEAP_KEPT

    @property
    def room(self) -> int:
        """Bytes beside the weights, where forward passes run."""
        if self._discrete:
            return int(self._discrete.free * DEVICE_PART) - self.on_device
        return self.settings.budget - self.settings.weights

    def settings_for(self, context: int, prefill: Prefill) -> CacheSettings:
        """The settings of a run of `context` tokens whose prompt goes through like that."""
        activations = self._activations(context, prefill) + HEAP_KEPT * self.keeps_heap
        return replace(
            self.settings,
            activations=HEAP_SLACK if self._discrete else activations,
            ring=max(0, self.room - activations) if self._discrete else None,
            loaded=False,
            stream="always" if prefill.streamed else "never",
        )

    def _activations(self, context: int, prefill: Prefill) -> int:
        passing = activation_bytes(
            self.config, self.batch, prefill.chunk, context, self.itemsize,
            STREAMED if prefill.streamed else self.attention, self.all_logits,
        )  # fmt: skip
        if prefill.span > prefill.chunk:
            passing += prefill.span * self._paused(context)
        return passing + self._kept(context)

    def decode_activations(self, context: int, prefill: Prefill) -> int:
        """Of one token a sequence."""
        attention = STREAMED if prefill.streamed else self.attention
        passing = activation_bytes(
            self.config, self.batch, 1, context, self.itemsize, attention, slack=DECODE_SLACK
        )
        return passing + self._kept(context)

    def _kept(self, context: int) -> int:
        """From pass to pass: what layers keep that are not offloaded, and the scratch memory of attention's
        kernels, each a copy of K for every query head."""
        kept = kept_bytes(self.config, self.batch, context, self.itemsize)
        if self._discrete or self.attention != "eager" or self.itemsize > 2:
            return kept
        return kept + KERNELS_KEPT * repeated_bytes(self.config, self.batch, context, self.itemsize)

    def _paused(self, context: int) -> int:
        return paused_bytes(self.config, self.batch, context, self.itemsize, self.attention)

    def plan(self, context: int, prefill: Prefill, snapshot: MemorySnapshot) -> RunPlan:
        """By arithmetic alone. Raises BudgetError."""
        settings = self.settings_for(context, prefill)
        specs = kv_specs(self.config, self.batch, context, self.itemsize)
        return make_plan(specs, make_request(settings, snapshot, mapped=0), snapshot)

    def fits(self, context: int, prefill: Prefill, snapshot: MemorySnapshot) -> bool:
        """Is the budget enough?"""
        try:
            self.plan(context, prefill, snapshot)
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
            made = self.plan(context, self.prefill_for(context, max(1, context - 1), snapshot), snapshot)
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


def device_bytes(plan: RunPlan, forecast: Forecast | None = None) -> dict[str, Any]:
    """What lies on the device that computes. On the CPU, and where memory is unified, the KV ring is the
    staging memory; else it is that and the unfinished blocks once more."""
    footprint = plan.footprint
    accelerator = forecast.accelerator if forecast else None
    record: dict[str, Any] = {
        "name": accelerator.name if accelerator else "cpu",
        "weights_bytes": footprint.weights_bytes,
        "activation_bytes": footprint.reserve_bytes,
        "kv_ring_bytes": footprint.staging_bytes,
    }
    if forecast is None or accelerator is None:
        return record
    record |= {"model": accelerator.model, "total_bytes": accelerator.total, "unified": accelerator.unified}
    if not accelerator.unified:
        record |= {
            "weights_bytes": forecast.on_device,
            "activation_bytes": forecast.room - (plan.request.ring or 0),
            "kv_ring_bytes": footprint.staging_bytes + footprint.tails_bytes,
        }
    return record
