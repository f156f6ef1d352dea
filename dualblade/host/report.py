# SPDX-License-Identifier: Apache-2.0
"""What the commands say: one record on stdout, as lines or as one JSON object; questions on stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dualblade.errors import BindError, DualBladeError
from dualblade.host.command import host_command


def emit(record: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    text = json.dumps(record, indent=2) if as_json else "\n".join(lines(record))
    print(text, flush=True)  # before what is said on stderr next


@contextmanager
def errors_told(as_json: bool) -> Iterator[None]:
    """With --json an error is a record too; the words on stderr are the program's, as ever."""
    try:
        yield
    except DualBladeError as error:
        if as_json:
            print(json.dumps({"ok": False, "error": error.message, "hint": error.hint} | _details(error)))
        raise


def _details(error: DualBladeError) -> dict[str, Any]:
    details = getattr(error, "details", None)
    return details if isinstance(details, dict) else {}


def check_root(args: argparse.Namespace) -> None:
    """Raises BindError, with the whole command as root would have to give it."""
    if os.geteuid() != 0:
        raise BindError(f"{args.words[0]} is root's to do", host_command(*args.words))


def ask(question: str) -> str | None:
    """A line that the user types; None where nobody is there to type one."""
    if not sys.stdin or not sys.stdin.isatty():
        return None
    print(question, end=" ", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()
