# SPDX-License-Identifier: Apache-2.0
"""`bench step --scripted`: the pipeline alone; its medium, copies and compute keep to a script.

The medium is RAM with a scripted bandwidth, copies and compute are waits, so none takes anything from the
others and a perfect pipeline takes exactly as long as the longest of the three. What it takes beyond is the
pipeline's own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dualblade.adaptive import StoreShare
from dualblade.bench.tensors import HEAD_DIM, HEADS, ITEMSIZE, RawPath, no_growth
from dualblade.device import CpuDevice
from dualblade.layout import choose_layout
from dualblade.paths.base import StoragePath, Ticket
from dualblade.pipeline import STORE_SLOTS, STREAM_SLOTS, Mode
from dualblade.planner import make_specs
from dualblade.scheduler import Scheduler
from dualblade.staging import Slot
from dualblade.store import KVStore
from dualblade.streamed_store import StreamedStore
from dualblade.tensors import Placement, TensorKey
from dualblade.traffic import copy_pace
from dualblade.units import MIB, counted
from spdk_glue import READ, MemOptions, Piece, Queue

LAYERS = (1, 2, 7, 32)
TOKENS = 1024
BANDWIDTH = 256 * MIB  # bytes a second
LAYER_S = 2 * HEADS * HEAD_DIM * ITEMSIZE * TOKENS / BANDWIDTH  # of storage: 16 ms
AHEAD = 3
CHUNKS = 8  # of a streamed layer
WARM_STEPS = 6  # in which the adaptive mode makes up its mind
# Compute and the copy to the device, as multiples of a layer's storage.
DOMINATING = {"storage": (0.5, 0.5), "copy": (0.5, 2.0), "compute": (2.0, 0.5), "none": (1.0, 1.0)}


@dataclass(frozen=True, slots=True)
class Script:
    """layers of the model; compute_s and copy_s of each; streamed: a layer passes in chunks, compute after
    each."""

    layers: int
    compute_s: float
    copy_s: float
    streamed: bool


class CopyingDevice(CpuDevice):
    """Has every read copied to it, by a copy engine that keeps to its script: it begins when a command has
    arrived, and goes in order. The rows themselves stay where they are."""

    def __init__(self, dtype: torch.dtype, bandwidth: float):
        super().__init__(dtype)
        self._bandwidth = bandwidth
        self._stored = self._copied = 0.0  # when storage and copies have done all that was asked of them

    def move(
        self, path: StoragePath, op: int, key: TensorKey, pieces: Sequence[Piece], slot: Slot | None
    ) -> Ticket:
        if op != READ:
            return super().move(path, op, key, pieces, slot)
        nbytes = sum(piece.nbytes for piece in pieces)
        command = min(nbytes, path.queue.options.command_bytes)
        begun = max(time.monotonic(), self._stored)
        self._stored = begun + nbytes / BANDWIDTH
        first = max(self._copied, begun + command / BANDWIDTH)
        self._copied = max(first + nbytes / self._bandwidth, self._stored + command / self._bandwidth)
        return path.transfer(op, key, pieces, then=partial(_sleep_until, self._copied))

    def copy_seconds(self, pieces: Sequence[Piece]) -> float:
        return sum(piece.nbytes for piece in pieces) / self._bandwidth


def _sleep_until(moment: float) -> None:
    left = moment - time.monotonic()
    if left > 0:  # a sleep of no time takes some 70 us
        time.sleep(left)


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
            for part, (compute, copy) in DOMINATING.items():
                script = Script(layers, compute * LAYER_S, copy * LAYER_S, streamed)
                way = "streamed" if streamed else "one piece"
                say(f"{counted(layers, 'layer')}, {way}, dominating: {part}")
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
        taken = []
        for _ in range(rounds):
            begun = time.perf_counter()
            _step(store, script, compute)
            taken.append(time.perf_counter() - begun)
        reads = script.streamed or script.layers > 1  # a single layer stays in its slot
        storage_s, copy_s = reads * script.layers * LAYER_S, reads * script.layers * script.copy_s
        compute_s, step_s = script.layers * script.compute_s, statistics.median(taken)
        return {
            "step_s": step_s,
            "storage_s": storage_s,
            "copy_s": copy_s,
            "compute_s": compute_s,
            "overlap_efficiency": max(storage_s, copy_s, compute_s) / step_s,
            "prefetch_depth": store.scheduler.depth,
        }


@contextmanager
def _filled(script: Script, mode: Mode) -> Iterator[KVStore]:
    """A store whose tensors are full of what lies on the medium."""
    specs = make_specs(script.layers, 1, HEADS, HEAD_DIM, ITEMSIZE, TOKENS)
    capacity = TOKENS // CHUNKS if script.streamed else TOKENS
    layouts = {spec.key: choose_layout(spec).for_slots(capacity) for spec in specs}
    sizes = {key: layout.bytes_for(TOKENS) for key, layout in layouts.items()}
    with Queue.memory(sum(sizes.values()), script=MemOptions(bandwidth=BANDWIDTH)) as queue:
        path = RawPath(queue)
        ahead = min(AHEAD, script.layers - 1) if mode.crosses_layers else 0
        slots = STREAM_SLOTS[0] if script.streamed else 2 * (ahead + 1)
        kind = StreamedStore if script.streamed else KVStore
        scheduler = Scheduler(mode, ahead)
        if script.streamed:
            scheduler.store_share = StoreShare(STORE_SLOTS, STORE_SLOTS, slots - 4)
        device = CopyingDevice(torch.bfloat16, BANDWIDTH * LAYER_S / script.copy_s)
        store = kind(specs, layouts, device, {path.kind: path}, no_growth, slots, capacity, scheduler)
        store.place([Placement(key, path.kind, nbytes, "benchmark") for key, nbytes in sizes.items()])
        scheduler.copy_s_per_byte = copy_pace(store)
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
