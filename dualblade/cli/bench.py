# SPDX-License-Identifier: Apache-2.0
"""`bench io`: what the engine and the store make of a drive, beside fio, in one run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from dualblade.cli.bench_step import step
from dualblade.cli.bench_sweep import sweep
from dualblade.cli.output import console, emit, json_option, table
from dualblade.config import default_cache_dir
from dualblade.errors import UsageError
from dualblade.units import KIB, MIB, parse_size

STEP = 256 * MIB  # a layer: K and V
_NAMES = {"engine": "engine", "python": "Python", "uring": "io_uring"}
_PERF_RATIOS = ("engine_vs_perf", "python_vs_perf")


@click.group()
def bench() -> None:
    """Measure. Speeds are compared within one run, as ratios."""


bench.add_command(step)
bench.add_command(sweep)


@bench.command(epilog="Example: dualblade-spdk bench io --size 1G --rounds 5")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the test file is made."
)
@click.option(
    "--nvme",
    metavar="TARGET",
    help="A drive with a volume of ours, which is written to: a block device, or through SPDK a bound "
    "one, a PCI address or a transport id.",
)
@click.option(
    "--emulate",
    is_flag=True,
    help="Through SPDK: a controller made for this run, in memory; with --cache-dir on a file there, "
    "on which io_uring is measured too.",
)
@click.option("--size", default="1G", show_default=True, help="Of the test file; a multiple of 256M.")
@click.option("--queue-depth", type=click.IntRange(1, 1024), help="Through the kernel. [default: 32]")
@click.option(
    "--command", "command_size", metavar="SIZE", help="Size of the kernel's commands. [default: 1M]"
)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option("--seconds", type=click.IntRange(1, 60), help="Of each measurement through SPDK. [default: 1]")
@json_option
def io(
    as_json: bool,
    cache_dir: Path | None,
    nvme: str | None,
    emulate: bool,
    size: str,
    queue_depth: int | None,
    command_size: str | None,
    rounds: int,
    seconds: int | None,
) -> None:
    """The engine beside fio, and the store beside the engine, on one file of random bytes.

    Through SPDK it is the engine beside spdk_nvme_perf, with transfers of 128K and 1M, 8 and 32 of them in
    flight.
    """
    nbytes = parse_size(size, "--size")
    if nbytes % STEP or not nbytes:
        raise UsageError(f"--size {size} is not a multiple of 256M", "write e.g. 1G")
    if nvme and emulate:
        raise UsageError("--emulate makes its own target", "leave --nvme or --emulate out")
    if not emulate and not _by_spdk(nvme):
        if seconds:
            raise UsageError("--seconds is for what SPDK drives")
        _io_file(as_json, cache_dir, nvme, nbytes, queue_depth or 32, command_size or "1M", rounds)
        return
    if queue_depth or command_size or (nvme and cache_dir):
        raise UsageError("--cache-dir, --queue-depth and --command are for what the kernel drives")
    _io_nvme(as_json, nvme, cache_dir, nbytes, rounds, seconds or 1)


def _by_spdk(nvme: str | None) -> bool:
    if nvme is None:
        return False
    from dualblade.targets import find_target

    return find_target(nvme).by_spdk


def _io_file(
    as_json: bool, cache_dir: Path | None, nvme: str | None, nbytes: int, queue_depth: int,
    command_size: str, rounds: int,
) -> None:  # fmt: skip
    command_bytes = parse_size(command_size, "--command")
    if command_bytes % 4096 or command_bytes > 4 * MIB:
        raise UsageError(f"--command {command_size} is not a multiple of 4K up to 4M", "write e.g. 1M")
    from dualblade.bench.fio import fio_path
    from dualblade.bench.io import IoBench, run_io_bench
    from dualblade.speeds import CACHED, DIRECT, remember_storage

    screen = console()
    if not fio_path():
        screen.print(
            "fio is not installed, so the engine has no reference here (Debian: apt-get install fio)"
        )
    folder = cache_dir or default_cache_dir()
    made = IoBench(folder, nbytes, queue_depth, command_bytes, rounds, nvme)
    record = run_io_bench(made, lambda text: screen.print(f"[dim]{text}[/dim]"))
    read, write = record["tensor_store_gib_s"], record["engine_write_gib_s"]
    remember_storage(folder, DIRECT, nvme, "bench io", read=read, write=write)
    remember_storage(folder, CACHED, None, "bench io", read=record["page_cache_gib_s"])
    emit(record, as_json, _show)


def _io_nvme(
    as_json: bool, nvme: str | None, folder: Path | None, nbytes: int, rounds: int, seconds: int
) -> None:
    from dualblade.bench.nvme import NvmeBench, emulated_bench, no_perf, run_nvme_bench
    from dualblade.speeds import DIRECT, remember_storage

    screen = console()
    if reason := no_perf():
        screen.print(f"{reason}, so the engine has no reference here")

    def say(text: str) -> None:
        screen.print(f"[dim]{text}[/dim]")

    made = (
        nullcontext(NvmeBench(nvme, nbytes, rounds, seconds))
        if nvme
        else emulated_bench(nbytes, rounds, seconds, folder, say)
    )
    with made as chosen:
        record = run_nvme_bench(chosen, say)
    if nvme:
        speed = record["tensor_store_gib_s"]
        remember_storage(default_cache_dir(), DIRECT, nvme, "bench io", read=speed)
    emit(record, as_json, _show_nvme)


@bench.command(epilog="Example: dualblade-spdk bench policy --rounds 5")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the files are made."
)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@json_option
def policy(as_json: bool, cache_dir: Path | None, rounds: int) -> None:
    """One decode cycle over both paths: cached tensors first (the paper's), or spread."""
    from dualblade.bench.policy import PolicyBench, run_policy_bench

    screen = console()
    made = PolicyBench(cache_dir or default_cache_dir(), rounds=rounds)
    record = run_policy_bench(made, lambda text: screen.print(f"[dim]{text}[/dim]"))
    emit(record, as_json, _show_policy)


@bench.command(epilog="Example: dualblade-spdk bench context --upto 65536")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the files are made."
)
@click.option("--upto", type=click.IntRange(4096, 1 << 20), default=65536, show_default=True, metavar="N")
@json_option
def context(as_json: bool, cache_dir: Path | None, upto: int) -> None:
    """Seconds a decoded token as the context grows, beside what the drive allows."""
    from dualblade.bench.context import ContextBench, run_context_bench

    screen = console()
    contexts = tuple(1 << power for power in range(12, upto.bit_length()) if 1 << power <= upto)
    made = ContextBench(cache_dir or default_cache_dir(), contexts)
    record = run_context_bench(made, lambda text: screen.print(f"[dim]{text}[/dim]"))
    emit(record, as_json, _show_context)


def _show_context(record: dict[str, Any]) -> None:
    rows = [
        (
            row["context"],
            f"{row['read_bytes_per_token'] / MIB:.0f}",
            f"{row['s_per_token'] * 1000:.0f}",
            f"{row['floor_s'] * 1000:.0f}",
            f"{row['s_per_token_vs_floor']:.2f}",
        )
        for row in record["rows"]
    ]
    table(("context", "MiB read a token", "ms a token", "ms at the drive's limit", "ratio"), rows)


def _show_policy(record: dict[str, Any]) -> None:
    rows = [
        (
            f"{row['cached']:.0%}",
            row["prefetch_depth"],
            f"{row['first_fit_s'] * 1000:.0f}",
            f"{row['spread_s'] * 1000:.0f}",
            f"{row['spread_vs_first_fit']:.2f}",
        )
        for row in record["rows"]
    ]
    table(("cached", "layers ahead", "first-fit ms", "spread ms", "spread / first-fit"), rows)


def _show_nvme(record: dict[str, Any]) -> None:
    who = [name for name in ("engine", "python", "uring") if f"{name}_gib_s" in record["cases"][0]]
    rows = [
        (
            row["op"],
            f"{row['transfer_bytes'] // KIB}K",
            row["depth"],
            *(f"{row[f'{name}_gib_s']:.2f}" for name in who),
            f"{row['perf_gib_s']:.2f}" if "perf_gib_s" in row else "-",
            *(f"{row['ratios'][name]:.3f}" if name in row["ratios"] else "-" for name in _PERF_RATIOS),
            *(f"{row[f'{name}_cpu_s_per_gib']:.3f}" for name in who),
        )
        for row in record["cases"]
    ]
    named = [_NAMES[name] for name in who]
    titles = (*named, "perf", "engine/perf", "Python/perf", *(f"{name} CPU s/GiB" for name in named))
    table(("", "size", "depth", *titles), rows)
    click.echo(
        "GiB/s (median); engine: one transfer cut in C; Python: lists of transfers; perf: spdk_nvme_perf"
    )
    tensor, store = record["tensor_engine_gib_s"], record["tensor_store_gib_s"]
    size = f"{record['tensor_bytes'] // MIB} MiB"
    click.echo(f"{size} KV tensor: {store:.2f} GiB/s through the store, {tensor:.2f} by the engine alone")
    click.echo(f"store vs engine: {record['ratios']['store_vs_engine']:.3f}")
    beside = record["uring_idle_cpu"]
    also = "" if beside is None else f", io_uring {beside:.1%}"
    click.echo(f"idle: {record['idle_cpu']:.1%} of a CPU{also} (the target's own CPU is in no figure)")


def _show(record: dict[str, Any]) -> None:
    names = {
        "engine_read": "sequential read",
        "fio_read": "  fio, the same",
        "posix_read": "  posix threads, the same",
        "engine_write": "sequential write",
        "fio_write": "  fio, the same",
        "tensor_engine": "128 MiB at a time, engine",
        "tensor_store": "128 MiB KV tensor, store",
        "page_cache": "128 MiB KV tensor, page cache",
    }
    rows = [
        (title, f"{record[name + '_gib_s']:.2f}")
        for name, title in names.items()
        if name + "_gib_s" in record
    ]
    table(("measured", "GiB/s (median)"), rows)
    click.echo(f"engine: {record['engine']}" + (f", because {record['reason']}" if record["reason"] else ""))
    ratios, software = record["ratios"], record["software"]
    for name, value in ratios.items():
        click.echo(f"{name.replace('_', ' ')}: {value:.3f}")
    click.echo(
        f"software: {software['ns_per_command']:.0f} ns a command, "
        f"{software['python_us_per_load']:.0f} us of Python a tensor"
    )
