# SPDX-License-Identifier: Apache-2.0
"""One drive, and the program run on its machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from nvme_machine import FakeDrive, Machine
from one_drive import (
    BDF,
    SERIAL,
)

from dualblade.host import __main__ as tool
from dualblade.host import bind as bind_module
from dualblade.host import driver, unbind


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One drive, nobody's, driven by the kernel; this process is root there."""
    made = Machine(tmp_path / "root")
    made.add(FakeDrive(BDF, SERIAL))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("SUDO_USER", raising=False)
    for module, name in (
        (driver, "_LINK_SECONDS"),
        (bind_module, "_NODE_SECONDS"),
        (unbind, "_DEVICE_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.05)
    return made


@pytest.fixture
def run(machine: Machine, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(words) -> (exit code, stdout, stderr)."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tool.main(words, machine)
        shown = capsys.readouterr()
        print(words, code, shown.err)  # where a test fails
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call
