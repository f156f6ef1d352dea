# SPDX-License-Identifier: Apache-2.0
"""pytest in the guest: its fixtures, and one line of JSON a test to the host, as soon as it is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from drives import MIB, Drive, call, drives, host

REPORTS = Path("/run/host/reports")


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("machine(name)", "needs(*names)", "slow"):
        config.addinivalue_line("markers", f"{marker}: see tests/qemu/conftest.py")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    text = report.longreprtext
    if report.skipped and isinstance(report.longrepr, tuple):
        text = report.longrepr[2]
    if report.failed:
        text += "".join(f"\n--- {name}\n{content}" for name, content in report.sections)
    line = {
        "test": report.nodeid, "when": report.when, "outcome": report.outcome, "text": text,
        "seconds": round(report.duration, 2),
    }  # fmt: skip
    with REPORTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.fixture
def blank() -> Iterator[Drive]:
    """A drive that may be bound; the kernel's again afterwards, with nothing left of it."""
    drive = drives()["BLANK0"]
    yield drive
    host("unbind", drive.address)
    drive.wait()


@pytest.fixture
def spare() -> Iterator[Drive]:
    """A drive that may be written to; free to take again afterwards."""
    drive = drives()["SPARE0"]
    size = int(call("blockdev", "--getsize64", drive.block))
    yield drive
    if drive.driver != "nvme":
        host("unbind", drive.address)
        drive.wait()
    for offset in (0, size - MIB):
        drive.write(offset, bytes(MIB))
    call("blockdev", "--rereadpt", drive.block)
