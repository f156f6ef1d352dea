# SPDX-License-Identifier: Apache-2.0
"""The options that `run` and `plan` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dualblade.settings import KV_PATHS, PIPELINES, POLICIES, STREAM

_OPTIONS: list[Callable[[Any], Any]] = [
    click.option("--model", default="tiny", show_default=True, help="An alias, a hub id or a local folder."),
    click.option(
        "--mem-budget", required=True, metavar="SIZE", help="Host memory of the whole process, e.g. 6G."
    ),
    click.option("--page-cache-budget", metavar="SIZE", help="What the page-cache path may fill of it."),
    click.option("--kv-path", type=click.Choice(list(KV_PATHS)), default="auto", show_default=True),
    click.option(
        "--policy", type=click.Choice(list(POLICIES)), help="How tensors are chosen for the page cache."
    ),
    click.option(
        "--nvme", metavar="TARGET", help="Where the direct path lives [default: a file in --cache-dir]."
    ),
    click.option("--capacity", metavar="SIZE", help="Size of a target file that this run creates."),
    click.option(
        "--cache-dir", type=click.Path(path_type=Path, file_okay=False), help="Folder for KV files."
    ),
    click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        show_default=True,
        help="What computes; auto: a CUDA device that torch finds, else the CPU.",
    ),
    click.option(
        "--group-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="Sequences of the batch that are generated at once [default: what the budget allows].",
    ),
    click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: as stored]"
    ),
    click.option(
        "--prefill-chunk",
        type=click.IntRange(min=1),
        metavar="N",
        help="Prompt tokens a forward pass [default: what the budget allows].",
    ),
    click.option(
        "--weights",
        type=click.Choice(["auto", "dummy"]),
        default="auto",
        show_default=True,
        help="dummy: random values, one decoder layer shared by all; nothing is downloaded.",
    ),
    click.option(
        "--stream",
        type=click.Choice(list(STREAM)),
        default="auto",
        show_default=True,
        help="Attend to a layer in chunks; auto: where its K and V do not fit the budget; faster: also where "
        "that is predicted to take less time a token.",
    ),
    click.option(
        "--live/--no-live",
        default=None,
        help="Move tensors between the paths as the memory changes [default: live, but for first-fit].",
    ),
    click.option("--write-cap", metavar="SIZE", help="Write no more KV than this, to spare the drive."),
    click.option(
        "--governor-trace",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="Write every decision of the live governor here, a JSON line each.",
    ),
    click.option("--checksum", is_flag=True, help="Verify every block that is read back (CRC-32C)."),
    click.option(
        "--pipeline",
        type=click.Choice(list(PIPELINES)),
        default="adaptive",
        show_default=True,
        help="What may travel while a layer computes; all but adaptive are for comparison.",
    ),
    click.option(
        "--prefetch-depth", type=click.IntRange(min=0), metavar="N", help="Layers fetched ahead, at most."
    ),
]


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the shared options to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_from(options: dict[str, Any]) -> Any:
    """CacheSettings of the parsed options. Raises UsageError."""
    from dualblade.settings import CacheSettings

    names = (
        "mem_budget",
        "page_cache_budget",
        "kv_path",
        "policy",
        "nvme",
        "capacity",
        "cache_dir",
        "prefetch_depth",
        "checksum",
        "stream",
        "pipeline",
        "live",
        "write_cap",
        "governor_trace",
    )
    return CacheSettings.checked(**{name: options[name] for name in names if name in options})
