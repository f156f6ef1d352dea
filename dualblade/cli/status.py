# SPDX-License-Identifier: Apache-2.0
"""`status`: what `python3 -m dualblade.host status` does."""

from __future__ import annotations

import argparse
from typing import Any

import click

from dualblade.cli.output import json_option
from dualblade.host import status_command as command


@click.command(help=command.SUMMARY, epilog=f"\b\nExample:\n  {command.EXAMPLE}")
@json_option
def status(**options: Any) -> None:
    command.run(argparse.Namespace(**options))
