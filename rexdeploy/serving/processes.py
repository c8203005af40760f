"""The server as processes: which program, how it is started and ended, and what a dead one left."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.util
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.files import open_locked
from rexdeploy.progress import Report

# In what Triton 2.51 writes where it has no GPU, or listens at a socket in the file system.
_USUAL = (
    "CudaDriverHelper",
    "unable to create stream",
    "Failed to initialize NVML",
    "NODELAY NOT SUPPORTED",
)
# E1123 07:56:26.000000 123 file.cc:45] "what\n\nAt:\n  where"
_LOGGED = re.compile(r"[IWEF]\d{4} ")
_LOGGED_ERROR = re.compile(r'E\d{4} [^\]]*\] "?(.*?)(\\n.*)?"?')
_CRASHED = re.compile(r"Signal \(\d+\) received\.")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LEAST_STACK = 2**26
_GONE_S = 5.0  # how long killed processes may take to go
GONE = ("Z", "X")  # states as `ps` shows them


def start(binary: Binary, options: Sequence[str], stack: int) -> subprocess.Popen[str]:
    """Starts a server with threads of at least `stack` bytes beside what they need.

    To be called by the main thread: the process ends when the thread that started it does. Raises
    RexdeployError where it cannot be started.
    """
    libc = ctypes.CDLL(None)
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = max(_LEAST_STACK, stack + 2**23)
    limit = wanted if most == resource.RLIM_INFINITY else min(wanted, most)

    def prepare() -> None:
        """Runs in the new process."""
        # What copies a request to a thread's stack (Triton 2.51 does with forms) has room for it.
        resource.setrlimit(resource.RLIMIT_STACK, (limit, most))
        # A killed `rexdeploy serve` leaves no server behind.
        with contextlib.suppress(AttributeError):  # Linux only
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    try:
        return subprocess.Popen(
            [str(binary.path), *options],
            env=_environment(binary),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
            preexec_fn=prepare,
        )
    except OSError as error:
        raise RexdeployError(
            f"{binary.path} ({binary.origin}) cannot be started ({error.strerror})"
        ) from None


def _environment(binary: Binary) -> dict[str, str]:
    """Ours, with the libraries that the server needs and this Python first on the path.

    The Python backend's process looks for its packages by the python3 on PATH, and the models run
    the code of this very package, from wherever it was imported.
    """
    ours = os.environ
    folder = Path(__file__).parents[2]  # that holds rexdeploy
    environment = {
        # Else glibc keeps the memory of the largest requests, once for each thread.
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": str(2**20),
        "MALLOC_TRIM_THRESHOLD_": str(2**22),
        **ours,
        "PATH": _paths(Path(sys.executable).parent, ours.get("PATH", os.defpath)),
        "PYTHONPATH": _paths(folder, ours.get("PYTHONPATH")),
    }
    if binary.libraries is not None:
        libraries = _paths(ours.get("LD_LIBRARY_PATH"), binary.libraries)
        environment["LD_LIBRARY_PATH"] = libraries
    return environment


def _paths(*parts: Path | str | None) -> str:
    return os.pathsep.join(str(part) for part in parts if part)


def end(process: subprocess.Popen[str], patience: float) -> None:
    """Ends the process, by force after `patience` seconds, and what is left of its children."""
    if process.poll() is None and patience:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    process.kill()
    # It leads a group of its own, in which its children outlive it.
    _kill_all(lambda: [pid for pid in _pids() if _runs_in(process.pid, pid)])
    process.wait()


def _kill_all(find: Callable[[], Sequence[int]]) -> None:
    """Kills what is found until nothing is found any more, for _GONE_S at the most."""
    deadline = time.monotonic() + _GONE_S
    while (pids := find()) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def _pids() -> Iterator[int]:
    """The processes of this machine."""
    return (int(path.name) for path in Path("/proc").glob("[1-9]*"))


def stat_of(pid: int) -> list[str]:
    """What proc(5) calls a process's stat, from its third field, the state, on; X: it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return ["X", "0", "0"]


def _runs_in(group: int, pid: int) -> bool:
    """Whether a process is of the group and runs; one that nobody has waited for does not."""
    state, _, its_group = stat_of(pid)[:3]
    return its_group == str(group) and state not in GONE


@dataclass
class Stop:
    """How often the end was asked for: once, to answer what is in flight; twice, to end at once."""

    count: int = 0


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within it, Ctrl-C and SIGTERM ask for the end and do not end this process."""
    stop = Stop()

    def asked(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.count += 1

    before = {number: signal.signal(number, asked) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TritonLog(threading.Thread):
    """Reads a server's log as it is written; keeps its first and last error.

    `outside` is the first line that is not in the log's form, but for usual ones.
    """

    def __init__(self, process: subprocess.Popen[str], show: Report, whole: bool) -> None:
        super().__init__(daemon=True)
        self.first_error: str | None = None
        self.last_error: str | None = None
        self.outside: str | None = None
        self.shows_errors = False
        self._process, self._show, self._whole = process, show, whole
        self.start()

    @property
    def first_words(self) -> str:
        """Why a server has not started; the loader's words, such as "no such library", count."""
        return self.first_error or self.outside or self._code

    @property
    def how_it_ended(self) -> str:
        """How a server that has run has ended."""
        return f"ended ({self._code}); its last error: {self.last_error or 'none'}"

    @property
    def _code(self) -> str:
        code = self._process.returncode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name}"
        return f"exit code {code}"

    def run(self) -> None:
        for line in self._process.stderr or ():
            line = line.rstrip()
            usual = any(part in line for part in _USUAL)
            error = None if usual else _LOGGED_ERROR.fullmatch(line)
            if error is not None:
                self.last_error = error[1]
                self.first_error = self.first_error or self.last_error
            elif _CRASHED.fullmatch(line):
                self.last_error = line
            elif self.outside is None and line and not usual and not _LOGGED.match(line):
                self.outside = line
            if self._whole:
                self._show(line)
            elif error is not None and self.shows_errors:
                self._show(f"tritonserver: {self.last_error}")


@dataclass(frozen=True)
class Binary:
    """A tritonserver, and what it needs to start."""

    path: Path
    origin: str  # how it was found
    libraries: Path | None = None  # a folder for the loader
    python_backend: tuple[Path, ...] = ()  # its files, where they lie apart; else none
    backends: frozenset[str] = frozenset()  # none: nobody knows

    def lacks(self, backend: str) -> bool:
        """Whether it is known not to have one of Triton's backends."""
        return bool(self.backends) and backend not in self.backends


def find_server(wanted: Path | str | None = None) -> Binary:
    """The tritonserver at `wanted`, the one on PATH, or nvidia-pytriton's.

    Raises UsageError if there is none at `wanted`, BackendUnavailable where there is none at all.
    """
    path, origin = wanted, "--tritonserver"
    if wanted is None:
        path, origin = shutil.which("tritonserver"), "on PATH"
    elif not (Path(wanted).is_file() and os.access(wanted, os.X_OK)):
        raise UsageError(f"--tritonserver: {wanted} is not a program; expected tritonserver's path")
    if path is None:
        return _packaged_server()
    path = Path(path).resolve()
    backends = path.parent.parent / "backends"  # /opt/tritonserver/{bin,backends}
    names = {folder.name for folder in backends.iterdir()} if backends.is_dir() else set()
    return Binary(path, origin, backends=frozenset(names))


def _packaged_server() -> Binary:
    """The server in the nvidia-pytriton wheel, whose own Python API is not imported."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise BackendUnavailable(
            "no tritonserver on PATH, and nvidia-pytriton, which carries one, is not installed: "
            "pip install 'rexdeploy[serve]', or give --tritonserver FILE"
        )
    package = Path(spec.origin).parent
    root = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stubs = root / "python_backend_stubs"
    stub = stubs / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = sorted(folder.name for folder in stubs.glob("*"))
        raise BackendUnavailable(
            f"nvidia-pytriton's server runs models in Python {', '.join(known)}, and this is "
            f"{version}; make an environment with one of them"
        )
    backend = root / "backends" / "python"
    return Binary(
        root / "bin" / "tritonserver",
        "in nvidia-pytriton",
        libraries=package.parent / "nvidia_pytriton.libs",
        python_backend=(
            backend / "libtriton_python.so",
            backend / "triton_python_backend_utils.py",
            stub,
        ),
        backends=frozenset({"python"}),
    )


SHARED_MEMORY = Path("/dev/shm")
_NAME = "rexdeploy-serve-"
_LOCK = "lock"
_SETTLED_S = 60  # a folder without a lock that is older than this was left by a killed command
# The longest name of a socket is 107 bytes: sockaddr_un, linux/un.h.
_LONGEST_FOLDER = 80


@dataclass(frozen=True)
class Workplace:
    """A folder that one `serve` has for itself while it runs."""

    folder: Path

    @property
    def mark(self) -> str:
        """What begins the names of its shared memory, and is in its processes' arguments."""
        return self.folder.name.replace("-", "_") + "_"

    def clear_memory(self) -> None:
        """Removes its shared memory; the processes that use it must be gone."""
        for file in SHARED_MEMORY.glob(f"{self.mark}*"):
            with contextlib.suppress(OSError):
                file.unlink()

    def clear(self) -> None:
        """Removes all that it has: processes, shared memory, and the folder itself."""
        _kill_all(lambda: [pid for pid in _pids() if self._owns(pid)])
        self.clear_memory()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _owns(self, pid: int) -> bool:
        """Whether a process is a server's with this folder, whose name, in arguments, is unique."""
        with contextlib.suppress(OSError):
            program, *arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            names = os.fsencode(self.folder.name) + b"/", os.fsencode(self.mark)
            ours = program.endswith((b"tritonserver", b"triton_python_backend_stub"))
            return ours and any(name in argument for name in names for argument in arguments)
        return False


@contextlib.contextmanager
def workplace() -> Iterator[Workplace]:
    """A new one, cleared when the block is left.

    Clears first what killed commands of this user have left. Raises RexdeployError where no folder
    can be made.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        with contextlib.suppress(OSError):  # somebody else's, or just removed by another start
            if _is_dead(left):
                Workplace(left).clear()
    try:
        place = Workplace(Path(tempfile.mkdtemp(prefix=_NAME)))
    except OSError as error:
        raise RexdeployError(
            f"cannot make a folder in {tempfile.gettempdir()} ({error.strerror}); free some space, "
            "or set TMPDIR to another folder"
        ) from None
    try:
        if len(os.fsencode(place.folder)) > _LONGEST_FOLDER:
            raise RexdeployError(
                f"{place.folder}: too long a name for the server's sockets, expected at most "
                f"{_LONGEST_FOLDER} bytes; set TMPDIR to another folder"
            )
        lock = _lock(place.folder)
        try:
            yield place
        finally:
            os.close(lock)
    finally:
        place.clear()


def _is_dead(folder: Path) -> bool:
    """Whether the command of this folder runs no more: then nobody holds its lock."""
    status = folder.lstat()
    if status.st_uid != os.getuid() or not stat.S_ISDIR(status.st_mode):
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
        descriptor = open_locked(new)
        new.rename(folder / _LOCK)  # never seen there without its lock
    except OSError as error:
        raise RexdeployError(f"cannot write in {folder} ({error.strerror})") from None
    return descriptor
