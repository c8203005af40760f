"""Starts a real Triton Inference Server over a model repository, waits for it, and ends it."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rexdeploy import gpu
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError

POLL_SECONDS = 2  # how long a new version waits before it is loaded
_START_SECONDS = 600  # an engine for a large GPU may take minutes to load and warm up
# Triton ends when every connection is closed or after this: idle clients hold theirs open.
_GRACE_SECONDS = 5
# In what Triton 2.51 writes on every machine without a GPU.
_NO_GPU = ("CudaDriverHelper", "unable to create stream", "Failed to initialize NVML")
# E1123 07:56:26.000000 123 file.cc:45] "what\n\nAt:\n  where"
_LOGGED = re.compile(r"[IWEF]\d{4} ")
_LOGGED_ERROR = re.compile(r'E\d{4} [^\]]*\] "?(.*?)(\\n.*)?"?')
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Binary:
    """A tritonserver, and what it needs to start."""

    path: Path
    origin: str  # how it was found
    libraries: Path | None = None  # a folder for the loader
    python_backend: tuple[Path, ...] = ()  # its files, where they lie apart; else none
    backends: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Address:
    """Where the server listens; gRPC and metrics are at the two ports after HTTP's."""

    host: str = "127.0.0.1"
    port: int = 8000

    @property
    def http(self) -> str:
        """The base of HTTP's URLs."""
        return f"http://{self._reached}:{self.port}"

    @property
    def grpc(self) -> str:
        """What a gRPC client takes."""
        return f"{self._reached}:{self.port + 1}"

    @property
    def metrics(self) -> str:
        """The URL of the Prometheus metrics."""
        return f"http://{self._reached}:{self.port + 2}/metrics"

    @property
    def _reached(self) -> str:
        """The host by which a client on this machine reaches the server."""
        return "127.0.0.1" if self.host == "0.0.0.0" else self.host


def find_server(wanted: Path | None = None) -> Binary:
    """The tritonserver at `wanted`, the one on PATH, or nvidia-pytriton's.

    Raises UsageError if there is none at `wanted`, BackendUnavailable where there is none at all.
    """
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
    if gpu.detect() is None:
        return "python", "no NVIDIA GPU on this machine"
    if not binary.backends >= {"tensorrt", "onnxruntime"}:
        return "python", f"the tritonserver {binary.origin} lacks TensorRT's or ONNX Runtime's"
    return "auto", ""


def check_ports(address: Address) -> None:
    """Raises UsageError unless all three ports are free."""
    if not 1 <= address.port <= 65533:
        raise UsageError(f"port: got {address.port}, expected 1 to 65533, for it and the next two")
    if ":" in address.host:  # Triton's HTTP and gRPC want it spelt differently
        raise UsageError(f"host: got '{address.host}', expected an IPv4 address or a name")
    for port, what in enumerate(("HTTP", "gRPC", "metrics"), address.port):
        try:
            family, kind, protocol, _, where = socket.getaddrinfo(
                address.host, port, type=socket.SOCK_STREAM
            )[0]
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
                probe.bind(where)
        except (OSError, UnicodeError) as error:  # a name with an empty or a long part
            reason = getattr(error, "strerror", None) or error
            raise UsageError(
                f"cannot listen on {address.host}:{port} for {what} ({reason}); "
                "choose another --port (it and the next two are used) or --host"
            ) from None


class Server:
    """A running tritonserver."""

    def __init__(self, process: subprocess.Popen[str], address: Address, log: _Log) -> None:
        self.address = address
        self._process = process
        self._log = log
        self._stopping = False

    @property
    def pid(self) -> int:
        """The process that serves."""
        return self._process.pid

    def wait_until_ready(self, models: Sequence[str]) -> bool:
        """Waits until the server and the models answer; False: it was asked to stop meanwhile.

        Raises RexdeployError, with the server's own reason, if it ends before.
        """
        deadline = time.monotonic() + _START_SECONDS
        paths = ["/v2/health/ready", *(f"/v2/models/{name}/ready" for name in models)]
        while time.monotonic() < deadline:
            if self._stopping:
                return False
            if self._process.poll() is not None:
                self._log.join()
                said = self._log.first_error or self._log.outside  # the loader's: no such library
                reason = said or f"exit code {self._process.returncode}"
                raise RexdeployError(f"tritonserver ended while starting: {reason}")
            if all(self._answers(path) for path in paths):
                self._log.shows_errors = True
                return True
            time.sleep(0.05)
        raise RexdeployError(
            f"tritonserver was not ready after {_START_SECONDS} s: "
            f"{self._log.first_error or 'it logged no error'}; see --log"
        )

    def wait(self) -> None:
        """Returns when the server has ended after `stop`; raises RexdeployError otherwise."""
        code = self._process.wait()
        if not self._stopping:
            self._log.join()
            raise RexdeployError(
                f"tritonserver ended with code {code}; "
                f"its last error: {self._log.last_error or 'none'}"
            )

    def stop(self) -> None:
        """Asks the server to answer what is in flight and to end; it need not run any more."""
        self._stopping = True
        self._log.shows_errors = False  # clients that stay connected are no error at the end
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _answers(self, path: str) -> bool:
        connection = http.client.HTTPConnection(
            self.address.http.removeprefix("http://"), timeout=2
        )
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@contextlib.contextmanager
def running(
    binary: Binary,
    repository: Path,
    address: Address,
    show: Callable[[str], None] | None = None,
    whole_log: bool = False,
) -> Iterator[Server]:
    """A server over the repository, ended when the block is left.

    `show` is given what goes wrong while it serves, or the `whole_log`, line by line. Raises
    RexdeployError where it cannot be started.
    """
    with tempfile.TemporaryDirectory(prefix="rexdeploy-triton-") as folder:
        command = [str(binary.path), *_arguments(repository, address)]
        if binary.python_backend:
            backend = Path(folder) / "backends" / "python"
            backend.mkdir(parents=True)
            for file in binary.python_backend:  # the backend looks for its stub beside itself
                (backend / file.name).symlink_to(file)
            command.append(f"--backend-directory={backend.parent}")
        try:
            process = subprocess.Popen(
                command,
                env=_environment(binary),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # a terminal's Ctrl-C is ours to pass on
                preexec_fn=_die_with_parent,
            )
        except OSError as error:
            raise RexdeployError(
                f"{binary.path} ({binary.origin}) cannot be started ({error.strerror})"
            ) from None
        server = Server(process, address, _Log(process, show, whole_log))
        try:
            yield server
        finally:
            server.stop()
            try:
                process.wait(_GRACE_SECONDS + 5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def stopped_by_signals(server: Server) -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM end the server and not this process."""

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        server.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Log(threading.Thread):
    """Reads a server's log as it is written; keeps its first and last error.

    `outside` is the first line that is not in the log's form, but for known ones.
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

    def run(self) -> None:
        for line in self._process.stderr or ():
            line = line.rstrip()
            known = any(part in line for part in _NO_GPU)
            error = None if known else _LOGGED_ERROR.fullmatch(line)
            if error is not None:
                self.last_error = error[1]
                self.first_error = self.first_error or self.last_error
            elif self.outside is None and line and not known and not _LOGGED.match(line):
                self.outside = line
            if self._show is not None and self._whole:
                self._show(line)
            elif self._show is not None and error is not None and self.shows_errors:
                self._show(f"tritonserver: {self.last_error}")


def _arguments(repository: Path, address: Address) -> list[str]:
    options = {
        "model-repository": repository,
        # Explicit control would let every client load models, with code of its own.
        "model-control-mode": "poll",
        "repository-poll-secs": POLL_SECONDS,
        "http-address": address.host,
        "grpc-address": address.host,
        "metrics-address": address.host,
        "http-port": address.port,
        "grpc-port": address.port + 1,
        "metrics-port": address.port + 2,
        "exit-timeout-secs": _GRACE_SECONDS,
    }
    return [f"--{name}={value}" for name, value in options.items()]


def _environment(binary: Binary) -> dict[str, str]:
    """Ours, with the libraries that the server needs and this Python first on the path.

    The Python backend's process looks for its packages by the python3 on PATH.
    """
    environment = dict(os.environ)
    environment["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    )
    # The models run the code of this very package, from wherever it was imported.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if binary.libraries is not None:
        folders = [os.environ.get("LD_LIBRARY_PATH", ""), str(binary.libraries)]
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return environment


def _die_with_parent() -> None:
    """Runs in the server's process: a killed `rexdeploy serve` leaves no server behind."""
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
