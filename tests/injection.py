"""A disk that fails: the n-th call that writes, flushes, renames, opens or makes in one folder."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
KINDS = ("write", "fsync", "rename", "open", "mkdir")
SHORT = 0
"""In place of an error: the n-th write takes half of its bytes, as a system call may."""


@dataclass
class Disk:
    """Counts the calls on files in a folder, and fails one of them."""

    folder: Path
    number: int  # which call fails, from 1; 0: none, they are counted only
    error: int
    kinds: Collection[str]
    lasting: bool  # every later call fails as well, but for opening what is there already
    calls: list[str] = field(default_factory=list)
    injected: list[str] = field(default_factory=list)

    def check(self, kind: str, path: str, makes: bool = True) -> bool:
        """Raises the error if this call is the one; says whether it is to be a short one.

        `makes`: it needs room on the disk, as opening a file for reading does not.
        """
        if kind not in self.kinds or not path.startswith(f"{self.folder}{os.sep}"):
            return False
        self.calls.append(kind)
        if not self.number or len(self.calls) < self.number:
            return False
        if len(self.calls) > self.number and not (self.lasting and makes):
            return False
        self.injected.append(f"{kind} {path}")
        if self.error == SHORT:
            return kind == "write"
        raise OSError(self.error, os.strerror(self.error), path)


def _path(file: object) -> str:
    """The absolute path of a name, or of what a descriptor is open on."""
    if isinstance(file, int):
        try:
            return str(Path(f"/proc/self/fd/{file}").readlink())
        except OSError:
            return ""
    return str(Path(os.fsdecode(cast("str", file))).absolute())


@contextlib.contextmanager
def failing(
    folder: Path,
    number: int,
    error: int = SHORT,
    kinds: Collection[str] = KINDS,
    lasting: bool = False,
) -> Iterator[Disk]:
    """A failure of the `number`-th of these calls on files in `folder`, in the block."""
    disk = Disk(Path(os.path.realpath(folder)), number, error, kinds, lasting)
    system: dict[str, Callable[..., Any]] = {
        name: getattr(os, name) for name in ("open", "write", "replace", "rename", "mkdir")
    }
    plain_open = builtins.open

    class Raw(io.FileIO):
        def write(self, data: Any, /) -> int:
            view = memoryview(data).cast("B")
            is_short = disk.check("write", _path(self.fileno()))
            return super().write(view[: max(1, len(view) // 2)] if is_short else view)

    def file_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        writes = bool(set(mode) & set("wax+"))
        disk.check("open", "" if isinstance(file, int) else _path(file), writes)
        if not writes or "+" in mode or not _path(file).startswith(str(disk.folder)):
            return plain_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        buffered = io.BufferedWriter(Raw(file, mode.strip("bt"), closefd, opener))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        disk.check("open", _path(path), bool(flags & os.O_CREAT))
        return cast(int, system["open"](path, flags, *rest, **named))

    def os_write(descriptor: int, data: Any) -> int:
        view = memoryview(data)
        is_short = disk.check("write", _path(descriptor))
        return cast(
            int, system["write"](descriptor, view[: max(1, len(view) // 2)] if is_short else view)
        )

    def os_fsync(descriptor: int) -> None:
        # Nothing is waited for: the machine that runs the tests is not going to lose its power.
        disk.check("fsync", _path(descriptor) + os.sep)  # of the folder itself, too

    def renaming(name: str) -> Callable[..., None]:
        def rename(source: Any, target: Any, **named: Any) -> None:
            disk.check("rename", _path(target))
            system[name](source, target, **named)

        return rename

    def os_mkdir(path: Any, *rest: Any, **named: Any) -> None:
        disk.check("mkdir", _path(path) + os.sep)
        system["mkdir"](path, *rest, **named)

    with (
        mock.patch.object(os, "open", os_open),
        mock.patch.object(os, "write", os_write),
        mock.patch.object(os, "fsync", os_fsync),
        mock.patch.object(os, "replace", renaming("replace")),
        mock.patch.object(os, "rename", renaming("rename")),
        mock.patch.object(os, "mkdir", os_mkdir),
        mock.patch.object(builtins, "open", file_open),
        mock.patch.object(io, "open", file_open),
    ):
        yield disk
