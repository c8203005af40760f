"""A journal: lines of JSON appended to a file, so that a killed run goes on where it was.

Its first line says what the others are of. A kill leaves whole lines and perhaps a torn one, which
the next run cuts off.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from rexdeploy.files import open_locked

Entry = TypeVar("Entry")
_SYNC_S = 2.0  # at most so many seconds of work are lost with the machine; with the process, none


class Journal(Generic[Entry]):
    """An open journal, locked until `close`."""

    def __init__(self, path: Path, header: object, entry: type[Entry]) -> None:
        """Reads what an earlier run of the same header left; anything else begins anew.

        Raises BlockingIOError while another process holds the file, and OSError.
        """
        self.path, self._type = path, entry
        self._descriptor = open_locked(path, wait=False)
        self._synced = time.monotonic()
        try:
            self.entries = self._read(msgspec.json.encode(header) + b"\n")
        except BaseException:
            os.close(self._descriptor)
            raise

    def append(self, entry: Entry) -> None:
        """Adds an entry; raises OSError where there is no room, and keeps what was there."""
        self._write(msgspec.json.encode(entry) + b"\n")
        if time.monotonic() - self._synced > _SYNC_S:
            os.fsync(self._descriptor)
            self._synced = time.monotonic()

    def remove(self) -> None:
        """Removes the file: its run is complete."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._descriptor)

    def _read(self, header: bytes) -> list[Entry]:
        entries: list[Entry] = []
        with open(self._descriptor, "rb", closefd=False) as file:
            end = len(header) if file.readline() == header else 0
            for line in file if end else ():
                try:
                    if not line.endswith(b"\n"):
                        break
                    entries.append(msgspec.json.decode(line, type=self._type))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    break
                end += len(line)
        os.ftruncate(self._descriptor, end)
        os.lseek(self._descriptor, end, os.SEEK_SET)
        if not end:
            self._write(header)
        return entries

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
