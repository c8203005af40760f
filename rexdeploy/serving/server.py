"""Starts a real Triton Inference Server over a model repository, waits for it, and ends it."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.progress import Report, several, silent
from rexdeploy.serving.deploy import backend_here, deploy, servable
from rexdeploy.serving.front import SOCKETS, Address, Front, check_ports
from rexdeploy.serving.health import Watch, ask
from rexdeploy.serving.processes import (
    Binary,
    Stop,
    TritonLog,
    Workplace,
    end,
    find_server,
    start,
    workplace,
)
from rexdeploy.serving.repository import DEFAULT_REPOSITORY, Deployed
from rexdeploy.serving.request_limits import Guard, request_bytes

POLL_SECONDS = 2  # how long a new version waits before it is loaded
DRAIN_SECONDS = 25.0  # less than the 30 that Kubernetes waits between SIGTERM and SIGKILL
_START_SECONDS = 600  # an engine for a large GPU may take minutes to load and warm up
_STOP_SECONDS = 5  # nothing is in flight by then
_LOOK_SECONDS = 0.1
# A server that has to be started again so often within that time is left to who started us.
_STARTS, _STARTS_SECONDS = 5, 600.0

Run = Callable[[Path], tuple[subprocess.Popen[str], TritonLog]]
"""Starts a server that listens at sockets in a folder."""


@dataclass(frozen=True, repr=False)
class Service:
    """A repository to serve, and where."""

    title: str  # of `model`
    model: Deployed  # of the bundle that was given, or the first one
    others: tuple[Deployed, ...]
    repository: Path
    binary: Binary
    address: Address
    guard: Guard

    @property
    def url(self) -> str:
        """Where image files are sent to, over HTTP."""
        return f"{self.address.http}/v2/models/{self.model.image_name}"

    @property
    def names(self) -> list[str]:
        """The models that it has when it is ready."""
        return [name for one in (self.model, *self.others) for name in (one.name, one.image_name)]

    def __repr__(self) -> str:
        return f"<Service {self.url}: {self.title}>"


class Server:
    """A tritonserver behind its front; it is started again when it fails."""

    def __init__(self, run: Run, place: Workplace, front: Front, stop: Stop, show: Report) -> None:
        self._run, self._place, self._front = run, place, front
        self._stop, self._show = stop, show
        self._starts: deque[float] = deque(maxlen=_STARTS)
        self._models: Sequence[str] = ()
        self._numbers = itertools.count(1)
        self._begin()

    @property
    def pid(self) -> int:
        """The process that serves."""
        return self._process.pid

    def wait_until_ready(self, models: Sequence[str]) -> bool:
        """Waits until the server and the models answer; False: it was asked to stop meanwhile.

        Raises RexdeployError, with the server's own reason, if it ends before.
        """
        self._models = models
        deadline = time.monotonic() + _START_SECONDS
        paths = ["/v2/health/ready", *(f"/v2/models/{name}/ready" for name in models)]
        while time.monotonic() < deadline:
            if self._stop.count:
                return False
            if self._has_ended():
                raise RexdeployError(f"tritonserver ended while starting: {self._log.first_words}")
            if all(ask(self._sockets / SOCKETS["http"], path, 2)[0] == 200 for path in paths):
                self._log.shows_errors = True
                self._front.serve_from(self._sockets)
                return True
            time.sleep(0.05)
        raise RexdeployError(
            f"tritonserver was not ready after {_START_SECONDS} s: "
            f"{self._log.first_error or 'it logged no error'}; see --log"
        )

    def wait(self, image_model: str) -> None:
        """Serves until `stop`, starts the server again when it fails, and ends it.

        What is in flight at the end is answered, for DRAIN_SECONDS or until a second `stop`. Raises
        RexdeployError where the server fails again and again.
        """
        while not self._stop.count:
            watch = Watch(self.pid, self._sockets / SOCKETS["http"], image_model)
            watch.start()
            try:
                fault = self._wait_for_fault(watch)
            finally:
                watch.stop()
            if fault is not None:
                self._heal(fault)
        if self._front.in_flight:
            self._show(
                f"answering what is in flight ({self._front.in_flight}), for {DRAIN_SECONDS:.0f} s "
                "at most; once more ends it now"
            )
        left = self._front.drain(
            lambda seconds: (
                seconds > DRAIN_SECONDS or self._stop.count > 1 or self._process.poll() is not None
            )
        )
        if left:
            self._show(f"{left} requests were not answered")

    def end(self) -> None:
        """Ends the server and its processes, whatever is in flight."""
        self._log.shows_errors = False  # clients that stay connected are no error at the end
        end(self._process, _STOP_SECONDS + 5)
        self._place.clear_memory()

    def _begin(self) -> None:
        self._sockets = self._place.folder / f"start-{next(self._numbers)}"
        self._sockets.mkdir()
        self._process, self._log = self._run(self._sockets)

    def _wait_for_fault(self, watch: Watch) -> str | None:
        """What is wrong with the server; None: it was asked to stop."""
        while not self._stop.count:
            if self._has_ended():
                return f"tritonserver {self._log.how_it_ended}"
            if watch.fault is not None:
                return watch.fault
            time.sleep(_LOOK_SECONDS)
        return None

    def _has_ended(self) -> bool:
        if self._process.poll() is None:
            return False
        self._front.serve_from(None)
        end(self._process, 0)  # its children hold its log open
        self._log.join(_STOP_SECONDS)
        return True

    def _heal(self, fault: str) -> None:
        """Starts the server again; raises RexdeployError if that was done too often."""
        self._front.serve_from(None)
        now = time.monotonic()
        if len(self._starts) == _STARTS and now - self._starts[0] < _STARTS_SECONDS:
            raise RexdeployError(
                f"{fault}; it was started again {_STARTS} times within the last "
                f"{_STARTS_SECONDS / 60:.0f} minutes, so this ends"
            )
        self._starts.append(now)
        self._show(f"{fault}; starting it again")
        self._log.shows_errors = False
        end(self._process, 0)
        self._place.clear_memory()
        self._begin()
        if self.wait_until_ready(self._models):
            self._show(f"tritonserver serves again, after {time.monotonic() - now:.1f} s")


@contextlib.contextmanager
def running(
    binary: Binary,
    repository: Path,
    address: Address,
    show: Report = silent,
    whole_log: bool = False,
    guard: Guard | None = None,
    stop: Stop | None = None,
) -> Iterator[Server]:
    """A server over the repository, ended when the block is left.

    `show` is given what goes wrong while it serves, or the `whole_log`, line by line. Raises
    RexdeployError where it cannot be started.
    """
    guard = guard or Guard()
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(workplace())
        options = _arguments(binary, repository, place, guard)

        def run(sockets: Path) -> tuple[subprocess.Popen[str], TritonLog]:
            listening = (
                f"--{name}-address=unix:{sockets / socket_name.partition(':')[0]}"
                for name, socket_name in SOCKETS.items()
            )
            process = start(binary, [*options, *listening], 2 * guard.request_bytes)
            return process, TritonLog(process, show, whole_log)

        front = Front(address.host, address.port, guard.request_bytes)
        try:
            front.start()
        except OSError as error:
            raise UsageError(
                f"cannot listen on {address.host}:{address.port} and the next two "
                f"({error.strerror}); choose another --port or --host"
            ) from None
        stack.callback(front.close)
        server = Server(run, place, front, stop or Stop(), show)
        stack.callback(server.end)
        stack.callback(front.close)  # first: Triton waits for connections
        yield server


def prepare(
    bundle: Bundle | Path | str | None,
    repository: Path,
    backend: str,
    tritonserver: Path | str | None,
    address: Address,
    max_request: int | None,
    apis: Sequence[str],
    require_signature: Path | str | None,
) -> Service:
    """What `serve` serves; adds the bundle to the repository, once everything else is checked."""
    server = find_server(tritonserver)
    check_ports(address)
    Guard(opened=tuple(apis))  # before anything is written
    request_bytes(max_request, [])
    models = servable(repository, server)
    if bundle is None and not models and repository.is_dir() and any(repository.iterdir()):
        raise UsageError(f"{repository} holds no model of rexdeploy's; name a bundle to add to it")
    if bundle is None and models:
        if backend != "auto" or require_signature is not None:
            option = "--backend" if backend != "auto" else "--require-signature"
            raise UsageError(f"{option} is for a bundle that is added: name one")
        served = models[0]
        title = f"{served.name}, version {served.version}, in {repository}"
    else:
        opened = find(bundle, require_signature)
        chosen, why = backend_here(backend, repository, opened.manifest.name, server)
        if chosen != "auto" and server.lacks(chosen):
            raise UsageError(
                f"--backend {chosen}: the tritonserver {server.origin} has only "
                f"{', '.join(sorted(server.backends))}; give another with --tritonserver"
            )
        result = deploy(opened, repository, chosen, why=why)
        models = servable(repository, server)
        served = next(model for model in models if model.name == result.name)
        title = (
            f"{opened.manifest.model.title}, version {result.version}, {result.backend} backend "
            f"({result.reason})"
        )
    return Service(
        title=title,
        model=served,
        others=tuple(model for model in models if model != served),
        repository=repository,
        binary=server,
        address=address,
        guard=Guard(
            request_bytes(max_request, [model.tensor_bytes for model in models]), tuple(apis)
        ),
    )


@contextlib.contextmanager
def serve(
    bundle: Bundle | Path | str | None = None,
    *,
    repository: Path | str = DEFAULT_REPOSITORY,
    backend: str = "auto",
    tritonserver: Path | str | None = None,
    host: str = Address.host,
    port: int = Address.port,
    max_request: int | None = None,
    open: str | Sequence[str] = (),  # noqa: A002 - the command's name for it
    require_signature: Path | str | None = None,
    report: Report = silent,
) -> Iterator[Service]:
    """Serves a model repository with a real Triton Inference Server while the block runs.

    `bundle` is added first, as `triton` does: one, its folder or its name in artifacts/; None: only
    to an empty repository, the latest. `backend` is the bundle's there. `tritonserver` is the
    program, else the one on PATH or nvidia-pytriton's. HTTP is at `port`, gRPC and metrics at the
    next two. `max_request` is in MiB, `open` names APIs that every client may use (CLOSED_APIS),
    and `require_signature` is the public key that must have signed the bundle. Call it in the main
    thread; a server that fails is not started again, as the command does.

    Raises UsageError, BackendUnavailable where there is no server, and RexdeployError, with the
    server's own reason, where it does not become ready.

    Example: `with rexdeploy.serve("rexnet_1.5") as service: print(service.url)`
    """
    repository, address = Path(repository), Address(host, port)
    service = prepare(
        bundle,
        repository,
        backend,
        tritonserver,
        address,
        max_request,
        several(open),
        require_signature,
    )
    with running(service.binary, repository, address, guard=service.guard) as server:
        report("starting tritonserver")
        server.wait_until_ready(service.names)
        yield service


def _arguments(binary: Binary, repository: Path, place: Workplace, guard: Guard) -> list[str]:
    """Triton's options but for its addresses; makes the folder of backends that they name."""
    options = {
        "model-repository": repository.resolve(),
        # Explicit control would let every client load models, with code of its own.
        "model-control-mode": "poll",
        "repository-poll-secs": POLL_SECONDS,
        # Of sockets in the file system, the numbers are a part of gRPC's name only.
        "http-port": 2,
        "grpc-port": SOCKETS["grpc"].partition(":")[2],
        "metrics-port": 3,
        "exit-timeout-secs": _STOP_SECONDS,
        "backend-config": f"python,shm-region-prefix-name={place.mark}",
    }
    if binary.python_backend:
        backends = place.folder / "backends"
        (backends / "python").mkdir(parents=True)
        for file in binary.python_backend:  # the backend looks for its stub beside itself
            (backends / "python" / file.name).symlink_to(file)
        options["backend-directory"] = backends
    if guard.closed:
        # Nobody is told the key.
        key = f"{','.join(guard.closed)}:rexdeploy={secrets.token_hex(16)}"
        options |= {"http-restricted-api": key, "grpc-restricted-protocol": key}
    return [f"--{name}={value}" for name, value in options.items()]
