"""What a command shows: progress on stderr, results and tables on stdout, JSON, one-line errors."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import typer

from rexdeploy.errors import UsageError
from rexdeploy.progress import Report, silent

_LINE_S = 10.0  # between two lines of progress where there is no terminal


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yields a function that shows the step under way on stderr: a spinner, or a line each."""
    if quiet:
        yield silent
    elif not sys.stderr.isatty():
        yield lambda message: typer.echo(f"{message} ...", err=True)
    else:
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda message: status.update(f"{message} ...")


@contextmanager
def progress_bar(quiet: bool, what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how many of `total` are done by now; it began with `done`.

    On stderr: a bar with the rate and the time left, or without a terminal a line now and then.
    """
    begun, before = time.monotonic(), done

    def pace(done: int) -> str:
        rate = (done - before) / max(time.monotonic() - begun, 1e-3)
        left = str(timedelta(seconds=round((total - done) / rate))) if rate else "?"
        return f"{rate:.3g} a second, {left} left"

    if quiet:
        yield lambda _: None
    elif not sys.stderr.isatty():
        told = float("-inf")

        def tell(done: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _LINE_S:
                told = time.monotonic()
                typer.echo(f"{what}: {done} of {total}, {pace(done)} ...", err=True)

        tell(done)
        yield tell
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
        with Progress(TextColumn(what), *columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, completed=done, total=total, pace="")
            yield lambda done: bar.update(task, completed=done, pace=pace(done))


def print_table(columns: Sequence[str], lines: Iterable[Sequence[str]], wrap: bool = False) -> None:
    """Prints a table; its first column folds where the terminal is narrow; with `wrap`, all do."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        if index == 0:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="left" if wrap else "right", no_wrap=not wrap)
    for line in lines:
        table.add_row(*line)
    # Without a terminal, wide enough for every table.
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, highlight=False, markup=False, file=io.StringIO())
    console.print(table)
    say(console.file.getvalue().rstrip("\n"))  # type: ignore[attr-defined]


def say(*lines: str | None, to_stderr: bool = False) -> None:
    """Prints lines, but for those that are None.

    Output that cannot be written (a closed pipe, a full disk) does not stop a command, whose exit
    code may have something to say: `lost_output` keeps the reason.
    """
    for line in lines:
        if line is None:
            continue
        try:
            typer.echo(line, err=to_stderr)
        except OSError as error:
            os.dup2(
                os.open(os.devnull, os.O_WRONLY), (sys.stderr if to_stderr else sys.stdout).fileno()
            )
            if not isinstance(error, BrokenPipeError):  # `rexdeploy models | head` is no mistake
                lost_output.append(f"output: {error.strerror}")


lost_output: list[str] = []


def check_json(file: Path | None) -> None:
    """Raises UsageError if a result's file cannot be written; call it before the work."""
    if file is None or file == Path("-"):
        return
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise UsageError(f"cannot write {file}: expected a file in a folder that can be written")


def emit(file: Path | None, result: Callable[[], object]) -> None:
    """Writes a command's result as JSON to `file`, if one was asked for."""
    if file is None:
        return
    from rexdeploy.manifest import to_json

    write_text(file, to_json(result()).decode())


def write_text(file: Path, text: str) -> None:
    """Writes text to a file that the user has named; '-' is stdout."""
    if file == Path("-"):
        say(text.rstrip("\n"))
        return
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {file} ({error.strerror})") from None


def fail(message: str, code: int) -> NoReturn:
    """Prints one line on stderr and leaves."""
    typer.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(code)
