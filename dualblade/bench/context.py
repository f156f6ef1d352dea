# SPDX-License-Identifier: Apache-2.0
"""`bench context`: seconds a decoded token, from short contexts to long ones, beside what the drive allows.

A small grouped-query Llama with random weights decodes for real; its KV is random rows that were
appended without computing a prompt. All of it lies on the direct path.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dualblade.bench.io import IoBench, drive_limit
from dualblade.hf import DualBladeCache
from dualblade.tensors import PathKind
from dualblade.units import GIB, MIB

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 16, 4, 128
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * HEAD_DIM * 2  # bfloat16
FILL = 2048  # tokens appended at once


@dataclass(frozen=True, slots=True)
class ContextBench:
    """contexts: tokens. steps: decoded tokens that are timed, after one that is not."""

    folder: Path
    contexts: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536)
    steps: int = 5
    mem_budget: int = 4 * GIB


def run_context_bench(bench: ContextBench, say: Callable[[str], None]) -> dict[str, Any]:
    """For each context: seconds a token, bytes read a token, and both beside bytes / drive limit."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(max(bench.contexts) + 64)).eval()
    model.bfloat16()
    rows = []
    for context in bench.contexts:
        say(f"{context} tokens, {context * TOKEN_BYTES // MIB} MiB of KV")
        limit = drive_limit(IoBench(bench.folder, size=GIB))
        rows.append(_row(bench, model, context, limit))
    return {"layers": LAYERS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "rows": rows}


def _config(positions: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=512,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=positions,
    )


def _row(bench: ContextBench, model: LlamaForCausalLM, context: int, limit: float) -> dict[str, Any]:
    with (
        torch.inference_mode(),
        DualBladeCache(
            model.config,
            mem_budget=bench.mem_budget,
            kv_path="direct",
            max_tokens=context + bench.steps + 1,
            batch_size=1,
            dtype=torch.bfloat16,
            cache_dir=bench.folder,
        ) as cache,
    ):
        _fill(cache, context)
        seconds, read = _decode(bench, model, cache)
        stall = cache.storage.store.stall_s
    floor = read / (limit * GIB)
    return {
        "context": context,
        "read_bytes_per_token": read,
        "s_per_token": seconds,
        "limit_gib_s": limit,
        "floor_s": floor,
        "s_per_token_vs_floor": seconds / floor,
        "stall_s": stall,
    }


def _fill(cache: DualBladeCache, context: int) -> None:
    rows = torch.randn(1, KV_HEADS, FILL, HEAD_DIM).to(torch.bfloat16)
    for at in range(0, context, FILL):
        part = rows[:, :, : min(FILL, context - at)]
        for layer in range(LAYERS):
            cache.update(part, part, layer)


def _decode(bench: ContextBench, model: LlamaForCausalLM, cache: DualBladeCache) -> tuple[float, float]:
    """(median seconds a token, bytes read a token)"""
    ids = torch.zeros(1, 1, dtype=torch.long)
    model(input_ids=ids, past_key_values=cache)
    queue = cache.storage.paths[PathKind.DIRECT].queue
    before, times = queue.stats().read_bytes, []
    for _ in range(bench.steps):
        begun = time.perf_counter()
        model(input_ids=ids, past_key_values=cache)
        times.append(time.perf_counter() - begun)
    return statistics.median(times), (queue.stats().read_bytes - before) / bench.steps
