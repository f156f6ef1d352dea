# SPDX-License-Identifier: Apache-2.0
"""What callers do with a cache besides plain generation, beside transformers' own cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import VOCABULARY, WINDOW, model_of
from modes import EVERY_MODE
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.errors import ConfigError
from dualblade.hf import OffloadedLayer

FAMILIES = ["llama", "opt", "gemma3"]


def ids_of(tokens: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, tokens), generator=random)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=EVERY_MODE)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def caches(family: str, mode: str, direct_dir: Path) -> Iterator[tuple[DualBladeCache, DynamicCache]]:
    """Ours, over both paths, and the reference."""
    config = model_of(family, torch.float32).config
    with DualBladeCache(
        config, mem_budget="8G", page_cache_budget="96K", cache_dir=direct_dir, capacity="64M", pipeline=mode
    ) as ours:
        yield ours, DynamicCache(config=config)


def generate(family: str, cache: Any, ids: torch.Tensor, attention: str | None = None, **options: Any) -> Any:
    return model_of(family, torch.float32, attention).generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=False,
        **options,
    )


def same(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    if ours.logits is not None:
        assert all(torch.equal(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))


def test_three_turns_of_a_conversation(family: str, caches) -> None:
    """Each turn's prompt is all that was said, and the cache knows all but the end of it."""
    said = [ids_of(90), ids_of(90)]
    for turn in range(3):
        results = []
        for cache, ids in zip(caches, said, strict=True):
            results.append(generate(family, cache, ids, max_new_tokens=20))
        same(*results)
        said = [torch.cat([result.sequences, ids_of(37, seed=turn)], dim=1) for result in results]


def test_beam_search(family: str, caches) -> None:
    results = [generate(family, cache, ids_of(90), num_beams=3, max_new_tokens=16) for cache in caches]
    same(*results)


def test_assisted_decoding_takes_tokens_back(family: str, caches) -> None:
    ids = ids_of(40).repeat(1, 3)  # a prompt that repeats itself, so that guesses are made and fail
    results = [
        generate(family, cache, ids, prompt_lookup_num_tokens=4, max_new_tokens=30) for cache in caches
    ]
    same(*results)


def test_reset_then_another_prompt(family: str, caches) -> None:
    for seed in range(3):
        same(*[generate(family, cache, ids_of(100 + seed, seed=seed), max_new_tokens=8) for cache in caches])
        for cache in caches:
            cache.reset()
        assert caches[0].get_seq_length() == 0


def test_fewer_sequences_go_on(family: str, caches) -> None:
    ids = ids_of(100, batch=4)
    outputs = []
    for cache in caches:
        model = model_of(family, torch.float32)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
            cache.batch_select_indices(torch.tensor([3, 1]))
            logits = [model(input_ids=ids_of(1, 2, seed), past_key_values=cache).logits for seed in range(40)]
        outputs.append(logits)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_batch_cannot_grow(caches) -> None:
    layer = next(layer for layer in caches[0].layers if isinstance(layer, OffloadedLayer))
    with pytest.raises(ConfigError, match="cannot grow"):
        layer.batch_repeat_interleave(2)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(attention: str, direct_dir: Path) -> None:
    config = model_of("llama", torch.float32).config
    with DualBladeCache(config, mem_budget="8G", cache_dir=direct_dir, capacity="64M") as ours:
        same(
            *[
                generate("llama", cache, ids_of(130, batch=2), attention, max_new_tokens=6)
                for cache in (ours, DynamicCache(config=config))
            ]
        )


def test_compiled_models_leave_the_cache_alone(direct_dir: Path) -> None:
    """torch.compile breaks its graph at the cache: moving bytes is nothing that it can trace."""
    model = model_of("qwen2", torch.float32)
    compiled = torch.compile(model, backend="eager")
    ids = ids_of(100)
    with (
        torch.no_grad(),
        DualBladeCache(model.config, mem_budget="8G", cache_dir=direct_dir, capacity="64M") as ours,
    ):
        theirs = DynamicCache(config=model.config)
        for _ in range(3):
            got = compiled(input_ids=ids, past_key_values=ours).logits
            assert torch.equal(got, model(input_ids=ids, past_key_values=theirs).logits)
            ids = got[:, -1:].argmax(-1)


def test_windows_alone_run_in_memory(direct_dir: Path) -> None:
    """Nothing of the model grows, so nothing is offloaded, and it runs all the same."""
    model = model_of("mistral-window", torch.float32)
    with DualBladeCache(
        model.config, mem_budget="8G", cache_dir=direct_dir, max_tokens=200, batch_size=1, dtype=torch.float32
    ) as ours:
        same(
            *[
                generate("mistral-window", cache, ids_of(3 * WINDOW), max_new_tokens=20)
                for cache in (ours, DynamicCache(config=model.config))
            ]
        )
        report = ours.report()
        assert report["placements"] == []
        assert all(path["tensors"] == 0 for path in report["paths"].values())
        assert report["memory"]["kv_bytes"] == 0
        ours.reset()
        assert ours.get_seq_length() == 0


def test_windows_keep_their_own_layers(direct_dir: Path) -> None:
    model = model_of("gemma3", torch.float32)
    with DualBladeCache(model.config, mem_budget="8G", cache_dir=direct_dir, capacity="64M") as cache:
        generate("gemma3", cache, ids_of(3 * WINDOW), max_new_tokens=4)
        kept = [layer for layer in cache.layers if type(layer).__name__ == "DynamicSlidingWindowLayer"]
        assert len(kept) == 2
        assert all(layer.keys.shape[-2] == WINDOW - 1 for layer in kept)
        assert {item.key.layer for item in cache.storage.store.placements} == {1, 3}
