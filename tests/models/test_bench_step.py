# SPDX-License-Identifier: Apache-2.0
"""`bench step`: what it holds, and that its steps are all the same one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualblade.bench.scripted import DOMINATING, run_scripted_bench
from dualblade.bench.step import StepBench, run_step_bench
from dualblade.cli.main import main
from dualblade.settings import PIPELINES, CacheSettings


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
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny", "--context", "200", "--rounds", "1", "--nvme", "mem:64M"]
    assert main(["bench", "step", *words, "--trace", str(tmp_path / "none" / "t.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_the_scripted_step_compares_every_mode() -> None:
    record = run_scripted_bench(1, (2,), lambda text: None)
    assert [(row["attention"], row["dominating"]) for row in record["rows"]] == [
        (attention, part) for attention in ("one-piece", "streamed") for part in DOMINATING
    ]
    for row in record["rows"]:
        assert set(row["modes"]) == set(PIPELINES)
        for made in row["modes"].values():
            assert 0 < made["overlap_efficiency"] < 1.1, "nothing is faster than its script"
            assert made["storage_s"] == pytest.approx(2 / 64, rel=0.6), "every step reads all of it"
        assert row["modes"]["none"]["prefetch_depth"] == 0
