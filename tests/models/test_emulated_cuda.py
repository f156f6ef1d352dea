# SPDX-License-Identifier: Apache-2.0
"""Generation whose K and V are on an emulated CUDA device: every logit as with transformers' own cache, while
copies take their time. What a GPU does is tested in tests/gpu."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_cuda import Driver, EmulatedCuda
from modes import EVERY_MODE
from test_exact import NEW, PROMPT, Way, assert_same, kv_bytes, model_of
from test_streamed import assert_streamed_bits

from dualblade import DualBladeCache
from dualblade.bench.step import StepBench, run_step_bench
from dualblade.emulate import EmulatedTarget
from dualblade.errors import ConfigError
from dualblade.settings import CacheSettings
from dualblade.targets import open_target
from dualblade.units import MIB
from dualblade.volume import Volume

pytestmark = pytest.mark.needs("cc", "uring", "o_direct")


@pytest.fixture
def emulated(cuda: Driver, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Every cache of the test is on the device."""
    cuda.script(delay_us=50, jitter_us=200)
    made = lambda where, dtype: EmulatedCuda(dtype, cuda)  # noqa: E731
    monkeypatch.setattr("dualblade.hf.device_for", made)
    return cuda


def cache_of(way: Way, folder: Path, **options: Any) -> DualBladeCache:
    return DualBladeCache(
        model_of(way.family, way.dtype).config, mem_budget="8G", max_tokens=PROMPT + NEW,
        batch_size=way.batch, dtype=way.dtype, cache_dir=folder, **options,
    )  # fmt: skip


@pytest.mark.parametrize("kv_path", ["auto", "direct", "page-cache"])
@pytest.mark.parametrize(
    ("family", "dtype", "batch", "chunk"),
    [
        ("llama", torch.float32, 1, None),
        ("qwen3", torch.bfloat16, 4, 50),
        ("opt", torch.float32, 4, None),
        ("gemma2", torch.bfloat16, 1, 50),
    ],
)
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_exact(
    mode: str,
    family: str,
    dtype: torch.dtype,
    batch: int,
    chunk: int | None,
    kv_path: str,
    emulated: Driver,
    direct_dir: Path,
) -> None:
    way = Way(family, dtype, batch, False, chunk)
    copied = emulated.counts()["copied_bytes"]
    share = kv_bytes(way) // 3 if kv_path == "auto" else None
    options = {"kv_path": kv_path, "page_cache_budget": share, "pipeline": mode}
    with cache_of(way, direct_dir, **options) as cache:
        assert_same(way, cache)
        paths = cache.report()["paths"].values()
        read = sum(path["read_bytes"] for path in paths)
        written = sum(path["write_bytes"] for path in paths)
    assert 0 < read <= emulated.counts()["copied_bytes"] - copied
    assert written


@pytest.mark.parametrize("unified", [False, True])
def test_checksums_and_no_prefetch(unified: bool, emulated: Driver, direct_dir: Path) -> None:
    emulated.script(delay_us=50, jitter_us=200, integrated=unified)
    way = Way("llama3-rope", torch.bfloat16, 4, True, 50)
    with cache_of(way, direct_dir, kv_path="direct", checksum=True, prefetch_depth=0) as cache:
        assert_same(way, cache)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_streamed(family: str, emulated: Driver, direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualblade.pipeline.STREAM_CHUNK", 1)
    assert_streamed_bits(family, torch.bfloat16, 2, 50, direct_dir)


@pytest.mark.needs("spdk")
@pytest.mark.parametrize("transport", ["vfio-user", "tcp"])
def test_spdk_feeds_it(transport: str, emulated: Driver, direct_dir: Path) -> None:
    way = Way("llama", torch.float32, 1, False, 50)
    with EmulatedTarget(memory_mib=160, hugepages=False) as target:
        name = target.export(target.malloc("medium", 64 * MIB), transport)
        with open_target(name, capacity=None, cache_dir=Path()) as opened:
            Volume.create(opened.queue, opened.capacity)
        with cache_of(way, direct_dir, kv_path="direct", nvme=name) as cache:
            assert_same(way, cache)


def test_bench_step_tells_the_copies(emulated: Driver, tmp_path: Path) -> None:
    chosen = CacheSettings.checked(mem_budget="4G", kv_path="direct", nvme="mem:64M", cache_dir=tmp_path)
    record, _ = run_step_bench(StepBench("tiny", chosen, context=300, rounds=1), lambda text: None)
    assert record["copy_s"] > 0
    assert record["overlap_efficiency"] > 0


def test_memory_that_cannot_be_pinned_is_told(emulated: Driver, direct_dir: Path) -> None:
    emulated.fail("cuMemHostRegister_v2", 1, code=2)
    with pytest.raises(ConfigError, match="cannot be pinned"):
        cache_of(Way("llama", torch.float32, 1, False, None), direct_dir)
