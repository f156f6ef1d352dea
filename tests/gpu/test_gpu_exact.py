# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: the tokens of transformers' own cache, whatever the path, the dtype and the budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gpu_kit
import pytest
import torch
from gpu_kit import cache_of, generate, on_gpu
from transformers import DynamicCache

from dualblade.cli.main import main
from dualblade.device_cuda import CudaDevice
from dualblade.emulate import EmulatedTarget
from dualblade.errors import ConfigError
from dualblade.handles import STREAMED, in_memory_cache
from dualblade.targets import open_target
from dualblade.units import MIB
from dualblade.volume import Volume

pytestmark = [pytest.mark.gpu, pytest.mark.needs("gpu", "o_direct")]
FAMILIES = ["llama", "llama3-rope", "opt", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3"]
DTYPES = [torch.float32, torch.bfloat16]


def assert_same(want: Any, got: Any, dtype: torch.dtype) -> None:
    assert torch.equal(want.sequences, got.sequences)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(want.logits, got.logits, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=bound, atol=bound)


def check(
    family: str, dtype: torch.dtype, batch: int, folder: Path, chunk: int | None = None, **options: Any
) -> Any:
    model = on_gpu(family, dtype)
    want = generate(model, DynamicCache(config=model.config), batch, chunk)
    with cache_of(model, batch, folder, **options) as cache:
        assert_same(want, generate(model, cache, batch, chunk), dtype)
        return cache.report()


@pytest.mark.parametrize("kv_path", ["page-cache", "direct", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dtype: torch.dtype, kv_path: str, direct_dir: Path) -> None:
    share = "64K" if kv_path == "auto" else None
    report = check(family, dtype, 4, direct_dir, kv_path=kv_path, page_cache_budget=share)
    read = {kind: path["read_bytes"] for kind, path in report["paths"].items()}
    assert read["direct"] or kv_path == "page-cache"
    assert read["page_cache"] or kv_path == "direct"


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("checksum", [False, True])
def test_depths_and_chunks(depth: int, checksum: bool, direct_dir: Path) -> None:
    options = {"kv_path": "direct", "prefetch_depth": depth, "checksum": checksum}
    check("llama", torch.bfloat16, 2, direct_dir, 50, **options)


def test_growing_without_a_known_end(direct_dir: Path) -> None:
    options = {"max_tokens": None, "batch_size": None, "capacity": "64M"}
    check("llama", torch.float32, 2, direct_dir, 50, **options)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_streamed(family: str, batch: int, direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of a few blocks: the tokens of the same arithmetic over chunks of a cache in memory."""
    monkeypatch.setattr("dualblade.pipeline.STREAM_CHUNK", 1)
    model = on_gpu(family, torch.bfloat16, STREAMED)
    with cache_of(model, batch, direct_dir, kv_path="direct", stream="always") as cache:
        got = generate(model, cache, batch, 50)
        chunks = cache.storage.chunks
    want = generate(model, in_memory_cache(model.config, chunks), batch, 50)
    assert_same(want, got, torch.bfloat16)


def test_unified_memory(direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with one memory: kernels read the slots themselves, here through the bus."""
    unified = lambda where, dtype: CudaDevice(dtype, where, unified=True)  # noqa: E731
    monkeypatch.setattr("dualblade.hf.device_for", unified)
    check("llama", torch.float32, 2, direct_dir, kv_path="direct")


@pytest.mark.needs("spdk")
@pytest.mark.parametrize("transport", ["vfio-user", "tcp"])
def test_spdk_feeds_the_device(transport: str, direct_dir: Path) -> None:
    with EmulatedTarget(memory_mib=160, hugepages=False) as target:
        name = target.export(target.malloc("medium", 64 * MIB), transport)
        with open_target(name, capacity=None, cache_dir=Path()) as opened:
            Volume.create(opened.queue, opened.capacity)
        report = check("llama", torch.bfloat16, 2, direct_dir, kv_path="direct", nvme=name)
    assert report["paths"]["direct"]["engine"] == "spdk"


@pytest.mark.parametrize("stream", ["never", "always"])
def test_run(stream: str, direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "run",
        "--model",
        "tiny",
        "--prompt",
        "def add(a, b):",
        "--max-new-tokens",
        "24",
        "--mem-budget",
        "16G",
    ]
    where = ["--device", "cuda", "--kv-path", "direct", "--cache-dir", str(direct_dir), "--stream", stream]
    assert main([*words, *where, "--verify", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verified"]
    assert record["device"].startswith("cuda")
    on_device = record["device_bytes"]
    assert on_device["weights_bytes"] > 0
    assert on_device["kv_ring_bytes"] >= record["memory"]["staging_bytes"] // 2
    assert on_device["name"] == record["device"]


def test_a_cache_for_the_cpu_is_told(direct_dir: Path) -> None:
    model = on_gpu("llama", torch.float32)
    with (
        cache_of(model, 1, direct_dir, device="cpu") as cache,
        pytest.raises(ConfigError, match="was opened for cpu"),
    ):
        gpu_kit.generate(model, cache, 1)
