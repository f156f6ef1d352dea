# SPDX-License-Identifier: Apache-2.0
"""`dualblade-spdk emulate` as users run it: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from traces import Traces, folders, processes

import spdk_glue
from dualblade.cli.main import main
from dualblade.targets import TargetKind, parse_target
from dualblade.units import MIB

pytestmark = pytest.mark.needs("nvmf_tgt")
SIZE = 16 * MIB


@contextmanager
def started(*words: str | Path, pipe: bool = True) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dualblade.cli.main", "emulate", "--no-hugepages", *map(str, words)]
    out = subprocess.PIPE if pipe else subprocess.DEVNULL
    with subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().rstrip("\n")


def whole_record(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The JSON object, which comes while the command goes on."""
    assert process.stdout
    lines = [process.stdout.readline()]
    while lines[-1] not in ("}\n", ""):
        lines.append(process.stdout.readline())
    record = json.loads("".join(lines))
    assert isinstance(record, dict)
    return record


def ended(process: subprocess.Popen[str], by: signal.Signals = signal.SIGINT) -> tuple[int, str]:
    process.send_signal(by)
    _, err = process.communicate(timeout=30)
    return process.returncode, err


def wait_for_target(traces: Traces) -> int:
    deadline = time.monotonic() + 30
    while not (found := processes(traces.base)) and time.monotonic() < deadline:
        time.sleep(0.005)
    return found[0]


# what it prints -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_prints_the_target_and_lasts_until_told(nothing_left: Traces, by: signal.Signals) -> None:
    with started("--size", "16M") as process:
        target = parse_target(first_line(process))
        assert target.kind is TargetKind.TRANSPORT
        assert process.poll() is None
        code, err = ended(process, by)
    assert code == 0
    assert "on memory" in err
    assert "is busy until Ctrl-C ends it" in err


@pytest.mark.parametrize("transport", ["vfio-user", "tcp"])
def test_the_record(nothing_left: Traces, transport: str) -> None:
    with started("--size", "16M", "--transport", transport, "--latency-us", 80, "--json") as process:
        record = whole_record(process)
        assert processes(nothing_left.base) == [record["pid"]]
        assert ended(process)[0] == 0
    built = "spdk" in spdk_glue.engines()
    assert {key: value for key, value in record.items() if key not in ("pid", "target")} == {
        "size": SIZE, "transport": transport, "hugepages": False, "file": None, "latency_us": 80,
        "volume": built,
    }  # fmt: skip
    assert parse_target(record["target"]).kind is TargetKind.TRANSPORT
    assert ("127.0.0.1" in record["target"]) == (transport == "tcp")


@pytest.mark.skipif("spdk" in spdk_glue.engines(), reason="this build has an SPDK engine")
def test_a_build_without_the_engine_says_so(nothing_left: Traces) -> None:
    with started("--size", "16M") as process:
        assert first_line(process)
        assert "note: this build has no SPDK engine" in ended(process)[1]


# how it ends --------------------------------------------------------------------------------


def test_ctrl_c_while_it_starts(nothing_left: Traces) -> None:
    with started("--size", "16M") as process:
        wait_for_target(nothing_left)
        code, err = ended(process)
    assert (code, err) == (130, "interrupted\n")


def test_a_signal_that_python_loses(nothing_left: Traces) -> None:
    """An exception is dropped in what Python calls back after a fork. Seen there, under load."""
    code = (
        "import os, signal, sys\n"
        "from dualblade.cli.main import main\n"
        "sent = []\n"
        "def lose():\n"
        "    if not sent:\n"
        "        sent.append(os.kill(os.getpid(), signal.SIGTERM))\n"
        "os.register_at_fork(after_in_parent=lose)\n"
        "sys.exit(main(['emulate', '--size', '16M', '--no-hugepages']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert "Exception ignored in" in done.stderr


def test_ctrl_c_reaches_it_from_a_terminal(nothing_left: Traces) -> None:
    """The whole foreground group gets the signal there; it must not end nvmf_tgt under its parent."""
    with started("--size", "16M") as process:
        first_line(process)
        assert os.getsid(wait_for_target(nothing_left)) != os.getsid(0)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 0


def test_a_target_that_dies_is_an_error(nothing_left: Traces) -> None:
    with started("--size", "16M") as process:
        first_line(process)
        os.kill(wait_for_target(nothing_left), signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
    assert err.splitlines()[-1].startswith("error: nvmf_tgt was killed by signal 9")


def test_a_killed_command_leaves_no_process(nothing_left: Traces) -> None:
    with started("--size", "16M") as process:
        first_line(process)
        process.kill()
    deadline = time.monotonic() + 5
    while processes(nothing_left.base) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert processes(nothing_left.base) == []
    (folder,) = folders(nothing_left.base)
    os.utime(folder, (1, 1))
    with started("--size", "16M") as process:  # the next one tidies up
        first_line(process)
        assert not folder.exists()
        assert ended(process)[0] == 0


def test_a_reader_that_went_away(nothing_left: Traces) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "dualblade.cli.main", "emulate", "--no-hugepages", "--size", "16M"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.DEVNULL, timeout=60, check=False)
    os.close(writer)
    assert done.returncode == 1


# files --------------------------------------------------------------------------------------


def test_a_file_that_it_makes_stays(nothing_left: Traces, direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    with started("--size", "16M", "--file", path, "--json") as process:
        record = whole_record(process)
        assert (record["file"], record["size"]) == (str(path), SIZE)
        assert main(["volume", "show", str(path)]) == 1  # in use
        assert ended(process)[0] == 0
    assert path.stat().st_size == SIZE


def test_a_volume_of_ours_is_served_as_it_is(nothing_left: Traces, direct_dir: Path) -> None:
    path = direct_dir / "kv.img"
    assert main(["volume", "create", str(path), "--capacity", "16M"]) == 0
    before = path.read_bytes()
    with started("--file", path, "--json") as process:
        assert whole_record(process)["volume"] is True
        assert ended(process)[0] == 0
    assert path.read_bytes() == before
