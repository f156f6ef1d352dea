# SPDX-License-Identifier: Apache-2.0
"""The aliases: their shapes are those of the published models, and `plan` needs nothing else."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from dualblade.cli.main import main
from dualblade.errors import ModelError
from dualblade.layers import kv_specs, layer_shapes
from dualblade.loading import load_config
from dualblade.models import context_limit, empty_model, pick_dtype, weights_of
from dualblade.zoo import ALIASES, TINY, resolve

# parameters in millions, bytes of KV a token at two bytes a number, and positions, as published
PUBLISHED = {
    "llama-3-8b": (8_030, 32 * 2 * 8 * 128 * 2, 8_192),
    "llama-3.1-8b": (8_030, 32 * 2 * 8 * 128 * 2, 131_072),
    "llama-3.2-1b": (1_236, 16 * 2 * 8 * 64 * 2, 131_072),
    "llama-3.2-3b": (3_213, 28 * 2 * 8 * 128 * 2, 131_072),
    "opt-125m": (125.2, 12 * 2 * 768 * 2, 2_048),
    "opt-1.3b": (1_316, 24 * 2 * 2048 * 2, 2_048),
    "opt-6.7b": (6_658, 32 * 2 * 4096 * 2, 2_048),
    "qwen2.5-7b": (7_616, 28 * 2 * 4 * 128 * 2, 131_072),
    "qwen3-8b": (8_191, 36 * 2 * 8 * 128 * 2, 40_960),
    "mistral-7b": (7_248, 32 * 2 * 8 * 128 * 2, 32_768),
}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a connection to {address} was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where, **_: refuse(socket.socket(), where))


def test_every_alias_is_known_here() -> None:
    assert set(PUBLISHED) | {"tiny"} == set(ALIASES)


@pytest.mark.parametrize("alias", PUBLISHED)
def test_shapes_are_the_published_ones(alias: str, no_network: None) -> None:
    config = load_config(resolve(alias), shapes_only=True)
    millions, token_bytes, positions = PUBLISHED[alias]
    weights = weights_of(empty_model(config, torch.bfloat16))
    assert sum(weight.empty.numel() for weight in weights) == pytest.approx(millions * 1e6, rel=0.01)
    assert sum(spec.token_bytes for spec in kv_specs(config, 1, 100, 2)) == token_bytes
    assert context_limit(config) == positions
    assert all(shape.offloaded for shape in layer_shapes(config))
    assert pick_dtype(config, None) is (torch.float16 if alias.startswith("opt") else torch.bfloat16)


@pytest.mark.parametrize(("alias", "factor"), [("llama-3.1-8b", 8.0), ("llama-3.2-1b", 32.0)])
def test_llama_scales_its_positions(alias: str, factor: float) -> None:
    """Beyond the 8192 positions of its first training the slow frequencies are slower by `factor`."""
    scaled = empty_model(load_config(resolve(alias), shapes_only=True), torch.bfloat16)
    plain = empty_model(load_config(resolve("llama-3-8b"), shapes_only=True), torch.bfloat16)
    slowest = [dict(model.named_buffers())["model.rotary_emb.inv_freq"][-1] for model in (scaled, plain)]
    head_dims = [model.config.head_dim for model in (scaled, plain)]
    expected = 500_000.0 ** -((head_dims[0] - 2) / head_dims[0]) / factor
    assert float(slowest[0]) == pytest.approx(expected, rel=1e-4)
    assert float(slowest[1]) == pytest.approx(500_000.0 ** -((head_dims[1] - 2) / head_dims[1]), rel=1e-4)


@pytest.mark.parametrize("weights", ["auto", "dummy"])
def test_plan_needs_no_network(
    weights: str, no_network: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", "qwen3-8b", "--mem-budget", "40G", "--context", "4000", "--weights", weights]
    words += ["--dtype", "float16", "--json", "--cache-dir", str(tmp_path)]
    code, record = main(words), capsys.readouterr()
    if code:  # sixteen GiB of weights are refused where the machine has less
        assert weights == "auto"
        assert "gives" in record.err
        return
    planned = json.loads(record.out)
    assert planned["kv_bytes"] == 4000 * PUBLISHED["qwen3-8b"][1]
    assert planned["device_bytes"]["weights_bytes"] == planned["memory"]["weights_bytes"]
    layer, ends = 192_946_432, 2 * 151_936 * 4096 + 4096
    count = 36 if weights == "auto" else 1
    assert planned["memory"]["weights_bytes"] == 2 * (count * layer + ends)


def test_names(tmp_path: Path) -> None:
    assert resolve("llama-3-8b").source == "meta-llama/Meta-Llama-3-8B"
    assert resolve(str(tmp_path)).folder == tmp_path
    assert resolve("someone/model").source == "someone/model"
    assert resolve("someone/model").shapes is None
    assert resolve("tiny").folder == TINY
    for odd in ("lama-3", "a/b/c", "./nowhere", "/nowhere/x"):
        with pytest.raises(ModelError, match="unknown model"):
            resolve(odd)
