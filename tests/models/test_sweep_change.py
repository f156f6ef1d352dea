# SPDX-License-Identifier: Apache-2.0
"""`bench sweep --change`: a limit that is lowered and lifted while a run decodes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dualblade.bench.change import COMPARED, Change, lowered_bytes, phases
from dualblade.bench.limit import make_limit
from dualblade.bench.workloads import Budget, Need
from dualblade.cli.main import main
from dualblade.host.memory_cgroup import MemoryCgroup
from dualblade.host.sysfs import Host
from dualblade.units import MIB

NEED = Need(weights=100, runtime=100, activations=100, staging=100, moving=0, kv=1000)
BUDGET = Budget(0.5, 900)
WORDS = ["bench", "sweep", "--model", "tiny", "--context", "300", "--keep-caches", "--rounds", "1"]


def test_the_limit_moves_after_each_third(tmp_path: Path) -> None:
    for name in ("memory.max", "memory.peak"):
        (tmp_path / name).write_text("900")
    change = Change(MemoryCgroup("", Host(tmp_path), 2), BUDGET, NEED, 12)
    seen = []
    for count in range(1, 13):
        change.on_token(count)
        seen.append(int((tmp_path / "memory.max").read_text()))
    assert seen == [900] * 3 + [650] * 4 + [900] * 5
    assert change.refused == 0
    assert lowered_bytes(BUDGET, NEED) == 650


def test_a_limit_that_the_kernel_refuses_is_counted(tmp_path: Path) -> None:
    change = Change(MemoryCgroup("/none", Host(tmp_path), 2), BUDGET, NEED, 9)
    for count in range(1, 10):
        change.on_token(count)
    assert change.refused == 2


def test_the_steps_fall_into_the_phases_of_the_limit() -> None:
    """Of twelve tokens the first has no step; the fourth lowers the limit, the eighth lifts it."""
    steps = [1.0] * 3 + [5.0] * 4 + [2.0] * 4
    assert phases(steps) == {"before_s": 1.0, "lowered_s": 5.0, "after_s": 2.0}


@pytest.mark.needs("uring", "o_direct", "root")
def test_both_run_under_it(direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_limit("dualblade-test-change", 64 * MIB)
    if isinstance(made, str):
        pytest.skip(made)
    made.remove()
    words = [*WORDS, "--new-tokens", "9", "--budgets", "0.5", "--baselines", "dual", "--change"]
    out = direct_dir / "out"
    cache = direct_dir / "cache"
    assert main([*words, "--cache-dir", str(cache), "--out", str(out), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["enforced"]
    rows = {row["baseline"]: row for row in record["change"]["rows"]}
    assert set(rows) == set(COMPARED)
    assert all(row["verified"] and row["lowered_s"] > 0 for row in rows.values())
    assert rows["dual"]["decode_vs_static"]["ratio"] > 0
    assert rows["dual"]["lowered_bytes"] < rows["dual"]["budget_bytes"]
    assert "Memory that becomes scarce" in (out / "report.html").read_text()
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--change", "--new-tokens", "4"], "error: --change takes more tokens"),
        (["--change", "--new-tokens", "9", "--no-enforce"], "error: --change lowers the limit"),
    ],
)
def test_refusals(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--budgets", "0.5", "--cache-dir", str(tmp_path), *words]) in (1, 2)
    assert message in capsys.readouterr().err
