# SPDX-License-Identifier: Apache-2.0
"""The C programs of this folder, built plainly; `make asan` and `make tsan` run them under sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE.parents[1] / "scripts" / "sanitize.sh"
CASES = {
    "copies_test": ("refused", "memory", "events", "loads", "stores", "errors", "close", "quarantine"),
    "queue_test": ("full", "refused", "faults", "hung", "close", "flush", "memory"),
    "stress_test": ("order", "reorder", "posix", "uring"),
}
SKIP = 77

pytestmark = pytest.mark.needs("cc")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("c")
    subprocess.run([SCRIPT, "plain", "--build-only"], check=True, env=os.environ | {"OUT": str(out)})
    return out


def run(program: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"TMPDIR": str(program.parent)}
    return subprocess.run([program, *args], capture_output=True, text=True, timeout=120, env=env, check=False)


@pytest.mark.parametrize(
    ("program", "case"), [(name, case) for name, cases in CASES.items() for case in cases]
)
def test_case(programs: Path, program: str, case: str) -> None:
    done = run(programs / program, case)
    if done.returncode == SKIP:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stderr


def test_every_case_is_named_here(programs: Path) -> None:
    assert sorted(CASES) == sorted(path.stem for path in HERE.glob("*.c"))
    for name, cases in CASES.items():
        assert tuple(run(programs / name, "--list").stdout.split()) == cases
