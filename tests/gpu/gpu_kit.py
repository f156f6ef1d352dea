# SPDX-License-Identifier: Apache-2.0
"""Models and caches on a CUDA device."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import torch
from families import VOCABULARY, model_of

from dualblade import DualBladeCache

PROMPT, NEW = 230, 24


@functools.cache
def on_gpu(family: str, dtype: torch.dtype, attention: str | None = None) -> Any:
    return model_of.__wrapped__(family, dtype, attention).to("cuda")


def prompt(batch: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left."""
    random = torch.Generator().manual_seed(batch)
    ids = torch.randint(2, VOCABULARY, (batch, PROMPT), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 17 * row] = 0
        ids[row, : 17 * row] = 1
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda()}


def generate(model: Any, cache: Any, batch: int, chunk: int | None = None) -> Any:
    return model.generate(
        **prompt(batch), past_key_values=cache, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip


def cache_of(model: Any, batch: int, folder: Path, **options: Any) -> DualBladeCache:
    chosen = {"mem_budget": "16G", "max_tokens": PROMPT + NEW, "batch_size": batch, "device": model.device}
    return DualBladeCache(model.config, dtype=model.dtype, cache_dir=folder, **chosen | options)
