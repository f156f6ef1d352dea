# SPDX-License-Identifier: Apache-2.0
"""A build on a machine without liburing, and without what CUDA wants."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import sys
from spdk_glue import *
print(*engines())
with open(sys.argv[1], "r+b") as file, Queue.files([file.fileno()]) as queue, Region(PAGE) as region:
    region.buffer()[:] = b"x" * PAGE
    queue.run(WRITE, [plain(PAGE, region.address, PAGE)])
    queue.flush()
    print(queue.engine, queue.reason, sep=": ")
    try:
        Queue.files([file.fileno()], engine="uring")
    except NotBuiltError as error:
        print(error)
"""

NOTHING = {"DUALBLADE_NO_URING": "1", "DUALBLADE_NO_SPDK": "1", "DUALBLADE_NO_CUDA": "1"}

pytestmark = pytest.mark.needs("cc")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of its own with the package in it: the checkout's build stays as it is."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("build")
    shutil.copytree(
        ROOT / "spdk_glue", folder / "spdk_glue", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(ROOT / "setup.py", folder)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder, env=os.environ | NOTHING,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "building without it" in done.stderr
    return folder


def python(built: Path, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": str(built)}
    return subprocess.run(
        [sys.executable, *words], cwd=built, env=env, capture_output=True, text=True, check=True
    ).stdout


def test_files_go_through_posix(built: Path, tmp_path: Path) -> None:
    file = tmp_path / "medium"
    file.write_bytes(bytes(8192))
    assert python(built, "-c", USE, str(file)).splitlines() == [
        "posix mem null",
        "posix: this build has no io_uring: liburing was not found",
        "this build has no engine 'uring' (it has: posix, mem, null)",
    ]
    assert file.read_bytes() == bytes(4096) + b"x" * 4096


def test_the_doctor_warns(built: Path, tmp_path: Path) -> None:
    ask = (
        "import json; from dualblade.cli import doctor; from dualblade.host import checks\n"
        "engine = checks.c_engine(*doctor.built_engines(), 'rebuild')\n"
        "print(json.dumps([engine.state, engine.detail, engine.fix]))"
    )
    state, detail, fix = json.loads(python(built, "-c", ask))
    assert (state, fix) == ("warn", "apt-get install liburing-dev pkg-config && rebuild")
    assert detail.startswith("built without liburing (it has: posix mem null); posix threads")


def test_a_generic_device_needs_liburing(built: Path) -> None:
    ask = (
        "from dualblade.errors import TargetError; from dualblade.targets import open_target\n"
        "try: open_target('/dev/ng0n1', capacity=None, cache_dir=None)\n"
        "except TargetError as error: print(error.message, error.hint, sep='; ')"
    )
    told = python(built, "-c", ask)
    assert told.startswith("/dev/ng0n1 needs io_uring, which this build is without; install liburing")


def test_copiers_are_told_to_be_missing(built: Path) -> None:
    code = "from spdk_glue import *\ntry: Copier()\nexcept NotBuiltError as error: print(error)"
    assert python(built, "-c", code) == "this build is without CUDA\n"
