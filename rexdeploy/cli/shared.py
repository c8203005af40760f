"""What the commands share: options, Ctrl-C, and finding a bundle."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from rexdeploy.cli.console import fail, say
from rexdeploy.errors import RexdeployError
from rexdeploy.text import one_line, printable

EXIT_INTERRUPTED = 130  # as a shell reports SIGINT
BundleArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[BUNDLE]",
        help="A bundle's folder or its name under artifacts/ [default: the latest one].",
        show_default=False,
    ),
]
RequireSignature = Annotated[
    Path | None,
    typer.Option(
        metavar="PUBLIC_KEY",
        help="Refuse the bundle unless this key has signed it, and nothing has changed since.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the result as JSON; '-' is stdout."),
]


def leave_with(message: str = "") -> Callable[[int, object], NoReturn]:
    """A handler that leaves at once on Ctrl-C, with a message.

    A KeyboardInterrupt inside torch's exporter (2.15) ends in std::terminate, and what commands
    write survives being killed at any moment, so there is nothing to unwind.
    """

    def leave(signal_number: int, frame: object) -> NoReturn:
        del signal_number, frame
        show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # the spinner had hidden it
        line = f"{show_cursor}error: {one_line(f'interrupted{message}')}\n"
        with contextlib.suppress(OSError):
            os.write(2, line.encode())  # a stream may be in the middle of another line
        os._exit(EXIT_INTERRUPTED)

    return leave


interrupted = leave_with()


@contextlib.contextmanager
def taken_back_on_ctrl_c() -> Iterator[None]:
    """Within it Ctrl-C unwinds what is under way, where that takes back what it has begun."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; no model is left half written", EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, interrupted)


@contextlib.contextmanager
def only_warned_of(is_error: bool) -> Iterator[None]:
    """The writing of a result's files, behind its printing: what was found is never lost to it.

    Where the result itself `is_error`, the exit code is the result's.
    """
    try:
        yield
    except RexdeployError as error:
        if not is_error:
            raise
        say(f"warning: {one_line(str(error))}", to_stderr=True)


def command_line() -> str:
    """The command line that is running, as a person would type it again."""
    return printable(shlex.join(["rexdeploy", *sys.argv[1:]]))


def tell(quiet: bool, *lines: str | None, to_stderr: bool = False) -> None:
    """Prints the lines, unless errors only are wanted."""
    if not quiet:
        say(*lines, to_stderr=to_stderr)
