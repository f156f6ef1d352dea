# SPDX-License-Identifier: Apache-2.0
"""`doctor`: read-only checks, each failure with the command that mends it."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from dualblade.cli.output import emit, json_option
from dualblade.config import default_cache_dir
from dualblade.host import checks, surroundings

EXAMPLE = """\b
Example:
  dualblade-spdk doctor --cache-dir /mnt/nvme/dualblade"""


@click.command(epilog=EXAMPLE)
@click.option("--cache-dir", type=click.Path(path_type=Path), help="Look at this folder, not the default.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, cache_dir: Path | None, as_json: bool) -> None:
    """Check this machine; changes nothing. Exit 1 if a check fails."""
    found = examine(cache_dir or default_cache_dir())
    record = {"checks": [asdict(check) for check in found], "ok": all(c.state != checks.FAIL for c in found)}
    emit(record, as_json, show)
    ctx.exit(0 if record["ok"] else 1)


def examine(cache_dir: Path) -> list[checks.Check]:
    engines, problem = built_engines()
    found = [checks.python_version(), checks.c_engine(engines, problem, rebuild_command())]
    if "uring" in engines:
        found.append(checks.io_uring(*try_ring()))
    found += [checks.memlock(), checks.cache_folder(cache_dir)]
    if found[-1].state == checks.OK:
        found += [look(cache_dir) for look in (checks.filesystem, checks.direct_io, checks.free_space)]
    found += [surroundings.kernel(), surroundings.container(), surroundings.drives()]
    found += [
        checks.memory_cgroup(),
        surroundings.delegation(),
        checks.hugepages(),
        checks.swap(),
        checks.torch(),
        checks.spdk(spdk_version() if engines else None, rebuild_command()),
    ]
    return found


def built_engines() -> tuple[list[str], str | None]:
    try:
        import spdk_glue
    except ImportError as error:
        return [], str(error)
    return spdk_glue.engines(), None


def spdk_version() -> str | None:
    import spdk_glue

    return spdk_glue.spdk_version()


def rebuild_command() -> str:
    checkout = (Path(checks.__file__).parents[2] / "Makefile").exists()
    return "make setup" if checkout else "pip install --force-reinstall --no-deps --no-cache-dir ."


def try_ring() -> tuple[OSError | None, str | None]:
    """Open an io_uring on an empty file. What the kernel answered, and why threads take its place."""
    import spdk_glue

    with tempfile.TemporaryFile() as file:
        try:
            spdk_glue.Queue.files([file.fileno()], engine="uring").close()
        except OSError as error:
            return error, spdk_glue.why_no_uring(error)
    return None, None


def show(record: dict[str, Any]) -> None:
    for check in record["checks"]:
        click.echo(f"{check['state']:<5} {check['name']}: {check['detail']}")
        if check["fix"]:
            click.echo(f"      fix: {check['fix']}")
