# SPDX-License-Identifier: Apache-2.0
"""`python memory_worker.py BUDGET FOLDER SEED`: rounds of generation in one process that its budget's cgroup
holds, until its stdin ends. A line of JSON a round: its tokens, or why it was refused."""

from __future__ import annotations

import gc
import json
import random
import select
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualblade.host.budget_cgroup import BudgetCgroup
from dualblade.host.heap import keep_large_blocks, return_large_blocks

NEW = 24


def make_model() -> Any:
    """32 KiB of KV a token, little to compute, on one thread: the hog and the judge want theirs, and another
    number of threads may round differently."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=199, hidden_size=128, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def generate(model: Any, cache: Any, prompt: Any) -> list[int]:
    import torch

    ids = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=NEW,
        do_sample=False, prefill_chunk_size=256,
    )  # fmt: skip
    return [int(token) for token in ids[0, prompt.shape[1] :]]


def prompt_of(seed: int) -> Any:
    import torch

    tokens = random.Random(seed).randrange(1500, 4000)
    return torch.randint(2, 199, (1, tokens), generator=torch.Generator().manual_seed(seed))


def play(model: Any, group: BudgetCgroup, budget: int, folder: Path, seed: int) -> dict[str, Any]:
    import torch

    from dualblade import DualBladeCache
    from dualblade.errors import BudgetError
    from dualblade.settings import CacheSettings

    prompt = prompt_of(seed)
    checked = CacheSettings.checked(
        mem_budget=budget, cache_dir=folder, activation_bytes=24 << 20, stream="never"
    )
    try:
        with DualBladeCache(
            model.config, max_tokens=prompt.shape[1] + NEW, batch_size=1, dtype=torch.float32,
            settings=replace(checked, cgroup=group),
        ) as cache:  # fmt: skip
            tokens = generate(model, cache, prompt)
            report = cache.report()
    except BudgetError as error:
        return {"tokens": None, "why": str(error)}
    memory = report["memory"]
    return {
        "tokens": tokens, "share": memory["page_cache_share_bytes"], "peak": memory["peak_bytes"],
        "cgroup": memory["cgroup"], "direct": report["paths"]["direct"]["bytes"],
    }  # fmt: skip


def main(budget: int, folder: Path, seed: int) -> None:
    with BudgetCgroup.enter() as group:
        model = make_model()
        group.limit(budget)
        number = 0
        while not select.select([sys.stdin], [], [], 0)[0]:
            gc.collect()  # what a round leaves is not to be the next one's runtime
            its = seed * 1_000_003 + number
            (keep_large_blocks if number % 2 else return_large_blocks)()
            print(json.dumps({"seed": its} | play(model, group, budget, folder, its)), flush=True)
            number += 1


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
