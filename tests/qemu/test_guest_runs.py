# SPDX-License-Identifier: Apache-2.0
"""Whole runs with files on a drive, held to their budget by a v2 memory cgroup."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from drives import MIB, drives, in_child

pytestmark = [
    pytest.mark.needs("qemu"),
    pytest.mark.machine("runs"),
    pytest.mark.slow,  # torch alone takes a minute and more to load
]
JOB = Path("/sys/fs/cgroup/job")
LAYERS, HEADS, HEAD_DIM, BATCH, PROMPT, NEW = 4, 16, 128, 16, 96, 16
KV = LAYERS * 2 * BATCH * HEADS * HEAD_DIM * 4 * (PROMPT + NEW)  # 112 MiB
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A filesystem on a drive."""
    folder, block = tmp_path_factory.mktemp("disk"), str(drives()["DISK0"].block)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", block], check=True)
    subprocess.run(["mount", "-t", "ext4", block, str(folder)], check=True)
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def job() -> Iterator[Path]:
    """A cgroup with a memory controller for those below it."""
    (JOB.parent / "cgroup.subtree_control").write_text("+memory")
    JOB.mkdir()
    yield JOB
    JOB.rmdir()


def run(job: Path, disk: Path, *words: str) -> dict[str, Any]:
    model, report = disk / "model", disk / "report"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps(CONFIG))
    arguments = [
        "run", "--model", str(model), "--weights", "dummy", "--dtype", "float32", "--batch-size", str(BATCH),
        "--prompt-len", str(PROMPT), "--max-new-tokens", str(NEW), "--enforce", "--cache-dir", str(disk),
        "--report", str(report), *words,
    ]  # fmt: skip

    def child() -> None:
        (job / "cgroup.procs").write_text(str(os.getpid()))
        from dualblade.cli.main import main

        assert main(arguments) == 0

    assert in_child(child) == 0
    return dict(json.loads(report.read_text()))


def test_reclaim_takes_less_than_a_hundredth_of_decoding(job: Path, disk: Path) -> None:
    """In a budget that holds a part of the KV, and whose limit is met."""
    record = run(job, disk, "--mem-budget", "460M")
    memory, cgroup = record["memory"], record["memory"]["cgroup"]
    assert cgroup["version"] == 2
    assert cgroup["stalls_of"] == "cgroup"
    assert cgroup["over_high"] > 0
    assert 0 < record["paths"]["page_cache"]["bytes"] < KV // 2
    assert cgroup["decode_stall_ratio"] < 0.01
    assert cgroup["decode_stall_some_s"] < 0.01 * record["decode_s"]
    assert cgroup["oom_kills"] == 0
    assert memory["peak_bytes"] <= 460 * MIB
