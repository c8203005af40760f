"""Latency of bundles on the backends of this machine: interleaved rounds, raw samples kept."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np

from rexdeploy import gpu, images
from rexdeploy.backends import (
    ENGINE_BACKENDS,
    ONNX_BACKENDS,
    Backend,
    engine_backend,
    open_backend,
)
from rexdeploy.bundle import Bundle
from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.manifest import Artifact
from rexdeploy.progress import Report, silent

BACKENDS = ("pytorch", *ONNX_BACKENDS, *ENGINE_BACKENDS)
WARMUP_ROUNDS = 3
MAX_ROUNDS = 100_000


@dataclass(frozen=True)
class BenchOptions:
    """What to time; every combination is a competitor, and all take turns in every round."""

    backends: tuple[str, ...] = ("onnxruntime",)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)  # of the CPU backends
    rounds: int = 30


@dataclass(frozen=True)
class Latency:
    """Samples of one competitor, in the order they were taken."""

    bundle: str
    model: str
    align: str  # of the graph: the multiple its channels are padded to, or "off"
    file: str
    backend: str
    batch: int
    threads: int
    samples_ms: tuple[float, ...]  # one batch each, wall clock, from and to host memory

    def percentile_ms(self, percent: float) -> float:
        """From the raw samples, linearly interpolated."""
        return float(np.percentile(self.samples_ms, percent))

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.batch / self.percentile_ms(50)


@dataclass(frozen=True)
class Benchmark:
    """One run of the harness, with the machine that it ran on."""

    machine: dict[str, str]
    rounds: int
    latencies: tuple[Latency, ...]
    skipped: tuple[str, ...]  # competitors that cannot run here, with the reason
    interrupted: bool  # by Ctrl-C: the rounds so far are kept


def bench(bundles: Sequence[Bundle], options: BenchOptions, report: Report = silent) -> Benchmark:
    """Times every bundle on every backend, batch size and number of threads.

    Each round runs every competitor once, so that a machine that drifts hits all of them alike.
    Ctrl-C ends it with the rounds that are complete. Raises UsageError for unusable options and
    BackendUnavailable where nothing can run.
    """
    _check_options(bundles, options)
    skipped: list[str] = []
    with ExitStack() as stack:
        competitors: list[tuple[Latency, Callable[[], object]]] = []
        for bundle in bundles:
            for name in options.backends:
                artifact = _artifact(bundle, name)
                if artifact is None:
                    skipped.append(f"{bundle.path.name} has no file for {name}")
                    continue
                for threads in options.threads:
                    report(f"loading {bundle.path.name} on {name}")
                    try:
                        backend = open_backend(
                            name, bundle.read(artifact), bundle.manifest.model, threads
                        )
                    except BackendUnavailable as error:
                        skipped.append(f"{bundle.path.name} on {name}: {error}")
                        break
                    stack.callback(backend.close)
                    competitors += [
                        (
                            _empty(bundle, artifact, name, batch, threads),
                            _task(backend, bundle, batch),
                        )
                        for batch in options.batches
                    ]
        if not competitors:
            raise BackendUnavailable(f"nothing to time: {'; '.join(skipped)}")
        samples, interrupted = _time([task for _, task in competitors], options.rounds, report)
    latencies = [
        replace(empty, samples_ms=tuple(times))
        for (empty, _), times in zip(competitors, samples, strict=True)
    ]
    return Benchmark(_machine(), len(samples[0]), tuple(latencies), tuple(skipped), interrupted)


def _check_options(bundles: Sequence[Bundle], options: BenchOptions) -> None:
    for name in options.backends:
        if name not in BACKENDS:
            raise UsageError(f"backend: got '{name}', expected one of {', '.join(BACKENDS)}")
    if not 1 <= options.rounds <= MAX_ROUNDS:
        raise UsageError(f"rounds: got {options.rounds}, expected 1 to {MAX_ROUNDS}")
    cores = os.cpu_count() or 1
    for threads in options.threads:
        if not 1 <= threads <= cores:
            raise UsageError(f"threads: got {threads}, expected 1 to this machine's {cores}")
    for batch in options.batches:
        if batch < 1:
            raise UsageError(f"batch: got {batch}, expected 1 or more")
        for bundle in bundles:
            for name in options.backends:
                allowed = getattr(_artifact(bundle, name), "batch", None)
                if allowed is not None and not allowed.min <= batch <= allowed.max:
                    raise UsageError(
                        f"batch: got {batch}, but {bundle.path.name} on {name} takes "
                        f"{allowed.min} to {allowed.max}"
                    )


def _artifact(bundle: Bundle, backend: str) -> Artifact | None:
    """The file that a backend would run: float32 on a CPU, float16 where an engine has it."""
    manifest = bundle.manifest
    if backend == "pytorch":
        return manifest.find("weights")
    if backend in ONNX_BACKENDS:
        return manifest.find("onnx")
    engines = [
        artifact
        for artifact in manifest.artifacts
        if artifact.kind == "engine" and engine_backend(artifact) == backend
    ]
    return min(engines, key=lambda engine: engine.precision != "fp16", default=None)


def _empty(bundle: Bundle, artifact: Artifact, name: str, batch: int, threads: int) -> Latency:
    graph = bundle.manifest.find("onnx")
    shaped = graph is not None and name != "pytorch"
    return Latency(
        bundle=bundle.path.name,
        model=bundle.manifest.model.title,
        align=graph.built_with.get("align", "off") if graph and shaped else "off",
        file=artifact.file,
        backend=name,
        batch=batch,
        threads=threads,
        samples_ms=(),
    )


def _task(backend: Backend, bundle: Bundle, batch: int) -> Callable[[], object]:
    pool = images.synthetic(min(batch, 8), bundle.manifest.model.preprocess, seed=2)
    inputs = np.ascontiguousarray(pool[np.arange(batch) % len(pool)])
    return lambda: backend.run(inputs)


def _time(
    tasks: Sequence[Callable[[], object]], rounds: int, report: Report
) -> tuple[list[list[float]], bool]:
    """Milliseconds of every task in every complete round, and whether Ctrl-C cut it short."""
    samples: list[list[float]] = [[] for _ in tasks]
    try:
        for number in range(WARMUP_ROUNDS + rounds):
            if number in (0, WARMUP_ROUNDS):
                report(f"timing {rounds} rounds" if number else "warming up")
            times = []
            for task in tasks:
                started = time.perf_counter()
                task()
                times.append(1e3 * (time.perf_counter() - started))
            if number >= WARMUP_ROUNDS:
                for taken, milliseconds in zip(samples, times, strict=True):
                    taken.append(milliseconds)
    except KeyboardInterrupt:
        if not samples[0]:
            raise
        return samples, True
    return samples, False


def _machine() -> dict[str, str]:
    described = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in ("rexdeploy", "torch", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx"):
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = gpu.detect()
    if found is not None:
        described["gpu"] = f"{found.name}, driver {found.driver}"
    return described


def _processor() -> str:
    """Its name, and the widest vector unit, which decides more than the name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = fields.get("flags", "").split()
    vectors = next((name for name in ("avx512f", "avx2", "avx") if name in flags), "")
    return f"{fields.get('model name', platform.processor())} {vectors}".strip()
