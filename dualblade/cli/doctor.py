# SPDX-License-Identifier: Apache-2.0
"""`doctor`: read-only checks, each failure with the command that mends it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from dualblade.cli.output import emit, json_option
from dualblade.config import default_cache_dir
from dualblade.host import checks, software_checks
from dualblade.host import doctor_command as command

EXAMPLE = """\b
Example:
  dualblade-spdk doctor --cache-dir /mnt/nvme/dualblade"""


@click.command(help=command.SUMMARY, epilog=EXAMPLE)
@click.option("--cache-dir", type=click.Path(path_type=Path), help=command.CACHE_DIR_HELP)
@click.option("--thorough", is_flag=True, help="Import torch, too, in a process of its own: takes seconds.")
@json_option
@click.pass_context
def doctor(ctx: click.Context, cache_dir: Path | None, thorough: bool, as_json: bool) -> None:
    record = command.as_record(examine(cache_dir or default_cache_dir(), thorough))
    emit(record, as_json, lambda record: click.echo("\n".join(command.lines(record))))
    ctx.exit(0 if record["ok"] else 1)


def examine(cache_dir: Path, thorough: bool = False) -> list[checks.Check]:
    engines, problem = built_engines()
    found = [checks.python_version(), checks.c_engine(engines, problem, rebuild_command())]
    if "uring" in engines:
        found.append(checks.io_uring(*try_ring()))
    return [
        *found,
        checks.memlock(),
        *command.folder_checks(cache_dir),
        *command.machine_checks(),
        software_checks.torch_import() if thorough else software_checks.torch(software_checks.torch_folder()),
        software_checks.spdk(spdk_version() if engines else None, rebuild_command()),
    ]


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
