# SPDX-License-Identifier: Apache-2.0
"""`bench sweep` from end to end, on the tiny model: its record, its files, its refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dualblade.bench import trial as trials
from dualblade.bench.baselines import BASELINES, COMPUTE
from dualblade.bench.ground import DriveLimit
from dualblade.bench.launch import ChildFailed, OnToken, run_child
from dualblade.bench.sweep import Sweep, SweepBench, rotated, why_not
from dualblade.bench.trial import Trial, run_trial
from dualblade.bench.workloads import Budget, Need, Workload, measure_need, read_budgets
from dualblade.cli.main import main
from dualblade.errors import UsageError
from dualblade.units import GIB, MIB

SMALL = ["--model", "tiny", "--context", "300", "--new-tokens", "3", "--keep-caches"]
WORKLOAD = Workload("tiny", context=300, new_tokens=3)
ROOMY = 3 * GIB  # for a trial in this process, with all that other tests have left in it
ROW = {
    "baseline", "budget_bytes", "kv_bytes", "prefill_s", "decode_s_per_token", "compute_s_per_token",
    "read_gib_s", "ssd_utilisation", "peak_bytes",
}  # fmt: skip


def sweep(folder: Path, *words: str) -> int:
    return main(["bench", "sweep", *SMALL, "--cache-dir", str(folder), *words])


@pytest.mark.needs("uring", "o_direct")
def test_two_baselines_in_two_budgets(direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, out = direct_dir / "cache", direct_dir / "out"
    words = ["--budgets", "0.5,1.25", "--baselines", "flexgen,dual", "--rounds", "1", "--out", str(out)]
    assert sweep(cache, *words, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert len(record["rows"]) == 4
    assert record["ssd_limit_gib_s"] > 0
    for row in record["rows"]:
        assert row.keys() >= ROW
        assert row["verified"] is True
        assert row["prefill_s"] > 0 < row["decode_s_per_token"]
        held = int(row["budget_fraction"] * row["kv_bytes"] * 33 / 32)  # with the kernel's own memory for it
        assert row["budget_bytes"] == record["need"]["base"] + held
        assert row["peak_bytes"] < row["budget_bytes"]
    assert [run["baseline"] for run in record["runs"]] == 2 * ["flexgen", "dual"]
    assert list(cache.iterdir()) == [], "nothing is left behind"
    _check_files(record, out)


def _check_files(record: dict[str, Any], out: Path) -> None:
    """The report shows what was measured, and needs no other file."""
    assert json.loads((out / "results.json").read_text())["rows"] == record["rows"]
    html, text = (out / "report.html").read_text(), (out / "results.md").read_text()
    for row in record["rows"]:
        assert f"<td>{row['prefill_s']:.2f}</td>" in html
        assert f"| {row['decode_s_per_token']:.3f} |" in text
    for name in re.findall(r"\]\((.*?\.png)\)", text):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert html.count("data:image/png;base64,") == len(list(out.glob("*.png"))) >= 2
    assert "four copy threads" in html


@pytest.mark.needs("uring", "o_direct")
def test_the_table_and_what_was_left_out(direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--budgets", "0", "--baselines", "direct,in-memory", "--rounds", "1", "--no-enforce"]
    assert sweep(direct_dir, *words) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^0\.00 +direct ", shown, re.MULTILINE)
    assert "left out: in-memory at 0.00: all KV in memory takes" in shown
    assert "budgets were not enforced: asked for by --no-enforce" in shown


@pytest.mark.needs("uring", "o_direct")
def test_a_volume_of_the_users_is_used_and_left_clean(
    direct_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = direct_dir / "drive.kv"
    assert main(["volume", "create", str(target), "--capacity", "256M"]) == 0
    words = ["--nvme", str(target), "--budgets", "0.5", "--baselines", "direct-qd1,direct", "--rounds", "1"]
    assert sweep(direct_dir, *words) == 0
    capsys.readouterr()
    assert main(["volume", "check", str(target), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["extents"] == 0


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["--baselines", "flexgn"], 2, "no such baseline: 'flexgn'", "did you mean 'flexgen'?"),
        (["--budgets", "64M"], 1, "a budget of 64 MiB is too small", "pass --budgets 0.25, or "),
        (["--budgets", "90T"], 1, "more than the", "lower --budgets"),
        (["--budgets", "half"], 2, "budget 'half' is not a size", "write a number"),
        (["--budgets", "-1"], 2, "a budget of -1 times the KV bytes makes no sense", "write e.g. 0.5"),
        (["--model", "nonesuch"], 1, "unknown model 'nonesuch'", "aliases: "),
        (["--context", "99999999"], 1, "a context of", "shorten the prompt"),
    ],
)
def test_refusals_are_one_line_and_a_hint(
    words: list[str], code: int, message: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(tmp_path, *words) == code
    streams = capsys.readouterr()
    said = streams.err.splitlines()
    assert said[-2].startswith("error: ")
    assert message in said[-2]
    assert said[-1].startswith(f"hint: {hint}")
    assert streams.out == ""


def test_no_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.target_files.room", lambda folder: (3 * GIB, 3 * GIB - MIB))
    assert sweep(tmp_path, "--budgets", "0.5") == 1
    assert "error: no room for" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("own", [False, True])
def test_the_drive_is_measured_around_each_run_and_its_decoding(
    own: bool, direct_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drive that gets faster with every measurement. own: a volume of the user's, which a run locks."""
    speeds = count(1.0)

    def measured(*_: object) -> DriveLimit:
        speed = next(speeds)
        return DriveLimit(read=speed, write=2 * speed)

    monkeypatch.setattr("dualblade.bench.sweep.measure_limit", measured)
    monkeypatch.setattr("dualblade.bench.sweep.measure_reading", lambda *_: next(speeds))
    words = ["--budgets", "0.5", "--baselines", "direct-qd1,direct", "--rounds", "1", "--json"]
    if own:
        target = direct_dir / "drive.kv"
        assert main(["volume", "create", str(target), "--capacity", "256M"]) == 0
        capsys.readouterr()
        words += ["--nvme", str(target)]
    assert sweep(direct_dir, *words) == 0
    record = json.loads(capsys.readouterr().out)
    # 1 was beside compute; then before a run, at its first token, at its last, and after it
    read, write = ([2.5, 4.5], [5.0, 9.0]) if own else ([3.5, 7.5], [7.0, 15.0])
    assert [run["limit_read_gib_s"] for run in record["runs"]] == read
    assert [run["limit_write_gib_s"] for run in record["runs"]] == write
    assert record["limit_measured"] == ("around each run" if own else "around decode")
    for row, limit in zip(record["rows"], read, strict=True):
        assert row["ssd_utilisation"] == pytest.approx(row["read_gib_s"] / limit)


@pytest.mark.needs("uring", "o_direct")
def test_a_pause_is_no_tokens_time(direct_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is far ahead after the first token and after the last."""
    ahead = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead[0])
    monkeypatch.setattr(trials, "time", clock)

    def tell(number: int) -> None:
        ahead[0] += 1e6 if number in (1, WORKLOAD.new_tokens) else 0

    record = run_trial(trial_in(direct_dir, budget=ROOMY), tell)
    assert sum(record["steps_s"]) < 1e6 > record["prefill_s"]


@pytest.mark.needs("uring", "o_direct")
def test_a_child_waits_where_its_trial_pauses(direct_dir: Path) -> None:
    """The second token comes a step after the pause, and does not lie ready."""
    ended: list[float] = []

    def on_token(number: int) -> None:
        if number == 1:
            time.sleep(1)
        ended.append(time.monotonic())

    record = run_child(trial_in(direct_dir, pauses=(1,)), on_token)
    assert ended[1] - ended[0] > record["steps_s"][0] / 2


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize(
    ("budgets", "baselines", "before"),
    [
        ("0.5,1", "direct", (0, 1, 3, 4)),
        ("3G", "direct-qd1,direct,dual", (0, 0, 1, 3, 4, 5, 7, 8, 8)),  # ours last, in the middle, first
    ],
)
def test_compute_alone_is_measured_around_budgets_and_ours(
    budgets: str,
    baselines: str,
    before: tuple[int, ...],
    direct_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """before: which of all was the last one before each run. In this process, for their order alone."""
    monkeypatch.setattr("dualblade.bench.sweep.run_child", run_trial)
    rounds = len(before) // (budgets.count(",") + 1) // (baselines.count(",") + 1)
    words = ["--budgets", budgets, "--baselines", baselines, "--rounds", str(rounds), "--json"]
    assert sweep(direct_dir, *words, "--no-enforce") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rounds"] == rounds
    alone = [each["prefill_s"] for each in record["computes"]]
    around = [(alone[at] + alone[at + 1]) / 2 for at in before]
    assert len(alone) == before[-1] + 2
    assert [run["compute_prefill_s"] for run in record["runs"]] == pytest.approx(around)


@pytest.mark.needs("uring", "o_direct")
@pytest.mark.parametrize("all_rounds", [False, True])
def test_what_is_far_from_ours_rests_after_three_rounds(
    all_rounds: bool, direct_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """direct-qd1 takes three times as long as ours, direct as long but in the second round. Each runs once
    in truth, and has the time of its round then."""

    def timed(trial: Trial, on_token: OnToken) -> dict[str, Any]:
        if trial.baseline not in made:
            made[trial.baseline] = run_trial(trial, on_token)
        elif trial.baseline == COMPUTE:
            on_token(1)
        again[trial.baseline] += 1
        slow = {"direct-qd1": 3.0, "direct": 1.9 if again["direct"] == 2 else 3.0}
        return made[trial.baseline] | {"decode_s_per_token": slow.get(trial.baseline, 1.0)}

    made: dict[str, dict[str, Any]] = {}
    again: Counter[str] = Counter()
    monkeypatch.setattr("dualblade.bench.sweep.run_child", timed)
    words = ["--budgets", "1", "--baselines", "direct-qd1,direct,dual", "--rounds", "5", "--json"]
    assert sweep(direct_dir, *words, "--no-enforce", *["--all-rounds"] * all_rounds) == 0
    streams = capsys.readouterr()
    rounds = {row["baseline"]: row["rounds"] for row in json.loads(streams.out)["rows"]}
    assert rounds == {"direct-qd1": 5 if all_rounds else 3, "direct": 5, "dual": 5}
    told = "no more rounds for direct-qd1: each took over 2 times as long as dual in every one"
    assert " ".join(streams.err.split()).count(told) == (0 if all_rounds else 2)


@pytest.mark.needs("uring", "o_direct")
def test_other_numbers_than_the_rest_are_an_error(
    direct_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child that gives other rows than it should: its process is this one, so that it can be spoilt."""

    def spoilt(trial: Trial, on_token: OnToken) -> dict[str, Any]:
        made = run_trial(trial, on_token)
        return made | ({"kv_digest": "0"} if trial.baseline == "direct-qd1" else {})

    monkeypatch.setattr("dualblade.bench.sweep.run_child", spoilt)
    words = [
        "--budgets",
        "0.5",
        "--baselines",
        "direct,direct-qd1,page-cache",
        "--rounds",
        "1",
        "--no-enforce",
    ]
    assert sweep(direct_dir, *words) == 1
    streams = capsys.readouterr()
    assert "error: other logits or KV bytes than the rest: direct-qd1" in streams.err
    assert " NO" in streams.out


@pytest.mark.needs("uring", "o_direct")
def test_a_run_that_fails_is_told_and_the_rest_goes_on(
    direct_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(trial: Trial, on_token: OnToken) -> dict[str, Any]:
        if trial.baseline == "flexgen":
            raise ChildFailed("it was killed")
        return run_trial(trial, on_token)

    monkeypatch.setattr("dualblade.bench.sweep.run_child", failing)
    words = ["--budgets", "0.5", "--baselines", "flexgen,direct", "--rounds", "1", "--no-enforce", "--json"]
    assert sweep(direct_dir, *words) == 1
    streams = capsys.readouterr()
    record = json.loads(streams.out)
    assert [row["baseline"] for row in record["rows"]] == ["direct"]
    assert record["failures"][0]["reason"] == "it was killed"
    assert "error: 1 runs failed, first flexgen at 0.50: it was killed" in streams.err


# children -----------------------------------------------------------------------------------


@pytest.mark.needs("uring", "o_direct")
def test_a_sweep_that_is_told_to_end_leaves_nothing(direct_dir: Path) -> None:
    """In the midst of a run, of its process and of the target that was written for all of them."""
    code = "import sys; from dualblade.cli.main import main; sys.exit(main())"
    words = ["--cache-dir", str(direct_dir), "--budgets", "1", "--baselines", "dual", "--rounds", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", code, "bench", "sweep", *SMALL, *words], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        while "round 1 of 1" not in (line := process.stderr.readline()):
            assert line, "it ended by itself"
        while not (running := children(process.pid)):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert said.splitlines()[-1] == "interrupted"
    assert list(direct_dir.iterdir()) == []
    deadline = time.monotonic() + 30  # one that was just started ends by itself
    while any(Path(f"/proc/{child}").exists() for child in running):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def trial_in(folder: Path, **more: Any) -> Trial:
    need = measure_need(WORKLOAD, 300 * MIB)
    return Trial(
        **{"baseline": "dual", "workload": WORKLOAD, "need": need, "budget": GIB, "folder": str(folder)}
        | more
    )


@pytest.mark.needs("uring", "o_direct")
def test_a_child_tells_each_token(direct_dir: Path) -> None:
    tokens: list[int] = []
    record = run_child(trial_in(direct_dir), tokens.append)
    assert tokens == [1, 2, 3]
    assert len(record["steps_s"]) == 2
    assert record["decode_s_per_token"] == pytest.approx(sum(record["steps_s"]) / 2)
    spent = record["prefill_user_s"] + record["prefill_kernel_s"]
    assert 0 < spent < (record["prefill_s"] + 0.1) * (os.cpu_count() or 1)
    assert record["prefill_page_faults"] > 0


def test_a_child_that_is_refused_says_why(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="a memory budget of 1 MiB is too small"):
        run_child(trial_in(tmp_path, budget=MIB))


def test_a_child_that_breaks_says_why(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed, match="FileNotFoundError"):
        run_child(trial_in(tmp_path, cgroup="/nonesuch"))


def test_a_trial_crosses_the_border(tmp_path: Path) -> None:
    trial = trial_in(tmp_path)
    assert Trial.of(json.loads(json.dumps(trial.plain()))) == trial
    assert trials.NOTHING.bytes is None


# plans --------------------------------------------------------------------------------------

NEED = Need(weights=100, runtime=1000, activations=10, staging=40, moving=0, kv=160)


def test_a_budget_is_the_base_and_a_part_of_the_kv() -> None:
    """And a 32nd of that part, which the kernel takes beside cached pages."""
    need = Need(weights=GIB, runtime=GIB, activations=0, staging=GIB, moving=0, kv=32 * GIB)
    assert read_budgets("0.25,1, 36G", need) == [
        Budget(0.25, 11 * GIB + GIB // 4),
        Budget(1.0, 36 * GIB),
        Budget(1.0, 36 * GIB),
    ]
    with pytest.raises(UsageError):
        read_budgets("0.5,", need)


def test_what_needs_all_kv_in_memory_runs_where_it_fits() -> None:
    assert why_not("in-memory", Budget(1.0, NEED.base + 160), NEED) is None
    assert why_not("in-memory", Budget(0.75, NEED.base + 120), NEED)
    assert why_not("dual", Budget(0.0, NEED.base), NEED) is None


def test_every_round_begins_with_another_baseline() -> None:
    names = list(BASELINES)
    assert {rotated(names, number)[0] for number in range(len(names))} == set(names)
    assert all(sorted(rotated(names, number)) == sorted(names) for number in range(9))


def test_the_base_holds_what_a_process_takes() -> None:
    made = Sweep(SweepBench(WORKLOAD, Path("unused"), "0"), lambda text: None)
    assert made.need.base > 200 * MIB
    assert made.need.staging <= made.need.kv
