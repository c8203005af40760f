"""Finds how Triton should put requests together to answer the most of them within a latency."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path

from PIL import Image

from rexdeploy.bundle.manifest import BatchRange, Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode, sets
from rexdeploy.loadgen import Load, measure
from rexdeploy.progress import Report, silent
from rexdeploy.serve import Address, Binary, free_port, running
from rexdeploy.triton import Deployment, backend_here, deploy
from rexdeploy.triton_config import DEFAULTS, Settings

MIN_MS, MAX_MS = 0.1, 60_000.0
_MOST_CONNECTIONS = 64
_SECONDS = 2.0  # for each number of connections, and longer until there are
_LEAST = 200  # answers, of which the second-slowest is the 99th percentile
_MANY_CORES = 8  # from here on, more than two copies of the network are tried
_FILES = 32  # different images
_PREVIEW = (640, 480)  # pixels of a synthetic photograph, so that decoding costs what it does

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


@dataclass(frozen=True)
class Sweep:
    """What was measured, and which way is kept: None where none is within the bound."""

    bound_ms: float  # of the 99th percentile
    images: str  # which they were
    batch: BatchRange  # that the network's file takes
    rows: tuple[Row, ...]
    kept: Settings | None
    deployment: Deployment | None = None  # with what is kept


@dataclass(frozen=True)
class SweepOptions:
    """The bound, and what is sent."""

    p99_ms: float
    images: Path | None = None  # None: seeded synthetic photographs
    candidates: Sequence[Settings] = ()  # none: those of `candidates`


def tune_serving(
    bundle: Bundle,
    repository: Path,
    server: Binary,
    options: SweepOptions,
    report: Report = silent,
) -> Sweep:
    """Measures the bundle on the server, and adds it to the repository with the best settings.

    The servers that are measured have repositories and ports of their own, one after the other: the
    repository is touched once, at the end, and not at all where nothing is within the bound. Raises
    UsageError for what cannot be measured, RexdeployError where no server could be.
    """
    if not MIN_MS <= options.p99_ms <= MAX_MS:
        raise UsageError(
            f"p99: got {options.p99_ms:g}, expected {MIN_MS:g} to {MAX_MS:g} milliseconds"
        )
    files, described = _files(options.images, bundle.manifest.model.preprocess)
    chosen, why = backend_here("auto", repository, bundle.manifest.name, server)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="rexdeploy-tune-") as folder:
        scratch = Path(folder) / "models"
        first = deploy(bundle, scratch, chosen)
        tried = options.candidates or candidates(first.batch, options.p99_ms, _cores())
        for number, settings in enumerate(tried, start=1):
            what = f"{number} of {len(tried)}: {describe(settings, first.batch)}"
            report(f"{what}: starting tritonserver")
            deployment = deploy(bundle, scratch, first.backend, settings=settings)
            rows.append(_row(deployment, settings, server, files, options.p99_ms, report, what))
    if not any(row.loads for row in rows):
        raise RexdeployError(f"no way of serving could be measured: {rows[0].fault}")
    kept = choose(rows, options.p99_ms)
    sweep = Sweep(options.p99_ms, described, first.batch, tuple(rows), kept)
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
    best = [(row, load) for row in rows if (load := row.best(bound_ms)) is not None]
    if not best:
        return None
    return max(best, key=lambda pair: pair[1].per_second)[0].settings


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
    host = address.http.removeprefix("http://")
    loads: list[Load] = []

    def load(connections: int) -> Load:
        report(f"{what}: {connections} connection{'s' * (connections > 1)}")
        model, output = deployment.image_name, deployment.output
        return measure(host, model, output, files, connections, _SECONDS, _LEAST)

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
        made = [_jpeg(Image.fromarray(image).resize(_PREVIEW)) for image in pixels]
        return made, f"synthetic JPEG files of {width} x {height} pixels"
    found = list(islice(sets.walk(folder), _FILES))
    for path in found:
        decode.read(path, spec)  # raises for one that the server would refuse
    return [path.read_bytes() for path in found], f"{len(found)} files of {folder}"


def _jpeg(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


def _cores() -> int:
    return len(os.sched_getaffinity(0))
