"""Reads the files that a person or a manifest names: plain ones only, and of a stated size."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path
from typing import BinaryIO

MAX_GRAPH_BYTES = (1 << 31) - 1  # of an ONNX graph with its weights: protobuf holds no more
MAX_TEXT_BYTES = 64 << 20  # of a manifest or of labels: a million names have some 20 MB
MAX_FILE_BYTES = 4 << 30  # of anything that is read whole, engines of several GPUs among it

_CHUNK = 1 << 20
_NAMES = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_plain(path: Path) -> BinaryIO:
    """Opens a plain file, or a link to one, for reading.

    Raises OSError, whose `strerror` says why, for whatever else has that name: a named pipe would
    be waited for, a device read without end.
    """
    _check_plain(path.stat().st_mode, path)  # first: to open a device can do something
    # What has the name by now may be another thing: it is not waited for either.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_plain(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_plain(path: Path, most: int = MAX_FILE_BYTES) -> bytes:
    """A plain file's bytes; raises OSError as `open_plain` does, and above `most` of them."""
    with open_plain(path) as file:
        # Not more than it says that it has: some files of the kernel's have no end.
        size = file_size(file)
        if size > most:
            raise OSError(
                errno.EFBIG, f"it has {size} bytes, expected at most {most}", os.fspath(path)
            )
        return file.read(size)


def file_size(file: BinaryIO) -> int:
    """How many bytes an open file says that it has."""
    return os.fstat(file.fileno()).st_size


def sha256_of(path: Path) -> str:
    """The SHA-256 of a plain file of any size, in hexadecimal; raises OSError as `open_plain`."""
    found = hashlib.sha256()
    with open_plain(path) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _check_plain(mode: int, path: Path) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    what = next((name for test, name in _NAMES if test(mode)), "no plain file")
    raise OSError(errno.EINVAL, f"it is {what}, expected a plain file", os.fspath(path))
