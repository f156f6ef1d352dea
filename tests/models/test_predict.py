# SPDX-License-Identifier: Apache-2.0
"""Predictions: what they are made of, and that they are of the size of what then happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import CONFIGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, MixtralConfig

from dualblade.bench.compute import measure_compute
from dualblade.cli.main import main
from dualblade.loading import dummy_model
from dualblade.models import empty_model
from dualblade.predict import model_shape
from dualblade.speeds import ASSUMED, DIRECT, FILE, remember_storage

SHAPE = ["--model", "tiny", "--mem-budget", "2G", "--kv-path", "direct"]


@pytest.fixture
def program(direct_dir: Path, capsys: pytest.CaptureFixture[str]):
    def call(*words: str) -> dict:
        code = main([*words, "--cache-dir", str(direct_dir), "--json"])
        out = capsys.readouterr()
        assert code == 0, out.err
        return json.loads(out.out)

    return call


def test_run_and_then_plan(program, direct_dir: Path) -> None:
    shape = [*SHAPE, "--prefill-chunk", "256"]  # one prompt may fit one pass where the other takes two
    unknown = program("plan", *shape, "--context", "600")
    assert unknown["prediction"]["compute_rates"]["source"] == ASSUMED
    assert len(unknown["prediction"]["assumed"]) == 2
    assert not (direct_dir / FILE).exists()
    done = program("run", *shape, "--prompt-len", "590", "--max-new-tokens", "10")
    assert done["prediction"]["compute_rates"]["source"] == "measured"
    known = program("plan", *shape, "--context", "600")
    assert known["prediction"]["compute_rates"]["source"] == "run"
    for name in ("predicted_prefill_s", "predicted_decode_s_per_token"):
        assert known[name] == pytest.approx(done[name], rel=0.2), "the same rates, nearly the same tokens"


def test_the_size_is_right(program) -> None:
    """No measure of how good it is: tests run on busy machines."""
    done = program("run", *SHAPE, "--prompt-len", "2000", "--max-new-tokens", "20")
    for ratio in (
        done["prefill_s"] / done["predicted_prefill_s"],
        done["decode_s_per_token"] / done["predicted_decode_s_per_token"],
    ):
        assert 1 / 30 < ratio < 30


def test_a_slow_drive_decides(program, direct_dir: Path) -> None:
    remember_storage(direct_dir, DIRECT, None, "bench io", read=0.001, write=0.001)
    planned = program("plan", *SHAPE, "--context", "600")
    decode = planned["prediction"]["decode"]
    assert decode["seconds"] == decode["storage_s"] > decode["compute_s"]
    nbytes = planned["paths"]["direct"]["bytes"]
    assert planned["storage_s_per_token"] == pytest.approx(nbytes / (0.001 * 2**30))
    assert any("whole context again" in text for text in planned["prediction"]["losses"])
    rate = planned["prediction"]["storage_rates"]["direct_read_gib_s"]
    assert rate == {"value": pytest.approx(0.001), "source": "bench io"}


def test_groups_add_up(program) -> None:
    words = ["plan", *SHAPE, "--context", "600", "--batch-size", "4", "--group-size"]
    halves, whole = program(*words, "2"), program(*words, "4")
    assert halves["predicted_decode_s_per_token"] >= whole["predicted_decode_s_per_token"]
    assert halves["prediction"]["losses"] == [] or whole["prediction"]["losses"]


def test_it_is_said_in_words(capsys: pytest.CaptureFixture[str], direct_dir: Path) -> None:
    assert main(["plan", *SHAPE, "--context", "600", "--cache-dir", str(direct_dir)]) == 0
    out = capsys.readouterr().out
    assert "predicted: prefill " in out
    assert "1 GiB/s on the direct path; `dualblade-spdk bench io` measures it" in out
    assert "offloading will not pay: the budget holds the whole KV cache" in out
    words = ["run", *SHAPE, "--prompt-len", "100", "--max-new-tokens", "3", "--cache-dir", str(direct_dir)]
    assert main(words) == 0
    assert "(predicted " in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "gemma2"])
def test_the_work_is_what_torch_counts(family: str) -> None:
    """Operations of a token's products, and of attention to a cache."""
    config = CONFIGS[family]()
    model = dummy_model(config, torch.float32, "sdpa", 0)
    shape = model_shape(config, model, 4)
    assert shape == model_shape(config, empty_model(config, torch.float32), 4), "with weights or without"
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(input_ids=torch.ones(1, 1, dtype=torch.long), past_key_values=DynamicCache(config=config))
    attention = sum(4 * layer.width for layer in shape.attention)
    products = 2 * (shape.layer_parameters + shape.head_parameters)
    assert counter.get_total_flops() == pytest.approx(products + attention, rel=0.02)


def test_of_experts_only_those_count_that_a_token_is_sent_to() -> None:
    def parameters(experts: int, used: int) -> int:
        more = {"num_local_experts": experts, "num_experts_per_tok": used}
        config = MixtralConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=99, **more
        )
        return model_shape(config, empty_model(config, torch.float32), 4).layer_parameters

    two, four, two_of_four = parameters(2, 2), parameters(4, 4), parameters(4, 2)
    router = 2 * 64 * 2
    assert two_of_four == two + router
    assert four > two_of_four + router


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_is_measured(family: str, streamed: bool) -> None:
    config = CONFIGS[family]()
    model = dummy_model(config, torch.bfloat16, "sdpa", 0)
    rates = measure_compute(model, model_shape(config, model, 2), batch=3, streamed=streamed)
    assert [rows for rows, _ in rates.linear] == [1, 3, 4, 16, 64, 256]
    assert min(rates.scan, rates.attention, *(seconds for _, seconds in rates.linear)) > 0
    assert rates.layer_s >= 0
