# SPDX-License-Identifier: Apache-2.0
"""What the CPU makes of a model's own operations, in some tenths of a second: the rates of the cost model.

Products with a weight of the model for a few numbers of rows, attention over small K and V, and one
forward pass of one token, which shows what a layer costs beside its arithmetic.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from dualblade.cost import ComputeRates, ModelShape
from dualblade.device import leave_a_cpu
from dualblade.handles import in_memory_cache
from dualblade.models import decoder_layers, last_position_only, text_config
from dualblade.offload import by_spdk
from dualblade.settings import CacheSettings
from dualblade.speeds import compute_rates
from dualblade.streaming import Visible, attend

CPU = "CPU"  # no device beside it
ROWS = (1, 4, 16, 64, 256)
OPERATIONS = 1e9  # of one timed product: some milliseconds
QUERIES, KEYS = 256, 1024
SCANNED = 16 << 20  # bytes of K and V together: more than caches hold, less than a pass may take
LONGEST_SCAN = 4096  # tokens
REPEATS = 3
# A pass that takes longer says nothing about overhead, and would itself be felt.
LONGEST_PASS_S = 0.25
USUAL_LAYER_S = 3e-4


def compute_name(config: Any, dtype: torch.dtype, streamed: bool, device: str = CPU) -> str:
    """What rates are kept under: they hold for models of this width, with so many threads or on a device of
    this model."""
    how = "streamed" if streamed else "one piece"
    width = text_config(config).hidden_size
    where = f"{torch.get_num_threads()} threads" if device == CPU else device
    return f"{str(dtype).removeprefix('torch.')}, {where}, width {width}, {how}"


def known_compute(
    config: Any, dtype: torch.dtype, streamed: bool, settings: CacheSettings, device: str = CPU
) -> ComputeRates:
    """What a run with these settings measured last, or else assumed. SPDK's polling takes a thread."""
    with leave_a_cpu(by_spdk(settings.nvme)):
        name = compute_name(config, dtype, streamed, device)
    return compute_rates(settings.cache_dir, name, dtype.itemsize)


@torch.inference_mode()
def measure_compute(model: Any, shape: ModelShape, batch: int, streamed: bool) -> ComputeRates:
    """batch: sequences that will be decoded together. streamed: attention goes through pieces."""
    weight = _largest_weight(model)
    rows = sorted({*ROWS, min(batch, ROWS[-1])})
    points = tuple((count, _seconds_a_parameter(weight, count)) for count in rows)
    scan, attention = _attention_rates(model.config, weight, streamed)
    made = ComputeRates(points, scan, attention, USUAL_LAYER_S, "measured")
    return ComputeRates(points, scan, attention, _layer_seconds(model, shape, made), "measured")


def _seconds(work: Callable[[], object]) -> float:
    _run(work)
    spent = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        _run(work)
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent)


def _run(work: Callable[[], object]) -> None:
    """To its end, also where it is a device's."""
    work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _largest_weight(model: Any) -> torch.Tensor:
    """A matrix of the first decoder layer."""
    weights = [weight for weight in decoder_layers(model)[0].parameters() if weight.dim() == 2]
    return max(weights, key=torch.Tensor.numel)


def _seconds_a_parameter(weight: torch.Tensor, rows: int) -> float:
    """Of many rows a part of the weight is enough, and not of one: that would be in the caches."""
    outputs = int(OPERATIONS / (2 * rows * weight.shape[1]))
    part = weight[: max(64, outputs)] if rows > 1 else weight
    given = torch.ones(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    return _seconds(lambda: linear(given, part)) / part.numel()


def _attention_rates(config: Any, like: torch.Tensor, streamed: bool) -> tuple[float, float]:
    """(bytes of K and V a second under one query, operations a second under many)"""
    text = text_config(config)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads

    def attention(queries: int, tokens: int) -> float:
        query = torch.ones(1, heads, queries, head_dim, dtype=like.dtype, device=like.device)
        keys, values = torch.ones(2, 1, kv_heads, tokens, head_dim, dtype=like.dtype, device=like.device)
        if streamed:
            return _seconds(lambda: attend(query, [(0, keys, values)], Visible(), kv_heads=kv_heads))
        return _seconds(lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True))

    token_bytes = 2 * kv_heads * head_dim * like.dtype.itemsize
    tokens = min(LONGEST_SCAN, SCANNED // token_bytes)
    operations = 4 * heads * QUERIES * KEYS * head_dim
    return tokens * token_bytes / attention(1, tokens), operations / attention(QUERIES, KEYS)


def _layer_seconds(model: Any, shape: ModelShape, rates: ComputeRates) -> float:
    """What a pass of one token takes beyond its products, a layer."""
    products = (shape.layer_parameters + shape.head_parameters) * rates.seconds_a_parameter(1)
    if products > LONGEST_PASS_S:
        return USUAL_LAYER_S
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    last = last_position_only(model)

    def one_token() -> None:
        model(input_ids=ids, past_key_values=in_memory_cache(model.config), use_cache=True, **last)

    return max(0.0, _seconds(one_token) - products) / shape.layers
