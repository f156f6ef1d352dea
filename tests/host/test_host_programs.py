# SPDX-License-Identifier: Apache-2.0
"""python -m dualblade.host and dualblade-spdk: one at a time, usage, hints that work."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from nvme_machine import Machine
from one_drive import (
    BIND,
    NODE,
    driver_of,
)

from dualblade.host import __main__ as tool
from dualblade.host import journal
from dualblade.host.command import host_command

# the programs -------------------------------------------------------------------------------


def test_one_at_a_time(machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_LOCK_SECONDS", 0.05)
    with journal.locked(machine):
        code, _, err = run(*BIND)
    assert code == 1
    assert "another bind or unbind is at work" in err
    assert driver_of(machine) == "nvme"


@pytest.mark.parametrize(
    "words", [["bind"], ["bind", NODE, "--driver", "nvme"], ["unbind"], ["status", "--all"]]
)
def test_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(words)
    assert ended.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    command = hint.removeprefix("hint: the options: ")
    assert "Example:" in subprocess.run(command, shell=True, cwd="/", capture_output=True, text=True).stdout


def test_the_hinted_command_works_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the current folder was imported')")
    command = shlex.split(host_command("status", "--json", root=False))
    done = subprocess.run(command, cwd=tmp_path, env={}, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["ok"] is True


def test_both_programs_take_the_same_options() -> None:
    import argparse

    import click

    from dualblade.cli import bind, status
    from dualblade.cli import unbind as unbind_cli
    from dualblade.host import bind_command, status_command, unbind_command

    pairs: list[tuple[click.Command, Any]] = [
        (bind.bind, bind_command), (unbind_cli.unbind, unbind_command), (status.status, status_command),
    ]  # fmt: skip
    for clicked, module in pairs:
        parser = module.add_parser(argparse.ArgumentParser().add_subparsers())
        spelt = {word for action in parser._actions for word in action.option_strings or [action.metavar]}
        theirs = {
            word
            for option in clicked.params
            for word in (option.opts if option.opts[0][0] == "-" else ["DEV"])
        }
        assert theirs | {"-h", "--help"} == spelt
