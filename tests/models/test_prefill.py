# SPDX-License-Identifier: Apache-2.0
"""Prefill layer by layer: the bits of prefill chunk by chunk, and every row written once and none read."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from families import CONFIGS, VOCABULARY, model_of
from modes import EVERY_MODE
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.attention import Mask, implementation, masks_made, noted_mask
from dualblade.models import decoder_layers, paused_bytes
from dualblade.prefill import by_layers, leading_layers
from dualblade.runner import Generation, Prompt, Sampling

TOKENS, CHUNK, NEW = 230, 50, 6


def prompt(batch: int) -> Prompt:
    """Rows of different lengths, padded on the left."""
    ids = torch.randint(2, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 17 * row] = 0
    return Prompt(ids, mask)


def generation(family: str, cache, batch: int, span: int, **more) -> Generation:
    model = model_of(family, torch.float32)
    return Generation(model, cache, prompt(batch), Sampling(), frozenset(), CHUNK, span, **more)


def offloaded(family: str, batch: int, folder: Path, **more) -> DualBladeCache:
    return DualBladeCache(
        model_of(family, torch.float32).config,
        nvme="mem:64M",
        mem_budget="8G",
        kv_path="direct",
        max_tokens=TOKENS + NEW,
        batch_size=batch,
        dtype=torch.float32,
        cache_dir=folder,
        **more,
    )


def logits_of(made: Generation) -> list[torch.Tensor]:
    """Of the prompt's end and of every token after it."""
    seen = []
    sample = made._sample
    made._sample = lambda logits: seen.append(logits) or sample(logits)
    made.run(NEW)
    return seen


@pytest.mark.parametrize("mode", EVERY_MODE)
@pytest.mark.parametrize("span", [TOKENS, 2 * CHUNK])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_the_same_bits_as_chunk_by_chunk(
    family: str, batch: int, span: int, mode: str, tmp_path: Path
) -> None:
    reference = DynamicCache(config=model_of(family, torch.float32).config)
    want = logits_of(generation(family, reference, batch, CHUNK))
    with offloaded(family, batch, tmp_path, pipeline=mode) as cache:
        got = logits_of(generation(family, cache, batch, span))
    assert len(got) == len(want) == NEW
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_masks_that_come_and_go(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention that `run` uses drops its masks in a pause. The bits are the same."""
    model = model_of(family, torch.float32)
    monkeypatch.setattr(model.config, "_attn_implementation", implementation("sdpa"))
    want = logits_of(generation(family, DynamicCache(config=model.config), 4, CHUNK))
    dropped: list[int] = []
    drop = Mask.drop
    monkeypatch.setattr(Mask, "drop", lambda mask: dropped.append(mask.nbytes) or drop(mask))
    with offloaded(family, 4, tmp_path) as cache:
        got = logits_of(generation(family, cache, 4, TOKENS))
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))
    assert min(dropped) > 0


def test_a_mask_is_the_same_afterwards() -> None:
    token = masks_made.set([])
    try:
        mask = noted_mask(
            batch_size=2, q_length=3, kv_length=7, q_offset=4, attention_mask=torch.ones(2, 7) > 0
        )
        (noted,) = masks_made.get()
    finally:
        masks_made.reset(token)
    view, before = mask[:, :, 1:], mask.clone()
    noted.drop()
    assert mask.untyped_storage().nbytes() == 0
    noted.restore()
    assert torch.equal(mask, before)
    assert torch.equal(view, before[:, :, 1:])


@pytest.mark.parametrize(
    ("span", "again"), [(TOKENS, 0), (2 * CHUNK, 100 + 200), (CHUNK, 50 + 100 + 150 + 200)]
)
def test_what_is_read_again(span: int, again: int, tmp_path: Path) -> None:
    """K and V of whole blocks, once for every span after the first."""
    with offloaded("llama", 1, tmp_path, prefetch_depth=0) as cache, torch.inference_mode():
        generation("llama", cache, 1, span).prefill()
        cache.storage.store.flush()
        layouts = {key: tensor.layout for key, tensor in cache.storage.store.tensors.items()}
        read = cache.report()["paths"]["direct"]["read_bytes"]
        begins = range(span, TOKENS, span)
        assert sum(begins) == again
        assert read == sum(
            layout.full_blocks(begin) * layout.block_bytes for layout in layouts.values() for begin in begins
        )


def tensors() -> list[torch.Tensor]:
    """All that there are, of whatever test."""
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def memory(held: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of their storage, by address."""
    return {each.data_ptr(): each.nbytes() for each in (tensor.untyped_storage() for tensor in held)}


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - {"gemma2"}))  # which has no sdpa
def test_what_a_paused_prompt_holds(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, sdpa = model_of(family, torch.float32), 4, implementation("sdpa")
    monkeypatch.setattr(model.config, "_attn_implementation", sdpa)
    ids = prompt(batch).ids.repeat(1, 2)
    tokens, chunk, mask = ids.shape[1], 20, torch.ones_like(ids)
    cache, seen = DynamicCache(config=model.config), 0

    def look(done: int, total: int) -> None:
        nonlocal seen
        if seen or 2 * done < total:
            return
        layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        rows = [rows for layer in layers for rows in (layer.keys, layer.values)]
        other = memory([*rows, *model.parameters(), *model.buffers(), ids, mask])
        held = memory(tensor for tensor in tensors() if id(tensor) not in known)
        seen = sum(size for at, size in held.items() if at not in other)

    made = Generation(model, cache, Prompt(ids, mask), Sampling(), frozenset(), chunk, tokens, look)
    before = tensors()  # which keeps them, and their ids
    known = set(map(id, before))
    with torch.inference_mode():
        made.prefill()
    expected = tokens * paused_bytes(model.config, batch, tokens, 4, sdpa)
    padding = batch * tokens * tokens * 2 // chunk  # of every pass: OPT makes a float of each token before
    assert expected // 2 < seen < expected + padding


def test_progress_goes_up_to_the_end(tmp_path: Path) -> None:
    seen: list[int] = []
    with offloaded("llama", 1, tmp_path) as cache, torch.inference_mode():
        generation("llama", cache, 1, 2 * CHUNK, on_prefill=lambda done, total: seen.append(done)).prefill()
    assert seen == sorted(seen)
    assert seen[-1] == TOKENS


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_one_pass_ends_them_all(error: type[BaseException]) -> None:
    """Nothing of them is left: no hook, no pass that could go on."""
    layers = [torch.nn.Identity() for _ in range(3)]
    went: list[str] = []

    def passing(number: int) -> torch.Tensor:
        try:
            for at, layer in enumerate(layers):
                layer(torch.zeros(1))
                went.append(f"{number}.{at}")
                if (number, at) == (1, 1):
                    raise error("it fails")
            return torch.zeros(1)
        finally:
            went.append(f"{number} ended")

    with pytest.raises(error, match="it fails"):
        by_layers(layers, [lambda number=number: passing(number) for number in range(3)], lead=1)
    assert went[:5] == ["0.0", "1.0", "2.0", "0.1", "1.1"]
    assert sorted(went[5:]) == ["0 ended", "1 ended", "2 ended"]
    assert all(not layer._forward_pre_hooks for layer in layers)


def test_the_layers_that_masks_are_made_from() -> None:
    """The first of every kind: windows and full attention in turn make it two."""
    assert leading_layers(DynamicCache(config=model_of("llama", torch.float32).config)) == 1
    assert leading_layers(DynamicCache(config=model_of("gemma3", torch.float32).config)) == 2
    assert len(decoder_layers(model_of("gemma3", torch.float32))) == 4
