# SPDX-License-Identifier: Apache-2.0
"""Batches in groups: each group gives the tokens of itself in memory, and they come in the batch's order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import CONFIGS, model_of
from transformers import LlamaConfig

from dualblade import DualBladeCache
from dualblade.cli.main import main
from dualblade.errors import ConfigError
from dualblade.handles import in_memory_cache
from dualblade.runner import Generation, Prompt, Sampling, random_prompt
from dualblade.units import MIB

# A layer's K and V of one sequence are 4 MiB at 512 tokens.
WIDE_KV = LlamaConfig(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    max_position_embeddings=1024,
    dtype="bfloat16",
)
SAMPLED = ["--temperature", "0.9", "--top-k", "50", "--seed", "7"]


@pytest.fixture
def program(direct_dir: Path, capsys: pytest.CaptureFixture[str]):
    """program(*words) -> the JSON record, with KV files below direct_dir."""

    def call(*words: str) -> dict:
        code = main([*words, "--cache-dir", str(direct_dir / "kv"), "--json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)

    return call


@pytest.fixture
def wide(tmp_path: Path) -> str:
    folder = tmp_path / "wide"
    WIDE_KV.architectures = ["LlamaForCausalLM"]
    WIDE_KV.save_pretrained(folder)
    return str(folder)


def run_words(*more: str) -> list[str]:
    return ["run", "--model", "tiny", "--prompt-len", "90", "--mem-budget", "2G", "--kv-path", "direct",
            "--nvme", "mem:64M", "--max-new-tokens", "6", *more]  # fmt: skip


@pytest.mark.parametrize(("batch", "size", "groups"), [(5, 2, [2, 2, 1]), (4, 3, [2, 2]), (3, 8, [3])])
def test_groups_of_a_size(program, batch: int, size: int, groups: list[int]) -> None:
    words = run_words("--batch-size", str(batch), "--group-size", str(size), "--verify", *SAMPLED)
    record = program(*words)
    assert record["verified"] is True
    assert [group["sequences"] for group in record["groups"]] == groups
    assert (record["batch_size"], record["group_size"]) == (batch, groups[0])
    assert [len(row) for row in record["token_ids"]] == [6] * batch
    for name in ("prefill_s", "decode_s", "decode_s_per_token"):
        assert record[name] == pytest.approx(sum(group[name] for group in record["groups"]))
    tensors = record["paths"]["direct"]
    assert tensors["write_bytes"] >= len(groups) * tensors["bytes"] // 2, "the same rooms, written by each"


@pytest.mark.parametrize("more", [["--kv-path", "page-cache"], ["--stream", "always"], ["--checksum"]])
def test_groups_over_every_kind_of_store(program, more: list[str]) -> None:
    words = run_words("--batch-size", "3", "--group-size", "2", "--verify", *SAMPLED, *more)
    record = program(*words)
    assert record["verified"] is True
    assert [group["sequences"] for group in record["groups"]] == [2, 1]


def test_the_seed_and_the_groups_decide(program) -> None:
    words = run_words("--batch-size", "4", "--group-size", "2", *SAMPLED)
    first, again = (program(*words)["token_ids"] for _ in range(2))
    whole = program(*run_words("--batch-size", "4", *SAMPLED))["token_ids"]
    assert first == again
    assert first[:2] != first[2:]
    assert len(whole) == 4


def test_groups_in_greedy_runs_give_the_rows_of_the_batch(program) -> None:
    """In float32 the tokens of one sequence do not hang on those beside it."""
    words = run_words("--batch-size", "5", "--dtype", "float32")
    assert program(*words, "--group-size", "2")["token_ids"] == program(*words)["token_ids"]


def taken(record: dict) -> int:
    memory = record["memory"]
    return sum(memory[f"{name}_bytes"] for name in ("weights", "runtime", "activation", "staging", "tail"))


def test_a_batch_that_does_not_fit_at_once(program, wide: str) -> None:
    """The budget of one sequence and some: groups, each with layers in one piece, instead of streaming."""
    shape = ["--model", wide, "--weights", "dummy", "--kv-path", "direct", "--nvme", "mem:512M"]
    length = ["--prompt-len", "500", "--max-new-tokens", "12"]
    one = program("plan", *shape, "--context", "512", "--mem-budget", "4G", "--prefetch-depth", "0")
    budget = ["--mem-budget", f"{taken(one) // MIB + 60}M", "--batch-size", "16"]
    planned = program("plan", *shape, "--context", "512", *budget)
    assert planned["attention"] == "one-piece"
    assert planned["groups"] > 1
    assert 1 <= planned["group_size"] < 16
    done = program("run", *shape, *length, *budget, "--verify")
    assert done["verified"] is True
    assert done["pipeline"]["attention"] == "one-piece"
    assert len(done["groups"]) > 1
    assert len(done["token_ids"]) == 16


def test_plan_says_it_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "tiny", "--mem-budget", "2G", "--context", "200", "--batch-size", "7"]
    assert main([*words, "--group-size", "3"]) == 0
    assert "3 groups of at most 3 sequences, one after another" in capsys.readouterr().out
    assert main(words) == 0
    assert "groups of" not in capsys.readouterr().out


@pytest.mark.parametrize("family", CONFIGS)
def test_one_cache_for_groups_of_two_sizes(family: str, tmp_path: Path) -> None:
    """Also what a model keeps beside the offloaded layers begins anew, in the new size."""
    model = model_of(family, torch.float32)
    prompt = random_prompt(3, 60, model.config.vocab_size, seed=1)

    def generate(cache, part: slice) -> list[list[int]]:
        rows = Prompt(prompt.ids[part], prompt.mask[part])
        return Generation(model, cache, rows, Sampling(), frozenset(), 32, 64).run(5).tokens

    options = {"max_tokens": 65, "batch_size": 2, "dtype": torch.float32, "cache_dir": tmp_path}
    with DualBladeCache(model.config, nvme="mem:64M", kv_path="direct", mem_budget="8G", **options) as cache:
        for part in (slice(0, 2), slice(2, 3), slice(0, 2)):
            cache.begin(len(prompt.ids[part]))
            assert generate(cache, part) == generate(in_memory_cache(model.config), part)
        with pytest.raises(ConfigError, match="room for 2 sequences, and 3"):
            cache.begin(3)
