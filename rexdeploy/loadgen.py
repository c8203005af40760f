"""Loads a Triton server with image files from several connections at once, and takes the times.

The standard library's client is enough: a connection waits for its answer nearly all of the time.
Triton's own perf_analyzer would do it, but its wheel needs a C library that is newer (glibc 2.38)
than many systems on which a server runs.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from rexdeploy.errors import RexdeployError

_TIMEOUT_S = 60.0  # for one answer
_WARM_S = 0.5
_LONGEST = 8  # times as many seconds as asked for, while there are too few answers


@dataclass(frozen=True)
class Load:
    """What a server did for a number of connections, each of which waits for its answer."""

    connections: int
    requests: int  # that were answered within the time measured
    per_second: float
    p50_ms: float
    p99_ms: float  # the largest of all, where they are fewer than a hundred


def measure(
    host: str,
    model: str,
    output: str,
    files: Sequence[bytes],
    connections: int,
    seconds: float,
    least: int,
) -> Load:
    """Sends the files, one a request and over and over, to the ensemble `model` at `host` (:port).

    For so many `seconds`, after a warm-up, and longer (eight times at most) until `least` requests
    are answered. Raises RexdeployError where a request is refused or not answered.
    """
    bodies = [image_request(file, output) for file in files]
    answered: list[tuple[float, float]] = []  # when, and the milliseconds that it took
    stop = threading.Event()

    def work(place: int) -> None:
        connection = http.client.HTTPConnection(host, timeout=_TIMEOUT_S)
        try:
            while not stop.is_set():
                body, headers = bodies[place % len(bodies)]
                place += connections
                before = time.perf_counter()
                connection.request("POST", f"/v2/models/{model}/infer", body, headers)
                answer = connection.getresponse()
                text = answer.read()
                after = time.perf_counter()
                if answer.status != 200:
                    said = text[:200].decode(errors="replace")
                    raise RexdeployError(f"the server answered {answer.status}: {said}")
                answered.append((after, (after - before) * 1000))
        except (OSError, http.client.HTTPException) as error:
            raise RexdeployError(f"the server did not answer ({error or type(error)})") from None
        finally:
            connection.close()

    with ThreadPoolExecutor(connections) as threads:
        working = [threads.submit(work, place) for place in range(connections)]
        try:
            _wait(working, _WARM_S, lambda: len(answered) >= 2 * connections)
            begun, before = time.perf_counter(), len(answered)
            _wait(working, seconds, lambda: len(answered) - before >= least)
            ended = time.perf_counter()
        finally:
            stop.set()
        for done in working:
            done.result()  # raises what was refused
    samples = [ms for when, ms in answered if begun <= when <= ended]
    if not samples:
        raise RexdeployError(f"the server answered nothing in {ended - begun:.0f} s")
    p50, p99 = np.percentile(samples, [50, 99], method="higher")
    return Load(connections, len(samples), len(samples) / (ended - begun), float(p50), float(p99))


def _wait(working: Sequence[Future[None]], seconds: float, enough: Callable[[], bool]) -> None:
    """Waits so long, and up to eight times so long until there is enough; or until one fails."""
    begun = time.perf_counter()
    while not any(work.done() for work in working):
        passed = time.perf_counter() - begun
        if passed >= seconds and (enough() or passed >= _LONGEST * seconds):
            return
        time.sleep(0.01)


def image_request(file: bytes, output: str | None = None) -> tuple[bytes, dict[str, str]]:
    """The body and headers of a request with one image file, for an ensemble's `output` or all."""
    size = len(file)
    wanted: dict[str, object] = {
        "inputs": [
            {
                "name": "image",
                "datatype": "UINT8",
                "shape": [1, size],
                "parameters": {"binary_data_size": size},
            }
        ]
    }
    if output is not None:
        wanted["outputs"] = [{"name": output, "parameters": {"binary_data": True}}]
    header = json.dumps(wanted).encode()
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(header)),
    }
    return header + file, headers
