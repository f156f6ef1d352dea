# SPDX-License-Identifier: Apache-2.0
"""`python3 -m dualblade.host`: what changes the machine. It needs nothing that is not in Python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dualblade.errors import DualBladeError
from dualblade.host import hugepages_command
from dualblade.host.sysfs import Host


def main(words: Sequence[str] | None = None, host: Host = Host()) -> int:  # noqa: B008
    """The exit code: 0 done, 1 refused or failed, 2 usage."""
    parser = argparse.ArgumentParser("python3 -m dualblade.host", description=__doc__)
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    hugepages_command.add_parser(subparsers)
    args = parser.parse_args(words)
    try:
        return int(args.run(args, host))
    except DualBladeError as error:
        print(f"error: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
