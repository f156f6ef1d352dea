# SPDX-License-Identifier: Apache-2.0
"""`bench io`: what the engine and the store make of a drive, beside fio, in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dualblade.cli.output import console, emit, json_option, table
from dualblade.config import default_cache_dir
from dualblade.errors import UsageError
from dualblade.units import MIB, parse_size

STEP = 256 * MIB  # a layer: K and V


@click.group()
def bench() -> None:
    """Measure. Speeds are compared within one run, as ratios."""


@bench.command(epilog="Example: dualblade-spdk bench io --size 1G --rounds 5")
@click.option(
    "--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the test file is made."
)
@click.option("--size", default="1G", show_default=True, help="Of the test file; a multiple of 256M.")
@click.option("--queue-depth", type=click.IntRange(1, 1024), default=32, show_default=True)
@click.option("--command", "command_size", default="1M", show_default=True, help="Size of one command.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@json_option
def io(
    as_json: bool, cache_dir: Path | None, size: str, queue_depth: int, command_size: str, rounds: int
) -> None:
    """The engine beside fio, and the store beside the engine, on one file of random bytes."""
    nbytes, command_bytes = parse_size(size, "--size"), parse_size(command_size, "--command")
    if nbytes % STEP:
        raise UsageError(f"--size {size} is not a multiple of 256M", "write e.g. 1G")
    if command_bytes % 4096 or command_bytes > 4 * MIB:
        raise UsageError(f"--command {command_size} is not a multiple of 4K up to 4M", "write e.g. 1M")
    from dualblade.bench.fio import fio_path
    from dualblade.bench.io import IoBench, run_io_bench
    from dualblade.bench.speeds import remember

    screen = console()
    if not fio_path():
        screen.print(
            "fio is not installed, so the engine has no reference here (Debian: apt-get install fio)"
        )
    folder = cache_dir or default_cache_dir()
    made = IoBench(folder, nbytes, queue_depth, command_bytes, rounds)
    record = run_io_bench(made, lambda text: screen.print(f"[dim]{text}[/dim]"))
    remember(folder, None, record["tensor_store_gib_s"], record["page_cache_gib_s"])
    emit(record, as_json, _show)


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
