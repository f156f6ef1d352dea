# SPDX-License-Identifier: Apache-2.0
"""`bench io --nvme` and `--emulate`: the shape of the record, and what is never written to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from traces import Traces

from dualblade.bench import nvme
from dualblade.cli.main import main
from dualblade.emulate import EmulatedTarget

SIZE = 32 << 20
CODE = """
import json, pathlib, sys
from dualblade.bench import nvme
folder = pathlib.Path(sys.argv[4]) if sys.argv[4] else None
nvme.SIZES, nvme.DEPTHS = (131072,), (8,)
nvme.run_perf = lambda *words: calls.append(words) or 2.0
nvme.no_perf = lambda: sys.argv[2] or None
calls = []
bench = nvme.NvmeBench(sys.argv[1], int(sys.argv[3]), rounds=1, emulated=sys.argv[1] == "")
if sys.argv[1]:
    record = nvme.run_nvme_bench(bench, lambda text: None)
else:
    with nvme.emulated_bench(bench.size, 1, 1, folder, lambda text: None) as bench:
        record = nvme.run_nvme_bench(bench, lambda text: None)
print(json.dumps({"record": record, "perf": [list(words) for words in calls]}))
"""


def run(target: str, no_perf: str = "", folder: Path | str = "") -> dict[str, Any]:
    """In a process of its own, for SPDK's environment is a process's for life, with the memory that
    its first user asked for; spdk_nvme_perf is played."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, target, no_perf, str(SIZE), str(folder)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def volume(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dualblade.cli.main", "volume", *words, "--json"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def export(emulated: EmulatedTarget, name: str) -> str:
    emulated.malloc(name, SIZE + (4 << 20))
    return emulated.export(name)


# the record ---------------------------------------------------------------------------------


@pytest.mark.needs("spdk")
def test_an_emulated_target_is_read_and_written_by_both(nothing_left: Traces) -> None:
    found = run("")
    record = found["record"]
    assert [words[1] for words in found["perf"]] == ["read", "write"]
    assert [(row["op"], row["transfer_bytes"], row["depth"]) for row in record["cases"]] == [
        ("read", 131072, 8), ("write", 131072, 8),
    ]  # fmt: skip
    for row in record["cases"]:
        assert row["perf_gib_s"] == 2.0
        figures = [
            row[f"{who}_{what}"] for who in ("engine", "python") for what in ("gib_s", "cpu_s_per_gib")
        ]
        assert min(figures) > 0
        assert row["ratios"].keys() == {"engine_vs_perf", "python_vs_perf", "python_vs_engine"}
        assert row["ratios"]["engine_vs_perf"] == row["engine_gib_s"] / 2
    assert record["tensor_store_gib_s"] > 0
    assert record["ratios"]["store_vs_engine"] > 0
    assert record["idle_cpu"] >= 0
    assert (record["emulated"], record["no_perf"], record["engine"]) == (True, None, "spdk")
    assert len(record["measured"]) == record["rounds"] == 1


@pytest.mark.needs("spdk", "uring", "o_direct")
def test_io_uring_is_measured_on_the_file_behind_the_target(nothing_left: Traces, direct_dir: Path) -> None:
    record = run("", folder=direct_dir)["record"]
    for row in record["cases"]:
        assert min(row["uring_gib_s"], row["uring_cpu_s_per_gib"], row["ratios"]["engine_vs_uring"]) > 0
    assert 0 <= record["uring_idle_cpu"] < 0.5
    assert list(direct_dir.iterdir()) == []


@pytest.mark.needs("spdk")
def test_perf_only_reads_a_target_that_it_was_given(fresh_target: EmulatedTarget) -> None:
    target = export(fresh_target, "given")
    uuid = json.loads(volume("create", target).stdout)["uuid"]
    found = run(target)
    assert [(words[0], words[1]) for words in found["perf"]] == [(f"{target} ns:1", "read")]
    assert "perf_gib_s" not in found["record"]["cases"][1]
    after = json.loads(volume("check", target).stdout)
    assert (after["uuid"], after["ok"], after["extents"]) == (uuid, True, 0)


@pytest.mark.needs("spdk")
def test_without_perf_our_own_figures_are_left(fresh_target: EmulatedTarget) -> None:
    target = export(fresh_target, "alone")
    volume("create", target)
    found = run(target, "it is not here")
    assert (found["perf"], found["record"]["no_perf"]) == ([], "it is not here")
    assert all(row["ratios"].keys() == {"python_vs_engine"} for row in found["record"]["cases"])


@pytest.mark.needs("spdk")
def test_a_namespace_without_a_volume_is_refused(fresh_target: EmulatedTarget) -> None:
    target = export(fresh_target, "foreign")
    command = [sys.executable, "-m", "dualblade.cli.main", "bench", "io", "--nvme", target, "--size", "256M"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "no volume" in done.stderr
    (found,) = fresh_target.rpc.bdev_get_iostat()["bdevs"]
    assert (found["name"], found["num_write_ops"]) == ("foreign", 0)


# without a target ----------------------------------------------------------------------------


def test_perf_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "perf_path", lambda: None)
    assert "spdk_nvme_perf is not in PATH" in str(nvme.no_perf())


def test_perf_is_read_and_its_failure_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dualblade.bench import perf
    from dualblade.errors import DualBladeError

    program = tmp_path / "spdk_nvme_perf"
    program.write_text(
        "#!/bin/sh\necho 'Total     :  116663.00   2048.00      68.52       6.04    6258.28'\n"
    )
    program.chmod(0o700)
    monkeypatch.setattr(perf, "perf_path", lambda: str(program))
    assert perf.run_perf("trtype:X", "read", 131072, 8, 1, 0) == 2.0
    program.write_text("#!/bin/sh\necho no hugepages >&2; exit 1\n")
    with pytest.raises(DualBladeError, match="spdk_nvme_perf failed: no hugepages"):
        perf.run_perf("trtype:X", "read", 131072, 8, 1, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nvme", "mem:1G"], "is no drive to measure"),
        (["--nvme", "kv.img", "--seconds", "2"], "is for what SPDK drives"),
        (["--nvme", "0000:01:00.0", "--emulate"], "makes its own target"),
        (["--emulate", "--queue-depth", "8"], "are for what the kernel drives"),
        (["--seconds", "2"], "is for what SPDK drives"),
    ],
)
def test_options_that_make_no_sense(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "io", *words]) == 2
    assert said in capsys.readouterr().err
