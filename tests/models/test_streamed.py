# SPDX-License-Identifier: Apache-2.0
"""Streamed attention in whole models: the bits of the same arithmetic over rows in memory, and close to
attention in one piece."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import CONFIGS, model_of, padded_prompt
from modes import EVERY_MODE, MODES
from transformers import DynamicCache

from dualblade import DualBladeCache, offload
from dualblade.attention import streams
from dualblade.cli.main import main
from dualblade.errors import BudgetError, ConfigError, StorageError
from dualblade.handles import STREAMED, Handle, in_memory_cache
from dualblade.layers import layer_shapes
from dualblade.runner import Generation, Prompt, Sampling
from dualblade.tensors import TensorKey
from dualblade.zoo import TINY
from spdk_glue import PAGE, READ, WRITE

PROMPT, NEW = 230, 12
FLOATS = [torch.float32, torch.bfloat16]


def generate(family: str, dtype: torch.dtype, batch: int, chunk: int | None, cache, attention=STREAMED):
    return model_of(family, dtype, attention).generate(
        **padded_prompt(batch, PROMPT),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        prefill_chunk_size=chunk,
        output_logits=True,
        return_dict_in_generate=True,
    )


def streamed(family: str, dtype: torch.dtype, batch: int, folder: Path, **more) -> DualBladeCache:
    options = {"nvme": "mem:64M", "mem_budget": "8G", "kv_path": "direct", "stream": "always"} | more
    return DualBladeCache(
        model_of(family, dtype, STREAMED).config,
        max_tokens=PROMPT + NEW,
        batch_size=batch,
        dtype=dtype,
        cache_dir=folder,
        **options,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These tensors are too small to share out; threads that wait for each other take longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of one block, which these small models otherwise exceed many times."""
    monkeypatch.setattr("dualblade.pipeline.STREAM_CHUNK", 1)


def same(want, got) -> None:
    assert torch.equal(want.sequences, got.sequences)
    assert all(torch.equal(a, b) for a, b in zip(want.logits, got.logits, strict=True))


def assert_streamed_bits(
    family: str, dtype: torch.dtype, batch: int, chunk: int | None, folder: Path, **more: str
) -> None:
    with streamed(family, dtype, batch, folder, checksum=True, **more) as cache:
        got = generate(family, dtype, batch, chunk, cache)
        chunks, report = cache.storage.chunks, cache.report()
        # within: with another number of threads torch may round differently
        reference = in_memory_cache(model_of(family, dtype, STREAMED).config, chunks)
        same(generate(family, dtype, batch, chunk, reference), got)
    assert report["pipeline"]["attention"] == "streamed"
    assert set(chunks.values()) == {report["pipeline"]["chunk_tokens"]}
    assert max(chunks.values()) < PROMPT
    assert report["paths"]["direct"]["read_bytes"] > 0


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("batch", "chunk"), [(1, None), (4, 50)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_the_bits_of_the_same_pieces_in_memory(
    mode: str, family: str, dtype: torch.dtype, batch: int, chunk: int | None, tmp_path: Path
) -> None:
    """Every logit: what the store does to the rows is exact, as in one piece."""
    assert_streamed_bits(family, dtype, batch, chunk, tmp_path, pipeline=mode)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mode", MODES)
def test_the_same_bits_in_every_mode(mode: str, tmp_path: Path) -> None:
    assert_streamed_bits("llama", torch.float32, 4, 50, tmp_path, pipeline=mode)


@functools.cache
def one_piece(family: str, dtype: torch.dtype, batch: int):
    """As the family computes it as a rule, with the cache in memory."""
    cache = DynamicCache(config=model_of(family, dtype).config)
    return generate(family, dtype, batch, None, cache, attention=None)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_close_to_one_piece(family: str, batch: int, tmp_path: Path) -> None:
    """In float32: logits within a hundred roundings of their size, and the same greedy tokens, none of which
    was in doubt."""
    want = one_piece(family, torch.float32, batch)
    with streamed(family, torch.float32, batch, tmp_path) as cache:
        got = generate(family, torch.float32, batch, None, cache)
    for a, b in zip(want.logits, got.logits, strict=True):
        allowed = 100 * torch.finfo(torch.float32).eps * float(a.abs().max())
        torch.testing.assert_close(b, a, rtol=0, atol=allowed)
        assert float(a.topk(2).values.diff().abs().min()) > 2 * allowed
    assert torch.equal(want.sequences, got.sequences)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3"])
def test_bfloat16_is_no_further_from_float64_than_one_piece(family: str, tmp_path: Path) -> None:
    """The prompt's last logits: rounded operands, exact arithmetic between them."""
    exact = one_piece(family, torch.float32, 1).logits[0].double()
    whole = one_piece(family, torch.bfloat16, 1).logits[0].double()
    with streamed(family, torch.bfloat16, 1, tmp_path) as cache:
        got = generate(family, torch.bfloat16, 1, 50, cache).logits[0].double()
    assert (got - exact).norm() < 1.5 * (whole - exact).norm()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("span", [PROMPT, 100, 50])
@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3-next"])
def test_prefill_layer_by_layer(family: str, span: int, tmp_path: Path) -> None:
    """Chunks of a prompt that pass each layer in turn, with masks that come and go."""

    def run(cache) -> tuple[list[list[int]], torch.Tensor]:
        seen = []
        made = padded_prompt(4, PROMPT)
        way = Prompt(made["input_ids"], made["attention_mask"])
        generation = Generation(
            model_of(family, torch.float32, STREAMED), cache, way, Sampling(), frozenset(), 50, span
        )
        sample = generation._sample
        generation._sample = lambda logits: seen.append(logits) or sample(logits)
        return generation.run(NEW).tokens, torch.stack(seen)

    with streamed(family, torch.float32, 4, tmp_path) as cache:
        tokens, logits = run(cache)
        chunks = cache.storage.chunks
    want = run(in_memory_cache(model_of(family, torch.float32, STREAMED).config, chunks))
    assert tokens == want[0]
    assert torch.equal(logits, want[1])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("way", ["beams", "assisted", "contrast"])
def test_operations(way: str, tmp_path: Path) -> None:
    """Sequences that are reordered, and tokens that are taken back."""
    model = model_of("llama", torch.float32, STREAMED)
    more = {
        "beams": {"num_beams": 3},
        "assisted": {"prompt_lookup_num_tokens": 4},
        "contrast": {"num_beams": 2, "length_penalty": 0.5},
    }[way]
    ids = {"input_ids": padded_prompt(1, PROMPT)["input_ids"][:, :90].repeat(1, 2)}

    def run(cache):
        return model.generate(**ids, past_key_values=cache, max_new_tokens=40, do_sample=False, **more)

    with DualBladeCache(
        model.config, nvme="mem:64M", mem_budget="8G", kv_path="direct", stream="always", max_tokens=240,
        batch_size=more.get("num_beams", 1), dtype=torch.float32, cache_dir=tmp_path,
    ) as cache:  # fmt: skip
        got = run(cache)
        chunks = cache.storage.chunks
    if way == "assisted":
        assert torch.equal(got, run(in_memory_cache(model.config, chunks)))
    assert torch.equal(got, run(DynamicCache(config=model.config)))


# budgets ------------------------------------------------------------------------------------


@pytest.fixture
def empty_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process held nothing yet, so that budgets as small as these models' layers mean something."""
    make = offload.make_request
    monkeypatch.setattr(offload, "make_request", lambda *args: replace(make(*args), runtime=0))


@pytest.mark.usefixtures("empty_process")
def test_a_budget_of_less_than_a_layer(tmp_path: Path) -> None:
    """Refused in one piece; streamed, with its slots within what is left of the budget, where that may be."""
    family, batch = "qwen3", 16
    config = model_of(family, torch.float32, STREAMED).config
    shape = next(shape for shape in layer_shapes(config) if shape.offloaded)
    layer = 2 * batch * shape.heads * shape.head_dim * 4 * (PROMPT + NEW)
    options = {"mem_budget": layer, "activation_bytes": layer // 8, "page_cache_budget": 0}
    with pytest.raises(BudgetError, match="one layer's K and V"):
        streamed(family, torch.float32, batch, tmp_path, stream="never", **options)
    with streamed(family, torch.float32, batch, tmp_path, stream="auto", **options) as cache:
        got = generate(family, torch.float32, batch, 50, cache)
        report, chunks = cache.report(), cache.storage.chunks
        plan = cache.storage.plan
    assert report["pipeline"]["attention"] == "streamed"
    assert plan.footprint.staging_bytes + plan.footprint.tails_bytes <= layer * 7 // 8
    assert plan.pipeline.slots * plan.slot_bytes == plan.footprint.staging_bytes
    same(generate(family, torch.float32, batch, 50, in_memory_cache(config, chunks)), got)


def test_one_piece_where_it_fits(tmp_path: Path) -> None:
    """The same bits as ever, also for a model that could stream."""
    with streamed("llama", torch.float32, 1, tmp_path, stream="auto") as cache:
        got = generate("llama", torch.float32, 1, 50, cache)
        pipeline = cache.report()["pipeline"]
    assert (pipeline["attention"], pipeline["chunk_tokens"]) == ("one-piece", None)
    want = DynamicCache(config=model_of("llama", torch.float32).config)
    same(generate("llama", torch.float32, 1, 50, want, attention=None), got)


@pytest.mark.usefixtures("empty_process")
def test_a_model_that_cannot_stream_is_refused(tmp_path: Path) -> None:
    """By its plan where nobody insisted, else by its first layer; nothing is computed from a handle."""
    model = model_of("llama", torch.float32)
    assert not streams(model.config)
    options = {"nvme": "mem:64M", "dtype": torch.float32, "cache_dir": tmp_path, "max_tokens": PROMPT + NEW}
    with pytest.raises(BudgetError, match="one layer's K and V"):
        DualBladeCache(model.config, mem_budget="100K", activation_bytes=0, batch_size=1, **options)
    with (
        DualBladeCache(model.config, mem_budget="8G", stream="always", **options) as cache,
        pytest.raises(ConfigError, match="this attention wants them whole"),
    ):
        generate("llama", torch.float32, 1, None, cache, attention=None)


# the program --------------------------------------------------------------------------------

SAMPLE = TINY.parent / "sample.txt"
RUN = ["run", "--model", "tiny", "--prompt-file", str(SAMPLE), "--mem-budget", "2G", "--max-new-tokens", "24"]


@pytest.mark.needs("o_direct")
@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kv_path", ["auto", "direct", "page-cache"])
def test_run(kv_path: str, direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verified token by token against the same chunks in memory."""
    share = ["--page-cache-budget", "2M"] if kv_path == "auto" else []
    options = ["--stream", "always", "--kv-path", kv_path, *share, "--verify", "--json"]
    assert main([*RUN, *options, "--prefill-chunk", "64", "--cache-dir", str(direct_dir)]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verified"] is True
    assert record["pipeline"]["attention"] == "streamed"
    assert 0 < record["pipeline"]["chunk_tokens"] < record["prompt_tokens"]
    assert record["memory"]["peak_bytes"] <= record["memory"]["budget_bytes"]


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is read again is the older rows of every chunk of the prompt."""
    command = [
        "plan",
        "--model",
        "tiny",
        "--mem-budget",
        "2G",
        "--context",
        "1025",
        "--cache-dir",
        str(tmp_path),
    ]
    seen = {}
    for stream in ("auto", "always"):
        assert main([*command, "--stream", stream, "--prefill-chunk", "256", "--json"]) == 0
        seen[stream] = json.loads(capsys.readouterr().out)
    assert [seen["auto"][name] for name in ("attention", "chunk_tokens")] == ["one-piece", None]
    assert seen["auto"]["prefill_reread_bytes"] == 0
    assert seen["always"]["attention"] == "streamed"
    assert seen["always"]["prefill_reread_bytes"] == seen["always"]["kv_bytes"] * (256 + 512 + 768) // 1025
    assert main([*command, "--stream", "always"]) == 0
    assert f"in chunks of {seen['always']['chunk_tokens']} tokens" in capsys.readouterr().out


def test_a_model_whose_attention_cannot_be_streamed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--stream", "always", "--attention", "eager"]) == 1
    assert "the attention of tiny cannot be streamed (eager)" in capsys.readouterr().err


# handles ------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[DualBladeCache]:
    with streamed("llama", torch.float32, 1, tmp_path) as made:
        yield made


def rows(tokens: int, heads: int = 2, dim: int = 16) -> torch.Tensor:
    return torch.randn(1, heads, tokens, dim)


def test_a_handle_has_a_shape_and_no_values(cache: DualBladeCache) -> None:
    with torch.inference_mode():
        cache.update(rows(9), rows(9), 0)
        keys, values = cache.update(rows(1), rows(1), 0)
        assert isinstance(keys, Handle)
        assert (keys.shape, keys.dtype, keys.device.type) == ((1, 2, 10, 16), torch.float32, "cpu")
        assert values.shape[-2] == 10
        for use in (
            lambda: keys + 1,
            lambda: keys[:, :, :3],
            lambda: keys.transpose(2, 3),
            lambda: torch.cat([keys, values]),
            lambda: keys.sum().item(),
            lambda: torch.nn.functional.scaled_dot_product_attention(rows(1), keys, values),
        ):
            with pytest.raises(ConfigError, match="wants them whole") as caught:
                use()
            assert "attn_implementation='dualblade'" in caught.value.hint
        assert "(1, 2, 10, 16)" in repr(keys)


def test_a_handle_of_rows_that_changed(cache: DualBladeCache) -> None:
    with torch.inference_mode():
        old, _ = cache.update(rows(9), rows(9), 0)
        assert [begin for begin, *_ in old.source.pieces()] == [0]
        cache.update(rows(1), rows(1), 0)
        with pytest.raises(ConfigError, match="have changed"):
            list(old.source.pieces())


# faults -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["error", "torn"])
@pytest.mark.parametrize("op", [READ, WRITE])
def test_faults_end_the_run(kind: str, op: int, tmp_path: Path) -> None:
    """With the tensor, the LBA and the NVMe status; and again whatever is asked for next."""
    with streamed("llama", torch.float32, 1, tmp_path) as cache:
        store = cache.storage.store
        room = store.tensors[TensorKey(1, "V")].segments[0].room
        queue = next(iter(cache.storage.paths.values())).queue
        queue.fault(kind, op, lo=room.offset, hi=room.offset + PAGE, count=1 << 30)
        with pytest.raises(StorageError) as caught:
            generate("llama", torch.float32, 1, 50, cache)
        error = caught.value
        assert (error.tensor, error.lba, error.sc) == ("layer 1 V", room.offset // PAGE, 0x81)
        with pytest.raises(StorageError) as again:
            cache.update(rows(1), rows(1), 0)
        assert again.value is error
