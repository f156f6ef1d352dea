# SPDX-License-Identifier: Apache-2.0
"""`emulate`: an NVMe controller without a drive, for as long as the command runs."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

from dualblade.cli.output import emit, json_option
from dualblade.emulate import BLOCK, TRANSPORTS, EmulatedTarget
from dualblade.errors import CapacityError, TargetError, UsageError
from dualblade.units import MIB, format_size, parse_size, round_up

EXAMPLE = """\b
Example:
  dualblade-spdk emulate --size 4G --latency-us 80"""
_LOOK_S = 1.0


@click.command(epilog=EXAMPLE)
@click.option("--size", metavar="SIZE", help="Of the drive; of a --file that is there already, its own.")
@click.option("--file", "path", metavar="PATH", type=click.Path(path_type=Path), help="Keep it on this file.")
@click.option("--latency-us", type=click.IntRange(1), metavar="N", help="Added to every read and write.")
@click.option(
    "--transport", type=click.Choice(list(TRANSPORTS)), default="vfio-user", show_default=True,
    help="vfio-user: shared memory, one client at a time. tcp: 127.0.0.1, any number.",
)  # fmt: skip
@click.option(
    "--hugepages/--no-hugepages", default=None, help="[default: hugepages where enough of them are free]"
)
@click.option("--nvmf-tgt", metavar="PATH", type=click.Path(path_type=Path), help="SPDK's target program.")
@json_option
def emulate(
    size: str | None,
    path: Path | None,
    latency_us: int | None,
    transport: str,
    hugepages: bool | None,
    nvmf_tgt: Path | None,
    as_json: bool,
) -> None:
    """An NVMe controller without a drive: prints its TARGET, and lasts until Ctrl-C.

    SPDK's nvmf_tgt runs as a child, as an ordinary user too, with a disk in memory or on a file and a
    volume of ours on it. It polls: one CPU, the last this process may use, is busy all the time.
    Nothing is left afterwards but the file.
    """
    wanted = parse_size(size, "--size") if size else None
    with _ended_by_signals() as ending, _disk(path, wanted) as disk:
        memory_mib = 0 if disk.path else round_up(disk.size, MIB) // MIB
        with EmulatedTarget(
            memory_mib=memory_mib, hugepages="auto" if hugepages is None else hugepages, program=nvmf_tgt
        ) as emulated:
            record = _set_up(emulated, disk, latency_us, transport)
            ending.check()
            disk.keep = True
            _say_how_it_runs(emulated, disk)
            _show_until_told(emulated, ending, record, as_json)


# the disk -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Disk:
    """What the controller's namespace is kept on. size: bytes. path: None in memory. ours: it holds a
    volume of ours already. keep: a file that was made here stays."""

    size: int
    path: Path | None = None
    ours: bool = False
    keep: bool = False


@contextmanager
def _disk(path: Path | None, size: int | None) -> Iterator[Disk]:
    """Locked, if it is a file. One that is there is never resized, nor taken if it holds anything else
    than a volume of ours. Raises UsageError, TargetError, CapacityError."""
    if path is not None and os.path.lexists(path):
        with _existing_file(path.absolute(), size) as disk:
            yield disk
        return
    if size is None:
        raise UsageError("how large is the drive?", "pass for instance --size 4G")
    _check_size(size)
    if path is None:
        yield Disk(size // BLOCK * BLOCK)
    else:
        with _new_file(path.absolute(), size // BLOCK * BLOCK) as disk:
            yield disk


def _check_size(size: int) -> None:
    from dualblade.superblock import MIN_CAPACITY

    if size < MIN_CAPACITY:
        least = format_size(MIN_CAPACITY)
        raise CapacityError(
            f"a drive of {format_size(size)} is too small for a volume: {least} at least",
            "a size such as 4G is of use",
        )


@contextmanager
def _new_file(path: Path, size: int) -> Iterator[Disk]:
    from dualblade.target_files import open_new, release, remove_if_same

    disk = Disk(size, path)
    fd = open_new(path, size)
    try:
        yield disk
    finally:
        if not disk.keep:
            remove_if_same(path, fd)
        release(fd)


@contextmanager
def _existing_file(path: Path, size: int | None) -> Iterator[Disk]:
    from dualblade.superblock import has_magic
    from dualblade.target_files import facts_of, open_existing, read_edges, release

    if stat.S_ISBLK(path.stat().st_mode if path.exists() else 0):
        raise TargetError(f"{path} is a block device, not a file", f"use it as it is: --nvme {path}")
    fd = open_existing(path)
    try:
        found = facts_of(fd, str(path)).size
        if size is not None and size != found:
            raise TargetError(
                f"{path} is there already, with {format_size(found)} and not {format_size(size)}",
                "leave --size out, or name another file",
            )
        _check_size(found)
        if found % BLOCK:
            raise TargetError(f"the size of {path} is no multiple of {BLOCK} bytes")
        edges = read_edges(fd, str(path))
        if any(edges) and not has_magic(edges):
            raise TargetError(
                f"{path} is not empty: its first and last MiB are not all zero, and it is no volume of ours",
                "name a file that does not exist yet, with --size",
            )
        yield Disk(found, path, has_magic(edges), keep=True)
    finally:
        release(fd)


# the controller -------------------------------------------------------------------------------


def _set_up(emulated: EmulatedTarget, disk: Disk, latency_us: int | None, transport: str) -> dict[str, Any]:
    """The disk, its way in and the volume on it. Returns the record that is shown."""
    name = emulated.file("disk", disk.path) if disk.path else emulated.malloc("disk", disk.size)
    if latency_us is not None:
        name = emulated.delay("slow", name, latency_us)
    target = emulated.export(name, transport)
    return {
        "target": target,
        "pid": emulated.pid,
        "size": disk.size,
        "transport": transport,
        "hugepages": emulated.hugepages,
        "file": str(disk.path) if disk.path else None,
        "latency_us": latency_us or 0,
        "volume": disk.ours or _make_volume(target),
    }


def _make_volume(target: str) -> bool:
    """As `volume create` does, in a process of its own: what SPDK takes of a process, hugepages among
    it, it gives back at its end alone. False where this build cannot."""
    import spdk_glue

    if "spdk" not in spdk_glue.engines():
        click.echo(
            "note: this build has no SPDK engine: it makes no volume there, and cannot use it", err=True
        )
        return False
    program = [sys.executable, "-P", "-m", "dualblade.cli.main"]
    done = subprocess.run(
        [*program, "volume", "create", target, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(done.stderr.split()).removeprefix("error: ")
        raise TargetError(f"no volume can be made on {target}: {said or f'exit status {done.returncode}'}")
    return bool(json.loads(done.stdout)["uuid"])


def _say_how_it_runs(emulated: EmulatedTarget, disk: Disk) -> None:
    where = str(disk.path) if disk.path else f"memory{', in hugepages' if emulated.hugepages else ''}"
    click.echo(f"nvmf_tgt: pid {emulated.pid}, {format_size(disk.size)} on {where}", err=True)
    click.echo(f"CPU {emulated.cpu} is busy until Ctrl-C ends it", err=True)


# the end --------------------------------------------------------------------------------------


class Ending:
    """The signals that end the command in order; one of them is enough.

    They raise KeyboardInterrupt, which is lost where Python calls back, after a fork for instance; hence
    check().
    """

    def __init__(self) -> None:
        self._told = False
        self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            self._before[signal.SIGHUP] = signal.getsignal(signal.SIGHUP)

    def listen(self) -> None:
        for number in self._before:
            signal.signal(number, self._interrupt)

    def unlisten(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises KeyboardInterrupt if it has been told."""
        if self._told:
            raise KeyboardInterrupt

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._told:  # another one must not leave half of it behind
            self._told = True
            raise KeyboardInterrupt


@contextmanager
def _ended_by_signals() -> Iterator[Ending]:
    ending = Ending()
    try:
        ending.listen()
        yield ending
    finally:
        ending.unlisten()


def _show_until_told(emulated: EmulatedTarget, ending: Ending, record: dict[str, Any], as_json: bool) -> None:
    """Raises TargetError if nvmf_tgt ends first."""
    try:
        emit(record, as_json, lambda record: click.echo(record["target"]))
        while True:
            emulated.wait(_LOOK_S)
            ending.check()
    except KeyboardInterrupt:
        return
