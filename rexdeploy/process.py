"""Starts a tritonserver as a process of ours, reads its log, and ends it with all its children."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
