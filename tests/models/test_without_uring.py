# SPDX-License-Identifier: Apache-2.0
"""The program where io_uring is forbidden, as in a container with its runtime's default profile."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dualblade.zoo import TINY

FORBID = Path(__file__).parents[1] / "forbid_uring.py"
PROGRAM = [sys.executable, "-m", "dualblade.cli.main"]
SAMPLE = TINY.parent / "sample.txt"
RUN = ["run", "--model", "tiny", "--prompt-file", str(SAMPLE), "--mem-budget", "2G", "--max-new-tokens", "24"]
REASON = "io_uring is forbidden here (EPERM): seccomp profile or kernel.io_uring_disabled"

pytestmark = pytest.mark.needs("uring", "o_direct", "seccomp")


def program(*words: str, forbidden: bool = True) -> subprocess.CompletedProcess[str]:
    before = [sys.executable, str(FORBID), "EPERM"] if forbidden else []
    done = subprocess.run(
        [*before, *PROGRAM, *words], capture_output=True, text=True, timeout=120, check=False
    )
    assert "Traceback" not in done.stderr
    return done


def test_the_text_is_the_same_and_both_paths_say_why(direct_dir: Path) -> None:
    options = [*RUN, "--page-cache-budget", "2M", "--cache-dir", str(direct_dir), "--json"]
    usual, other = (program(*options, forbidden=forbidden) for forbidden in (False, True))
    assert (usual.returncode, other.returncode) == (0, 0), other.stderr
    before, now = json.loads(usual.stdout), json.loads(other.stdout)
    assert now["text"] == before["text"]
    for path in before["paths"].values():
        assert path["engine"] == "uring"
        assert "reason" not in path
    for path in now["paths"].values():
        assert path["tensors"] > 0
        assert path["read_bytes"] > path["bytes"] > 0
        assert (path["engine"], path["reason"]) == ("posix", REASON)


def test_the_summary_says_it_once(direct_dir: Path) -> None:
    done = program(*RUN, "--page-cache-budget", "2M", "--cache-dir", str(direct_dir))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 10
    assert done.stderr.splitlines().count(f"engine posix, because {REASON}") == 1
    assert "direct path: posix, " in done.stderr


def test_a_volume_is_used_by_one_engine_after_the_other(direct_dir: Path) -> None:
    volume = str(direct_dir / "kv.img")
    assert program("volume", "create", volume, "--capacity", "64M").returncode == 0
    options = [*RUN, "--nvme", volume, "--kv-path", "direct", "--cache-dir", str(direct_dir), "--json"]
    texts = set()
    for forbidden in (True, False):
        done = program(*options, forbidden=forbidden)
        assert done.returncode == 0, done.stderr
        texts.add(json.loads(done.stdout)["text"])
        assert program("volume", "check", volume, forbidden=not forbidden).returncode == 0
    assert len(texts) == 1


def test_the_doctor_warns_and_names_the_remedy(direct_dir: Path) -> None:
    done = program("doctor", "--cache-dir", str(direct_dir), "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    ring = checks["io_uring"]
    assert ring["state"] == "warn"
    assert ring["detail"] == f"{REASON}; posix threads move the bytes instead, slower on a fast drive"
    assert "seccomp=unconfined" in ring["fix"] or "io_uring_disabled=0" in ring["fix"]
    assert checks["engine"]["state"] == "ok"
