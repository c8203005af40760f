"""What a command shows: progress on stderr, results and tables on stdout, JSON, one-line errors."""

from __future__ import annotations

import io
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, TextIO

import typer

from rexdeploy.errors import RexdeployError
from rexdeploy.files import check_replaceable, replacing
from rexdeploy.progress import Report, Result, silent
from rexdeploy.text import json_text, one_line, plain

if TYPE_CHECKING:
    from rexdeploy.bundle.manifest import Artifact
    from rexdeploy.bundle.store import Bundle


_LINE_S = 10.0  # between two lines of progress where there is no terminal
lost_output: list[str] = []
"""Why what was printed on stdout is lost, if it is: a command that was fine is not fine then."""


def secure_streams() -> None:
    """Makes a closed or full stdout or stderr stop no command, whose exit code is its work's.

    What cannot be written is dropped. `lost_output` keeps why, unless nobody is there to read it
    (`rexdeploy models | head`, `>&-`) or it was on stderr, which has no results.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Left closed, the next file that is opened would get its number and what is printed.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:  # not in a test that takes what is printed
        sys.stdout = _stream(1, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _stream(2, sys.stderr)


class _Lossy(io.FileIO):
    """A standard stream whose first failure is its last: from then on, all is dropped."""

    is_lost = False

    def write(self, data: Any, /) -> int:
        if not self.is_lost:
            try:
                while (size := super().write(data)) is None:  # a pipe that does not block is full
                    select.select((), (self,), ())
                return size
            except OSError as error:
                self.is_lost = True
                if self.fileno() == 1 and not isinstance(error, BrokenPipeError):
                    lost_output.append(f"output: {error.strerror}")
        return memoryview(data).nbytes


def _stream(number: int, before: TextIO | None) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(_Lossy(number, "wb", closefd=False)),
        encoding=before.encoding if before else "utf-8",
        errors="backslashreplace",  # a name that this terminal has no letters for
        line_buffering=before is not None and bool(before.line_buffering),
    )


@contextmanager
def progress(quiet: bool) -> Iterator[Report]:
    """Yields a function that shows the step under way on stderr: a spinner, or a line each."""
    if quiet:
        yield silent
    elif not sys.stderr.isatty():
        yield lambda message: say(f"{message} ...", to_stderr=True)
    else:
        from rich.console import Console
        from rich.text import Text

        with Console(stderr=True).status("starting") as status:
            yield lambda message: status.update(Text(f"{one_line(message)} ..."))


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
                say(f"{what}: {done} of {total}, {pace(done)} ...", to_stderr=True)

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
        table.add_row(*map(plain, line))
    # Without a terminal, wide enough for every table.
    width = None if sys.stdout.isatty() else 160
    printed = io.StringIO()
    Console(width=width, highlight=False, markup=False, emoji=False, file=printed).print(table)
    say(*printed.getvalue().rstrip("\n").split("\n"))


def say(*lines: str | None, to_stderr: bool = False) -> None:
    """Prints lines, but for those that are None, without what would steer a terminal."""
    for line in lines:
        if line is not None:
            typer.echo(plain(line), err=to_stderr)


def check_json(file: Path | None) -> None:
    """Raises UsageError if a result's file cannot be written; call it before the work."""
    if file is not None and file != Path("-"):
        check_replaceable(file)


def emit(file: Path | None, result: Result | Sequence[Result]) -> None:
    """Writes a command's result as JSON to `file`, if one was asked for."""
    if file is None:
        return
    from rexdeploy.bundle.manifest import to_json

    parts = result.to_dict() if isinstance(result, Result) else [one.to_dict() for one in result]
    write_text(file, json_text(to_json(parts).decode()))


def write_text(file: Path, text: str) -> None:
    """Writes text to a file that the user has named, all of it or none; '-' is stdout."""
    if file == Path("-"):
        say(*text.rstrip("\n").split("\n"))
        return
    with output_file(file) as out:
        out.write(text.encode())


@contextmanager
def output_file(file: Path) -> Iterator[BinaryIO]:
    """A file that the user has named, to write in the block; raises RexdeployError.

    It is there when the block ends, and if anything fails, what was there before is.
    """
    try:
        with replacing(file) as out:
            yield out
    except OSError as error:
        raise RexdeployError(
            f"cannot write {file} ({error.strerror or error}); what was there before is "
            "unchanged: make room, or name another file"
        ) from None


def fail(message: str, code: int) -> NoReturn:
    """Prints one line on stderr, no longer than a screen, and leaves."""
    say(f"error: {one_line(message)}", to_stderr=True)
    sys.exit(code)


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are; --json has them all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return one_line(", ".join(names[:most])) + more


def describe_artifact(bundle: Bundle, artifact: Artifact | None) -> str:
    """`artifacts/rexnet_1.5/fp32.onnx, 37.0 MiB, batch dynamic`."""
    if artifact is None:
        return str(bundle.path)
    file = bundle.path / artifact.file
    size = file.stat().st_size / 2**20
    return f"{file}, {size:.1f} MiB, batch {artifact.batch or 'dynamic'}"
