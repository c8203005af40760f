"""A results file of many images: CSV, JSON lines or Parquet; a killed run goes on where it was.

Rows are appended to `NAME.partial` beside the results file `NAME`, as JSON lines under a header
that says which command wrote them. When all are there, the results file is written from them and
renamed into place. What a kill leaves is a whole number of rows and perhaps a torn line, which the
next run cuts off.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import msgspec

from rexdeploy.bundle.manifest import to_json
from rexdeploy.bundle.store import sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import check_replaceable, open_locked, replacing, sync_folder
from rexdeploy.inference.classifier import Classifier
from rexdeploy.inference.stream import Row
from rexdeploy.text import printable

_SYNC_S = 2.0  # at most so many seconds of work are lost with the machine; with the process, none
_ROW_GROUP = 10_000  # of Parquet: rows held in memory at once


@dataclass(frozen=True)
class Header:
    """What the rows depend on: a run goes on only with rows of an equal one."""

    images: tuple[str, ...]  # as given: a folder's new images are taken in when a run goes on
    folder: str  # that these are relative to, if one is
    model: str  # hash of what decides the numbers: file, preprocessing, labels
    backend: str
    top: int

    @classmethod
    def of(cls, classifier: Classifier, inputs: Iterable[Path], top: int) -> Header:
        """The header of these images' classes."""
        images = tuple(printable(str(path)) for path in inputs)
        model = (classifier.artifact.sha256, classifier.spec, classifier.labels)
        return cls(
            images,
            "" if all(map(os.path.isabs, images)) else printable(str(Path.cwd())),
            sha256(to_json(model)),
            classifier.backend,
            min(top, len(classifier.labels)),
        )


def partial_of(out: Path) -> Path:
    """Where the rows of an unfinished run are."""
    return out.with_name(out.name + ".partial")


def check_out(out: Path) -> None:
    """Raises UsageError for a results file that cannot be written; call it before the work."""
    if out.suffix not in _WRITERS:
        raise UsageError(f"--out: got {out}, expected a name in {', '.join(_WRITERS)}")
    check_replaceable(out)
    if out.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise UsageError(
                f"{out} needs pyarrow, which is not installed: pip install 'rexdeploy[parquet]', "
                "or write .csv or .jsonl"
            ) from None


class Results:
    """A results file in the making; locked until closed. Use it in a `with` statement."""

    def __init__(self, out: Path, header: Header, force: bool) -> None:
        """Goes on with an unfinished run of the same header, or begins one.

        `force` replaces a results file that is there, and another command's unfinished one.
        Raises UsageError for either without it, and while another process writes the same file.
        """
        self.out, self.path = out, partial_of(out)
        self.done: set[str] = set()  # the files that have had their row since an earlier run
        self.rows = self.errors = 0  # of all runs; errors are rows too
        self.top = header.top
        self._synced = time.monotonic()
        try:
            self._descriptor = open_locked(self.path, wait=False)
            is_new = os.fstat(self._descriptor).st_size == 0
            try:
                self._recover(header, force)
            except BaseException:
                if is_new:
                    with contextlib.suppress(OSError):
                        self.path.unlink()
                self.close()
                raise
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is being written by another command: wait for it, or give another "
                "--out"
            ) from None
        except OSError as error:
            raise RexdeployError(
                f"cannot write {self.path} ({error.strerror or error}); nothing was changed: make "
                "room, or give another --out"
            ) from None

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows to the unfinished results; raises RexdeployError where they do not fit."""
        lines = []
        for row in rows:
            lines.append(msgspec.json.encode(row) + b"\n")
            self._count(row)
        with self._writing(self.path):
            self._write(b"".join(lines))

    def finish(self) -> None:
        """Writes the results file in one atomic step and drops the unfinished one."""
        with self._writing(self.out):
            with replacing(self.out) as file:
                _WRITERS[self.out.suffix](self._rows(), file, self.top)
            sync_folder(self.out.parent)
            self.path.unlink()

    def close(self) -> None:
        """Lets go of the lock."""
        os.close(self._descriptor)

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _recover(self, header: Header, force: bool) -> None:
        """Reads what an earlier run left, and cuts it behind its last whole row."""
        expected = msgspec.json.encode(header) + b"\n"
        with open(self.path, "rb") as file:
            first = file.readline()
            if first == expected:
                end = len(first)
                for line in file:
                    row = _parse(line)
                    if row is None:
                        break
                    end += len(line)
                    self.done.add(row.file)
                    self._count(row)
                os.ftruncate(self._descriptor, end)
                os.lseek(self._descriptor, end, os.SEEK_SET)
                return
        torn = len(first) < len(expected) and expected.startswith(first)  # killed at once
        if not torn and not force:
            raise UsageError(f"{self.path} {_difference(first, header)}; --force begins anew")
        if self.out.exists() and not force:
            self.path.unlink()  # without a row
            raise UsageError(f"{self.out} is there already: --force replaces it")
        os.ftruncate(self._descriptor, 0)
        self._write(expected)

    def _count(self, row: Row) -> None:
        self.rows += 1
        self.errors += row.error is not None

    def _rows(self) -> Iterator[Row]:
        with open(self.path, "rb") as file:
            next(file)
            for line in file:
                yield msgspec.json.decode(line, type=Row)

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    @contextlib.contextmanager
    def _writing(self, file: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RexdeployError(
                f"cannot write {file} ({error.strerror or error}); {self.path} keeps what is done: "
                "make room, and the same command goes on"
            ) from None


def _parse(line: bytes) -> Row | None:
    """One row, or None for a torn line."""
    if not line.endswith(b"\n"):
        return None
    try:
        return msgspec.json.decode(line, type=Row)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _difference(first: bytes, header: Header) -> str:
    """What a file that this command did not begin is, and how to keep it."""
    try:
        begun = msgspec.json.decode(first, type=Header)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "is not what an unfinished run leaves: remove it"
    names = (field.name for field in fields(Header))
    other = [name for name in names if getattr(begun, name) != getattr(header, name)]
    return (
        f"is of an unfinished run with other values of {', '.join(other)}: the same command as "
        "then finishes it"
    )


def _columns(classes: int) -> list[str]:
    numbers = range(1, classes + 1)
    names = [f"{name}_{n}" for n in numbers for name in ("class", "label", "probability")]
    return ["file", "error", *names]


def _cells(row: Row) -> dict[str, str | int | float | None]:
    """A row by the names of its columns; of an error, those of the classes are missing."""
    cells: dict[str, str | int | float | None] = {"file": row.file, "error": row.error}
    for n, item in enumerate(row.predictions, start=1):
        cells[f"class_{n}"] = item.index
        cells[f"label_{n}"] = item.label
        cells[f"probability_{n}"] = item.probability
    return cells


def _write_csv(rows: Iterable[Row], file: BinaryIO, classes: int) -> None:
    text = io.TextIOWrapper(file, "utf-8", newline="")
    writer = csv.DictWriter(text, _columns(classes), lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(_cells, rows))
    text.detach()  # the file is not ours to close


def _write_json_lines(rows: Iterable[Row], file: BinaryIO, classes: int) -> None:
    del classes
    for row in rows:
        file.write(msgspec.json.encode(row) + b"\n")


def _write_parquet(rows: Iterable[Row], file: BinaryIO, classes: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"class": pa.int32(), "probability": pa.float64()}
    names = _columns(classes)
    schema = pa.schema([(name, types.get(name.split("_")[0], pa.string())) for name in names])
    remaining = iter(rows)
    with pq.ParquetWriter(file, schema) as writer:
        while group := list(islice(remaining, _ROW_GROUP)):
            table = pa.Table.from_pylist([_cells(row) for row in group], schema=schema)
            writer.write_table(table)


_WRITERS: dict[str, Callable[[Iterable[Row], BinaryIO, int], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_json_lines,
    ".parquet": _write_parquet,
}
