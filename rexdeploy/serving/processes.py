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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rexdeploy import machine
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError

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


def start(
    command: Sequence[str], environment: Mapping[str, str], stack: int
) -> subprocess.Popen[str]:
    """Starts it with threads of at least `stack` bytes beside what they need; raises OSError.

    To be called by the main thread: the process ends when the thread that started it does.
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

    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
        preexec_fn=prepare,
    )


def end(process: subprocess.Popen[str], patience: float) -> None:
    """Ends the process, by force after `patience` seconds, and what is left of its children."""
    if process.poll() is None and patience:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    # It leads a group of its own, in which its children outlive it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + _GONE_S
    while _runs(process.pid) and time.monotonic() < deadline:
        time.sleep(0.01)


def _runs(group: int) -> bool:
    """Whether a process of the group still runs; one that nobody has waited for does not."""
    for path in Path("/proc").glob("[1-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
            if its_group == str(group) and state not in ("Z", "X"):
                return True
    return False


class Stop:
    """How often the end was asked for: once, to answer what is in flight; twice, to end at once."""

    def __init__(self) -> None:
        self.count = 0

    def ask(self) -> None:
        """Asks for it."""
        self.count += 1


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Within it, Ctrl-C and SIGTERM ask for the end and do not end this process."""
    stop = Stop()

    def asked(number: int, frame: FrameType | None) -> None:
        del number, frame
        stop.ask()

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

    def __init__(
        self, process: subprocess.Popen[str], show: Callable[[str], None] | None, whole: bool
    ) -> None:
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
            if self._show is not None and self._whole:
                self._show(line)
            elif self._show is not None and error is not None and self.shows_errors:
                self._show(f"tritonserver: {self.last_error}")


@dataclass(frozen=True)
class Binary:
    """A tritonserver, and what it needs to start."""

    path: Path
    origin: str  # how it was found
    libraries: Path | None = None  # a folder for the loader
    python_backend: tuple[Path, ...] = ()  # its files, where they lie apart; else none
    backends: frozenset[str] = frozenset()


def find_server(wanted: Path | str | None = None) -> Binary:
    """The tritonserver at `wanted`, the one on PATH, or nvidia-pytriton's.

    Raises UsageError if there is none at `wanted`, BackendUnavailable where there is none at all.
    """
    wanted = Path(wanted) if wanted is not None else None
    if wanted is not None and not (wanted.is_file() and os.access(wanted, os.X_OK)):
        raise UsageError(f"--tritonserver: {wanted} is not a program; expected tritonserver's path")
    on_path = shutil.which("tritonserver")
    if wanted is not None or on_path is not None:
        path = Path(wanted or on_path or "").resolve()
        backends = path.parent.parent / "backends"  # /opt/tritonserver/{bin,backends}
        names = {folder.name for folder in backends.iterdir()} if backends.is_dir() else set()
        origin = "--tritonserver" if wanted else "on PATH"
        return Binary(path, origin, backends=frozenset(names))
    return _packaged_server()


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


def choose_backend(binary: Binary, wanted: str) -> tuple[str, str]:
    """The backend to deploy a bundle for, on this server and machine, and why.

    Raises UsageError where the server lacks the one that is wanted.
    """
    if wanted != "auto":
        if binary.backends and wanted not in binary.backends:
            raise UsageError(
                f"--backend {wanted}: the tritonserver {binary.origin} has only "
                f"{', '.join(sorted(binary.backends))}; give another with --tritonserver"
            )
        return wanted, "asked for"
    if machine.detect() is None:
        return "python", "no NVIDIA GPU on this machine"
    if not binary.backends >= {"tensorrt", "onnxruntime"}:
        return "python", f"the tritonserver {binary.origin} lacks TensorRT's or ONNX Runtime's"
    return "auto", ""


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
