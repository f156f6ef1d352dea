# SPDX-License-Identifier: Apache-2.0
"""`bench policy`: one decode cycle over both paths, with the cached tensors first or spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dualblade.bench.tensors import HEAD_DIM, HEADS, ITEMSIZE, no_growth
from dualblade.device import CpuDevice
from dualblade.governor import Policy, place
from dualblade.layout import choose_layout
from dualblade.paths.base import StoragePath
from dualblade.paths.direct import DirectPath
from dualblade.paths.pagecache import PageCachePath
from dualblade.planner import make_specs
from dualblade.scheduler import Scheduler
from dualblade.store import KVStore
from dualblade.superblock import capacity_for
from dualblade.targets import open_target, open_volume
from dualblade.tensors import PathKind, TensorKey
from dualblade.units import counted


@dataclass(frozen=True, slots=True)
class PolicyBench:
    """layers of Llama-3-8B's shape with `tokens` each: 4 KiB a token and layer."""

    folder: Path
    layers: int = 16
    tokens: int = 8192
    rounds: int = 5
    shares: tuple[float, ...] = (0.25, 0.5, 0.75)
    depths: tuple[int, ...] = (1, 2, 3)


def run_policy_bench(bench: PolicyBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Seconds of one cycle for each share of cached bytes and prefetch depth, and the ratio of the
    policies within each round."""
    rows = []
    for share in bench.shares:
        for depth in bench.depths:
            say(f"{share:.0%} of the KV in the page cache, {counted(depth, 'layer')} ahead")
            rows.append({"cached": share, "prefetch_depth": depth} | _compare(bench, share, depth))
    return {"kv_bytes": bench.layers * bench.tokens * 4096, "rows": rows}


def _compare(bench: PolicyBench, share: float, depth: int) -> dict[str, float]:
    with ExitStack() as stack:
        stores = {policy: stack.enter_context(_filled(bench, policy, share, depth)) for policy in Policy}
        for store in stores.values():
            _cycle(bench, store)  # the slots are faulted in, the page cache is warm
        rounds = [
            {policy: _cycle(bench, store) for policy, store in stores.items()} for _ in range(bench.rounds)
        ]
    ratios = [made[Policy.SPREAD] / made[Policy.FIRST_FIT] for made in rounds]
    return {
        "first_fit_s": statistics.median(made[Policy.FIRST_FIT] for made in rounds),
        "spread_s": statistics.median(made[Policy.SPREAD] for made in rounds),
        "spread_vs_first_fit": statistics.median(ratios),
    }


@contextmanager
def _filled(bench: PolicyBench, policy: Policy, share: float, depth: int) -> Iterator[KVStore]:
    """A store over both paths, every tensor full of random rows."""
    specs = make_specs(bench.layers, 1, HEADS, HEAD_DIM, ITEMSIZE, bench.tokens)
    layouts = {spec.key: choose_layout(spec) for spec in specs}
    sizes = {key: layout.bytes_for(bench.tokens) for key, layout in layouts.items()}
    total = sum(sizes.values())
    target = open_target(None, capacity=capacity_for(total, len(specs)), cache_dir=bench.folder)
    paths: dict[PathKind, StoragePath] = {
        PathKind.DIRECT: DirectPath(target, open_volume(target)),
        PathKind.PAGE_CACHE: PageCachePath(bench.folder),
    }
    device = CpuDevice(torch.bfloat16)
    store = KVStore(
        specs, layouts, device, paths, no_growth, 2 * (depth + 1), bench.tokens, Scheduler(limit=depth)
    )
    try:
        store.place(place(specs, sizes, int(share * total), policy))
        rows = torch.randn(1, HEADS, bench.tokens, HEAD_DIM).to(device.dtype)
        for key in store.tensors:
            slot = store.load(key, bench.tokens)
            device.write_rows(rows, slot.view, 0)
            store.append(key, slot, bench.tokens)
        store.flush()
        yield store
    finally:
        store.close()


def _cycle(bench: PolicyBench, store: KVStore) -> float:
    """Seconds of one token's attention over every layer, 32 query heads."""
    query = torch.randn(1, HEADS, 4, HEAD_DIM, dtype=torch.bfloat16)
    begun = time.perf_counter()
    for layer in range(bench.layers):
        keys, values = (store.load(TensorKey(layer, kind)).view[None, :, : bench.tokens] for kind in "KV")
        torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    return time.perf_counter() - begun
