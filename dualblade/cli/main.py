# SPDX-License-Identifier: Apache-2.0
"""The program `dualblade-spdk`: finds the command, and turns every error into one line and an exit code.

Each command is a module of this package that holds a click command of the same name. It is imported
when it is used, so that --help needs neither torch nor the C engine.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from dualblade import __version__
from dualblade.config import prepare_for_torch
from dualblade.errors import DualBladeError, UsageError

PROGRAM = "dualblade-spdk"
DEVICE_MEMORY_HINT = "take a smaller --prefill-chunk, batch or context, leave out --verify, or --device cpu"
COMMANDS = {
    "run": "Generate text with the KV cache offloaded.",
    "plan": "Show which tensor goes where and why; touches nothing.",
    "bench": "Measure the engine on a target, or a decode step.",
    "volume": "Make a target ours, look at it, verify it, erase it.",
    "emulate": "An NVMe controller without a drive, through SPDK's own target.",
    "bind": "Take an NVMe drive from the kernel for the userspace driver.",
    "unbind": "Give a drive back to the kernel.",
    "status": "Show which drive is bound, who has it open, and what is left half done.",
    "hugepages": "Show hugepages by NUMA node, reserve, give back.",
    "doctor": "Check this machine; each failure with the command that mends it.",
}
EXAMPLE = f"""\b
Example:
  {PROGRAM} run --model tiny --prompt "Once upon a time" --mem-budget 1G"""


class LazyGroup(click.Group):
    """Imports a command's module when the command is used; the listing comes from COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        found = getattr(importlib.import_module(f"dualblade.cli.{cmd_name}"), cmd_name)
        assert isinstance(found, click.Command)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise _no_such_command(args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _no_such_command(name: str) -> UsageError:
    listing = f"{PROGRAM} --help lists the commands"
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return UsageError(f"no such command: {name!r}", f"did you mean {close[0]!r}?" if close else listing)


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="LLM inference on one machine whose KV cache is larger than its memory.",
    epilog=EXAMPLE,
)
@click.version_option(__version__, prog_name=PROGRAM)
@click.option("--debug", is_flag=True, help="Show the traceback of an internal error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


class Told(KeyboardInterrupt):
    """By a signal, to end: as Ctrl-C does, with everything put away."""

    def __init__(self, number: int):
        super().__init__()
        self.exit_code = 128 + number


def _told(number: int, frame: FrameType | None) -> None:
    raise Told(number)


def _heed_signals() -> None:
    """Those that would end the process on the spot, its files and cgroups left behind."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _told)


def main(args: Sequence[str] | None = None) -> int:
    """The console entry: runs the command and returns the exit code."""
    if args is None:
        _heed_signals()
        prepare_for_torch()
    words = list(sys.argv[1:] if args is None else args)
    debug, words = _take_debug(words)
    try:
        return _run(words, whole_process=args is None)
    except DualBladeError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except click.ClickException as error:
        return _usage(error, words)
    except (KeyboardInterrupt, click.Abort) as end:
        click.echo("interrupted", err=True)
        return end.exit_code if isinstance(end, Told) else 128 + signal.SIGINT
    except BrokenPipeError:
        _forget_stdout()
        return 1
    except Exception as error:
        return _internal(error, debug)


def _run(words: list[str], whole_process: bool) -> int:
    """whole_process: nothing else runs in it, and a command may start it anew."""
    try:
        with cli.make_context(PROGRAM, words, obj={"whole_process": whole_process}) as ctx:
            cli.invoke(ctx)
    except click.exceptions.Exit as done:
        return done.exit_code
    finally:
        sys.stdout.flush()  # a broken pipe shows here, not in the interpreter's last moments
    return 0


def _take_debug(words: list[str]) -> tuple[bool, list[str]]:
    """--debug is taken anywhere before "--", since it is typed after the fact."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return len(kept) < end, kept + words[end:]


def _complain(message: str, hint: str | None = None) -> None:
    click.echo(f"error: {message}", err=True)
    if hint:
        click.echo(f"hint: {hint}", err=True)


def _usage(error: click.ClickException, words: list[str]) -> int:
    ctx: click.Context | None = getattr(error, "ctx", None)
    if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
        click.echo(error.format_message(), err=True)
    else:
        typed = next((word for word in words if word in COMMANDS), "")
        path = ctx.command_path if ctx else f"{PROGRAM} {typed}".rstrip()
        _complain(" ".join(error.format_message().split()), f"{path} --help shows the options")
    return error.exit_code


def _internal(error: Exception, debug: bool) -> int:
    if type(error).__name__ == "NotBuiltError":  # by name: spdk_glue itself may be what cannot be imported
        _complain(str(error), f"{PROGRAM} doctor names what is missing")
    elif type(error).__name__ == "OutOfMemoryError":  # torch's
        _complain(f"the device ran out of memory: {str(error).split('. ')[0]}", DEVICE_MEMORY_HINT)
    elif debug:
        traceback.print_exc()
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        _complain(f"internal error: {text} (--debug shows the traceback)")
    return 1


def _forget_stdout() -> None:
    """Nobody reads any more; without this the interpreter complains when it flushes at exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())
