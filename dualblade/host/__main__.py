# SPDX-License-Identifier: Apache-2.0
"""`python3 -m dualblade.host`: what changes the machine. It needs nothing that is not in Python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from dualblade.errors import DualBladeError
from dualblade.host import bind_command, doctor_command, hugepages_command, status_command, unbind_command
from dualblade.host.command import host_command
from dualblade.host.sysfs import Host

_COMMANDS = (bind_command, unbind_command, status_command, hugepages_command, doctor_command)
_EXAMPLE = "Example: python3 -m dualblade.host status"


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, and the way to the options."""

    def error(self, message: str) -> NoReturn:
        words = self.prog.split()[3:]
        _complain(message, f"the options: {host_command(*words, '--help', root=False)}")
        sys.exit(2)


def main(words: Sequence[str] | None = None, host: Host = Host()) -> int:
    """The exit code: 0 done, 1 refused or failed, 2 usage."""
    parser = Parser("python3 -m dualblade.host", description=__doc__, epilog=_EXAMPLE)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(words)
    try:
        return int(args.run(args, host))
    except DualBladeError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except OSError as error:
        _complain(f"{error.filename or 'the kernel'}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _complain(message: str, hint: str | None = None) -> None:
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
