"""Files: only plain ones are read, and what is written is whole or not there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rexdeploy.errors import UsageError

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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which takes the place of `path` when the block ends without an error.

    Until then it is beside `path`, under one name: what a killed command left there, the next one
    writes over. A pipe or a device is written as it is. Raises OSError.
    """
    if _is_stream(path):
        # Without O_NONBLOCK, opening a named pipe would wait for somebody who reads it.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        with open(descriptor, "wb") as stream:
            yield stream
        return
    target, staged = _places(path)
    descriptor = open_locked(staged)
    try:
        os.ftruncate(descriptor, 0)
        with contextlib.suppress(OSError):  # of a new file there is no mode to keep
            os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
        with open(descriptor, "wb", closefd=False) as file:
            yield file
        os.fsync(descriptor)
        os.replace(staged, target)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    finally:
        os.close(descriptor)


def check_replaceable(path: Path) -> None:
    """Raises UsageError where `replacing` could not write; call it before a long step."""
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if _is_stream(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(None, "no right to write to it")
            return
        _, staged = _places(path)
        descriptor = open_locked(staged)
        try:
            staged.unlink()
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: expected a file in a folder that can be written "
            f"({error.strerror})"
        ) from None


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file that is renamed into place later, and has the disk confirm it."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Makes the renames in a folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_locked(path: Path, wait: bool = True) -> int:
    """The descriptor of a file to write, and its lock: the kernel lets go of it at a kill.

    Makes the file where there is none. Raises BlockingIOError if another process holds it, unless
    `wait`, and OSError.
    """
    while True:
        # No link is followed: in a folder that others may write, it would lead to any file.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # finished by its owner between opening and locking
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _places(path: Path) -> tuple[Path, Path]:
    """The file to replace (of a link, what it points to), and where the new one is made."""
    target = Path(os.path.realpath(path))
    return target, target.with_name(f".{target.name}.staged")


def _is_stream(path: Path) -> bool:
    """Whether something is there that can be written to and not replaced, such as /dev/null."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        return False
    return not stat.S_ISREG(kind) and not stat.S_ISDIR(kind)
