# SPDX-License-Identifier: Apache-2.0
"""`run`: text streams to stdout, progress and the closing table to stderr."""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dualblade.cli.enforcement import Enforcement, enforcement_line
from dualblade.cli.options import model_options, settings_from
from dualblade.cli.output import console, describe_device, emit, json_option
from dualblade.errors import ConfigError, UsageError
from dualblade.stream_choice import choice_words
from dualblade.units import counted, format_size


@click.command(epilog='Example: dualblade-spdk run --model tiny --mem-budget 1G --prompt "The list type"')
@model_options
@click.option("--prompt", metavar="TEXT")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    "--prompt-len", type=click.IntRange(min=1), metavar="N", help="N random tokens; prints no text."
)
@click.option("--chat", is_flag=True, help="Put the prompt into the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--attention", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy."
)
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="0 for all.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--verify", is_flag=True, help="Generate again with the KV cache in memory and compare.")
@click.option(
    "--report", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON record here too."
)
@click.option(
    "--enforce/--no-enforce",
    default=False,
    show_default=True,
    help="Put the process under a memory cgroup of the budget.",
)
@json_option
@click.pass_obj
def run(obj: dict[str, Any], as_json: bool, report: Path | None, enforce: bool, **options: Any) -> None:
    """Generate text with the KV cache offloaded."""
    _one_prompt(options)
    if report:
        _check_report(report)
    settings = settings_from(options)
    with Enforcement(enforce, settings.budget, obj["whole_process"]) as enforcement:
        settings = replace(settings, cgroup=enforcement.cgroup)
        record = _generate(_run_options(options, settings), show_text=not as_json)
        record["memory"]["advisory"] = enforcement.advisory
    if report:
        report.write_text(json.dumps(record, indent=2) + "\n")
    emit(record, as_json, lambda _: None)
    if not as_json:
        show_summary(record)


def _check_report(report: Path) -> None:
    """Before the run, whose record would be lost."""
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(report if report.exists() else report.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"the report {report} cannot be written: {error.strerror}", "name another file with --report"
        ) from error


def _one_prompt(options: dict[str, Any]) -> None:
    given = [name for name in ("prompt", "prompt_file", "prompt_len") if options[name] is not None]
    if len(given) != 1:
        raise UsageError(
            "there is no prompt" if not given else "there is more than one prompt",
            "pass one of --prompt TEXT, --prompt-file FILE and --prompt-len N",
        )
    if options["chat"] and options["prompt_len"]:
        raise UsageError("random tokens are no chat", "leave out --chat or --prompt-len")


def _run_options(options: dict[str, Any], settings: Any) -> Any:
    from dualblade.models import quiet_libraries
    from dualblade.run_options import RunOptions
    from dualblade.runner import Sampling

    quiet_libraries()
    return RunOptions(
        model=options["model"],
        settings=settings,
        prompt=options["prompt"],
        prompt_file=options["prompt_file"],
        prompt_len=options["prompt_len"],
        max_new_tokens=options["max_new_tokens"],
        batch_size=options["batch_size"],
        group_size=options["group_size"],
        dtype=options["dtype"],
        device=options["device"],
        attention=options["attention"],
        chunk=options["prefill_chunk"],
        weights=options["weights"],
        chat=options["chat"],
        verify=options["verify"],
        sampling=Sampling(options["temperature"], options["top_k"], options["top_p"], options["seed"]),
    )


def _generate(options: Any, show_text: bool) -> dict[str, Any]:
    from dualblade.run_options import Watcher
    from dualblade.session import Session

    screen = console()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} tokens"),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
    )
    bar: list[Any] = []
    open_line = [False]  # text is streaming, and its line has not ended

    def end_line() -> None:
        if open_line[0]:
            sys.stdout.write("\n")
            sys.stdout.flush()
        open_line[0] = False

    def on_stage(stage: str) -> None:
        end_line()
        screen.print(f"[dim]{stage}[/dim]", soft_wrap=True)

    def on_prefill(done: int, total: int) -> None:
        if not bar:
            progress.start()
            bar.append(progress.add_task("prefill", total=total))
        elif progress.finished and done < total:  # the next group's
            progress.reset(bar[0])
            progress.start()
        progress.update(bar[0], completed=done)
        if done == total:
            progress.stop()

    def on_text(piece: str) -> None:
        if show_text and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()
            open_line[0] = True

    watcher = Watcher(on_stage, on_prefill, on_text)
    try:
        record = Session(options, watcher).run()
    finally:
        progress.stop()
        end_line()
    return record


def show_summary(record: dict[str, Any]) -> None:
    """The closing table on stderr."""
    from rich.table import Table

    table = Table(title=f"{record['model']}: {record['prompt_tokens']} + {record['new_tokens']} tokens")
    for column in ("path", "tensors", "KV", "read", "written", "GiB/s"):
        table.add_column(column, justify="left" if column == "path" else "right", no_wrap=True)
    for name, path in record["paths"].items():
        speed = path["read_gib_s"]
        table.add_row(
            name.replace("_", "-"),
            str(path["tensors"]),
            format_size(path["bytes"]),
            format_size(path["read_bytes"]),
            format_size(path["write_bytes"]),
            f"{speed:.2f}" if speed else "-",
        )
    screen = console()
    screen.print(table)
    for line in _closing_lines(record):
        screen.print(line, soft_wrap=True)


def _pipeline_line(pipeline: dict[str, Any]) -> str:
    depth, limit = pipeline["prefetch_depth"], pipeline["prefetch_depth_limit"]
    words = f"pipeline {pipeline['mode']}: {counted(depth, 'layer')} fetched ahead, of at most {limit}"
    if not limit and not pipeline["chunk_tokens"] and pipeline["mode"] in ("adaptive", "cross-layer"):
        words += "; slower, because the budget holds one layer's slots alone"
    if pipeline["chunk_tokens"]:
        words = f"pipeline {pipeline['mode']}: chunks of this layer and the next ones fetched ahead"
    return f"{words}; {counted(len(pipeline['decisions']), 'decision')} (--json has their reasons)"


def _closing_lines(record: dict[str, Any]) -> list[str]:
    memory, pipeline, direct = record["memory"], record["pipeline"], record["paths"]["direct"]
    lines = [
        f"device {describe_device(record['device_bytes'])}",
        f"prefill {record['prefill_s']:.2f} s (predicted {record['predicted_prefill_s']:.2f} s), "
        f"decode {record['decode_s_per_token'] * 1000:.1f} ms a token "
        f"(predicted {record['predicted_decode_s_per_token'] * 1000:.1f} ms), "
        f"waited for storage {pipeline['stall_s']:.2f} s",
        f"memory peak {format_size(memory['peak_bytes'])} of {format_size(memory['budget_bytes'])}, "
        f"page-cache share {format_size(memory['page_cache_share_bytes'])}",
        *enforcement_line(memory),
        f"direct path: {direct['engine']}, {direct['target']}"
        if direct["tensors"]
        else "direct path: not needed",
    ]
    lines += _group_lines(record)
    lines.append(_pipeline_line(pipeline))
    lines += _moved(record["governor"])
    if pipeline["chunk_tokens"]:
        lines.append(f"attention streamed, in chunks of {pipeline['chunk_tokens']} tokens of a layer")
    if pipeline["stream_choice"]:
        lines.append(choice_words(pipeline["stream_choice"]))
    lines += sorted(
        {
            f"engine {path['engine']}, because {path['reason']}"
            for path in record["paths"].values()
            if "reason" in path
        }
    )
    if memory["peak_bytes"] > memory["budget_bytes"]:
        lines.append("warning: the peak is above the budget; give it more, or a smaller --prefill-chunk")
    if record.get("verified"):
        how = ", streamed in the same chunks" if pipeline["chunk_tokens"] else ""
        lines.append(f"verified: every token equals the run with its KV cache in memory{how}")
    return lines


def _group_lines(record: dict[str, Any]) -> list[str]:
    """Seconds a token are those of one more token for every sequence, hence of all groups together."""
    groups = record["groups"]
    if len(groups) == 1:
        return []
    sizes = ", ".join(str(group["sequences"]) for group in groups)
    return [f"{len(groups)} groups of {sizes} sequences, one after another; times are of all together"]


def _moved(governor: dict[str, Any] | None) -> list[str]:
    """What the live governor did, where it did anything."""
    if governor is None:
        return []
    down, up = (format_size(governor[f"{way}_bytes"]) for way in ("demoted", "promoted"))
    moved = governor["demoted_bytes"] or governor["promoted_bytes"]
    lines = [f"moved as the memory changed: {down} to the direct path, {up} back"] if moved else []
    return lines + [f"note: {note}" for note in governor["notes"]]
