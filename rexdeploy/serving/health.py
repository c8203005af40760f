"""Watches a Triton server's processes: says when one is gone, stopped, or answers no more.

Triton 2.51 calls a model ready whose Python process has died, and answers 500 to each request.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rexdeploy.serving.config import image_request
from rexdeploy.serving.processes import GONE, stat_of

_LOOK_S = 1.0
_PROBE_S = 10.0  # between two looks at whether images are answered
_ANSWER_S = 30.0  # a probe that is not answered by then, while nobody else is either, is a fault
# A white pixel as PNG: the smallest image.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49"
    "44415478da63f80f00010101001cb08c990000000049454e44ae426082"
)
_STOPPED = ("T", "t")  # as `ps` shows it
_PROGRAM = b"triton_python_backend_stub"


def ask(
    path: Path,
    target: str,
    timeout: float,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, bytes]:
    """A GET, or a POST of the body, at a socket in the file system: the answer's status and body.

    0 where there is no answer.
    """
    connection = http.client.HTTPConnection("localhost")
    try:
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(timeout)
        connection.sock.connect(str(path))
        connection.request("POST" if body else "GET", target, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


@dataclass(frozen=True)
class Stub:
    """A process of Triton's Python backend, which runs one instance of one version of a model."""

    pid: int
    model: str
    version: str
    instance: str


class Watch(threading.Thread):
    """Looks after a server's processes until `stop`; `fault` is what is wrong, or None."""

    def __init__(self, pid: int, socket_path: Path, image_model: str) -> None:
        super().__init__(daemon=True)
        self.fault: str | None = None
        self._pid, self._socket, self._model = pid, socket_path, image_model
        self._stopped = threading.Event()
        self._known: dict[tuple[str, str, str], Stub] = {}
        self._suspects: dict[tuple[str, str, str], str] = {}  # wrong when last looked at
        self._answered = -1

    def run(self) -> None:
        looked = time.monotonic()
        while self.fault is None:
            self.fault = self._look()
            if self.fault is None and time.monotonic() - looked > _PROBE_S:
                self.fault = self._probe()
                looked = time.monotonic()
            if self._stopped.wait(_LOOK_S):
                return

    def stop(self) -> None:
        """Ends it."""
        self._stopped.set()

    def _look(self) -> str | None:
        """A process that was wrong in this look and the last one, while its model is ready."""
        if self._server_stands() and not self._stopped.wait(_LOOK_S) and self._server_stands():
            return "tritonserver is stopped"
        states = stubs(self._pid)
        well = {_key(stub) for stub, state in states.items() if state not in (*_STOPPED, *GONE)}
        self._known.update({_key(stub): stub for stub in states})
        wrong: dict[tuple[str, str, str], str] = {}
        for key, stub in list(self._known.items()):
            if key in well:
                continue
            if not self._is_ready(stub):  # unloaded, as an older version is
                del self._known[key]
                continue
            state = states.get(stub, "X")
            what = "is stopped" if state in _STOPPED else f"has ended{_by_what(stub.pid)}"
            wrong[key] = f"the process of {stub.model}, version {stub.version} ({stub.pid}), {what}"
        again = [text for key, text in wrong.items() if key in self._suspects]
        self._suspects = wrong
        return again[0] if again else None

    def _server_stands(self) -> bool:
        return stat_of(self._pid)[0] in _STOPPED

    def _is_ready(self, stub: Stub) -> bool:
        target = f"/v2/models/{stub.model}/versions/{stub.version}/ready"
        return ask(self._socket, target, 5)[0] in (200, 0)  # 0: it does not even say so

    def _probe(self) -> str | None:
        """Sends an image, unless others' were answered since the last time."""
        before, answered = self._answered, self._count()
        self._answered = answered
        if answered != before and before >= 0:
            return None
        body, headers = image_request(_PIXEL)
        failure = "did not answer"
        target = f"/v2/models/{self._model}/infer"
        for _ in range(2):
            status, answer = ask(self._socket, target, _ANSWER_S, body, headers)
            if status == 0:
                break
            if status == 200:
                self._answered = self._count()
                return None
            failure = f"answers {status}: {answer[:200].decode(errors='replace')}"
            if self._stopped.wait(_LOOK_S):
                return None
        if self._count() not in (answered, -1):  # it is slow, and answers others
            return None
        return f"{self._model} {failure} to an image of one pixel"

    def _count(self) -> int:
        """How many images the server has answered; -1: it does not say."""
        _, body = ask(self._socket, f"/v2/models/{self._model}/stats", 5)
        with contextlib.suppress(ValueError, LookupError):
            statistics = json.loads(body)["model_stats"]
            return sum(int(entry["inference_stats"]["success"]["count"]) for entry in statistics)
        return -1


def stubs(server: int) -> dict[Stub, str]:
    """The Python backend's processes of a server, and the state of each, as in `ps`."""
    found = {}
    for path in Path(f"/proc/{server}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for pid in path.read_text().split():
                stub = _stub(int(pid))
                if stub is not None:
                    found[stub] = stat_of(int(pid))[0]
    return found


def _stub(pid: int) -> Stub | None:
    """What a child of the server runs; None: it is none of these, or it has ended."""
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # PROGRAM MODEL.PY MEMORY SIZE GROWTH SERVER BACKEND HANDLE INSTANCE ...
        if arguments[0].endswith(_PROGRAM) and len(arguments) > 8:
            path = Path(os.fsdecode(arguments[1]))
            model, instance = path.parent.parent.name, os.fsdecode(arguments[8])
            if instance != model:  # else it looks at the model's configuration, and ends
                return Stub(pid, model, path.parent.name, instance)
    return None


def _key(stub: Stub) -> tuple[str, str, str]:
    return stub.model, stub.version, stub.instance


def _by_what(pid: int) -> str:
    """How a process has ended, where the kernel still knows it."""
    with contextlib.suppress(IndexError, ValueError):
        status = int(stat_of(pid)[49])  # field 52, as waitpid gives it
        if number := status & 0x7F:
            return f" ({signal.Signals(number).name})"
        return f" (exit code {status >> 8})"
    return ""
