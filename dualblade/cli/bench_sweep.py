# SPDX-License-Identifier: Apache-2.0
"""`bench sweep`: budgets x baselines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dualblade.cli.output import console, emit, json_option, table
from dualblade.config import default_cache_dir
from dualblade.errors import ConfigError, DualBladeError
from dualblade.units import format_size


@click.command(epilog="Example: dualblade-spdk bench sweep --budgets 0.25,0.5,1.0 --rounds 7 --out results")
@click.option(
    "--model",
    default="kv-heavy",
    show_default=True,
    help="An alias, a local folder, or kv-heavy: a small Llama with much KV. Weights are random.",
)
@click.option("--context", type=click.IntRange(min=2), default=8192, show_default=True, help="Prompt tokens.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True
)
@click.option(
    "--budgets",
    default="0.25,0.5,0.75,1.0,1.25",
    show_default=True,
    help="Parts of the KV bytes beside what is in memory anyway; or sizes of the whole process.",
)
@click.option("--baselines", metavar="A,B,...", help="[default: all]")
@click.option("--rounds", type=click.IntRange(1, 1000), default=3, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2, 100_000), default=8, show_default=True)
@click.option("--nvme", metavar="TARGET", help="Where the direct paths live [default: a file].")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder for KV files.")
@click.option("--enforce/--no-enforce", default=True, show_default=True, help="Each run in a memory cgroup.")
@click.option("--drop-caches/--keep-caches", default=True, show_default=True, help="Before each run (root).")
@click.option(
    "--change",
    is_flag=True,
    help="Also with half the memory for a third of the tokens: dual and dual-first-fit-static.",
)
@click.option(
    "--all-rounds",
    is_flag=True,
    help="Also of what took over twice as long a token as dual in each of three rounds.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for results.json, results.md, report.html and pictures (needs matplotlib).",
)
@json_option
def sweep(as_json: bool, out: Path | None, **options: Any) -> None:
    """Prefill and decode of every baseline in every budget, interleaved, beside what the drive and the
    CPU alone would take.

    Every run is a process of its own, in a memory cgroup of the budget where one can be made (root).
    """
    if out:
        _check_out(out)
    from dualblade.bench.sweep import Sweep
    from dualblade.models import quiet_libraries

    quiet_libraries()
    screen = console()
    made = Sweep(_bench(options), lambda text: screen.print(f"[dim]{text}[/dim]", soft_wrap=True))
    record = made.run(lambda record: _save(record, out))
    emit(record, as_json, _show)
    _judge(record)


def _bench(options: dict[str, Any]) -> Any:
    from dualblade.bench.baselines import BASELINES, read_baselines
    from dualblade.bench.sweep import SweepBench
    from dualblade.bench.workloads import Workload

    workload = Workload(
        options["model"], options["context"], options["new_tokens"], options["batch_size"], options["dtype"]
    )
    return SweepBench(
        workload,
        options["cache_dir"] or default_cache_dir(),
        options["budgets"],
        tuple(read_baselines(options["baselines"]) if options["baselines"] else BASELINES),
        options["rounds"],
        options["nvme"],
        options["drop_caches"],
        options["enforce"],
        options["change"],
        options["all_rounds"],
    )


def _check_out(out: Path) -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError("--out needs matplotlib", "pip install matplotlib")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}", "name another folder") from error


def _save(record: dict[str, Any], out: Path | None) -> None:
    """After every round, so that a sweep that is broken off leaves what it has."""
    if out is None or not record["rows"]:
        return
    from dualblade.bench.report import write_report

    try:
        write_report(record, out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", "name another folder") from error


def _judge(record: dict[str, Any]) -> None:
    """Raises DualBladeError where a run failed, or gave other numbers than the rest."""
    wrong = [row for row in record["rows"] + record["change"]["rows"] if not row["verified"]]
    if wrong:
        names = ", ".join(sorted({row["baseline"] for row in wrong}))
        raise DualBladeError(
            f"other logits or KV bytes than the rest: {names}", "this is a defect: please report it"
        )
    if failures := record["failures"]:
        first = failures[0]
        which = f"{first['baseline']} at {first['fraction']:.2f}"
        raise DualBladeError(f"{len(failures)} runs failed, first {which}: {first['reason']}")


def _show(record: dict[str, Any]) -> None:
    from dualblade.bench.report import CHANGE_HEADERS, HEADERS, cells, change_cells

    table(HEADERS, [cells(row) for row in record["rows"]])
    if changes := record["change"]["rows"]:
        click.echo("with half of that part for the second third of the tokens:")
        table(CHANGE_HEADERS, [change_cells(row) for row in changes])
    need = record["need"]
    click.echo(
        f"budget: {format_size(need['base'])} that is in memory anyway, and that part of "
        f"{format_size(need['kv'])} of KV; drive: {record['ssd_limit_gib_s']:.2f} GiB/s read, "
        f"{record['ssd_write_limit_gib_s']:.2f} write; compute alone: prefill "
        f"{record['compute_prefill_s']:.2f} s, {record['compute_s_per_token']:.3f} s a token"
    )
    if not record["enforced"]:
        click.echo(f"budgets were not enforced: {record['not_enforced']}")
    for item in record["skipped"]:
        click.echo(f"left out: {item['baseline']} at {item['fraction']:.2f}: {item['reason']}")
