# SPDX-License-Identifier: Apache-2.0
"""Dummy weights: every shape and FLOP of the real model, one decoder layer in memory."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from families import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from dualblade.cli.main import main
from dualblade.handles import in_memory_cache
from dualblade.layers import layer_shapes
from dualblade.loading import dummy_model
from dualblade.models import decoder_layers, empty_model, weight_bytes
from dualblade.runner import Generation, Sampling, random_prompt

PROGRAM = [sys.executable, "-m", "dualblade.cli.main"]
MIB = 1 << 20
# A head large enough that one copy of it for each sequence would break the budget below.
WIDE = LlamaConfig(
    vocab_size=64_000,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    dtype="bfloat16",
)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A folder that holds a configuration and nothing else."""
    folder = tmp_path / "wide"
    folder.mkdir()
    WIDE.architectures = ["LlamaForCausalLM"]
    WIDE.save_pretrained(folder)
    return folder


def storages(model: torch.nn.Module) -> int:
    """Bytes really allocated for parameters."""
    return sum(
        {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values()
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_computes(family: str) -> None:
    config = CONFIGS[family]()
    model = dummy_model(config, torch.bfloat16, "sdpa", seed=1)
    planned = weight_bytes(empty_model(config, torch.bfloat16, shared=True))
    assert storages(model) == planned < weight_bytes(empty_model(config, torch.bfloat16))
    prompt = random_prompt(2, 30, config.vocab_size, seed=3)
    generation = Generation(
        model, in_memory_cache(config), prompt, Sampling(), frozenset(), chunk=20, span=20
    )
    assert [len(row) for row in generation.run(3).tokens] == [3, 3]
    with torch.inference_mode():
        assert bool(model(input_ids=prompt.ids).logits.isfinite().all())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_one_layer_serves_all_and_each_keeps_its_place(family: str) -> None:
    config = CONFIGS[family]()
    layers = decoder_layers(dummy_model(config, torch.bfloat16, "sdpa", seed=1))
    first = dict(layers[0].named_parameters())
    for layer in layers:
        assert all(parameter is first[name] for name, parameter in layer.named_parameters())
    assert [layer.self_attn.layer_idx for layer in layers] == list(range(len(layer_shapes(config))))


def test_flops_are_those_of_the_real_model() -> None:
    config = CONFIGS["llama"]()
    ids = torch.arange(40)[None]
    counted = []
    for model in (
        dummy_model(config, torch.float32, "sdpa", 0),
        empty_model(config, torch.float32).to_empty(device="cpu"),
    ):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(input_ids=ids)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] > 1e6


def test_the_seed_decides() -> None:
    config = CONFIGS["llama"]()
    first, again, other = (
        dict(dummy_model(config, torch.bfloat16, "sdpa", seed).named_parameters()) for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_head_gets_plain_rows(batch: int) -> None:
    """For a strided view, of one sequence too, matmul would copy the head's weights."""
    model = dummy_model(CONFIGS["llama"](), torch.bfloat16, "sdpa", 0)
    strides = []
    model.get_output_embeddings().register_forward_hook(lambda _, args, out: strides.append(args[0].stride()))
    with torch.inference_mode():
        model(input_ids=torch.ones(batch, 30, dtype=torch.long), logits_to_keep=1)
    hidden = model.config.hidden_size
    assert strides == [(hidden, hidden, 1)]


def test_a_batch_on_two_paths_inside_the_budget(wide: Path, direct_dir: Path) -> None:
    """The large run in small: batch 8, weights whose copies would not fit, KV larger than its share."""
    command = [*PROGRAM, "run", "--model", str(wide), "--weights", "dummy", "--mem-budget", "640M"]
    command += ["--batch-size", "8", "--prompt-len", "900", "--max-new-tokens", "3", "--json"]
    command += ["--page-cache-budget", "30M"]
    command += ["--cache-dir", str(direct_dir / "kv")]
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            kinds = re.findall(r"(?:RssAnon|RssShmem|VmSwap|HugetlbPages):\s+(\d+)", status)
            peak = max(peak, sum(map(int, kinds)) << 10)
            time.sleep(0.05)
        out, err = process.communicate()
    assert process.returncode == 0, err
    assert "one decoder layer shared by all 12 layers" in err
    record = json.loads(out)
    memory, paths = record["memory"], record["paths"]
    assert peak <= 640 * MIB
    assert memory["peak_bytes"] <= 640 * MIB
    assert record["weights"] == "dummy"
    assert "text" not in record
    assert paths["page_cache"]["read_bytes"] > paths["page_cache"]["bytes"] > 0
    assert paths["direct"]["read_bytes"] > paths["direct"]["bytes"] > 0
    assert memory["kv_bytes"] == 12 * 2 * 8 * 2 * 64 * 2 * 902
    assert record["device_bytes"]["weights_bytes"] == weight_bytes(
        empty_model(WIDE, torch.bfloat16, shared=True)
    )


def planned(folder: Path, capsys: pytest.CaptureFixture[str], context: int) -> dict:
    words = ["plan", "--model", str(folder), "--weights", "dummy", "--mem-budget", "16G"]
    words += ["--page-cache-budget", "100M", "--batch-size", "8"]
    assert main([*words, "--context", str(context), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert isinstance(record, dict)
    return record


def test_plan_says_from_what_context_on_kv_goes_direct(
    wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = planned(wide, capsys, 4000)["all_in_page_cache_up_to"]
    token_bytes = 12 * 2 * 8 * 2 * 64 * 2
    assert 0.8 * 100 * MIB < last * token_bytes <= 100 * MIB
    assert planned(wide, capsys, last)["paths"]["direct"]["bytes"] == 0
    assert planned(wide, capsys, last + 1)["paths"]["direct"]["bytes"] > 0


def test_plan_says_it_in_words(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(wide), "--weights", "dummy", "--mem-budget", "16G", "--context", "300"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"up to the model's own end, 4096 tokens", out)
    assert re.search(r"device cpu: weights 1\d\d MiB, activations .*, KV ring ", out)
    assert main([*words, "--kv-path", "direct"]) == 0
    assert "--kv-path sends every tensor one way" in capsys.readouterr().out


def test_more_than_the_machine_has_is_refused(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The budget would do; memory would not."""
    words = ["plan", "--model", "qwen3-8b", "--weights", "dummy", "--mem-budget", "100000G"]
    words += ["--context", "40000", "--batch-size", "4096"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert "more are needed (weights" in err
    assert "gives" in err


def test_a_text_needs_a_tokenizer(wide: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model in (str(wide), "llama-3-8b"):
        words = ["run", "--model", model, "--weights", "dummy", "--prompt", "x", "--mem-budget", "3G"]
        assert main(words) == 2
        assert "--prompt-len" in capsys.readouterr().err


def test_no_random_text_is_shown(direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--model", "tiny", "--weights", "dummy", "--prompt", "Hello", "--mem-budget", "1G"]
    words += ["--max-new-tokens", "4", "--cache-dir", str(direct_dir)]
    assert main(words) == 0
    assert capsys.readouterr().out == ""
    assert main([*words, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert "text" not in record
    assert [len(row) for row in record["token_ids"]] == [4]
