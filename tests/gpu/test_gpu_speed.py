# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: how fast copies are, that they run beside kernels, that the host waits for none, and that
nothing is left behind."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_kit import cache_of, on_gpu

from dualblade import DualBladeCache
from dualblade.bench.step import StepBench, run_step_bench
from dualblade.settings import CacheSettings
from dualblade.tensors import TensorKey
from spdk_glue import (
    READ,
    TO_DEVICE,
    WRITE,
    Copier,
    Copies,
    DevicePiece,
    MemOptions,
    Piece,
    Queue,
    QueueOptions,
    Region,
)

pytestmark = [pytest.mark.gpu, pytest.mark.needs("gpu")]
MIB = 1 << 20
HEADS, RUN, BLOCKS = 8, 128 << 10, 128  # 128 MiB, as K of a layer of Llama-3-8B with 64K tokens
SIZE = HEADS * RUN * BLOCKS


@contextmanager
def copier_and_slot() -> Iterator[tuple[Copier, Region, torch.Tensor]]:
    torch.cuda.init()
    device = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    with Copier(device.device.index) as copier, Region(SIZE) as region:
        copier.register(region, SIZE)
        region.buffer()[:] = torch.randint(0, 250, (SIZE,), dtype=torch.uint8).numpy().tobytes()
        yield copier, region, device


def seconds(stream: Any, start: Callable[[], None], rounds: int = 15) -> float:
    """Median, on the device's own clock."""
    taken = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        start()
        end.record(stream)
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken[3:])


def slot_piece(region: Region) -> Piece:
    return Piece(0, region.address, RUN * BLOCKS, RUN, RUN, HEADS, BLOCKS)


@pytest.mark.parametrize("half_full", [False, True])
def test_bandwidth(half_full: bool) -> None:
    """A slot that is full is one row of bytes; one that is half full is a row a head, with gaps between."""
    with copier_and_slot() as (copier, region, device):
        piece = slot_piece(region)
        if half_full:
            piece = piece._replace(blocks=BLOCKS // 2)
        there = DevicePiece(device.data_ptr(), RUN * BLOCKS, RUN)
        pinned = torch.empty(piece.nbytes, dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.ExternalStream(copier.loads)
        plain = seconds(
            torch.cuda.current_stream(),
            lambda: device[: piece.nbytes].copy_(pinned, non_blocking=True) and None,
        )
        ours = seconds(stream, lambda: copier.copy(TO_DEVICE, copier.loads, [piece], [there]))
        print(f"\n{torch.cuda.get_device_name()}: {piece.nbytes / ours / 1e9:.1f} GB/s, "
              f"pinned cudaMemcpyAsync {piece.nbytes / plain / 1e9:.1f} GB/s")  # fmt: skip
        assert plain / ours >= 0.90


def test_commands_of_a_transfer_arrive() -> None:
    """From a medium in RAM to the device, command by command, out of order."""
    with copier_and_slot() as (copier, region, device):
        script = MemOptions(latency_us=20, reorder_seed=3)
        with Queue.memory(SIZE, QueueOptions(command_bytes=MIB), script) as queue:
            piece = slot_piece(region)
            queue.run(WRITE, [piece])
            want = torch.frombuffer(region.buffer(), dtype=torch.uint8).clone()
            filled = copier.event()
            there = DevicePiece(device.data_ptr(), RUN * BLOCKS, RUN)
            copies = Copies(copier, copier.loads, [there], filled)
            queue.wait(queue.submit(READ, [piece], copies=copies))
            copier.wait(torch.cuda.current_stream().cuda_stream, filled)
            assert torch.equal(device.cpu(), want)


# decode -----------------------------------------------------------------------------------------


def rows_of(cache: DualBladeCache, key: TensorKey, count: int) -> torch.Tensor:
    spec = cache.storage.store.tensors[key].spec
    shape = (spec.batch, spec.heads, count, spec.head_dim)
    return torch.randn(shape, device="cuda").to(cache.dtype)


def step(
    cache: DualBladeCache, rows: dict[int, torch.Tensor], work: Callable[[], Any] = lambda: None
) -> None:
    for layer, new in rows.items():
        keys, values = cache.exchange_both(layer, new, new)
        (keys * values).sum()
        work()


@contextmanager
def full_cache(
    folder: Path, tokens: int, **options: Any
) -> Iterator[tuple[DualBladeCache, dict[int, torch.Tensor]]]:
    model = on_gpu("llama", torch.bfloat16)
    chosen = {"kv_path": "direct", "max_tokens": tokens + 1100} | options
    with cache_of(model, 4, folder, **chosen) as cache:
        layers = range(model.config.num_hidden_layers)
        for layer in layers:
            new = rows_of(cache, TensorKey(layer, "K"), tokens)
            cache.exchange_both(layer, new, new)
        cache.storage.store.flush()
        yield cache, {layer: rows_of(cache, TensorKey(layer, "K"), 1) for layer in layers}


@pytest.mark.needs("o_direct")
def test_the_host_waits_for_no_copy(direct_dir: Path) -> None:
    """torch refuses whatever synchronises; the copier's own calls cannot (see glue_api.h)."""
    with torch.inference_mode(), full_cache(direct_dir, 2000) as (cache, rows):
        step(cache, rows)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(50):
                step(cache, rows)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.needs("o_direct")
def test_copies_run_beside_kernels(direct_dir: Path, tmp_path: Path) -> None:
    """At least half of the time that copies to the device take, a kernel runs too."""
    a = torch.randn(4096, 4096, device="cuda")
    with torch.inference_mode(), full_cache(direct_dir, 16000, prefetch_depth=2) as (cache, rows):
        step(cache, rows, lambda: a @ a)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(5):
                step(cache, rows, lambda: [a @ a for _ in range(4)])
            torch.cuda.synchronize()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    spans = {
        kind: [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == kind]
        for kind in ("kernel", "gpu_memcpy")
    }
    copies = [
        (e["ts"], e["ts"] + e["dur"])
        for e in events
        if e.get("cat") == "gpu_memcpy" and "HtoD" in e.get("name", "")
    ]
    assert copies, "the trace has no copy to the device"
    total = sum(end - begin for begin, end in copies)
    both = sum(overlap(copy, kernel) for copy in copies for kernel in spans["kernel"])
    assert both >= 0.5 * total


def overlap(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(0.0, min(a[1], b[1]) - max(a[0], b[0]))


@pytest.mark.needs("o_direct")
def test_a_thousand_steps_leave_nothing(direct_dir: Path) -> None:
    with torch.inference_mode(), full_cache(direct_dir, 500) as (cache, rows):
        device: Any = cache.storage.store.device
        for number in range(1000):
            step(cache, rows)
            if number == 100:
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
            assert device.copier.counts()[0] < 256
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() <= before[0] + MIB
        assert torch.cuda.mem_get_info()[0] >= before[1] - 64 * MIB


@pytest.mark.needs("o_direct")
def test_bench_step(direct_dir: Path) -> None:
    chosen = CacheSettings.checked(mem_budget="16G", kv_path="direct", cache_dir=direct_dir)
    record, _ = run_step_bench(StepBench("tiny", chosen, context=4000, rounds=3, device="cuda"), print)
    assert record["device"].startswith("cuda")
    assert 0 < record["copy_s"] < record["step_s"] * 10
