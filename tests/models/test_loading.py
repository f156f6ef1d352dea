# SPDX-License-Identifier: Apache-2.0
"""Real weights: the same as transformers loads, a tensor at a time; and what can be wrong with them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_hub
import pytest
import torch
from families import COMMON, CONFIGS, model_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig

from dualblade.cli.main import main
from dualblade.errors import ModelError
from dualblade.handles import in_memory_cache
from dualblade.loading import load_config, load_model, load_tokenizer, weight_folder
from dualblade.models import activation_bytes, last_position_only
from dualblade.runner import Generation, Sampling, encode, random_prompt
from dualblade.zoo import TINY, ModelRef
from spdk_glue import cached_bytes

REPO = "some/model"
MIB = 1 << 20


def load(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    ref = ModelRef(folder.name, str(folder))
    return load_model(ref, weight_folder(ref), load_config(ref, shapes_only=False), dtype, "sdpa")


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_like_transformers(folder: Path, dtype: torch.dtype) -> None:
    mine, theirs = load(folder, dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    got, want = tensors(mine), tensors(theirs)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
    ids = torch.arange(2, 60)[None]
    with torch.inference_mode():
        assert torch.equal(mine(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", CONFIGS)
def test_same_as_transformers_from_shards(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model_of(family, torch.bfloat16).save_pretrained(tmp_path, max_shard_size="80KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_like_transformers(tmp_path, dtype)


def test_a_bare_model_has_no_prefix(tmp_path: Path) -> None:
    model_of("opt", torch.bfloat16).model.save_pretrained(tmp_path)
    assert not any(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    assert_like_transformers(tmp_path, torch.bfloat16)


def test_pickled_weights(tmp_path: Path) -> None:
    """OPT on the hub: pytorch_model.bin, tied weights twice."""
    model = model_of("opt", torch.float16)
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert "lm_head.weight" in model.state_dict()
    assert_like_transformers(tmp_path, torch.float16)


def test_names_that_transformers_converts(tmp_path: Path) -> None:
    """Experts are stored one by one and used fused."""
    config = Qwen3MoeConfig(
        **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").keys()
    assert not stored <= model.state_dict().keys()
    assert_like_transformers(tmp_path, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda all: all.pop("model.layers.1.mlp.up_proj.weight"),
            "model.layers.1.mlp.up_proj.weight is missing",
        ),
        (lambda all: all.update(extra=torch.ones(3)), "extra has no place"),
        (
            lambda all: all.update({"model.norm.weight": torch.ones(95, dtype=torch.bfloat16)}),
            r"model.norm.weight is stored as \[95\], .* says \[96\]",
        ),
    ],
    ids=["missing", "unexpected", "mis-shaped"],
)
def test_weights_of_another_model(change: Any, words: str, tmp_path: Path) -> None:
    model_of("llama", torch.bfloat16).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    change(stored)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=words):
        load(tmp_path)


def test_a_missing_shard(tmp_path: Path) -> None:
    model_of("llama", torch.bfloat16).save_pretrained(tmp_path, max_shard_size="80KB")
    max(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="not all that its index names"):
        load(tmp_path)


MEASURE = """
import sys, torch
from pathlib import Path
from dualblade import loading, models
from dualblade.host.meminfo import process_memory
from dualblade.host.sysfs import Host
from dualblade.residency import MemoryMeter
from dualblade.zoo import ModelRef
ref, dtype = ModelRef("big", sys.argv[1]), getattr(torch, sys.argv[2])
config = loading.load_config(ref, False)
weights = models.weight_bytes(models.empty_model(config, dtype))
before = process_memory(Host()).anon
with MemoryMeter(interval_s=0.002) as meter:
    model = loading.load_model(ref, loading.weight_folder(ref), config, dtype, "sdpa")
assert sum(p.numel() * p.element_size() for p in model.parameters()) == weights
print(weights, meter.peak_bytes - before - weights)
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 MB of a random Llama in three shards, bfloat16."""
    folder = tmp_path_factory.mktemp("big")
    sizes = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32000}
    config = LlamaConfig(**COMMON | sizes | {"num_attention_heads": 12, "head_dim": 128})
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="250MB"
    )
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened)  # dirty pages cannot be dropped
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_host_memory_while_loading(dtype: str, big: Path) -> None:
    """The promise is 1 GiB beyond what stays; a step of 64 MiB and some heap is what is really used."""
    command = [sys.executable, "-c", MEASURE, str(big), dtype]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weights, beyond = map(int, done.stdout.split())
    assert weights > 550e6
    assert beyond < 160 * MIB
    for shard in big.glob("*.safetensors"):
        with shard.open("rb") as opened:
            assert cached_bytes(opened.fileno()) < MIB


# prompts ------------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<it>{% endif %}"
)


def test_chat_is_the_template_and_a_prompt_is_raw(tmp_path: Path) -> None:
    folder = tmp_path / "chatty"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(ModelRef("chatty", str(folder)))
    raw, chat = (encode(tokenizer, ["Hello"], chat=chat) for chat in (False, True))
    assert raw.ids.tolist() == tokenizer(["Hello"])["input_ids"]
    assert tokenizer.decode(raw.ids[0], skip_special_tokens=True) == "Hello"
    assert tokenizer.decode(chat.ids[0]) == "<user>Hello<it>"


def test_chat_without_a_template(direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--mem-budget", "1G", "--cache-dir", str(direct_dir), "--chat"]
    assert main([*words, "--prompt", "x"]) == 1
    assert "no chat template" in capsys.readouterr().err
    assert main([*words, "--prompt-len", "5"]) == 2


class AllLogits(LlamaForCausalLM):
    """A model that cannot leave logits out."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None
    ):
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values=past_key_values, use_cache=use_cache
        )


def test_models_that_give_all_logits() -> None:
    torch.manual_seed(2)
    model = AllLogits(CONFIGS["llama"]()).eval()
    asked: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, out: asked.append(out.shape[1]))
    answers = []
    for cls in (AllLogits, LlamaForCausalLM):
        model.__class__ = cls
        prompt = random_prompt(2, 30, 199, seed=1)
        made = Generation(
            model, in_memory_cache(model.config), prompt, Sampling(), frozenset(), chunk=20, span=20
        )
        answers.append(made.run(4).tokens)
    assert answers[0] == answers[1]
    assert asked == [20, 10, 1, 1, 1] + 5 * [1]
    assert not last_position_only(AllLogits(model.config))
    sizes = [activation_bytes(model.config, 1, 20, 30, 4, all_logits=yes) for yes in (True, False)]
    assert sizes[0] - sizes[1] == 19 * 199 * 12


# the hub ------------------------------------------------------------------------------------


ASK = """
import sys
from dualblade import hub
from dualblade.errors import ModelError
try:
    print(getattr(hub, sys.argv[1])(sys.argv[2]))
except ModelError as error:
    print("error:", error.message)
    print("hint:", error.hint)
"""


def ask(what: str, url: str, home: Path, repo: str = REPO) -> str:
    """In a process of its own: the library reads its settings once."""
    environment = os.environ | {"HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_TOKEN", None)
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", ASK, what, repo], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (
            (403, "GatedRepo"),
            ["is gated", "https://huggingface.co/some/model", "HF_TOKEN", "--weights dummy"],
        ),
        ((401, "GatedRepo"), ["is gated", "HF_TOKEN"]),
        ((401, "RepoNotFound"), ["there is none, or it is private", "HF_TOKEN"]),
        ((404, "RepoNotFound"), ["there is none, or it is private", "local folder"]),
        ((403, ""), ["HTTP 403", "HF_TOKEN", "local folder"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_hub_that_refuses(refuse: tuple[int, str], words: list[str], tmp_path: Path) -> None:
    with fake_hub.serving(TINY, refuse=refuse) as hub:
        answer = ask("small_files", hub.url, tmp_path)
    assert answer.count("\n") == 1
    for word in ["error:", "hint:", *words]:
        assert word in answer


def test_a_disk_too_small_is_told_before_the_download(tmp_path: Path) -> None:
    with fake_hub.serving(TINY, size=1 << 60) as hub:
        answer = ask("weight_folder", hub.url, tmp_path)
        assert hub.downloads == []
    for word in (
        "the disk is too small",
        "1 EiB" if "EiB" in answer else "1048576 TiB",
        "free",
        "HF_HOME",
        "dummy",
    ):
        assert word in answer


def test_the_second_time_needs_no_hub(tmp_path: Path) -> None:
    with fake_hub.serving(TINY) as hub:
        small = Path(ask("small_files", hub.url, tmp_path))
        assert "model.safetensors" not in hub.downloads
        weights = Path(ask("weight_folder", hub.url, tmp_path))
        assert hub.downloads.count("model.safetensors") == 1
    assert (small / "config.json").read_bytes() == (TINY / "config.json").read_bytes()
    assert (weights / "model.safetensors").read_bytes() == (TINY / "model.safetensors").read_bytes()
    assert Path(ask("small_files", "http://127.0.0.1:9", tmp_path)) == small
    assert Path(ask("weight_folder", "http://127.0.0.1:9", tmp_path)) == weights


def test_a_silent_hub_is_given_up_in_seconds(tmp_path: Path) -> None:
    with fake_hub.silence() as url:
        begun = time.monotonic()
        answer = ask("small_files", url, tmp_path)
    assert "cannot be reached" in answer
    assert time.monotonic() - begun < 20


def test_run_without_a_network_ends_in_one_line(tmp_path: Path) -> None:
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "dualblade.cli.main", "run", "--model", "llama-3-8b", "--prompt", "x"]
    begun = time.monotonic()
    done = subprocess.run([*command, "--mem-budget", "20G"], env=environment, capture_output=True, text=True)
    assert time.monotonic() - begun < 30
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error:", "hint:"))]
    assert len(lines) == 2
    assert "meta-llama/Meta-Llama-3-8B is not in the local copy" in lines[0]
    assert "--weights dummy" in lines[1]
    assert "Traceback" not in done.stderr


def test_an_index_names_the_files(tmp_path: Path) -> None:
    """A file beside the shards that the index does not name is another form of the same weights."""
    model_of("llama", torch.bfloat16).save_pretrained(tmp_path, max_shard_size="80KB")
    named = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    shutil.copy(tmp_path / max(named), tmp_path / "consolidated.safetensors")
    from dualblade.hub import weight_files

    assert {file.name for file in weight_files(tmp_path)} == named
