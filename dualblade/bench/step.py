# SPDX-License-Identifier: Apache-2.0
"""`bench step`: one decode step over synthetic KV, beside its storage alone and its compute alone, and before
it one prefill (prompt.py).

The model has dummy weights of the real shapes; its KV is random rows, written as a prompt's would be. A
step's storage alone is every tensor loaded in order, its compute alone the same step on a queue that
completes at once. A perfect pipeline takes as long as the longer of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dualblade import loading, models
from dualblade.bench.prompt import USUAL_PROMPT, measure_prefill, plan_prefill
from dualblade.bench.software import scheduler_cost
from dualblade.bench.without_storage import without_storage
from dualblade.device_cuda import find_accelerator
from dualblade.errors import ConfigError
from dualblade.hf import DualBladeCache
from dualblade.settings import CacheSettings
from dualblade.store import KVStore
from dualblade.trace import Trace
from dualblade.zoo import resolve

FILL = 2048  # tokens written at once


@dataclass(frozen=True, slots=True)
class StepBench:
    """context: tokens of KV. rounds: times that each part is measured, in turn. prompt: tokens of the
    prefill, 0 for none, None for the usual number. device: as for `run`."""

    model: str
    settings: CacheSettings
    context: int = 8192
    batch: int = 1
    rounds: int = 5
    dtype: str | None = None
    device: str = "cpu"
    prompt: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return min(self.context, USUAL_PROMPT if self.prompt is None else self.prompt)


def run_step_bench(
    bench: StepBench, say: Callable[[str], None], prefill_trace: Trace | None = None
) -> tuple[dict[str, Any], Trace]:
    """The record of `bench step --json`, and the timeline of the last step. prefill_trace: takes that of the
    prefill.

    Raises ModelError, ConfigError, BudgetError, TargetError, StorageError.
    """
    config = loading.load_config(resolve(bench.model), shapes_only=True)
    dtype = models.pick_dtype(config, bench.dtype)
    models.check_context(config, bench.context + 1)
    say("dummy weights: random values of the model's shapes")
    accelerator = find_accelerator(bench.device)
    model = loading.dummy_model(config, dtype, "sdpa", 0, accelerator.name if accelerator else "cpu")
    elsewhere = accelerator is not None and not accelerator.unified
    settings = replace(bench.settings, weights=0 if elsewhere else models.weight_bytes(model))
    prompt = bench.prompt_tokens
    if prompt:
        prefill, settings = plan_prefill(model, settings, bench.batch, bench.context + 64, prompt)
    with torch.inference_mode(), _cache(bench, settings, config, model) as cache:
        through = None
        if prompt:
            say(f"a prompt of {prompt} tokens, and its parts alone")
            through = measure_prefill(model, cache, bench.batch, prompt, prefill, prefill_trace or Trace())
        say(f"writing {bench.context} tokens of random KV")
        context = _fill(cache, bench)
        step = partial(_step, model, cache, bench.batch, context)
        step()
        rounds = []
        for number in range(bench.rounds):
            say(f"round {number + 1} of {bench.rounds}")
            rounds.append(_one_round(cache.storage.store, step))
        trace = _traced(model, cache.storage.store, step)
        record = _record(bench, cache, context, rounds) | {"prefill": through} | scheduler_cost()
    return record, trace


def _cache(bench: StepBench, settings: CacheSettings, config: Any, model: Any) -> DualBladeCache:
    return DualBladeCache(
        config,
        mem_budget=settings.budget,
        max_tokens=bench.context + 64,
        batch_size=bench.batch,
        dtype=model.dtype,
        device=model.device,
        settings=settings,
    )


def _fill(cache: DualBladeCache, bench: StepBench) -> int:
    """Random rows, in whole blocks. Returns the tokens that are there."""
    store = cache.storage.store
    keys = [key for key in store.tensors if key.kind == "K"]
    if not keys:
        raise ConfigError(f"{bench.model} keeps no KV that grows with the context", "take another model")
    block = max(tensor.layout.block_tokens for tensor in store.tensors.values())
    tokens = max(block, bench.context // block * block)
    for key in keys:
        spec = store.tensors[key].spec
        for at in range(0, tokens, FILL):
            shape = (bench.batch, spec.heads, min(FILL, tokens - at), spec.head_dim)
            rows = torch.randn(shape).to(store.device.where, cache.dtype)
            cache.exchange_both(key.layer, rows, rows)
    store.flush()
    return tokens


# measure ------------------------------------------------------------------------------------


def _step(model: Any, cache: DualBladeCache, batch: int, context: int) -> float:
    """Seconds of one token. It is taken back afterwards, so that every step is the same."""
    ids = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
    positions = torch.full_like(ids, context)
    begun = time.perf_counter()
    model(input_ids=ids, position_ids=positions, past_key_values=cache)
    cache.storage.store.device.synchronize()
    seconds = time.perf_counter() - begun
    for layer in {key.layer for key in cache.storage.store.tensors}:
        cache.crop_layer(layer, context)
    return seconds


def _one_round(store: KVStore, step: Callable[[], float]) -> dict[str, float]:
    step()  # what is ahead of the first layer is on its way, as between two tokens
    stalled = store.stall_s
    made = {"step_s": step()}
    made["stall_s"] = store.stall_s - stalled
    made["storage_s"] = _storage(store)
    made["copy_s"] = _copies(store)
    with without_storage(store):
        step()
        made["compute_s"] = step()
    return made


def _storage(store: KVStore) -> float:
    """Seconds to load every tensor once, with nothing else to do."""
    _load_all(store)
    begun = time.perf_counter()
    _load_all(store)
    return time.perf_counter() - begun


def _copies(store: KVStore) -> float:
    """Seconds in which a device fetches every tensor from a slot, with nothing else to do; 0 where attention
    reads the slots themselves."""
    store.flush()
    slot = store.pool.slots[0].address
    parts = [tensor.pieces(slot, store.capacity, 0, tensor.full) for tensor in store.tensors.values()]
    return store.device.copy_seconds([piece for part in parts for many in part.values() for piece in many])


def _load_all(store: KVStore) -> None:
    for key in sorted(store.tensors):
        store.load(key)


# look ---------------------------------------------------------------------------------------


def _traced(model: Any, store: KVStore, step: Callable[[], float]) -> Trace:
    """One step, every layer, transfer and wait of it."""
    trace = Trace()
    step()
    hooks = _watch_layers(models.decoder_layers(model), trace)
    _watch_storage(store, trace)
    try:
        step()
        store.flush()
    finally:
        _watch_storage(store, None)
        for hook in hooks:
            hook.remove()
    return trace


def _watch_layers(layers: Iterable[torch.nn.Module], trace: Trace) -> list[Any]:
    begun: dict[int, float] = {}

    def begin(number: int, *_: Any) -> None:
        begun[number] = time.monotonic()

    def end(number: int, *_: Any) -> None:
        trace.add("layers", f"layer {number}", begun[number], time.monotonic())

    hooks = []
    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_pre_hook(partial(begin, number)))
        hooks.append(layer.register_forward_hook(partial(end, number)))
    return hooks


def _watch_storage(store: KVStore, trace: Trace | None) -> None:
    store.trace = trace
    for path in store.paths.values():
        path.trace = trace


# report -------------------------------------------------------------------------------------


def _record(
    bench: StepBench, cache: DualBladeCache, context: int, rounds: list[dict[str, float]]
) -> dict[str, Any]:
    """Times are medians of all rounds in seconds; the efficiency is the median of each round's own."""
    report = cache.report()
    medians = {name: statistics.median(made[name] for made in rounds) for name in rounds[0]}
    return {
        "model": bench.model,
        "dtype": str(cache.dtype).removeprefix("torch."),
        "device": str(cache.storage.store.device.where),
        "context": context,
        "batch_size": bench.batch,
        "mode": report["pipeline"]["mode"],
        "prefetch_depth": report["pipeline"]["prefetch_depth"],
        "prefetch_depth_limit": report["pipeline"]["prefetch_depth_limit"],
        "decisions": report["pipeline"]["decisions"],
        "kv_bytes": report["memory"]["kv_bytes"],
        "staging_bytes": report["memory"]["staging_bytes"],
        **medians,
        "compute_with_io_s": statistics.median(made["step_s"] - made["stall_s"] for made in rounds),
        "overlap_efficiency": statistics.median(
            max(made["storage_s"], made["copy_s"], made["compute_s"]) / made["step_s"] for made in rounds
        ),
        "paths": {name: path["bytes"] for name, path in report["paths"].items()},
        "rounds": rounds,
    }
