# SPDX-License-Identifier: Apache-2.0
"""One prefill of a synthetic prompt, beside its writes alone and its compute alone, for `bench step`.

The prompt goes through as in `run`: layer by layer where the budget allows. Its storage alone is the same
rows handed to the cache in the same order, with nothing computed in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dualblade import models
from dualblade.bench.without_storage import without_storage
from dualblade.forecast import Forecast, Prefill
from dualblade.hf import DualBladeCache
from dualblade.host.sysfs import Host
from dualblade.residency import take_snapshot
from dualblade.runner import Generation, Sampling, random_prompt
from dualblade.settings import CacheSettings
from dualblade.store import KVStore
from dualblade.trace import Trace

USUAL_PROMPT = 1024


def plan_prefill(
    model: Any, settings: CacheSettings, batch: int, context: int, prompt: int
) -> tuple[Prefill, CacheSettings]:
    """How `run` would take a prompt of that length, and the settings with what a pass of it holds."""
    forecast = Forecast(
        model.config,
        settings,
        batch,
        model.dtype.itemsize,
        models.attention_of(model),
        chunk=None,
        all_logits=not models.last_position_only(model),
        limit=models.context_limit(model.config),
    )
    prefill = forecast.prefill_for(context, prompt, take_snapshot(Host()))
    return prefill, replace(forecast.settings_for(context, prefill), loaded=True)


def measure_prefill(
    model: Any, cache: DualBladeCache, batch: int, prompt: int, prefill: Prefill, trace: Trace
) -> dict[str, Any]:
    """Seconds until the prompt's last row is on its medium, and of its parts alone; the cache is empty
    before and after. trace: takes every layer, transfer and wait. Raises StorageError."""
    store = cache.storage.store
    through = partial(_through, model, cache, batch, prompt, prefill)
    write = partial(_write_rows, cache, batch, prompt, prefill)
    _timed(cache, write)  # touches the slots, as a run's first prompt did
    storage_s = _timed(cache, write)
    with without_storage(store):
        compute_s = _timed(cache, through)
    stalled = store.stall_s
    with _watched(model, store, trace):
        seconds = _timed(cache, through)
    return {
        "tokens": prompt,
        "chunk": prefill.chunk,
        "span": prefill.span,
        "prefill_s": seconds,
        "storage_s": storage_s,
        "compute_s": compute_s,
        "copy_s": 0.0,  # attention reads the slots themselves
        "stall_s": store.stall_s - stalled,
        "overlap_efficiency": max(storage_s, compute_s) / seconds,
    }


def _timed(cache: DualBladeCache, work: Callable[[], None]) -> float:
    begun = time.perf_counter()
    work()
    cache.storage.store.flush()
    seconds = time.perf_counter() - begun
    cache.reset()
    return seconds


def _through(model: Any, cache: DualBladeCache, batch: int, tokens: int, prefill: Prefill) -> None:
    prompt = random_prompt(batch, tokens, models.text_config(model.config).vocab_size, seed=0)
    chunk, span = prefill.chunk, prefill.span
    Generation(model, cache, prompt, Sampling(), frozenset(), chunk, span).prefill()


def _write_rows(cache: DualBladeCache, batch: int, tokens: int, prefill: Prefill) -> None:
    """A prompt's K and V in the order in which prefill has them."""
    specs = [tensor.spec for key, tensor in sorted(cache.storage.store.tensors.items()) if key.kind == "K"]
    for begin in range(0, tokens, prefill.span):
        end = min(begin + prefill.span, tokens)
        for spec in specs:
            rows = torch.ones(batch, spec.heads, min(prefill.chunk, end - begin), spec.head_dim)
            rows = rows.to(cache.dtype)
            for at in range(begin, end, prefill.chunk):
                part = rows[:, :, : min(prefill.chunk, end - at)]
                cache.exchange_both(spec.key.layer, part, part)


# look ---------------------------------------------------------------------------------------


@contextmanager
def _watched(model: Any, store: KVStore, trace: Trace) -> Iterator[None]:
    hooks = _watch_passes(model, trace)
    _watch_storage(store, trace)
    try:
        yield
    finally:
        _watch_storage(store, None)
        for hook in hooks:
            hook.remove()


def _watch_passes(model: Any, trace: Trace) -> list[Any]:
    """Passes take turns on one thread, so a layer began when the one before it ended, whoever's that was."""
    last = [time.monotonic()]

    def end(number: int, *_: Any) -> None:
        now = time.monotonic()
        trace.add("layers", f"layer {number}", last[0], now)
        last[0] = now

    layers = models.decoder_layers(model)
    return [layer.register_forward_hook(partial(end, number)) for number, layer in enumerate(layers)]


def _watch_storage(store: KVStore, trace: Trace | None) -> None:
    store.trace = trace
    for path in store.paths.values():
        path.trace = trace
