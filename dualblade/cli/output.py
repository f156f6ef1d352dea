# SPDX-License-Identifier: Apache-2.0
"""Data on stdout, talk on stderr. A command fills one record; text and JSON both come from it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dualblade.units import format_size

if TYPE_CHECKING:
    from rich.console import Console

Function = TypeVar("Function", bound=Callable[..., Any])


def json_option(function: Function) -> Function:
    """The option every command has; the function gets it as `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(function)


def emit(record: dict[str, Any], as_json: bool, text: Callable[[dict[str, Any]], None]) -> None:
    """Show `record` on stdout: as JSON, or as `text` prints it."""
    if as_json:
        click.echo(json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        text(record)


def _plain(value: Any) -> Any:
    """What JSON can hold; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def console() -> Console:
    """For progress and notes: rich, on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def describe_device(device: Mapping[str, Any]) -> str:
    """E.g. "cpu: weights 15 GiB, activations 1 GiB, KV ring 256 MiB"."""
    names = {"weights": "weights", "activation": "activations", "kv_ring": "KV ring"}
    parts = [f"{words} {format_size(device[f'{name}_bytes'])}" for name, words in names.items()]
    return f"{device['name']}: {', '.join(parts)}"


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns on stdout; a column of numbers stands to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))
    ]
    for line in [list(headers), *cells]:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ]
        click.echo("  ".join(parts).rstrip())
