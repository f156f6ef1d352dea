# SPDX-License-Identifier: Apache-2.0
"""Needs: `@pytest.mark.needs("uring")` skips a test, by name of the need, where it is not met.

REQUIRE=spdk,gpu in the environment turns a missing need, or one that no test ran for, into a failure.
The run ends with one line a need.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import needs
import pytest


class Needs:
    """What this run's tests need, what became of them, and what must not be missing."""

    def __init__(self, required: frozenset[str], whole: bool):
        self.required = required
        self.whole = whole  # every test of this version was looked at
        self.wanted: Counter[str] = Counter()
        self.ran: Counter[str] = Counter()

    def problem(self, need: str) -> str | None:
        """As the machine has it; without tests that ask, a slow probe is not worth its time."""
        return needs.problem(need) if self.wanted[need] else None

    def outcome(self, need: str) -> str:
        if self.ran[need]:
            return f"run ({self.ran[need]} test{'s' if self.ran[need] > 1 else ''})"
        if not self.wanted[need]:
            return f"no tests in this {'version' if self.whole else 'selection'}"
        if reason := self.problem(need):
            return f"skipped because {reason}"
        return f"not run: its {self.wanted[need]} test(s) were left out or skipped for another reason"

    def lines(self) -> list[str]:
        told = [need for need in needs.NAMES if self.wanted[need] or need in needs.ALWAYS_TOLD]
        told += sorted(self.required - set(told))
        return [f"need {need}: {self.outcome(need)}" for need in told]

    def unmet(self) -> list[str]:
        return sorted(need for need in self.required if not self.ran[need])


_KEY = pytest.StashKey[Needs]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*names): skipped where a need is not met; see tests/needs.py")
    required = frozenset(filter(None, os.environ.get("REQUIRE", "").replace(",", " ").split()))
    if unknown := sorted(required - set(needs.NAMES)):
        raise pytest.UsageError(f"REQUIRE names unknown needs: {unknown}; known: {', '.join(needs.NAMES)}")
    _as_in_the_foreground()
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    config.stash[_KEY] = Needs(required, whole)


def _as_in_the_foreground() -> None:
    """A shell ignores SIGINT for what it runs in the background, nohup SIGHUP; children would, too."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def needs_of(item: pytest.Item) -> list[str]:
    names = [name for mark in item.iter_markers("needs") for name in mark.args]
    if "direct_dir" in getattr(item, "fixturenames", ()):
        names.append("o_direct")
    return list(dict.fromkeys(names))


@pytest.hookimpl(tryfirst=True)  # before -m takes tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        names = needs_of(item)
        if unknown := [name for name in names if name not in needs.NAMES]:
            raise pytest.UsageError(f"{item.nodeid} needs {unknown}, which tests/needs.py does not know")
        config.stash[_KEY].wanted.update(names)


def missing(config: pytest.Config, need: str, reason: str) -> None:
    """Skip this test, or fail it where REQUIRE names the need."""
    if need in config.stash[_KEY].required:
        pytest.fail(f"REQUIRE={need}, but {reason}", pytrace=False)
    pytest.skip(f"need {need}: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for need in needs_of(item):
        if reason := needs.problem(need):
            missing(item.config, need, reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and not report.skipped:
        item.config.stash[_KEY].ran.update(needs_of(item))
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    state = session.config.stash[_KEY]
    if state.unmet() and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    state = config.stash[_KEY]
    terminalreporter.section("needs")
    for line in state.lines():
        terminalreporter.write_line(line)
    for need in state.unmet():
        terminalreporter.write_line(f"FAILED: REQUIRE={need}, but no test ran for it", red=True)


@pytest.fixture(autouse=True)
def no_gpu(request: pytest.FixtureRequest) -> Generator[None, None, None]:
    """Where there is a GPU, only tests that need one see it; the others are about the CPU."""
    if "gpu" in needs_of(request.node):
        yield
        return
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUDA_VISIBLE_DEVICES", "")  # for children
        if torch := sys.modules.get("torch"):
            patched.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def direct_dir(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder of this test's own where O_DIRECT works."""
    if reason := needs.direct_problem(tmp_path):
        missing(request.config, "o_direct", reason)
    return tmp_path


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated CUDA driver."""
    from emulated_cuda import build

    return build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture
def cuda(cuda_library: Path) -> Generator[Any, None, None]:
    """The emulated driver with a context and a compute stream, which must be left as they were found."""
    from emulated_cuda import Driver

    driver = Driver(cuda_library)
    yield driver
    driver.script()
    driver.close()
    left = {name: count for name, count in driver.counts().items() if not name.startswith("copie")}
    assert not any(left.values()), f"left behind: {left}"
