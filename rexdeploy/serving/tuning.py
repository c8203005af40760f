"""Finds how Triton should put requests together to answer the most of them within a latency."""

from __future__ import annotations

import http.client
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from rexdeploy.bundle.manifest import BatchRange, Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode, sets
from rexdeploy.progress import Report, Result, silent
from rexdeploy.serving.config import DEFAULTS, Settings, image_request
from rexdeploy.serving.deploy import Deployment, backend_here, deploy
from rexdeploy.serving.front import Address, free_port
from rexdeploy.serving.processes import Binary, find_server
from rexdeploy.serving.repository import DEFAULT_REPOSITORY
from rexdeploy.serving.server import running

MIN_MS, MAX_MS = 0.1, 60_000.0
_MOST_CONNECTIONS = 64
_SECONDS = 2.0  # for each number of connections, and longer until there are
_LEAST = 200  # answers, of which the second-slowest is the 99th percentile
_MANY_CORES = 8  # from here on, more than two copies of the network are tried
_FILES = 32  # different images
_PREVIEW = (640, 480)  # pixels of a synthetic photograph, so that decoding costs what it does


@dataclass(frozen=True)
class Load:
    """What a server did for a number of connections, each of which waits for its answer."""

    connections: int
    requests: int  # that were answered within the time measured
    per_second: float
    p50_ms: float
    p99_ms: float  # the largest of all, where they are fewer than a hundred


Measure = Callable[[int], Load]
"""Loads a server from that many connections."""


@dataclass(frozen=True)
class Row:
    """One way to serve, under every number of connections that was tried."""

    settings: Settings
    loads: tuple[Load, ...]
    fault: str | None = None  # why there are no more of them

    def best(self, bound_ms: float) -> Load | None:
        """The most images a second within the bound; None if no load was."""
        within = [load for load in self.loads if load.p99_ms <= bound_ms]
        return max(within, key=lambda load: load.per_second, default=None)


@dataclass(frozen=True, repr=False)
class Sweep(Result):
    """What was measured, and which way is kept: None where none is within the bound."""

    bound_ms: float  # of the 99th percentile
    images: str  # which they were
    batch: BatchRange  # that the network's file takes
    rows: tuple[Row, ...]
    kept: Settings | None
    deployment: Deployment | None = None  # with what is kept

    def __repr__(self) -> str:
        verdict = describe(self.kept, self.batch) if self.kept else "NONE is within it"
        return f"<Sweep of {len(self.rows)} ways within {self.bound_ms:g} ms: {verdict}>"

    def _document(self) -> dict[str, Any]:
        plain: dict[str, Any] = msgspec.to_builtins(replace(self, deployment=None))
        return plain | {"deployment": self.deployment.to_dict() if self.deployment else None}


def tune_serving(
    bundle: Bundle | Path | str | None = None,
    *,
    p99: float,
    repository: Path | str = DEFAULT_REPOSITORY,
    images: Path | str | None = None,
    tritonserver: Path | str | None = None,
    ways: Sequence[Settings] = (),
    report: Report = silent,
) -> Sweep:
    """Measures the bundle on servers, and adds it to the repository with the best settings.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. The most
    images a second count whose 99th percentile is within `p99` milliseconds. `images` is a folder
    of files to send, else synthetic photographs are. `tritonserver` is the program, as of `serve`,
    and `ways` are other settings to try than `candidates`.

    The servers that are measured have repositories and ports of their own, one after the other: the
    repository is touched once, at the end, and not at all where nothing is within the bound:
    then `kept` is None. Raises UsageError for what cannot be measured, BackendUnavailable where
    there is no server, and RexdeployError where none could be measured.

    Example: `rexdeploy.tune_serving("rexnet_1.5", p99=50)`
    """
    bundle, repository = Bundle.find(bundle), Path(repository)
    server = find_server(tritonserver)
    if not MIN_MS <= p99 <= MAX_MS:
        raise UsageError(f"p99: got {p99:g}, expected {MIN_MS:g} to {MAX_MS:g} milliseconds")
    files, described = _files(
        None if images is None else Path(images), bundle.manifest.model.preprocess
    )
    chosen, why = backend_here("auto", repository, bundle.manifest.name, server)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="rexdeploy-tune-") as folder:
        scratch = Path(folder) / "models"
        first = deploy(bundle, scratch, chosen)
        tried = ways or candidates(first.batch, p99, len(os.sched_getaffinity(0)))
        for number, settings in enumerate(tried, start=1):
            what = f"{number} of {len(tried)}: {describe(settings, first.batch)}"
            report(f"{what}: starting tritonserver")
            deployment = deploy(bundle, scratch, first.backend, settings=settings)
            rows.append(_row(deployment, settings, server, files, p99, report, what))
    if not any(row.loads for row in rows):
        raise RexdeployError(f"no way of serving could be measured: {rows[0].fault}")
    kept = choose(rows, p99)
    sweep = Sweep(p99, described, first.batch, tuple(rows), kept)
    if kept is None:
        return sweep
    return replace(sweep, deployment=deploy(bundle, repository, chosen, settings=kept, why=why))


def candidates(batch: BatchRange, bound_ms: float, cores: int) -> list[Settings]:
    """The ways to serve that are tried, the usual one first.

    Each request by itself, and batches of half of the file's best size and of all of it, either at
    once or after waiting a tenth of the bound for more; each with one copy of the network, with two
    and, on a machine of many cores, with four.
    """
    half = batch.opt // 2
    sizes = [None, *([half] if half > 1 else [])] if batch.opt > 1 else []
    waits = (0, round(bound_ms * 1000 / 10))
    batched = [Settings(size, wait) for size in sizes for wait in waits]
    alone = Settings(batch=1) if batched else DEFAULTS
    copies = (1, 2, 4) if cores >= _MANY_CORES else (1, 2)
    return [
        replace(settings, instances=count) for count in copies for settings in (*batched, alone)
    ]


def choose(rows: Sequence[Row], bound_ms: float) -> Settings | None:
    """The settings of the row with the most images a second whose p99 is within the bound.

    Of equal ones the first; None if there is none.
    """
    best = [(load.per_second, row.settings) for row in rows if (load := row.best(bound_ms))]
    return max(best, key=itemgetter(0), default=(0.0, None))[1]


def climb(load: Measure, bound_ms: float) -> Iterator[Load]:
    """Loads with 1, 2, 4, ... connections until the bound is left, then once in the middle."""
    within, connections = 0, 1
    while connections <= _MOST_CONNECTIONS:
        found = load(connections)
        yield found
        if found.p99_ms > bound_ms:
            break
        within, connections = connections, 2 * connections
    else:
        return
    middle = (within + connections) // 2
    if within and middle not in (within, connections):
        yield load(middle)


def describe(settings: Settings, batch: BatchRange) -> str:
    """Settings in words."""
    size = settings.batch or batch.opt
    together = "one by one" if size == 1 else f"batches of {min(size, batch.max)}"
    wait = f" after up to {settings.delay_us / 1000:g} ms" if settings.delay_us else ""
    return f"{together}{wait}, {settings.instances} instance{'s' * (settings.instances > 1)}"


def _row(
    deployment: Deployment,
    settings: Settings,
    server: Binary,
    files: Sequence[bytes],
    bound_ms: float,
    report: Report,
    what: str,
) -> Row:
    """Starts a server for it and loads it; what fails is told in the row, and ends it."""
    address = Address(port=free_port())
    host = f"{address.host}:{address.port}"
    loads: list[Load] = []

    def load(connections: int) -> Load:
        report(f"{what}: {connections} connection{'s' * (connections > 1)}")
        return measure(host, deployment.image_name, deployment.output, files, connections)

    try:
        with running(server, deployment.repository, address) as process:
            process.wait_until_ready([deployment.name, deployment.image_name])
            for found in climb(load, bound_ms):
                loads.append(found)
    except RexdeployError as error:
        return Row(settings, tuple(loads), str(error))
    return Row(settings, tuple(loads))


def _files(folder: Path | None, spec: Preprocess) -> tuple[list[bytes], str]:
    """The bytes of image files to send, and what they are."""
    if folder is None:
        pixels = sets.synthetic_pixels(_FILES, spec, seed=5)
        width, height = _PREVIEW
        made = [BytesIO() for _ in pixels]
        for image, file in zip(pixels, made, strict=True):
            Image.fromarray(image).resize(_PREVIEW).save(file, "JPEG")
        described = f"synthetic JPEG files of {width} x {height} pixels"
        return [file.getvalue() for file in made], described
    found = list(islice(sets.walk(folder), _FILES))
    for path in found:
        decode.read(path, spec)  # raises for one that the server would refuse
    return [path.read_bytes() for path in found], f"{len(found)} files of {folder}"


_TIMEOUT_S = 60.0  # for one answer
_WARM_S = 0.5
_LONGEST = 8  # times as many seconds as asked for, while there are too few answers


def measure(host: str, model: str, output: str, files: Sequence[bytes], connections: int) -> Load:
    """Sends the files, one a request and over and over, to the ensemble `model` at `host` (:port).

    Raises RexdeployError where a request is refused or not answered.
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
            _wait(working, _SECONDS, lambda: len(answered) - before >= _LEAST)
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
