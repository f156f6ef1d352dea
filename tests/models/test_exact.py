# SPDX-License-Identifier: Apache-2.0
"""Every token and every logit, bit for bit, as with transformers' own cache in memory."""

from __future__ import annotations

import functools
from itertools import product
from pathlib import Path

import pytest
import torch
from families import CONFIGS, model_of
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.models import kv_specs

PROMPT, NEW = 230, 24
WAYS = list(product(CONFIGS, (torch.float32, torch.bfloat16), (1, 4), (False, True), (None, 50)))


def prompt(batch: int) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded on the left."""
    random = torch.Generator().manual_seed(batch)
    ids = torch.randint(2, 199, (batch, PROMPT), generator=random)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 17 * row] = 0
        ids[row, : 17 * row] = 1
    return {"input_ids": ids, "attention_mask": mask}


def generate(family, dtype, batch, sample, chunk, cache):
    torch.manual_seed(3)
    return model_of(family, dtype).generate(
        **prompt(batch),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=sample,
        temperature=0.9 if sample else None,
        prefill_chunk_size=chunk,
        output_logits=True,
        return_dict_in_generate=True,
    )


@functools.cache
def expected(family, dtype, batch, sample, chunk):
    cache = DynamicCache(config=model_of(family, dtype).config)
    return generate(family, dtype, batch, sample, chunk, cache)


def kv_bytes(family: str, dtype: torch.dtype, batch: int) -> int:
    specs = kv_specs(model_of(family, dtype).config, batch, PROMPT + NEW, dtype.itemsize)
    return sum(spec.tokens * spec.token_bytes for spec in specs)


def assert_same(way, cache: DualBladeCache) -> None:
    want, got = expected(*way), generate(*way, cache)
    assert torch.equal(want.sequences, got.sequences)
    for step, (a, b) in enumerate(zip(want.logits, got.logits, strict=True)):
        assert torch.equal(a, b), f"logits differ at step {step}"


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("engine", ["uring", "mem"])
@pytest.mark.parametrize("kv_path", ["page-cache", "direct", "auto"])
@pytest.mark.parametrize(
    "way", WAYS, ids=lambda way: "-".join(str(part).removeprefix("torch.") for part in way)
)
def test_same_tokens_and_logits(way, kv_path: str, engine: str, direct_dir: Path) -> None:
    family, dtype, batch, *_ = way
    if engine == "mem" and kv_path == "page-cache":
        kv_path = "auto"  # the page-cache path has one engine; share below one tensor puts all on mem
        share = 4096
    else:
        share = kv_bytes(family, dtype, batch) // 3 if kv_path == "auto" else None
    with DualBladeCache(
        model_of(family, dtype).config,
        nvme="mem:64M" if engine == "mem" else None,
        mem_budget="8G",
        page_cache_budget=share,
        kv_path=kv_path,
        max_tokens=PROMPT + NEW,
        batch_size=batch,
        dtype=dtype,
        cache_dir=direct_dir,
    ) as cache:
        assert_same(way, cache)
        paths = cache.report()["paths"]
    if kv_path == "auto" and share != 4096:
        assert 0 < paths["page_cache"]["bytes"] <= share < paths["direct"]["bytes"]
        assert paths["page_cache"]["read_bytes"] > 0
    if kv_path != "page-cache":
        assert paths["direct"]["engine"] == engine
        assert paths["direct"]["read_bytes"] > 0


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize(
    "way", [w for w in WAYS if w[1] == torch.float32 and w[2] == 4 and w[4]][:3:2], ids=str
)
def test_growing_without_a_known_end(way, depth: int, direct_dir: Path) -> None:
    """No max_tokens, no batch_size: slots and tensors grow while generating, at every prefetch depth."""
    family, dtype, batch, *_ = way
    with DualBladeCache(
        model_of(family, dtype).config,
        mem_budget="8G",
        page_cache_budget=kv_bytes(family, dtype, batch) // 3,
        cache_dir=direct_dir,
        capacity="64M",
        prefetch_depth=depth,
    ) as cache:
        assert_same(way, cache)
