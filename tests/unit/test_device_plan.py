# SPDX-License-Identifier: Apache-2.0
"""A plan for a device with memory of its own: what counts where."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dualblade import session
from dualblade.device_cuda import Accelerator
from dualblade.errors import BudgetError, ConfigError
from dualblade.forecast import device_bytes
from dualblade.run_options import RunOptions
from dualblade.session import Session
from dualblade.settings import CacheSettings
from dualblade.units import GIB, MIB

LARGE = Accelerator("cuda:0", "a large one", 80 * GIB, 80 * GIB, unified=False)


def made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: Accelerator | None, device: str = "cuda"
) -> Session:
    monkeypatch.setattr(session, "find_accelerator", lambda wanted: found)
    settings = CacheSettings.checked(mem_budget="8G", cache_dir=tmp_path)
    options = RunOptions(
        "llama-3.2-1b", settings, prompt_len=32767, max_new_tokens=1, device=device, weights="dummy"
    )
    return Session(options, plan_only=True)


def test_weights_and_activations_leave_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (made(tmp_path, monkeypatch, found) for found in (None, LARGE))
    on_cpu, on_gpu = here.plan(), there.plan()
    assert on_gpu.footprint.weights_bytes == 0
    assert on_gpu.footprint.reserve_bytes < on_cpu.footprint.reserve_bytes
    assert on_gpu.share.bytes > on_cpu.share.bytes
    record = device_bytes(on_gpu, there.forecast)
    assert record["name"] == there.device == "cuda:0"
    assert record["weights_bytes"] == on_cpu.footprint.weights_bytes
    assert record["activation_bytes"] > on_gpu.footprint.reserve_bytes
    assert record["kv_ring_bytes"] == on_gpu.footprint.staging_bytes + on_gpu.footprint.tails_bytes
    whole = record["weights_bytes"] + record["activation_bytes"] + record["kv_ring_bytes"]
    assert whole < LARGE.total


def test_one_memory_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, shared = (made(tmp_path, monkeypatch, found) for found in (None, replace(LARGE, unified=True)))
    on_cpu, unified = here.plan(), shared.plan()
    assert unified.footprint.weights_bytes == on_cpu.footprint.weights_bytes > 0
    assert unified.footprint.staging_bytes == on_cpu.footprint.staging_bytes
    assert device_bytes(unified, shared.forecast)["kv_ring_bytes"] == unified.footprint.staging_bytes


def test_staging_is_no_larger_than_the_device_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(LARGE, free=2 * GIB, total=2 * GIB)
    plan = made(tmp_path, monkeypatch, small).plan()
    assert plan.request.ring is not None
    assert plan.footprint.staging_bytes + plan.footprint.tails_bytes <= plan.request.ring < small.free


def test_a_device_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(LARGE, free=600 * MIB, total=600 * MIB)
    with pytest.raises(BudgetError, match="the device has") as caught:
        made(tmp_path, monkeypatch, tiny).plan()
    assert "--device cpu" in str(caught.value.hint)
    assert made(tmp_path, monkeypatch, tiny, "auto").device == "cpu", "auto computes where the weights fit"


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    settings = CacheSettings.checked(mem_budget="8G", cache_dir=tmp_path)
    with pytest.raises(ConfigError, match="CUDA"):
        Session(RunOptions("tiny", settings, prompt="x", device="cuda"))
    assert Session(RunOptions("tiny", settings, prompt="x", device="auto")).device == "cpu"
