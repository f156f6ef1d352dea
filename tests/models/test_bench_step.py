# SPDX-License-Identifier: Apache-2.0
"""`bench step`: what it holds, and that its steps are all the same one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dualblade.bench.prompt import measure_prefill
from dualblade.bench.scripted import DOMINATING, LAYER_S, run_scripted_bench
from dualblade.bench.step import StepBench, run_step_bench
from dualblade.cli.main import main
from dualblade.forecast import Prefill
from dualblade.hf import DualBladeCache
from dualblade.loading import dummy_model, load_config
from dualblade.models import decoder_layers
from dualblade.settings import PIPELINES, CacheSettings
from dualblade.trace import Trace
from dualblade.zoo import resolve


def settings(folder: Path, **more: object) -> CacheSettings:
    return CacheSettings.checked(mem_budget="4G", kv_path="direct", nvme="mem:64M", cache_dir=folder, **more)


@pytest.mark.parametrize(("depth", "mode"), [(0, "none"), (2, "cross-layer")])
def test_the_record(depth: int, mode: str, tmp_path: Path) -> None:
    bench = StepBench("tiny", settings(tmp_path, prefetch_depth=2, pipeline=mode), context=300, rounds=2)
    record, trace = run_step_bench(bench, lambda text: None)
    assert (record["mode"], record["prefetch_depth"], record["copy_s"]) == (mode, depth, 0)
    assert 0 < record["context"] <= 300
    assert min(record[name] for name in ("step_s", "storage_s", "compute_s", "overlap_efficiency")) > 0
    assert 0 <= record["stall_s"] <= record["step_s"]
    assert len(record["rounds"]) == 2
    per_token = record["kv_bytes"] / record["context"]
    assert per_token == int(per_token), "a token that a step added was taken back"
    layers = {span.name for span in trace.spans if span.lane == "layers"}
    reads = {span.name for span in trace.spans if span.lane == "direct reads"}
    assert {f"{layer} {kind}" for layer in layers for kind in "KV"} == reads
    assert all(span.end >= span.begin > 0 for span in trace.spans)


def test_the_command_writes_both_timelines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--trace", str(tmp_path / "t.json"), "--plot", str(tmp_path / "t.png")]
    words = ["--model", "tiny", "--context", "200", "--rounds", "1", "--nvme", "mem:64M", *files]
    assert main(["bench", "step", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    titles = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert titles[0] == "tiny, a prompt of 200 tokens"
    assert titles[1].startswith("tiny, one token after ")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--context", "200", "--rounds", "1", "--nvme", "mem:64M"]
    assert main(["bench", "step", *words, "--trace", str(tmp_path / "none" / "t.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(("batch", "prompt"), [(1, None), (3, 100)])
def test_a_prefill_beside_its_parts(batch: int, prompt: int | None, tmp_path: Path) -> None:
    trace = Trace()
    bench = StepBench("tiny", settings(tmp_path), context=300, batch=batch, rounds=1, prompt=prompt)
    record, _ = run_step_bench(bench, lambda text: None, trace)
    made = record["prefill"]
    assert made["tokens"] == (prompt or 300)
    assert made["span"] == made["tokens"], "nothing of so short a prompt is read again"
    assert min(made[name] for name in ("prefill_s", "storage_s", "compute_s", "overlap_efficiency")) > 0
    assert 0 <= made["stall_s"] <= made["prefill_s"]
    layers = {span.name for span in trace.spans if span.lane == "layers"}
    writes = {span.name for span in trace.spans if span.lane == "direct writes"}
    assert {f"{layer} {kind}" for layer in layers for kind in "KV"} == writes
    assert "direct reads" not in trace.lanes
    assert record["context"] <= 300, "the decode step's own KV, not the prompt's"
    assert record["scheduler_us_per_layer"] > 0


def test_prefill_in_many_passes(tmp_path: Path) -> None:
    """Passes take turns; what the timeline has of a layer never overlaps."""
    made = settings(tmp_path)
    model = dummy_model(load_config(resolve("tiny"), shapes_only=True), torch.bfloat16, "sdpa", 0)
    trace, way = Trace(), Prefill(chunk=64, span=256)
    options = {"max_tokens": 320, "batch_size": 1, "dtype": torch.bfloat16}
    with torch.inference_mode(), DualBladeCache(model.config, settings=made, **options) as cache:
        record = measure_prefill(model, cache, 1, 256, way, trace)
        assert cache.tokens(0) == 0
    spans = [span for span in trace.spans if span.lane == "layers"]
    assert len(spans) == 4 * len(decoder_layers(model))
    assert all(later.begin >= earlier.end for earlier, later in pairwise(spans))
    assert record["prefill_s"] >= sum(span.seconds for span in spans) * 0.9


def test_without_a_prefill(tmp_path: Path) -> None:
    bench = StepBench("tiny", settings(tmp_path), context=300, rounds=1, prompt=0)
    assert run_step_bench(bench, lambda text: None)[0]["prefill"] is None


def test_the_page_cache_path_too(direct_dir: Path) -> None:
    made = CacheSettings.checked(mem_budget="4G", kv_path="page-cache", cache_dir=direct_dir)
    record, trace = run_step_bench(StepBench("tiny", made, context=600, rounds=1), lambda text: None)
    assert min(record["compute_s"], record["prefill"]["compute_s"], record["prefill"]["storage_s"]) > 0
    assert "page-cache reads" not in trace.lanes, "attention reads it where it is"


def test_the_scripted_step_compares_every_mode() -> None:
    record = run_scripted_bench(1, (2,), lambda text: None)
    assert [(row["attention"], row["dominating"]) for row in record["rows"]] == [
        (attention, part) for attention in ("one-piece", "streamed") for part in DOMINATING
    ]
    for row in record["rows"]:
        assert set(row["modes"]) == set(PIPELINES)
        for made in row["modes"].values():
            assert made["step_s"] > 0
            assert made["storage_s"] == pytest.approx(2 * LAYER_S)
        assert row["modes"]["none"]["prefetch_depth"] == 0
