# SPDX-License-Identifier: Apache-2.0
"""From a budget to a plan: layouts, staging, the page cache's share and every tensor's place.

The same plan serves `plan`, which shows it, and the cache, which carries it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dualblade.errors import BudgetError
from dualblade.governor import Footprint, Share, as_option, page_cache_share, place, place_segment
from dualblade.layout import Layout, choose_layout, chunk_bytes
from dualblade.pipeline import STREAM_SLOTS, PipelinePlan, plan_pipeline, plan_stream
from dualblade.residency import MemorySnapshot
from dualblade.revision import fill
from dualblade.tensors import PathKind, Placement, TensorKey, TensorSpec
from dualblade.units import format_size

TAILS_SHARE = 4  # unfinished blocks take at most this fraction of the free budget: short runs cost more
DEFAULT_POLICY = "spread"


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """budget: bytes for the whole process, host memory. weights, runtime, activations: bytes.
    page_cache: --page-cache-budget, or None. forced: the path of every tensor, or None. stream: "auto", a
    layer is streamed in chunks where its K and V do not fit; "never"; "always". live: tensors may change
    paths later. ring: what a device with memory of its own has for K and V under way, or None. in_place:
    attention reads what the page cache holds where it is."""

    budget: int
    weights: int
    runtime: int
    activations: int
    page_cache: int | None = None
    forced: PathKind | None = None
    policy: str = DEFAULT_POLICY
    prefetch_depth: int | None = None
    stream: str = "never"
    live: bool = False
    ring: int | None = None
    in_place: bool = False

    @property
    def host(self) -> int:
        """What staging, unfinished blocks and the page cache share of the budget."""
        return self.budget - self.weights - self.runtime - self.activations

    @property
    def left(self) -> int:
        """What staging and unfinished blocks may take: their bytes are on the device once more."""
        return self.host if self.ring is None else min(self.host, self.ring)


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run will do. capacity: tokens of a staging slot. sizes: bytes of each tensor on its path."""

    request: BudgetRequest
    specs: tuple[TensorSpec, ...]
    layouts: dict[TensorKey, Layout]
    capacity: int
    slot_bytes: int
    pipeline: PipelinePlan
    footprint: Footprint
    share: Share
    placements: list[Placement]

    @property
    def in_place(self) -> bool:
        """What the page cache holds of a tensor as a whole is read where it lies."""
        return self.request.in_place and self.request.ring is None and self.pipeline.chunk_tokens is None

    def bytes_on(self, path: PathKind) -> int:
        return sum(placement.bytes for placement in self.placements if placement.path is path)


def make_specs(
    num_layers: int, batch: int, heads: int, head_dim: int, itemsize: int, tokens: int
) -> tuple[TensorSpec, ...]:
    """Every K and V in the order of decoding."""
    return tuple(
        TensorSpec(TensorKey(layer, kind), batch, heads, head_dim, itemsize, tokens)
        for layer in range(num_layers)
        for kind in ("K", "V")
    )


def make_plan(
    specs: Sequence[TensorSpec], request: BudgetRequest, snapshot: MemorySnapshot | None, grows: bool = False
) -> RunPlan:
    """Raises BudgetError where the budget cannot hold the parts that never leave memory.

    grows: the tokens of the specs are only where the run begins; tensors are placed as they grow.
    """
    left = request.left
    layouts = choose_layouts(specs, left)
    tails = sum(layout.block_bytes for layout in layouts.values())
    total = sum(spec.nbytes for spec in specs)
    chunk = chunk_bytes((layout.block_bytes for layout in layouts.values()), total)
    migration = chunk if request.live else 0
    pipeline = _plan_staging(specs, layouts, request, left - tails - migration)
    capacity, slot_bytes = _slot(specs, layouts, pipeline.chunk_tokens)
    if not grows:
        layouts = {key: layout.for_slots(capacity) for key, layout in layouts.items()}
    footprint = Footprint(
        request.weights, request.runtime, pipeline.slots * slot_bytes, tails, migration, request.activations
    )
    share = page_cache_share(request.budget, footprint, snapshot, request.page_cache)
    plan = RunPlan(request, tuple(specs), layouts, capacity, slot_bytes, pipeline, footprint, share, [])
    if grows:
        return plan
    if not plan.in_place:
        return _placed(plan, snapshot)
    return _with_as_few_slots(plan, snapshot)


def _with_as_few_slots(bare: RunPlan, snapshot: MemorySnapshot | None) -> RunPlan:
    """Three slots instead of four, where no layer then reads two tensors and more KV is cached: one is in use
    and two are on their way, as many as before. A depth that was asked for is kept."""
    plan, fewer = _without_needless_tails(bare, snapshot), replace(bare.pipeline, slots=3)
    if bare.pipeline.slots != 4 or bare.request.prefetch_depth is not None:
        return plan
    footprint = replace(bare.footprint, staging_bytes=fewer.slots * bare.slot_bytes)
    better = _without_needless_tails(replace(bare, pipeline=fewer, footprint=footprint), snapshot)
    read = [item.key.layer for item in better.placements if item.path is PathKind.DIRECT]
    gained = better.bytes_on(PathKind.PAGE_CACHE) > plan.bytes_on(PathKind.PAGE_CACHE)
    return better if gained and len(read) == len(set(read)) else plan


def _placed(plan: RunPlan, snapshot: MemorySnapshot | None) -> RunPlan:
    """With the share that its footprint leaves, and every tensor's place."""
    request, layouts = plan.request, plan.layouts
    share = page_cache_share(request.budget, plan.footprint, snapshot, request.page_cache)
    sizes = {spec.key: layouts[spec.key].bytes_for(spec.tokens) for spec in plan.specs}
    placements = place(plan.specs, sizes, share.bytes, request.policy, request.forced)
    if request.live and placements and request.forced is None:
        blocks = {key: layout.block_bytes for key, layout in layouts.items()}
        placements = fill(placements, blocks, share.bytes, request.policy, plan.in_place)
    return replace(plan, share=share, placements=placements)


def _without_needless_tails(plan: RunPlan, snapshot: MemorySnapshot | None) -> RunPlan:
    """Every tensor placed. One that is read in place has its unfinished block there too: what that saves is
    the page cache's. Every round may cache more, and so save more; the last plan whose own footprint it fits
    is taken."""
    plan = _placed(plan, snapshot)
    while (tails := _tails(plan)) < plan.footprint.tails_bytes:
        better = _placed(replace(plan, footprint=replace(plan.footprint, tails_bytes=tails)), snapshot)
        if _tails(better) > tails:
            break
        plan = better
    return plan


def _tails(plan: RunPlan) -> int:
    """Bytes of the unfinished blocks of tensors that do not lie in the page cache as a whole."""
    copied = {placement.key for placement in plan.placements if placement.path is PathKind.DIRECT}
    return sum(plan.layouts[key].block_bytes for key in copied)


def choose_layouts(specs: Sequence[TensorSpec], left: int) -> dict[TensorKey, Layout]:
    """The unfinished blocks of all tensors share a small part of the `left` bytes of the budget."""
    tail_bytes = max(0, left) // TAILS_SHARE // max(1, len(specs))
    return {spec.key: choose_layout(spec, tail_bytes) for spec in specs}


def _slot(
    specs: Sequence[TensorSpec], layouts: dict[TensorKey, Layout], chunk_tokens: int | None
) -> tuple[int, int]:
    """Tokens and bytes of a slot that holds any of the tensors whole, or `chunk_tokens` of it."""
    tokens = [(layouts[spec.key], spec.tokens if chunk_tokens is None else chunk_tokens) for spec in specs]
    capacity = max((layout.capacity_for(count) for layout, count in tokens), default=0)
    return capacity, max((layout.slot_bytes(capacity) for layout, _ in tokens), default=0)


def _plan_staging(
    specs: Sequence[TensorSpec], layouts: dict[TensorKey, Layout], request: BudgetRequest, left: int
) -> PipelinePlan:
    num_layers = len({spec.key.layer for spec in specs})
    if not specs:  # a model of sliding windows alone
        return PipelinePlan(prefetch_depth=0, slots=0)
    capacity, slot_bytes = _slot(specs, layouts, None)
    if request.stream != "always" and 2 * slot_bytes <= left:
        return plan_pipeline(num_layers, slot_bytes, left, request.prefetch_depth)
    if request.stream == "never":
        raise _too_small(request, left, 2 * slot_bytes, "one layer's K and V")
    tokens, unit = _slot(specs, layouts, 1)
    streamed = plan_stream(capacity, tokens, unit, left)
    if streamed is None:
        raise _too_small(request, left, STREAM_SLOTS[-1] * unit, "the chunks of one layer's K and V")
    return streamed


def _too_small(request: BudgetRequest, left: int, staging: int, what: str) -> BudgetError:
    if request.left < request.host:
        raise BudgetError(
            f"the device has {format_size(max(0, left))} left for K and V under way, and {what} take "
            f"{format_size(staging)}",
            "take a shorter context or a smaller batch, or --device cpu",
        )
    need = request.budget - left + staging
    parts = (
        f"weights {format_size(request.weights)}, runtime {format_size(request.runtime)}, "
        f"activations {format_size(request.activations)}, {what} {format_size(staging)}"
    )
    return BudgetError(
        f"a memory budget of {format_size(request.budget)} is too small: "
        f"{format_size(need)} is needed ({parts})",
        f"pass --mem-budget {as_option(need)} or more, or lower the context or the batch",
    )


class SegmentPlacer:
    """Places what a tensor grows by, within the page cache's share. share, used: bytes, as they are now."""

    def __init__(self, plan: RunPlan):
        self.share = plan.share.bytes
        self.used = plan.bytes_on(PathKind.PAGE_CACHE)
        self._forced = plan.request.forced

    def __call__(self, key: TensorKey, nbytes: int) -> Placement:
        placement = place_segment(key, nbytes, self.used, self.share, self._forced)
        if placement.path is PathKind.PAGE_CACHE:
            self.used += nbytes
        return placement
