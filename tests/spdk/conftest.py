# SPDX-License-Identifier: Apache-2.0
"""Emulated targets for tests: one that all share, and one to break."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from traces import Traces

from dualblade.emulate import EmulatedTarget


@pytest.fixture
def nothing_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traces]:
    """Targets of this test, and of programs it starts, keep their files in a folder of their own. After
    the test no process, socket, file or hugepage of them may be left."""
    tmp_path_factory.getbasetemp()  # made now, so that it is not made below the folder
    base = Path(tempfile.mkdtemp(prefix="db-"))
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setenv("TMPDIR", str(base))
    traces = Traces(base)
    yield traces
    left = traces.left()
    shutil.rmtree(base)
    assert left == []


@pytest.fixture(scope="session")
def shared_target() -> Iterator[EmulatedTarget]:
    """For tests that leave it as it is, but for disks and exports under names of their own."""
    with EmulatedTarget(memory_mib=256, hugepages=False) as emulated:
        yield emulated


@pytest.fixture
def fresh_target(nothing_left: Traces) -> Iterator[EmulatedTarget]:
    """For tests that kill, stop or misconfigure it."""
    with EmulatedTarget(memory_mib=64, hugepages=False) as emulated:
        yield emulated
