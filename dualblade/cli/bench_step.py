# SPDX-License-Identifier: Apache-2.0
"""`bench step`: one decode step, taken apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dualblade.cli.options import settings_from
from dualblade.cli.output import console, emit, json_option, table
from dualblade.errors import ConfigError
from dualblade.settings import KV_PATHS, PIPELINES
from dualblade.trace import Trace, combined
from dualblade.units import counted

_PLAIN = {"page_cache_budget": None, "policy": None, "capacity": None, "checksum": False, "stream": "never"}


@click.command(
    epilog="Example: dualblade-spdk bench step --model llama-3.2-1b --context 16384 --plot step.png"
)
@click.option("--model", default="llama-3.2-1b", show_default=True, help="An alias or a local folder.")
@click.option("--mem-budget", default="4G", show_default=True, metavar="SIZE", help="As for `run`.")
@click.option("--context", type=click.IntRange(min=1), default=8192, show_default=True, help="Tokens of KV.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--prompt-len",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens of the prefill; 0 leaves it out. [default: 1024, at most the context]",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as stored]")
@click.option("--kv-path", type=click.Choice(list(KV_PATHS)), default="direct", show_default=True)
@click.option("--nvme", metavar="TARGET", help="Where the direct path lives [default: a file].")
@click.option("--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder for KV files.")
@click.option("--pipeline", type=click.Choice(list(PIPELINES)), default="adaptive", show_default=True)
@click.option(
    "--prefetch-depth", type=click.IntRange(min=0), metavar="N", help="Layers fetched ahead, at most."
)
@click.option("--scripted", is_flag=True, help="The pipeline alone: medium and compute keep to a script.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
@click.option(
    "--trace", type=click.Path(path_type=Path, dir_okay=False), help="Timeline for Perfetto (JSON)."
)
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Timeline as a picture (PNG).")
@json_option
def step(as_json: bool, trace: Path | None, plot: Path | None, scripted: bool, **options: Any) -> None:
    """One prefill, and one decode step over random KV, with dummy weights of a model's shapes.

    Beside each, in the same run: its storage alone and its compute alone. A perfect pipeline takes as long
    as the longer of the two. With --scripted a medium in RAM and a compute that sleeps take the place of the
    drive and the model: every mode of the pipeline, for 1, 2, 7 and 32 layers.
    """
    if scripted:
        _scripted(as_json, options["rounds"])
        return
    settings = settings_from(options | _PLAIN)
    if plot:
        _needs_matplotlib()
    from dualblade.bench.step import StepBench, run_step_bench
    from dualblade.models import quiet_libraries

    quiet_libraries()
    screen = console()
    bench = StepBench(
        options["model"],
        settings,
        context=options["context"],
        batch=options["batch_size"],
        rounds=options["rounds"],
        dtype=options["dtype"],
        device=options["device"],
        prompt=options["prompt_len"],
    )
    prefill = Trace()
    record, timeline = run_step_bench(bench, lambda text: screen.print(f"[dim]{text}[/dim]"), prefill)
    timelines = [(timeline, f"{record['model']}, one token after {record['context']}")]
    if record["prefill"]:
        timelines.insert(0, (prefill, f"{record['model']}, a prompt of {record['prefill']['tokens']} tokens"))
    if trace:
        _write(trace, json.dumps(combined(timelines)).encode())
    if plot:
        from dualblade.bench.plots import timeline_png

        _write(plot, timeline_png(*timelines))
    emit(record, as_json, lambda record: _show(record, timeline.text(), prefill.text()))


def _scripted(as_json: bool, rounds: int) -> None:
    from dualblade.bench.scripted import LAYERS, run_scripted_bench

    screen = console()
    record = run_scripted_bench(rounds, LAYERS, lambda text: screen.print(f"[dim]{text}[/dim]"))
    emit(record, as_json, _show_scripted)


def _show_scripted(record: dict[str, Any]) -> None:
    click.echo("overlap efficiency, max(storage, copy, compute) / step:")
    table(
        ("layers", "attention", "dominating", *PIPELINES, "adaptive / best"),
        [
            (
                str(row["layers"]),
                row["attention"],
                row["dominating"],
                *(f"{row['modes'][mode]['overlap_efficiency']:.2f}" for mode in PIPELINES),
                f"{row['adaptive_to_best']:.2f}",
            )
            for row in record["rows"]
        ],
    )


def _needs_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib", "pip install matplotlib")


def _write(path: Path, content: bytes) -> None:
    try:
        path.write_bytes(content)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "name another file") from error


def _show(record: dict[str, Any], timeline: list[str], prefill: list[str]) -> None:
    if record["prefill"]:
        _show_prefill(record["prefill"], prefill)
    names = {
        "step_s": "one step",
        "storage_s": "its storage alone",
        "copy_s": "its copies to the device alone",
        "compute_s": "its compute alone",
        "compute_with_io_s": "compute while transfers run",
        "stall_s": "waited for storage",
    }
    _times(record, names, "ms (median)")
    click.echo(f"{counted(record['prefetch_depth'], 'layer')} fetched ahead ({record['mode']})")
    click.echo(f"overlap efficiency, max(storage, copy, compute) / step: {record['overlap_efficiency']:.2f}")
    for line in timeline:
        click.echo(line)
    click.echo(
        f"scheduler: {record['scheduler_us_per_layer']:.0f} us of Python a layer, and "
        f"{record['rows_us_per_layer']:.0f} us to copy rows (small shapes, no engine)"
    )


def _show_prefill(record: dict[str, Any], timeline: list[str]) -> None:
    names = {
        "prefill_s": "one prompt",
        "storage_s": "its writes alone",
        "compute_s": "its compute alone",
        "stall_s": "waited for storage",
    }
    _times(record, names, "ms")
    click.echo(f"prefill of {record['tokens']} tokens, {record['span']} a layer, {record['chunk']} a pass")
    click.echo(f"overlap efficiency, max(writes, compute) / prompt: {record['overlap_efficiency']:.2f}")
    for line in timeline:
        click.echo(line)
    click.echo("")


def _times(record: dict[str, Any], names: dict[str, str], unit: str) -> None:
    rows = [(title, f"{record[name] * 1e3:.1f}") for name, title in names.items()]
    table(("measured", unit), rows)
