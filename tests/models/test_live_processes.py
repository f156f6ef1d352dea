# SPDX-License-Identifier: Apache-2.0
"""Live runs in processes of their own: under a cgroup's limit that changes, and killed at any instant."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

# a cgroup -----------------------------------------------------------------------------------

LIMITED = """
import json, os, sys, torch
group, folder = sys.argv[1:]
def limit(nbytes):
    with open(f"{group}/memory.limit_in_bytes", "w") as file:
        file.write(str(nbytes))
def usage():
    with open(f"{group}/memory.usage_in_bytes") as file:
        return int(file.read())
limit(4 << 30)
with open(f"{group}/cgroup.procs", "w") as file:
    file.write(str(os.getpid()))
from dualblade import DualBladeCache
from transformers import LlamaConfig
torch.set_num_threads(1)
LAYERS, HEADS, DIM, TOKENS = 8, 8, 128, 4096
config = LlamaConfig(num_hidden_layers=LAYERS, hidden_size=HEADS * DIM, num_attention_heads=HEADS,
                     num_key_value_heads=HEADS, head_dim=DIM)
rows = torch.randn(1, HEADS, 3000, DIM).bfloat16()
with DualBladeCache(config, mem_budget="4G", cache_dir=folder, dtype=torch.bfloat16, max_tokens=TOKENS,
                    batch_size=1, activation_bytes=0, prefetch_depth=1) as cache:
    def steps(met, most=900):
        for step in range(most):
            for layer in range(LAYERS):
                k, v = cache.update(rows[:, :, step:step + 1], rows[:, :, step:step + 1], layer)
                if step % 8 == 0:
                    assert torch.equal(k[:, :, :3000], rows), "a wrong row of K"
                    assert torch.equal(v[:, :, :3000], rows), "a wrong row of V"
            if met():
                return
        raise SystemExit(json.dumps(governor.report()))
    for layer in range(LAYERS):
        cache.update(rows, rows, layer)
    governor = cache.storage.governor
    cache.storage.store.flush()
    limit(usage() - (60 << 20))
    steps(lambda: governor.report()["demoted_bytes"] >= 50 << 20)
    cache.crop(3000)
    limit(4 << 30)
    steps(lambda: governor.report()["promoted_bytes"] >= 40 << 20)
    print(json.dumps(cache.report()))
"""


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A memory cgroup of version 1 of this test's own."""
    group = Path(f"/sys/fs/cgroup/memory/dualblade-test-{uuid4().hex[:8]}")
    if not (group.parent / "memory.limit_in_bytes").exists():
        pytest.skip("need cgroup: there is no memory controller of version 1 here")
    group.mkdir()
    yield group
    group.rmdir()


@pytest.mark.needs("root", "uring", "o_direct")
def test_a_limit_that_falls_and_rises(memory_group: Path, direct_dir: Path) -> None:
    """A real one, lowered below what the process has by then: nobody is killed, and blocks go and come."""
    command = [sys.executable, "-c", LIMITED, str(memory_group), str(direct_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    governor = json.loads(done.stdout)["governor"]
    assert governor["notes"] == []
    reasons = {move["reason"] for move in governor["moves"] if move["to"] == "direct"}
    assert all("memory.limit_in_bytes leaves" in reason or "pressure" in reason for reason in reasons)
    assert list(direct_dir.iterdir()) == []


# kills --------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch
sys.path[:0] = sys.argv[3:]
from dualblade import DualBladeCache
from random_moves import RandomMoves
from transformers import LlamaConfig
config = LlamaConfig(num_hidden_layers=4, hidden_size=256, num_attention_heads=4, num_key_value_heads=4,
                     head_dim=64)
cache = DualBladeCache(config, nvme=sys.argv[1], mem_budget="8G", page_cache_budget="3M",
                       cache_dir=sys.argv[2], dtype=torch.bfloat16, max_tokens=4000, batch_size=1)
moves = RandomMoves(cache.storage.store, seed=1)
rows = torch.randn(1, 4, 1500, 64).bfloat16()
for layer in range(4):
    cache.update(rows, rows, layer)
for step in range(100000):
    for layer in range(4):
        k, v = cache.update(rows[:, :, :1], rows[:, :, :1], layer)
        assert torch.equal(k[:, :, :1500], rows) and torch.equal(v[:, :, :1500], rows), "a wrong row"
    if moves.migrator.copied_bytes:
        print("moving", flush=True)
    if step == 2000:
        cache.crop(1500)
"""


def volume(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dualblade.cli.main", "volume", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.needs("uring", "o_direct")
def test_a_kill_during_migrations_leaves_a_clean_volume(direct_dir: Path) -> None:
    """Whenever it comes; the next process reclaims what was left, and gives right rows."""
    target = direct_dir / "target"
    made = volume("create", str(target), "--capacity", "64M")
    assert made.returncode == 0, made.stderr
    here = Path(__file__).parent
    chance = random.Random(7)
    for _ in range(3):
        command = [sys.executable, "-c", PROGRAM, str(target), str(direct_dir), str(here.parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "moving\n", process.stderr and process.stderr.read()
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.communicate()
        checked = volume("check", str(target))
        assert checked.returncode == 0, checked.stderr
        assert [entry.name for entry in direct_dir.iterdir()] == ["target"]
