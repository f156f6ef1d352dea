# SPDX-License-Identifier: Apache-2.0
"""Starts the process of one trial and listens to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from dualblade.bench.trial import Trial
from dualblade.config import TORCH_ENVIRONMENT, child_environment
from dualblade.errors import DualBladeError

_CHILD = [sys.executable, "-m", "dualblade.bench.child"]


OnToken = Callable[[int], None]


def no_one(count: int) -> None:
    """Is told of a token."""


class ChildFailed(DualBladeError):
    """A trial that gave no record, and why, in one line."""


def run_child(trial: Trial, on_token: OnToken = no_one) -> dict[str, Any]:
    """The trial's record. on_token(n) is called when the n-th token is there; where the trial pauses, it goes
    on afterwards. Raises ChildFailed."""
    with tempfile.TemporaryFile("w+") as talk:
        environment = child_environment(**TORCH_ENVIRONMENT)
        child = subprocess.Popen(
            _CHILD, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=talk, text=True, env=environment
        )
        try:
            last = _listen(child, trial, on_token)
        finally:
            child.kill()  # after Ctrl-C; one that has ended feels nothing
            status = child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with suppress(BrokenPipeError):  # what was not taken any more
                        pipe.close()
        if "record" in last:
            record: dict[str, Any] = last["record"]
            return record
        raise ChildFailed(last.get("error") or _why(status, talk), last.get("hint"))


def _listen(child: subprocess.Popen[str], trial: Trial, on_token: OnToken) -> dict[str, Any]:
    """The last thing it said."""
    assert child.stdin
    assert child.stdout
    last: dict[str, Any] = {}
    _send(child.stdin, json.dumps(trial.plain()))
    for line in child.stdout:
        last = json.loads(line)
        if "token" in last:
            on_token(last["token"])
            if last["token"] in trial.pauses:
                _send(child.stdin, "go on")
    return last


def _send(pipe: IO[str], line: str) -> None:
    """A child that has ended tells by what it said, and by its status."""
    with suppress(BrokenPipeError):
        print(line, file=pipe, flush=True)


def _why(status: int, talk: IO[str]) -> str:
    if status == -signal.SIGKILL:
        return "it was killed: its memory cgroup was full"
    talk.seek(0)
    said = [line.strip() for line in talk if line.strip()]
    return said[-1] if said else f"it ended with status {status} and said nothing"
