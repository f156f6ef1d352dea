# SPDX-License-Identifier: Apache-2.0
"""`hugepages`: what `python3 -m dualblade.host hugepages` does."""

from __future__ import annotations

import argparse
from typing import Any

import click

from dualblade.cli.output import json_option
from dualblade.host import hugepages_command as command


@click.command(help=command.SUMMARY, epilog=f"\b\nExample:\n  {command.EXAMPLE}")
@click.option("--reserve", metavar="SIZE", help=command.RESERVE_HELP)
@click.option("--node", type=click.IntRange(min=0), metavar="N", help=command.NODE_HELP)
@click.option("--persist", is_flag=True, help=command.PERSIST_HELP)
@click.option("--release", is_flag=True, help=command.RELEASE_HELP)
@json_option
def hugepages(**options: Any) -> None:
    command.run(argparse.Namespace(**options))
