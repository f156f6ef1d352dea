# SPDX-License-Identifier: Apache-2.0
"""`unbind`: what `python3 -m dualblade.host unbind` does."""

from __future__ import annotations

import argparse
from typing import Any

import click

from dualblade.cli.output import json_option
from dualblade.host import unbind_command as command


@click.command(help=command.SUMMARY, epilog=f"\b\nExample:\n  {command.EXAMPLE}")
@click.argument("device", metavar="DEV")
@json_option
def unbind(**options: Any) -> None:
    command.run(argparse.Namespace(**options))
