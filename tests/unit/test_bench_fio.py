# SPDX-License-Identifier: Apache-2.0
"""fio beside the engine: what it is asked for, and what is said when it fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from dualblade.bench.fio import run_fio
from dualblade.errors import DualBladeError
from dualblade.units import GIB, MIB

REPORT = json.dumps({"jobs": [{"read": {"io_bytes": GIB, "runtime": 500}}]})


@pytest.fixture
def fio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fio that answers with the file `answer`, and leaves what it was asked for in `asked`."""
    program = tmp_path / "fio"
    program.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/asked\n. {tmp_path}/answer\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


@pytest.mark.parametrize("fixed", [True, False])
def test_buffers_are_registered_where_ours_are(fio: Path, fixed: bool) -> None:
    (fio / "answer").write_text(f"echo '{REPORT}'\n")
    assert run_fio(fio / "file", "read", GIB, MIB, 32, fixed) == pytest.approx(2.0)
    assert f"--fixedbufs={fixed:d}" in (fio / "asked").read_text().split()


def test_the_error_is_what_fio_complains_of(fio: Path) -> None:
    (fio / "answer").write_text("echo 'fio: pid=1, error=Cannot allocate memory'\necho '{}'\nexit 1\n")
    with pytest.raises(DualBladeError, match=r"^fio failed: pid=1, error=Cannot allocate memory$"):
        run_fio(fio / "file", "read", GIB, MIB, 32, True)
