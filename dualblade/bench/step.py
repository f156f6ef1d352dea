# SPDX-License-Identifier: Apache-2.0
"""`bench step`: one decode step over synthetic KV, beside its storage alone and its compute alone.

The model has dummy weights of the real shapes; its KV is random rows, written as a prompt's would be. A
step's storage alone is every tensor loaded in order, its compute alone the same step on a queue that
completes at once. A perfect pipeline takes as long as the longer of the two.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dualblade import loading, models
from dualblade.bench.tensors import RawPath
from dualblade.errors import ConfigError
from dualblade.hf import DualBladeCache
from dualblade.settings import CacheSettings
from dualblade.store import KVStore
from dualblade.tensors import PathKind
from dualblade.trace import Trace
from dualblade.zoo import resolve
from spdk_glue import Queue

FILL = 2048  # tokens written at once


@dataclass(frozen=True, slots=True)
class StepBench:
    """context: tokens of KV. rounds: times that each of the three is measured, in turn."""

    model: str
    settings: CacheSettings
    context: int = 8192
    batch: int = 1
    rounds: int = 5
    dtype: str | None = None


class NoStorage(RawPath):
    """In place of a path: everything completes at once, and nothing is moved."""

    def __init__(self, queue: Queue, kind: PathKind):
        super().__init__(queue)
        self.kind = kind


def run_step_bench(bench: StepBench, say: Callable[[str], None]) -> tuple[dict[str, Any], Trace]:
    """The record of `bench step --json`, and the timeline of the last step.

    Raises ModelError, ConfigError, BudgetError, TargetError, StorageError.
    """
    config = loading.load_config(resolve(bench.model), shapes_only=True)
    dtype = models.pick_dtype(config, bench.dtype)
    models.check_context(config, bench.context + 1)
    say("dummy weights: random values of the model's shapes")
    model = loading.dummy_model(config, dtype, "sdpa", 0)
    settings = replace(bench.settings, weights=models.weight_bytes(model))
    with torch.inference_mode(), _cache(bench, settings, config, dtype) as cache:
        say(f"writing {bench.context} tokens of random KV")
        context = _fill(cache, bench)
        step = partial(_step, model, cache, bench.batch, context)
        step()
        rounds = []
        for number in range(bench.rounds):
            say(f"round {number + 1} of {bench.rounds}")
            rounds.append(_one_round(cache.storage.store, step))
        trace = _traced(model, cache.storage.store, step)
        record = _record(bench, cache, context, rounds)
    return record, trace


def _cache(bench: StepBench, settings: CacheSettings, config: Any, dtype: torch.dtype) -> DualBladeCache:
    return DualBladeCache(
        config,
        mem_budget=settings.budget,
        max_tokens=bench.context + 64,
        batch_size=bench.batch,
        dtype=dtype,
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
            rows = torch.randn(shape).to(cache.dtype)
            cache.exchange_both(key.layer, rows, rows)
    store.flush()
    return tokens


# measure ------------------------------------------------------------------------------------


def _step(model: Any, cache: DualBladeCache, batch: int, context: int) -> float:
    """Seconds of one token. It is taken back afterwards, so that every step is the same."""
    ids = torch.zeros(batch, 1, dtype=torch.long)
    begun = time.perf_counter()
    model(input_ids=ids, position_ids=torch.full((batch, 1), context), past_key_values=cache)
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
    with _without_storage(store):
        step()
        made["compute_s"] = step()
    return made


def _storage(store: KVStore) -> float:
    """Seconds to load every tensor once, with nothing else to do."""
    _load_all(store)
    begun = time.perf_counter()
    _load_all(store)
    return time.perf_counter() - begun


def _load_all(store: KVStore) -> None:
    for key in sorted(store.tensors):
        store.load(key)


@contextmanager
def _without_storage(store: KVStore) -> Iterator[None]:
    store.flush()
    real = store.paths
    with Queue.null() as queue:
        store.paths = {kind: NoStorage(queue, kind) for kind in real}
        try:
            yield
            store.flush()
        finally:
            store.paths = real


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
        "device": "cpu",
        "context": context,
        "batch_size": bench.batch,
        "mode": report["pipeline"]["mode"],
        "prefetch_depth": report["pipeline"]["prefetch_depth"],
        "prefetch_depth_limit": report["pipeline"]["prefetch_depth_limit"],
        "decisions": report["pipeline"]["decisions"],
        "kv_bytes": report["memory"]["kv_bytes"],
        "staging_bytes": report["memory"]["staging_bytes"],
        **medians,
        "copy_s": 0.0,  # attention reads the slots themselves
        "compute_with_io_s": statistics.median(made["step_s"] - made["stall_s"] for made in rounds),
        "overlap_efficiency": statistics.median(
            max(made["storage_s"], made["compute_s"]) / made["step_s"] for made in rounds
        ),
        "paths": {name: path["bytes"] for name, path in report["paths"].items()},
        "rounds": rounds,
    }
