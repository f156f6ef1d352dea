# SPDX-License-Identifier: Apache-2.0
"""Generation under an enforced budget while a memory hog comes and goes in the cgroup above it.

`make soak` runs it; SOAK_MINUTES (30) and SOAK_SEED in the environment change it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from memory_worker import generate, make_model, prompt_of
from transformers import DynamicCache

from dualblade.host.cgroup import own_cgroup
from dualblade.host.sysfs import Host

pytestmark = [pytest.mark.soak, pytest.mark.needs("cgroup_v1")]
MINUTES = float(os.environ.get("SOAK_MINUTES", "30"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
MIB = 1 << 20
BUDGET = 384 * MIB
ABOVE = 560 * MIB  # what the run and the hog have together
HOG_MOST = 230 * MIB  # beside the anonymous memory of the run there is room for it, beside its cache not
WORKER = Path(__file__).with_name("memory_worker.py")
HOG = """
import mmap, random, sys, time
chance = random.Random(int(sys.argv[1]))
while True:
    size = chance.randrange(1 << 20, int(sys.argv[2]))
    held = mmap.mmap(-1, size)
    for offset in range(0, size, mmap.PAGESIZE):
        held[offset] = 1
    time.sleep(chance.uniform(0.1, 4))
    held.close()
    print(size, flush=True)
    time.sleep(chance.uniform(0, 2))
"""


@pytest.fixture
def above() -> Iterator[Path]:
    """A cgroup with a limit, over the run and the hog."""
    own = own_cgroup(Host())
    assert own is not None
    made = Path(own.directory) / f"soak-{os.getpid()}"
    made.mkdir()
    (made / "memory.limit_in_bytes").write_text(str(ABOVE))
    yield made
    for child in [*made.glob("dualblade-*"), made]:
        child.rmdir()


def start(cgroup: Path, out: Path, *words: object) -> subprocess.Popen[bytes]:
    with out.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, words)], stdin=subprocess.PIPE, stdout=file,
            preexec_fn=lambda: (cgroup / "cgroup.procs").write_text(str(os.getpid())) and None,
        )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> int:
    """Of the worker: its stdin ends, and with it the round that it is in."""
    assert process.stdin
    process.stdin.close()
    return process.wait(timeout=300)


def kills(cgroup: Path) -> int:
    words = (cgroup / "memory.oom_control").read_text().split()
    return int(words[words.index("oom_kill") + 1])


class Rounds:
    """What the worker has told so far, each round judged by a model of this process, outside of any limit."""

    def __init__(self, told: Path):
        self._told = told
        self._model = make_model()
        self.all: list[dict[str, Any]] = []
        self.outcomes: Counter[str] = Counter()

    def look(self) -> None:
        for line in self._told.read_text().splitlines(keepends=True)[len(self.all) :]:
            if line.endswith("\n"):
                self._judge(json.loads(line))

    def _judge(self, one: dict[str, Any]) -> None:
        self.all.append(one)
        if one["tokens"] is None:
            self.outcomes["refused"] += 1
            return
        right = generate(self._model, DynamicCache(config=self._model.config), prompt_of(one["seed"]))
        assert one["tokens"] == right, f"seed {one['seed']}"
        self.outcomes["right"] += 1

    @property
    def done(self) -> list[dict[str, Any]]:
        return [one for one in self.all if one["tokens"]]


def test_a_hog_comes_and_goes(above: Path, direct_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, hogged = direct_dir / "rounds", direct_dir / "hogged"
    told.touch()
    rounds, deadline = Rounds(told), time.monotonic() + 60 * MINUTES
    worker = start(above, told, WORKER, BUDGET, direct_dir / "kv", SEED)
    hog = start(above, hogged, "-c", HOG, SEED, HOG_MOST)
    try:
        while time.monotonic() < deadline:
            assert (worker.poll(), hog.poll()) == (None, None)
            rounds.look()
            time.sleep(0.1)
        assert end(worker) == 0
        assert hog.poll() is None
    finally:
        for process in (worker, hog):
            process.kill()
            process.wait()
    rounds.look()
    with capsys.disabled():
        print("\n" + summary(rounds, hogged.read_text().split()))
    judge(rounds)
    assert kills(above) == 0


def judge(rounds: Rounds) -> None:
    assert rounds.outcomes["right"] >= MINUTES
    assert max(one["peak"] for one in rounds.done) <= BUDGET
    last = rounds.done[-1]["cgroup"]
    assert last["peak_bytes"] <= last["limit_bytes"] <= BUDGET
    assert last["oom_kills"] == 0


def summary(rounds: Rounds, hogged: list[str]) -> str:
    shares = sorted(one["share"] // MIB for one in rounds.done)
    last = rounds.done[-1]["cgroup"]
    outcomes = ", ".join(f"{name} {count}" for name, count in rounds.outcomes.items())
    parts = [
        f"{MINUTES:g} minutes: {outcomes}",
        f"peak {max(one['peak'] for one in rounds.done) // MIB} MiB of {BUDGET // MIB}",
        f"page-cache share {shares[0]} to {shares[-1]} MiB",
        f"hog {len(hogged)} times, up to {max(map(int, hogged), default=0) // MIB} MiB",
        f"refaults {last['refault_bytes'] // MIB} MiB, over the limit {last['over_limit']}",
        f"machine stalled {last['stall_full_s']:.1f} s, OOM kills {last['oom_kills']}",
    ]
    return "; ".join(parts)
