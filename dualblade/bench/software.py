# SPDX-License-Identifier: Apache-2.0
"""What the scheduler itself costs: CPU time of Python per layer, over an engine that does nothing."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from dualblade.bench.tensors import RawPath, no_growth
from dualblade.device import CpuDevice
from dualblade.layout import choose_layout
from dualblade.pipeline import Mode
from dualblade.planner import make_specs
from dualblade.scheduler import Scheduler
from dualblade.store import KVStore
from dualblade.store_parts import Device
from dualblade.tensors import Placement, TensorKey
from spdk_glue import Queue

LAYERS, HEADS, HEAD_DIM, TOKENS = 32, 8, 64, 4096
AHEAD = 3  # layers
STEPS = 32


class NoRows(CpuDevice):
    """Copies no rows: what is left is the scheduler."""

    def copy_rows(self, source: Any, start: int, out: Any, at: int, count: int) -> None:
        return

    def write_rows(self, rows: Any, out: Any, at: int, start: int = 0, count: int | None = None) -> None:
        return


def scheduler_cost(steps: int = STEPS) -> dict[str, float]:
    """Microseconds of the calling thread's CPU time that one layer takes in a decode step, medians: to load K
    and V, whose reads were begun layers ago, to begin reads of a later layer, and to append a token to both.
    scheduler_us_per_layer: without copying rows; rows_us_per_layer: torch's copies of them (the new one and
    those of the unfinished block)."""
    alone = _us_per_layer(NoRows(torch.bfloat16), steps)
    with_rows = _us_per_layer(CpuDevice(torch.bfloat16), steps)
    return {"scheduler_us_per_layer": alone, "rows_us_per_layer": max(0.0, with_rows - alone)}


def _us_per_layer(device: CpuDevice, steps: int) -> float:
    with Queue.null() as queue:
        store = _store(queue, device)
        rows = torch.zeros(1, HEADS, 1, HEAD_DIM, dtype=device.dtype)
        spent = []
        for _ in range(steps):
            for layer in range(LAYERS):
                begun = time.thread_time()
                _layer(store, device, rows, layer)
                spent.append(time.thread_time() - begun)
        store.close()
    return statistics.median(spent) * 1e6


def _layer(store: KVStore, device: Device, rows: torch.Tensor, layer: int) -> None:
    for key in (TensorKey(layer, "K"), TensorKey(layer, "V")):
        slot = store.load(key, 1)
        device.write_rows(rows, slot.view, store.tensors[key].tokens)
        store.append(key, slot, 1)


def _store(queue: Queue, device: Device) -> KVStore:
    path = RawPath(queue)
    specs = make_specs(LAYERS, 1, HEADS, HEAD_DIM, 2, TOKENS)
    layouts = {spec.key: choose_layout(spec) for spec in specs}
    sizes = {spec.key: layouts[spec.key].bytes_for(TOKENS) for spec in specs}
    scheduler = Scheduler(Mode.ADAPTIVE, AHEAD)
    slots = 2 * (AHEAD + 1)
    store = KVStore(specs, layouts, device, {path.kind: path}, no_growth, slots, TOKENS, scheduler)
    store.place([Placement(key, path.kind, nbytes, "benchmark") for key, nbytes in sizes.items()])
    for tensor in store.tensors.values():
        tensor.tokens = TOKENS // 2 + 1
    return store
