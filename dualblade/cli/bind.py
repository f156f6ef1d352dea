# SPDX-License-Identifier: Apache-2.0
"""`bind`: what `python3 -m dualblade.host bind` does."""

from __future__ import annotations

import argparse
from typing import Any

import click

from dualblade.cli.output import json_option
from dualblade.host import bind_command as command


@click.command(help=command.SUMMARY, epilog=f"\b\nExample:\n  {command.EXAMPLE}")
@click.argument("device", metavar="DEV")
@click.option("--serial", metavar="S", help=command.SERIAL_HELP)
@click.option("--yes", is_flag=True, help=command.YES_HELP)
@click.option("--dry-run", is_flag=True, help=command.DRY_RUN_HELP)
@click.option(
    "--driver",
    type=click.Choice(command.DRIVERS),
    default=command.VFIO,
    show_default=True,
    help=command.DRIVER_HELP,
)
@click.option("--user", metavar="NAME", help=command.USER_HELP)
@click.option("--then", metavar="DEV", multiple=True, help=command.THEN_HELP)
@click.option("--i-know-this-erases", "erases", metavar="SERIAL", help=command.ERASES_HELP)
@json_option
@click.pass_context
def bind(ctx: click.Context, **options: Any) -> None:
    ctx.exit(command.run(argparse.Namespace(**options)))
