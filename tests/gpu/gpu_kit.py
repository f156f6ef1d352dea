# SPDX-License-Identifier: Apache-2.0
"""Models and caches on a CUDA device."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import torch
from families import model_of, padded_prompt

from dualblade import DualBladeCache

PROMPT, NEW = 230, 24


@functools.cache
def on_gpu(family: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    return model_of.__wrapped__(family, dtype, attention).to("cuda")


def prompt(batch: int) -> dict[str, torch.Tensor]:
    return {name: rows.cuda() for name, rows in padded_prompt(batch, PROMPT).items()}


def generate(model: Any, cache: Any, batch: int, chunk: int | None = None) -> Any:
    return model.generate(
        **prompt(batch), past_key_values=cache, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def cache_of(model: Any, batch: int, folder: Path, **options: Any) -> DualBladeCache:
    chosen = {"mem_budget": "16G", "max_tokens": PROMPT + NEW, "batch_size": batch, "device": model.device}
    return DualBladeCache(model.config, dtype=model.dtype, cache_dir=folder, **chosen | options)
