# SPDX-License-Identifier: Apache-2.0
"""The machinery of tests/conftest.py, run on small suites of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
SUITE = """
import pytest

@pytest.mark.needs("root")
def test_present(): pass

@pytest.mark.needs("fio")
def test_missing(): pass

def test_direct(direct_dir): assert direct_dir.is_dir()
"""
PROBES = """
_PROBES.update(root=lambda: None, fio=lambda: "it was taken away", o_direct=lambda: None)
"""


def run(folder: Path, suite: str = SUITE, require: str = "", *args: str) -> tuple[int, str]:
    (folder / "test_it.py").write_text(suite)
    (folder / "needs.py").write_text((TESTS / "needs.py").read_text() + PROBES)
    shutil.copy(TESTS / "conftest.py", folder)
    (folder / "pytest.ini").write_text("[pytest]\ntestpaths = .\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
        cwd=folder, env=os.environ | {"REQUIRE": require}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_missing_need_skips_and_is_named(tmp_path: Path) -> None:
    code, out = run(tmp_path, SUITE, "", "-rs")
    assert code == 0
    assert "need fio: it was taken away" in out
    assert "need root: run (1 test)\n" in out
    assert "need fio: skipped because it was taken away\n" in out
    assert "need o_direct: run (1 test)\n" in out
    assert "need spdk: no tests in this version\n" in out


def test_a_required_need_that_is_missing_fails(tmp_path: Path) -> None:
    code, out = run(tmp_path, SUITE, "fio,root")
    assert code == 1
    assert "REQUIRE=fio, but it was taken away" in out
    assert "REQUIRE=root" not in out


def test_a_required_need_without_tests_fails(tmp_path: Path) -> None:
    code, out = run(tmp_path, "def test_nothing(): pass\n", "spdk")
    assert code == 1
    assert "REQUIRE=spdk, but no test ran for it" in out


def test_a_required_need_whose_tests_were_left_out_fails(tmp_path: Path) -> None:
    code, out = run(tmp_path, SUITE, "root", "-k", "direct")
    assert code == 1
    assert "need root: not run" in out


@pytest.mark.parametrize(
    ("suite", "require", "text"),
    [
        (SUITE, "teapot", "REQUIRE names unknown needs: ['teapot']"),
        (SUITE.replace('"fio"', '"teapot"'), "", "needs ['teapot'], which tests/needs.py does not know"),
    ],
)
def test_an_unknown_need_is_a_usage_error(tmp_path: Path, suite: str, require: str, text: str) -> None:
    code, out = run(tmp_path, suite, require)
    assert code == 4
    assert text in out
