# SPDX-License-Identifier: Apache-2.0
"""The program's manners: exit codes, error and hint lines, what goes to which stream."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from dualblade import __version__
from dualblade.cli import main as program
from dualblade.cli import output
from dualblade.cli.main import COMMANDS, main
from dualblade.config import default_cache_dir
from dualblade.errors import BudgetError, ConfigError, StorageError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make `doctor` raise what the test gives it."""

    def install(error: BaseException) -> None:
        def fail(**_: object) -> None:
            raise error

        monkeypatch.setattr("dualblade.cli.doctor.doctor.callback", fail)

    return install


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What went to stderr; nothing may have gone to stdout."""
    streams = capsys.readouterr()
    assert streams.out == ""
    assert "Traceback" not in streams.err
    return streams.err.splitlines()


@pytest.mark.parametrize(
    ("name", "usual", "wished"),
    [
        ("OMP_WAIT_POLICY", "passive", None),
        ("OMP_WAIT_POLICY", "passive", "active"),
        ("LRU_CACHE_CAPACITY", "16", None),
        ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16", "1024"),
    ],
)
def test_torch_finds_its_environment(name: str, usual: str, wished: str | None) -> None:
    """Before it is loaded; who has set it keeps it."""
    code = (
        "import os, sys; from dualblade.cli.main import main; status = main(); "
        f"print(status, 'torch' in sys.modules, os.environ['{name}'])"
    )
    environment = {each: value for each, value in os.environ.items() if each != name}
    environment |= {name: wished} if wished else {}
    done = subprocess.run(
        [sys.executable, "-c", code, "-h"], env=environment, capture_output=True, check=True
    )
    assert done.stdout.decode().splitlines()[-1] == f"0 False {wished or usual}"


def test_help_lists_every_command_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "Example:\n" in shown


def every_command(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        found = group.get_command(ctx, name)
        if isinstance(found, click.Group):
            yield from every_command(found, *path, name)
        else:
            yield *path, name


def test_every_command_has_json_and_help_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    commands = list(every_command(program.cli))
    assert len(commands) > len(COMMANDS)
    for words in commands:
        assert main([*words, "--help"]) == 0
        shown = capsys.readouterr().out
        assert f"Usage: dualblade-spdk {' '.join(words)}" in shown
        assert "Example:" in shown, words
        assert "--json" in shown, words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_no_command_shows_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert lines(capsys)[0].startswith("Usage: dualblade-spdk")


def test_a_group_without_a_command_shows_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["volume"]) == 2
    assert lines(capsys)[0].startswith("Usage: dualblade-spdk volume")


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        (["docter"], "no such command: 'docter'", "did you mean 'doctor'?"),
        (["xyzzy"], "no such command: 'xyzzy'", "dualblade-spdk --help lists the commands"),
        (["doctor", "--speed"], "--speed", "dualblade-spdk doctor --help shows the options"),
        (["--speed"], "--speed", "dualblade-spdk --help shows the options"),
        (["doctor", "more"], "more", "dualblade-spdk doctor --help shows the options"),
        (["doctor", "--cache-dir"], "--cache-dir", "dualblade-spdk doctor --help shows the options"),
    ],
)
def test_usage_errors(words: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    first, second = lines(capsys)
    assert first.startswith("error: ")
    assert error in first
    assert second == f"hint: {hint}"


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"]])
def test_our_errors_are_an_error_and_a_hint(failing: Any, words: list[str], capsys: Any) -> None:
    failing(BudgetError("6 GiB is too little", "raise --mem-budget"))
    assert main(words) == 1
    assert lines(capsys) == ["error: 6 GiB is too little", "hint: raise --mem-budget"]


def test_a_storage_error_has_no_traceback(failing: Any, capsys: Any) -> None:
    failing(StorageError("cannot read layer 3 K", errno=errno.EIO))
    assert main(["doctor"]) == 1
    assert lines(capsys) == ["error: cannot read layer 3 K"]


def test_interrupted(failing: Any, capsys: Any) -> None:
    failing(KeyboardInterrupt())
    assert main(["doctor"]) == 130
    assert lines(capsys) == ["interrupted"]


def test_a_bug_is_one_line(failing: Any, capsys: Any) -> None:
    failing(ValueError("two\nlines"))
    assert main(["doctor"]) == 1
    assert lines(capsys) == [
        "error: internal error: ValueError: two lines (--debug shows the traceback)",
    ]


@pytest.mark.parametrize("words", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback(failing: Any, words: list[str], capsys: Any) -> None:
    failing(ValueError("a bug"))
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.rstrip().endswith("ValueError: a bug")


def test_debug_after_the_dashes_is_an_argument() -> None:
    assert program._take_debug(["run", "--", "--debug"]) == (False, ["run", "--", "--debug"])


def test_an_engine_that_is_not_built_names_the_doctor(failing: Any, capsys: Any) -> None:
    class NotBuiltError(ImportError):
        pass

    failing(NotBuiltError("the C engine is not built"))
    assert main(["doctor"]) == 1
    assert lines(capsys) == [
        "error: the C engine is not built",
        "hint: dualblade-spdk doctor names what is missing",
    ]


def test_a_device_without_memory_is_told(failing: Any, capsys: Any) -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    failing(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free."))
    assert main(["doctor"]) == 1
    error, hint = lines(capsys)
    assert error == "error: the device ran out of memory: CUDA out of memory"
    assert "--device cpu" in hint


def test_a_reader_that_went_away_is_no_error() -> None:
    code = "import sys; from dualblade.cli.main import main; sys.exit(main(['--help']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_real_process_with_one_line(number: signal.Signals) -> None:
    code = (
        "import sys, time, dualblade.cli.doctor as d\n"
        "from dualblade.cli.main import main\n"
        "d.doctor.callback = lambda **_: (print('ready', flush=True), time.sleep(60))\n"
        "sys.exit(main())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (128 + number, "interrupted\n")


def test_a_hangup_that_nohup_keeps_away_ends_nothing() -> None:
    code = (
        "import os, signal, sys, dualblade.cli.doctor as d\n"
        "from dualblade.cli.main import main\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "d.doctor.callback = lambda **_: (os.kill(os.getpid(), signal.SIGHUP), print('went on'))\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor"], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


# output.py ---------------------------------------------------------------------------------------


def test_emit_shows_one_record_as_text_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "name": "Größe",
        "nan": float("nan"),
        "inf": [float("inf"), 1.5],
        "path": Path("/x"),
        "flags": (True, None),
    }
    output.emit(record, True, lambda _: pytest.fail("text was asked for"))
    shown = capsys.readouterr().out
    assert json.loads(shown) == {
        "name": "Größe",
        "nan": None,
        "inf": [None, 1.5],
        "path": "/x",
        "flags": [True, None],
    }
    assert "Größe" in shown
    output.emit(record, False, lambda given: click.echo(given["name"]))
    assert capsys.readouterr().out == "Größe\n"


def test_table_aligns_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["path", "tensors"], [["page-cache", 3], ["direct", 12]])
    assert capsys.readouterr().out.splitlines() == [
        "path        tensors",
        "page-cache        3",
        "direct           12",
    ]
    output.table(["path"], [])
    assert capsys.readouterr().out == "path\n"


def test_the_console_talks_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.console().print("loading")
    assert lines(capsys) == ["loading"]


# config.py ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("xdg", "folder"),
    [
        ("/var/cache", "/var/cache/dualblade"),
        ("", "/home/u/.cache/dualblade"),
        ("rel", "/home/u/.cache/dualblade"),
    ],
)
def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch, xdg: str, folder: str) -> None:
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    assert default_cache_dir() == Path(folder)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    with pytest.raises(ConfigError) as caught:
        default_cache_dir()
    assert "--cache-dir" in str(caught.value.hint)
