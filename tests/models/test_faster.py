# SPDX-License-Identifier: Apache-2.0
"""--stream faster: runs that choose to stream and runs that do not, by the speeds that they find."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import model_of, padded_prompt
from transformers import DynamicCache

from dualblade import DualBladeCache
from dualblade.bench.compute import compute_name, known_compute
from dualblade.cli.main import main
from dualblade.cost import ComputeRates
from dualblade.device import leave_a_cpu
from dualblade.handles import STREAMED, in_memory_cache
from dualblade.loading import load_config
from dualblade.settings import CacheSettings
from dualblade.speeds import ASSUMED, DIRECT, FILE, remember_compute, remember_storage
from dualblade.zoo import resolve

# With nothing fetched ahead one piece takes storage and compute in turn; streamed, they run side by side.
SHAPE = ["--model", "tiny", "--mem-budget", "2G", "--kv-path", "direct", "--prefetch-depth", "0"]
RUN = ["run", *SHAPE, "--prompt-len", "200", "--max-new-tokens", "6", "--verify", "--stream", "faster"]
PLAN = ["plan", *SHAPE, "--context", "206", "--stream", "faster"]
PROMPT, NEW = 90, 6


@pytest.fixture
def program(direct_dir: Path, capsys: pytest.CaptureFixture[str]):
    """program(*words) -> the JSON record, with KV files and speeds in direct_dir."""

    def call(*words: str) -> dict:
        code = main([*words, "--cache-dir", str(direct_dir), "--json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)

    return call


def remember(folder: Path, config, dtype: torch.dtype, gib_s: float) -> None:
    """A CPU that takes 0.1 s a layer, either way, and a drive."""
    for streamed in (False, True):
        rates = ComputeRates(((1, 1e-12),), scan=1e15, attention=1e15, layer_s=0.1, source="measured")
        remember_compute(folder, compute_name(config, dtype, streamed), rates)
    remember_storage(folder, DIRECT, None, "bench io", read=gib_s, write=gib_s)


def remember_tiny(folder: Path, gib_s: float) -> None:
    remember(folder, load_config(resolve("tiny"), shapes_only=False), torch.bfloat16, gib_s)


def test_a_run_that_streams(program, direct_dir: Path) -> None:
    """A drive so slow that a token waits as long for it as it computes; half of that is saved."""
    remember_tiny(direct_dir, 0.001)
    planned = program(*PLAN)
    assert planned["attention"] == "streamed"
    choice = planned["stream_choice"]
    assert choice["attention"] == "streamed"
    assert choice["one_piece"]["decode_s"] > 1.5 * choice["streamed"]["decode_s"]
    assert choice["streamed"]["decode_s"] == planned["predicted_decode_s_per_token"]
    done = program(*RUN)
    assert done["verified"] is True
    assert done["pipeline"]["attention"] == "streamed"
    assert done["pipeline"]["stream_choice"]["attention"] == "streamed"
    assert done["prediction"]["compute_rates"]["source"] == "measured"


def test_a_run_that_does_not(program, direct_dir: Path) -> None:
    """The same with a fast drive, where there is nothing to save. What --stream auto gives, to the bit."""
    remember_tiny(direct_dir, 100.0)
    planned = program(*PLAN)
    assert (planned["attention"], planned["stream_choice"]["attention"]) == ("one-piece", "one-piece")
    assert "too little to give up exact bits for" in planned["stream_choice"]["reason"]
    done = program(*RUN)
    assert done["verified"] is True
    assert done["pipeline"]["attention"] == "one-piece"
    assert done["token_ids"] == program(*RUN, "--stream", "auto")["token_ids"]


def test_speeds_that_nobody_measured(program, direct_dir: Path) -> None:
    """One piece, and the run measures the CPU both ways, for the next one."""
    before = program(*PLAN)
    assert before["attention"] == "one-piece"
    assert "the speeds are not all measured: 1 GiB/s on the direct path" in before["stream_choice"]["reason"]
    assert not (direct_dir / FILE).exists()
    done = program(*RUN)
    assert done["pipeline"]["stream_choice"]["reason"] == before["stream_choice"]["reason"]
    remember_storage(direct_dir, DIRECT, None, "bench io", read=0.0001, write=1.0)
    after = program(*PLAN)["stream_choice"]
    assert after["one_piece"]["unmeasured"] == after["streamed"]["unmeasured"] == []
    assert after["streamed"]["decode_s"] < after["one_piece"]["decode_s"]


def test_it_is_said_in_words(direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remember_tiny(direct_dir, 0.001)
    for words in (PLAN, RUN):
        assert main([*words, "--cache-dir", str(direct_dir)]) == 0
        out = capsys.readouterr()
        said = "--stream faster: attention streamed, because a token is predicted to take "
        assert said in (out.out if words is PLAN else out.err)
    assert main([*PLAN, "--stream", "auto", "--cache-dir", str(direct_dir)]) == 0
    assert "--stream faster" not in capsys.readouterr().out


def test_a_prompt_that_takes_longer_streamed(program, direct_dir: Path) -> None:
    """Each of its chunks reads the older rows again; a few tokens do not win that back, more of them do."""
    remember_tiny(direct_dir, 0.0001)
    chunks = ["--prefill-chunk", "20"]
    planned = program(*PLAN, *chunks)["stream_choice"]
    assert planned["attention"] == "streamed", "for who asks for many"
    assert "; with its prompt it pays from " in planned["reason"]
    few = program(*RUN, *chunks)["pipeline"]
    assert few["attention"] == few["stream_choice"]["attention"] == "one-piece"
    assert "but the prompt takes longer: it pays from " in few["stream_choice"]["reason"]
    remember_tiny(direct_dir, 0.0001)
    many = program(*RUN, *chunks, "--max-new-tokens", "40")["pipeline"]
    assert many["attention"] == many["stream_choice"]["attention"] == "streamed"


def test_a_model_that_cannot_stream(program, direct_dir: Path) -> None:
    remember_tiny(direct_dir, 0.001)
    done = program(*RUN, "--attention", "eager")
    assert done["pipeline"]["attention"] == "one-piece"
    assert done["pipeline"]["stream_choice"]["reason"] == "this model's attention cannot be streamed"


def test_threads_that_spdk_polls_with(tmp_path: Path) -> None:
    """A run on SPDK leaves its polling a CPU, and what it measured then is what its plan finds."""
    config = load_config(resolve("tiny"), shapes_only=False)
    polled, filed = (
        CacheSettings.checked(mem_budget="1G", nvme=nvme, cache_dir=tmp_path)
        for nvme in ("trtype:VFIOUSER traddr:/nowhere", None)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with leave_a_cpu(True):
            remember(tmp_path, config, torch.bfloat16, 1.0)
        sources = [known_compute(config, torch.bfloat16, False, each).source for each in (polled, filed)]
    finally:
        torch.set_num_threads(before)
    assert sources == ["run", ASSUMED]


# from Python --------------------------------------------------------------------------------


def cache_of(folder: Path, attention: str | None, **more) -> DualBladeCache:
    options = {"max_tokens": PROMPT + NEW, "batch_size": 1, "prefetch_depth": 0} | more
    return DualBladeCache(
        model_of("llama", torch.float32, attention).config, mem_budget="8G", kv_path="direct",
        capacity="64M", stream="faster", dtype=torch.float32, cache_dir=folder, **options,
    )  # fmt: skip


def generate(cache, attention: str | None) -> torch.Tensor:
    prompt = padded_prompt(1, PROMPT)
    model = model_of("llama", torch.float32, attention)
    return model.generate(**prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("gib_s", [0.0001, 100.0])
def test_a_cache_that_is_asked(gib_s: float, direct_dir: Path) -> None:
    config = model_of("llama", torch.float32, STREAMED).config
    remember(direct_dir, config, torch.float32, gib_s)
    with cache_of(direct_dir, STREAMED) as cache:
        got = generate(cache, STREAMED)
        pipeline, chunks = cache.report()["pipeline"], cache.storage.chunks
    expected = "streamed" if gib_s < 1 else "one-piece"
    assert pipeline["attention"] == pipeline["stream_choice"]["attention"] == expected
    assert torch.equal(got, generate(in_memory_cache(config, chunks), STREAMED))


@pytest.mark.parametrize(
    ("attention", "more", "reason"),
    [
        (None, {}, "this model's attention cannot be streamed"),
        (STREAMED, {"max_tokens": None}, "max_tokens was not given"),
    ],
)
def test_a_cache_that_stays_in_one_piece(
    attention: str | None, more: dict, reason: str, direct_dir: Path
) -> None:
    config = model_of("llama", torch.float32, attention).config
    remember(direct_dir, config, torch.float32, 0.0001)
    with cache_of(direct_dir, attention, **more) as cache:
        got = generate(cache, attention)
        pipeline = cache.report()["pipeline"]
    assert (pipeline["attention"], pipeline["stream_choice"]["reason"]) == ("one-piece", reason)
    assert torch.equal(got, generate(DynamicCache(config=config), attention))
