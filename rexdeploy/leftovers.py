"""What a running server leaves on the machine: a folder, shared memory, processes; all cleared.

Triton's Python backend keeps a process and a file in /dev/shm for each model. Neither goes when the
server is killed, and a killed `rexdeploy serve` cannot tidy up: the next one does it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rexdeploy.errors import RexdeployError

SHARED_MEMORY = Path("/dev/shm")
_NAME = "rexdeploy-serve-"
_LOCK = "lock"
_SETTLED_S = 60  # a folder without a lock that is older than this was left by a killed command
_GONE_S = 5  # how long killed processes may take to go
# The longest name of a socket is 107 bytes: sockaddr_un, linux/un.h.
_LONGEST_FOLDER = 80


@dataclass(frozen=True)
class Workplace:
    """A folder that one `serve` has for itself while it runs."""

    folder: Path

    @property
    def mark(self) -> str:
        """What begins the names of its shared memory, and is in its processes' arguments."""
        return _mark(self.folder)

    def clear_memory(self) -> None:
        """Removes its shared memory; the processes that use it must be gone."""
        _clear_memory(self.mark)


@contextlib.contextmanager
def workplace() -> Iterator[Workplace]:
    """A new one, cleared when the block is left; clears those of dead commands first.

    Raises RexdeployError where no folder can be made.
    """
    clear_dead()
    try:
        folder = Path(tempfile.mkdtemp(prefix=_NAME))
    except OSError as error:
        raise RexdeployError(
            f"cannot make a folder in {tempfile.gettempdir()} ({error.strerror}); free some space, "
            "or set TMPDIR to another folder"
        ) from None
    try:
        if len(os.fsencode(folder)) > _LONGEST_FOLDER:
            raise RexdeployError(
                f"{folder}: too long a name for the server's sockets, expected at most "
                f"{_LONGEST_FOLDER} bytes; set TMPDIR to another folder"
            )
        lock = _lock(folder)
        try:
            yield Workplace(folder)
        finally:
            os.close(lock)
    finally:
        _clear(folder)


def clear_dead() -> None:
    """Removes what killed commands of this user have left: processes, shared memory, folders."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):  # somebody else's, or just removed by another start
            if _is_dead(folder):
                _clear(folder)


def _is_dead(folder: Path) -> bool:
    """Whether the command of this folder runs no more: then nobody holds its lock."""
    status = folder.lstat()
    if status.st_uid != os.getuid() or not folder.is_dir() or folder.is_symlink():
        return False
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:  # about to be written, or the command was killed before
        return time.time() - status.st_mtime > _SETTLED_S
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _lock(folder: Path) -> int:
    """Locks the folder: an open file that no child of ours has, and that goes with this process."""
    new = folder / f"{_LOCK}.new"
    try:
        descriptor = os.open(new, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        new.rename(folder / _LOCK)  # never seen there without its lock
    except OSError as error:
        raise RexdeployError(f"cannot write in {folder} ({error.strerror})") from None
    return descriptor


def _mark(folder: Path) -> str:
    return folder.name.replace("-", "_") + "_"


def _clear(folder: Path) -> None:
    _end_processes(folder)
    _clear_memory(_mark(folder))
    shutil.rmtree(folder, ignore_errors=True)


def _end_processes(folder: Path) -> None:
    """Kills what still runs of a dead server: its arguments name the folder, which is unique."""
    deadline = time.monotonic() + _GONE_S
    while (pids := _processes(folder)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes(folder: Path) -> list[int]:
    names = os.fsencode(folder.name) + b"/", os.fsencode(_mark(folder))
    found = []
    for entry in Path("/proc").glob("[1-9]*"):
        with contextlib.suppress(OSError):
            program, *arguments = (entry / "cmdline").read_bytes().split(b"\0")
            ours = program.endswith((b"tritonserver", b"triton_python_backend_stub"))
            if ours and any(name in argument for name in names for argument in arguments):
                found.append(int(entry.name))
    return found


def _clear_memory(mark: str) -> None:
    for file in SHARED_MEMORY.glob(f"{mark}*"):
        with contextlib.suppress(OSError):
            file.unlink()
