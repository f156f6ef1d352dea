# SPDX-License-Identifier: Apache-2.0
"""What a run will take, from its plan: the cost model's numbers for `plan` and `run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dualblade.cost import (
    NOTHING,
    ComputeRates,
    Cost,
    Elsewhere,
    LayerShape,
    ModelShape,
    Rate,
    Run,
    StorageRates,
    decode_cost,
    duration,
    elsewhere,
    losses,
    prefill_cost,
)
from dualblade.forecast import Prefill
from dualblade.layers import layer_shapes
from dualblade.models import decoder_layers, text_config
from dualblade.pipeline import STREAM_SLOTS, Mode
from dualblade.planner import RunPlan
from dualblade.speeds import ASSUMED
from dualblade.stream_choice import Expected
from dualblade.tensors import PathKind
from dualblade.units import GIB


@dataclass(frozen=True, slots=True)
class Prediction:
    """prefill: of all groups, one after another. decode: one token of every sequence. elsewhere: the same
    without offloading."""

    prefill: Cost
    decode: Cost
    elsewhere: Elsewhere
    storage: StorageRates
    compute: ComputeRates
    uses: tuple[PathKind, ...]

    @property
    def losses(self) -> list[str]:
        """Why offloading does not pay, in words."""
        return losses(self.decode.seconds, self.elsewhere)

    @property
    def assumed(self) -> list[str]:
        """Which numbers nobody has measured yet, and who does."""
        found = [_unmeasured(kind, self._read_rate(kind)) for kind in self.uses if self._counts(kind)]
        if self.compute.source == ASSUMED:
            found.append("the CPU's speed is assumed; `run` measures it")
        return [text for text in found if text]

    @property
    def expected(self) -> Expected:
        """What is compared with the same run in another way."""
        return Expected(self.decode.seconds, self.prefill.seconds, tuple(self.assumed))

    def _counts(self, kind: PathKind) -> bool:
        return kind is PathKind.DIRECT or self.decode.copy_s > 0

    def _read_rate(self, kind: PathKind) -> Rate:
        return self.storage.direct_read if kind is PathKind.DIRECT else self.storage.cached_read

    def record(self) -> dict[str, Any]:
        """The fields of `plan --json` and `run --json`. Seconds, and bytes a second as GiB/s."""
        return {
            "predicted_decode_s_per_token": self.decode.seconds,
            "predicted_prefill_s": self.prefill.seconds,
            "prediction": {
                "decode": asdict(self.decode),
                "prefill": asdict(self.prefill),
                "in_memory_decode_s_per_token": self.elsewhere.in_memory_s,
                "recompute_s_per_token": self.elsewhere.recompute_s,
                "losses": self.losses,
                "assumed": self.assumed,
                "storage_rates": {
                    f"{name}_gib_s": {"value": rate["value"] / GIB, "source": rate["source"]}
                    for name, rate in asdict(self.storage).items()
                },
                "compute_rates": asdict(self.compute),
            },
        }

    def words(self) -> list[str]:
        """For people, a line each."""
        lines = [
            f"predicted: prefill {_parts(self.prefill)}",
            f"predicted: decode {_parts(self.decode)} a token",
        ]
        lines += [f"assumed: {text}" for text in self.assumed]
        return lines + [f"offloading will not pay: {text}" for text in self.losses]


def _parts(cost: Cost) -> str:
    parts = [
        f"{name} {duration(seconds)}"
        for name, seconds in (
            ("compute", cost.compute_s),
            ("direct path", cost.storage_s),
            ("page-cache copies", cost.copy_s),
        )
        if seconds
    ]
    return f"{duration(cost.seconds)} ({', '.join(parts)})"


def _unmeasured(kind: PathKind, rate: Rate) -> str | None:
    if rate.source != ASSUMED:
        return None
    return f"{rate.value / GIB:.3g} GiB/s on the {kind.value} path; `dualblade-spdk bench io` measures it"


def predict(
    model: ModelShape,
    plan: RunPlan,
    prefill: Prefill,
    prompt: int,
    new_tokens: int,
    groups: Sequence[int],
    storage: StorageRates,
    compute: ComputeRates,
    mode: Mode = Mode.ADAPTIVE,
    checksum: bool = False,
) -> Prediction:
    """groups: sequences of each; `plan` is that of the largest, whose rooms serve the others too. checksum:
    of every block, for which the page cache is copied."""
    whole = Run(
        sum(groups),
        prompt,
        new_tokens,
        prefill.chunk,
        plan.bytes_on(PathKind.DIRECT),
        plan.bytes_on(PathKind.PAGE_CACHE),
        prefill.reread(prompt),
        _overlapped(plan, mode),
        copied=checksum or plan.pipeline.chunk_tokens is not None,
    )
    runs = [replace(whole, batch=batch) for batch in groups]
    used = tuple(kind for kind in PathKind if plan.bytes_on(kind))
    return Prediction(
        sum((prefill_cost(model, run, compute, storage) for run in runs), NOTHING),
        sum((decode_cost(model, run, compute, storage) for run in runs), NOTHING),
        elsewhere(model, whole, compute, _fits_in_memory(plan, sum(groups))),
        storage,
        compute,
        used,
    )


def _overlapped(plan: RunPlan, mode: Mode) -> bool:
    """Is anything fetched ahead?"""
    pipeline = plan.pipeline
    if pipeline.chunk_tokens is not None:
        return mode is not Mode.NONE and pipeline.slots > STREAM_SLOTS[-1]
    return pipeline.prefetch_depth > 0


def _fits_in_memory(plan: RunPlan, batch: int) -> bool:
    """Would the budget hold all KV of so many sequences, and one layer once more, which a cache in memory
    copies to append to it?"""
    sizes: dict[int, int] = {}
    for spec in plan.specs:
        layer = spec.key.layer
        sizes[layer] = sizes.get(layer, 0) + spec.nbytes // spec.batch * batch
    taken = plan.footprint.weights_bytes + plan.footprint.runtime_bytes + plan.footprint.reserve_bytes
    return taken + sum(sizes.values()) + max(sizes.values(), default=0) <= plan.request.budget


def model_shape(config: Any, model: Any, itemsize: int) -> ModelShape:
    """Of a model with or without weights. Of experts only as many count as a token is sent to."""
    text = text_config(config)
    layers = decoder_layers(model)
    used = _used_experts(text)
    parameters = sum(
        int(weight.numel() * (used if "experts" in name else 1))
        for layer in layers
        for name, weight in layer.named_parameters()
        if weight.dim() > 1
    )
    head = model.get_output_embeddings()
    query_heads = text.num_attention_heads
    attention = tuple(
        LayerShape(query_heads * shape.head_dim, 2 * shape.heads * shape.head_dim * itemsize, shape.window)
        for shape in layer_shapes(config)
        if shape.offloaded or shape.window is not None
    )
    return ModelShape(parameters, 0 if head is None else head.weight.numel(), len(layers), attention)


def _used_experts(text: Any) -> float:
    every = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    chosen = getattr(text, "num_experts_per_tok", None)
    return min(1.0, chosen / every) if every and chosen else 1.0
