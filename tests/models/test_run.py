# SPDX-License-Identifier: Apache-2.0
"""The program as a person uses it: `run` and `plan` with the shipped model."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from families import CONFIGS, WINDOWS_ALONE

from dualblade import session
from dualblade.cli.main import main
from dualblade.zoo import TINY

PROGRAM = [sys.executable, "-m", "dualblade.cli.main"]
SAMPLE = TINY.parent / "sample.txt"
RUN = ["run", "--model", "tiny", "--prompt-file", str(SAMPLE), "--mem-budget", "2G", "--max-new-tokens", "24"]


@pytest.fixture
def run(direct_dir: Path, capsys: pytest.CaptureFixture[str]):
    """run(*options) -> (exit code, stdout, stderr), with KV files below direct_dir."""

    def call(*words: str) -> tuple[int, str, str]:
        code = main([*words, "--cache-dir", str(direct_dir)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def record_of(answer: tuple[int, str, str]) -> dict:
    code, out, err = answer
    assert code == 0, err
    return json.loads(out)


def test_json_holds_what_the_contract_says(run) -> None:
    record = record_of(run(*RUN, "--page-cache-budget", "2M", "--json"))
    assert record["model"] == "tiny"
    assert record["device"] == "cpu"
    assert record["new_tokens"] == 24
    assert record["prompt_tokens"] == len(SAMPLE.read_bytes())
    assert re.search(r"[a-z]{3,}", record["text"])
    memory, paths = record["memory"], record["paths"]
    assert memory["kv_bytes"] > 3 * memory["page_cache_share_bytes"]
    for path in paths.values():
        assert path["tensors"] > 0
        assert path["read_bytes"] > path["bytes"] > 0
        assert path["write_bytes"] > 0
        assert path["read_gib_s"] > 0
        assert path["engine"] == "uring"
    assert sum(item["bytes"] for item in record["placements"]) == sum(
        path["bytes"] for path in paths.values()
    )
    assert all(item["reason"] for item in record["placements"])
    assert {"prefetch_depth", "chunk_bytes", "queue_depth", "stall_s"} <= record["pipeline"].keys()


@pytest.mark.parametrize("kv_path", ["auto", "direct", "page-cache"])
def test_every_path_gives_the_same_text(run, kv_path: str) -> None:
    share = ["--page-cache-budget", "2M"] if kv_path == "auto" else []
    record = record_of(run(*RUN, "--kv-path", kv_path, *share, "--verify", "--json"))
    assert record["verified"] is True


def test_seeded_sampling_repeats_itself(run) -> None:
    options = ["--temperature", "0.8", "--top-p", "0.9", "--top-k", "40", "--verify", "--json", "--seed"]
    first, again, other = (record_of(run(*RUN, *options, seed))["text"] for seed in ("5", "5", "6"))
    assert first == again != other


def test_random_prompt_in_a_batch(run) -> None:
    record = record_of(
        run(
            "run",
            "--model",
            "tiny",
            "--prompt-len",
            "300",
            "--batch-size",
            "3",
            "--mem-budget",
            "2G",
            "--max-new-tokens",
            "5",
            "--verify",
            "--json",
        )
    )
    assert [len(row) for row in record["token_ids"]] == [5, 5, 5]


def test_text_goes_to_stdout_and_talk_to_stderr(run) -> None:
    code, out, err = run(*RUN, "--page-cache-budget", "2M")
    assert code == 0
    assert len(out.strip()) > 10
    assert "prefill" in err
    assert "memory peak" in err
    assert "memory peak" not in out


def test_memory_stays_inside_the_budget(direct_dir: Path) -> None:
    """The peak of a process of its own, sampled every 100 ms from outside as well."""
    budget = 700 << 20
    command = [
        *PROGRAM,
        "run",
        "--model",
        "tiny",
        "--prompt-len",
        "4000",
        "--mem-budget",
        "700M",
        "--batch-size",
        "4",
        "--max-new-tokens",
        "60",
        "--cache-dir",
        str(direct_dir),
        "--json",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            anon = sum(
                int(kb) for kb in re.findall(r"(?:RssAnon|RssShmem|VmSwap|HugetlbPages):\s+(\d+)", status)
            )
            peak = max(peak, anon << 10)
            time.sleep(0.1)
        out, err = process.communicate()
    assert process.returncode == 0, err
    memory = json.loads(out)["memory"]
    assert memory["peak_bytes"] <= budget
    assert peak <= budget
    assert memory["peak_bytes"] > 0.8 * peak


def test_plan_touches_nothing_and_agrees_with_run(run, direct_dir: Path) -> None:
    context = len(SAMPLE.read_bytes()) + 24
    share = ["--page-cache-budget", "2M", "--json"]
    planned = record_of(
        run("plan", "--model", "tiny", "--context", str(context), "--mem-budget", "2G", *share)
    )
    assert list(direct_dir.iterdir()) == []
    done = record_of(run(*RUN, *share))
    assert planned["placements"] == done["placements"]
    assert planned["storage_s_per_token"] is None


# what cannot work ---------------------------------------------------------------------------


def refused(answer: tuple[int, str, str], code: int, *words: str) -> None:
    got, out, err = answer
    assert got == code, err
    assert out == ""
    assert "Traceback" not in err
    assert "internal error" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in words:
        assert word in err


def test_budget_below_the_weights(run) -> None:
    answer = run("run", "--model", "tiny", "--prompt", "x", "--mem-budget", "50M")
    refused(answer, 1, "is needed", "weights", "--mem-budget")


def test_a_budget_that_is_hinted_at_is_enough(run) -> None:
    _, _, err = run(*[word if word != "2G" else "60M" for word in RUN])
    enough = re.search(r"--mem-budget (\d+M)", err)
    assert enough, err
    record_of(run(*[word if word != "2G" else enough[1] for word in RUN], "--json"))


@pytest.mark.parametrize("size", ["6", "6GB", "-1G", "", "G", "0M"])
def test_odd_sizes(run, size: str) -> None:
    refused(
        run("run", "--model", "tiny", "--prompt", "x", f"--mem-budget={size}"), 2, "is not a size", "hint:"
    )


def test_unknown_model(run) -> None:
    refused(run("run", "--model", "lama-3", "--prompt", "x", "--mem-budget", "2G"), 1, "lama-3", "aliases:")


def test_truncated_weights(run, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(TINY, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refused(
        run("run", "--model", str(folder), "--prompt", "x", "--mem-budget", "2G"), 1, str(file), "cut short"
    )


def test_folder_without_weights(run, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    refused(run("run", "--model", str(folder), "--prompt", "x", "--mem-budget", "2G"), 1, "no .safetensors")


def test_context_beyond_the_model(run) -> None:
    answer = run(
        "run", "--model", "tiny", "--prompt-len", "8190", "--mem-budget", "2G", "--max-new-tokens", "50"
    )
    refused(answer, 1, "8240", "8192")


def test_a_device_that_is_not_there_is_said(run) -> None:
    refused(run(*RUN, "--device", "cuda"), 1, "CUDA", "--device cpu")
    assert record_of(run(*RUN, "--device", "auto", "--json"))["device"] == "cpu"


def test_plan_names_layers_that_stay_in_memory(run, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "config.json").write_text(CONFIGS["gemma3"]().to_json_string(use_diff=False))
    plan = ["plan", "--model", str(folder), "--context", "500", "--mem-budget", "2G", "--weights", "dummy"]
    record = record_of(run(*plan, "--json"))
    assert record["kept_in_memory"]["layers"] == {"sliding_attention": 2}
    assert record["kept_in_memory"]["bytes"] > 0
    assert {item["tensor"] for item in record["placements"]} == {
        f"layer {i} {kv}" for i in (1, 3) for kv in "KV"
    }
    assert "2 layers of sliding_attention in memory, in a cache that does not grow" in run(*plan)[1]


def test_windows_alone_run_with_nothing_offloaded(run, tmp_path: Path) -> None:
    folder = tmp_path / "windows"
    folder.mkdir()
    (folder / "config.json").write_text(WINDOWS_ALONE["mistral-window"]().to_json_string(use_diff=False))
    common = ["--model", str(folder), "--mem-budget", "2G", "--weights", "dummy"]
    planned = record_of(run("plan", "--context", "300", *common, "--json"))
    assert planned["kept_in_memory"]["layers"] == {"sliding_attention": 3}
    done = record_of(run("run", "--prompt-len", "200", "--max-new-tokens", "4", *common, "--json"))
    assert done["placements"] == planned["placements"] == []
    assert len(done["token_ids"][0]) == 4


def test_no_prompt_and_two_prompts(run) -> None:
    refused(run("run", "--model", "tiny", "--mem-budget", "2G"), 2, "no prompt")
    refused(run("run", "--prompt", "x", "--prompt-len", "3", "--mem-budget", "2G"), 2, "more than one")
    refused(run("run", "--prompt", "", "--mem-budget", "2G"), 2, "empty")


def test_target_too_small(run, tmp_path: Path) -> None:
    target = str(tmp_path / "small.img")
    answer = run(*RUN, "--nvme", target, "--capacity", "2M", "--kv-path", "direct")
    refused(answer, 1, "needed")
    refused(run(*RUN, "--nvme", "mem:2M", "--kv-path", "direct"), 1, "needed")


def test_foreign_data_is_refused_and_kept(run, tmp_path: Path) -> None:
    target = tmp_path / "photos.img"
    data = os.urandom(32 << 20)
    target.write_bytes(data)
    refused(run(*RUN, "--nvme", str(target), "--kv-path", "direct"), 1, "volume create")
    assert target.read_bytes() == data


def test_a_folder_is_no_target(run, tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    refused(run(*RUN, "--nvme", str(target), "--kv-path", "direct"), 1, "folder")


def test_second_process_on_one_volume(run, direct_dir: Path) -> None:
    target = direct_dir / "kv.img"
    assert main(["volume", "create", str(target), "--capacity", "64M"]) == 0
    hold = (
        "import sys\nfrom pathlib import Path\nfrom dualblade.targets import open_target\n"
        f"t = open_target({str(target)!r}, capacity=None, cache_dir=Path('.'))\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == b"held\n"
        run("doctor", "--json")  # swallow what was printed so far
        refused(run(*RUN, "--nvme", str(target), "--kv-path", "direct"), 1, "in use", str(other.pid))
        other.communicate()


def test_a_volume_serves_one_run_after_the_other(run, direct_dir: Path) -> None:
    target = direct_dir / "kv.img"
    options = ["--nvme", str(target), "--capacity", "64M", "--page-cache-budget", "2M", "--json"]
    first, second = (record_of(run(*RUN, *options)) for _ in range(2))
    assert first["text"] == second["text"]
    assert main(["volume", "check", str(target)]) == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_nothing_behind(how: signal.Signals, direct_dir: Path) -> None:
    target, cache = direct_dir / "kv.img", direct_dir / "cache"
    command = [
        *PROGRAM,
        "run",
        "--model",
        "tiny",
        "--prompt-len",
        "3000",
        "--mem-budget",
        "2G",
        "--batch-size",
        "4",
        "--max-new-tokens",
        "4000",
        "--page-cache-budget",
        "8M",
        "--cache-dir",
        str(cache),
        "--nvme",
        str(target),
        "--capacity",
        "512M",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not _decoding(process.pid) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how is signal.SIGINT else -how), err
    assert "Traceback" not in err
    assert list(cache.iterdir()) == []
    assert main(["volume", "check", str(target)]) == 0
    if how is signal.SIGINT:
        assert main(["volume", "show", str(target), "--json"]) == 0


def _decoding(pid: int) -> bool:
    """The process has written KV: it has the target open and some seconds of work behind it."""
    try:
        written = Path(f"/proc/{pid}/io").read_text()
    except OSError:
        return False
    return int(re.search(r"write_bytes: (\d+)", written)[1]) > 20 << 20  # type: ignore[index]


# places that cannot be written --------------------------------------------------------------


@pytest.mark.parametrize("command", [RUN, ["bench", "io"], ["bench", "context", "--upto", "4096"]])
def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, capsys, command: list[str]) -> None:
    (tmp_path / "file").touch()
    assert main([*command, "--cache-dir", str(tmp_path / "file" / "kv")]) == 1
    error = capsys.readouterr().err
    assert "cannot be made: Not a directory" in error
    assert "hint: name another with --cache-dir" in error


def test_a_report_that_cannot_be_written_is_found_out_first(run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, error = run(*RUN, "--report", str(tmp_path / "file" / "run.json"))
    assert (code, out) == (1, "")
    assert "run.json cannot be written: " in error
    assert "--report" in error


@pytest.mark.parametrize("told", [True, False])
def test_memory_that_takes_long_to_take_is_told_of(run, monkeypatch: pytest.MonkeyPatch, told: bool) -> None:
    if told:
        monkeypatch.setattr(session, "MUCH", 1)
    code, _, err = run(*RUN)
    assert code == 0
    assert bool(re.search(r"^taking [\d.]+ MiB of memory for K and V$", err, re.M)) is told
