# SPDX-License-Identifier: Apache-2.0
"""`bench step --scripted`: the pipeline alone, on a medium and a compute that keep to a script.

The medium is RAM with a scripted bandwidth, compute is a sleep, so neither takes anything from the other and
a perfect pipeline takes exactly as long as the longer of the two. What it takes beyond is the pipeline's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dualblade.adaptive import StoreShare
from dualblade.bench.tensors import HEAD_DIM, HEADS, ITEMSIZE, RawPath, no_growth
from dualblade.device import CpuDevice
from dualblade.layout import choose_layout
from dualblade.pipeline import STORE_SLOTS, STREAM_SLOTS, Mode
from dualblade.planner import make_specs
from dualblade.scheduler import Scheduler
from dualblade.store import KVStore
from dualblade.streamed_store import StreamedStore
from dualblade.tensors import Placement, TensorKey
from dualblade.units import MIB
from spdk_glue import MemOptions, Queue

LAYERS = (1, 2, 7, 32)
TOKENS = 1024
BANDWIDTH = 256 * MIB  # bytes a second: 16 ms a layer
AHEAD = 3
CHUNKS = 8  # of a streamed layer
WARM_STEPS = 6  # in which the adaptive mode makes up its mind
DOMINATING = {"storage": 0.5, "compute": 2.0, "neither": 1.0}  # compute, as a multiple of a layer's storage


@dataclass(frozen=True, slots=True)
class Script:
    """layers of the model; compute_s of each; streamed: a layer passes in chunks, compute after each."""

    layers: int
    compute_s: float
    streamed: bool

    @property
    def layer_bytes(self) -> int:
        return 2 * HEADS * HEAD_DIM * ITEMSIZE * TOKENS


class Compute:
    """Takes the time it is told to. How late a sleep ends is taken off the next one."""

    def __init__(self) -> None:
        self._late = 0.0

    def run(self, seconds: float) -> None:
        end = time.monotonic() - self._late + seconds
        time.sleep(max(0.0, end - time.monotonic()))
        self._late = time.monotonic() - end


def run_scripted_bench(
    rounds: int, layer_counts: tuple[int, ...], say: Callable[[str], None]
) -> dict[str, Any]:
    """A row for every number of layers, kind of attention and dominating part: the overlap efficiency of
    every mode, medians of `rounds` steps."""
    rows = []
    for streamed in (False, True):
        for layers in layer_counts:
            for part, factor in DOMINATING.items():
                script = Script(layers, factor * Script(1, 0.0, False).layer_bytes / BANDWIDTH, streamed)
                say(f"{layers} layers, {'streamed' if streamed else 'one piece'}, dominating: {part}")
                rows.append(_row(script, part, rounds))
    return {"bandwidth_bytes_s": BANDWIDTH, "rounds": rounds, "rows": rows}


def _row(script: Script, part: str, rounds: int) -> dict[str, Any]:
    modes = {mode.value: _measure(script, mode, rounds) for mode in Mode}
    best = min(made["step_s"] for made in modes.values())
    return {
        "layers": script.layers,
        "attention": "streamed" if script.streamed else "one-piece",
        "dominating": part,
        "modes": modes,
        "overlap_efficiency": modes[Mode.ADAPTIVE.value]["overlap_efficiency"],
        "adaptive_to_best": modes[Mode.ADAPTIVE.value]["step_s"] / best,
    }


def _measure(script: Script, mode: Mode, rounds: int) -> dict[str, Any]:
    with _filled(script, mode) as store:
        compute = Compute()
        for _ in range(WARM_STEPS):
            _step(store, script, compute)
        before = _read_bytes(store)
        taken = []
        for _ in range(rounds):
            begun = time.perf_counter()
            _step(store, script, compute)
            taken.append(time.perf_counter() - begun)
        storage_s = (_read_bytes(store) - before) / rounds / BANDWIDTH
        compute_s, step_s = script.layers * script.compute_s, statistics.median(taken)
        return {
            "step_s": step_s,
            "storage_s": storage_s,
            "compute_s": compute_s,
            "overlap_efficiency": max(storage_s, compute_s) / step_s,
            "prefetch_depth": store.scheduler.depth,
        }


def _read_bytes(store: KVStore) -> int:
    return sum(path.queue.stats().read_bytes for path in store.paths.values())


@contextmanager
def _filled(script: Script, mode: Mode) -> Iterator[KVStore]:
    """A store whose tensors are full of what lies on the medium."""
    specs = make_specs(script.layers, 1, HEADS, HEAD_DIM, ITEMSIZE, TOKENS)
    layouts = {spec.key: choose_layout(spec) for spec in specs}
    sizes = {key: layout.bytes_for(TOKENS) for key, layout in layouts.items()}
    with Queue.memory(sum(sizes.values()), script=MemOptions(bandwidth=BANDWIDTH)) as queue:
        path = RawPath(queue)
        ahead = min(AHEAD, script.layers - 1) if mode.crosses_layers else 0
        slots, capacity = 2 * (ahead + 1), TOKENS
        kind = StreamedStore if script.streamed else KVStore
        if script.streamed:
            slots, capacity = STREAM_SLOTS[0], TOKENS // CHUNKS
        scheduler = Scheduler(mode, ahead)
        if script.streamed:
            scheduler.store_share = StoreShare(STORE_SLOTS, STORE_SLOTS, slots - 4)
        device = CpuDevice(torch.bfloat16)
        store = kind(specs, layouts, device, {path.kind: path}, no_growth, slots, capacity, scheduler)
        store.place([Placement(key, path.kind, nbytes, "benchmark") for key, nbytes in sizes.items()])
        for tensor in store.tensors.values():
            tensor.tokens = TOKENS
        try:
            yield store
        finally:
            store.flush()
            store.close()


def _step(store: KVStore, script: Script, compute: Compute) -> None:
    for layer in range(script.layers):
        if isinstance(store, StreamedStore):
            for part in store.stream(layer):
                compute.run(script.compute_s * part.tokens / TOKENS)
        else:
            store.load(TensorKey(layer, "K"))
            store.load(TensorKey(layer, "V"))
            compute.run(script.compute_s)
