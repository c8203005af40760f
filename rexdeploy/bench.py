"""Latency of networks on the backends of this machine: interleaved rounds, raw samples kept."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from rexdeploy import gpu, images
from rexdeploy.backends import (
    ENGINE_BACKENDS,
    GPU_BACKENDS,
    ONNX_BACKENDS,
    TORCH_BACKENDS,
    Backend,
    DeviceBackend,
    open_backend,
)
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.images import Images
from rexdeploy.manifest import ModelSpec
from rexdeploy.progress import Report, silent
from rexdeploy.subjects import Subject, published_table

if TYPE_CHECKING:
    from rexdeploy.models.layers import Layer
    from rexdeploy.roofline import Rates

FLOAT32_ONLY = ("onnxruntime", "openvino")
"""Backends that keep float32 inside a float16 graph on a CPU: its time is not float16's."""
BACKENDS = (*TORCH_BACKENDS, *ONNX_BACKENDS, *ENGINE_BACKENDS)
WARMUP_ROUNDS = 3
_PACKAGES = (
    "rexdeploy", "torch", "timm", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt-rtx",
    "tensorrt",
)  # fmt: skip
MAX_ROUNDS = 100_000

Mode = Literal["host", "device", "cuda graph"]
"""What a sample holds: from and to host memory; on images that are on the GPU already; the same
as one launch of a CUDA graph."""


@dataclass(frozen=True)
class BenchOptions:
    """What to time; every combination is a competitor, and all take turns in every round."""

    backends: tuple[str, ...] = ("onnxruntime",)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)  # of the CPU backends
    rounds: int = 30
    fp16: bool = False  # float16 graphs and modules; engines are what they were built as


@dataclass(frozen=True)
class Latency:
    """Samples of one competitor, in the order they were taken."""

    network: str  # a bundle's or a peer's name
    model: str
    form: str  # multiple that the graph's channels are padded to, or plain, published, timm, own
    file: str
    backend: str
    precision: str
    mode: Mode
    batch: int
    threads: int | None  # None on a GPU
    samples_ms: tuple[float, ...] = ()  # one batch each, wall clock
    matrix_ms: float | None = None  # its published arithmetic at the machine's matrix rate
    # See rexdeploy.roofline; None where it cannot be counted. At batch 1 caches beat its bandwidth:
    # it is too long a time there, and a share of it would flatter.
    roofline_ms: float | None = None

    def percentile_ms(self, percent: float) -> float:
        """From the raw samples, linearly interpolated."""
        return float(np.percentile(self.samples_ms, percent))

    @property
    def spread(self) -> float:
        """The middle half of the samples, as a share of the median."""
        return (self.percentile_ms(75) - self.percentile_ms(25)) / self.percentile_ms(50)

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.batch / self.percentile_ms(50)


@dataclass(frozen=True)
class Probe:
    """What the machine itself does, timed in the same rounds."""

    what: Literal["matrix product", "copy"]
    work: float  # operations, or bytes read and written
    threads: int | None
    samples_ms: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Operations or bytes per second, of the median sample."""
        return 1e3 * self.work / float(np.median(self.samples_ms))


@dataclass(frozen=True)
class Benchmark:
    """One run of the harness, with the machine that it ran on."""

    machine: dict[str, str]
    rounds: int
    latencies: tuple[Latency, ...]
    probes: tuple[Probe, ...]
    skipped: tuple[str, ...]  # competitors that cannot run here, with the reason
    interrupted: bool  # by Ctrl-C: the rounds so far are kept


def bench(subjects: Sequence[Subject], options: BenchOptions, report: Report = silent) -> Benchmark:
    """Times every network on every backend, batch size and number of threads.

    Each round times every competitor once, so that a machine that drifts hits all of them alike,
    and after an untimed run, as a server that runs one network would find its caches.
    Ctrl-C ends it with the rounds that are complete. Raises UsageError for unusable options and
    BackendUnavailable where nothing can run.
    """
    _check_options(options)
    skipped: list[str] = []
    with ExitStack() as stack:
        competitors: list[_Competitor] = []
        opened: set[tuple[int, str]] = set()
        for subject in subjects:
            for name in options.backends:
                # The PyTorch code of two forms of a network can be the very same module.
                owner = subject.module if name in TORCH_BACKENDS else subject
                if owner is None or (id(owner), name) not in opened:
                    opened.add((id(owner), name))
                    competitors += _open(subject, name, options, stack, skipped, report)
        if not competitors:
            raise BackendUnavailable(f"nothing to time: {'; '.join(skipped)}")
        probes, tasks = _probes(competitors, options, skipped)
        samples, interrupted = _time(
            [*tasks, *(competitor.task for competitor in competitors)], options.rounds, report
        )
    probes = [
        replace(probe, samples_ms=tuple(times))
        for probe, times in zip(probes, samples, strict=False)
    ]
    rates = _rates(probes)
    layers = {id(subject): _layers(subject) for subject in subjects} if rates else {}
    latencies = tuple(
        _with_limits(
            replace(competitor.row, samples_ms=tuple(times)),
            layers.get(id(competitor.subject)),
            rates.get(competitor.row.threads),
        )
        for competitor, times in zip(competitors, samples[len(probes) :], strict=True)
    )
    return Benchmark(
        machine(), len(samples[0]), latencies, tuple(probes), tuple(skipped), interrupted
    )


def bench_published_table(options: BenchOptions, report: Report = silent) -> Benchmark:
    """The networks of the published comparison tables at their batch sizes: CPU 1, GPU 64.

    ReXNets' graphs are in our aligned form, EfficientNets are timm's.

    Raises what `bench` raises, and BackendUnavailable where timm is missing.
    """
    _check_options(options)
    report("making the networks of the published tables")
    subjects = published_table()
    on_gpu = tuple(name for name in options.backends if name in GPU_BACKENDS)
    on_cpu = tuple(name for name in options.backends if name not in GPU_BACKENDS)
    results: list[Benchmark] = []
    for backends, batch in ((on_cpu, 1), (on_gpu, 64)):
        if backends and not (results and results[-1].interrupted):
            here = replace(options, backends=backends, batches=(batch,))
            results.append(bench(subjects, here, report))
    return replace(
        results[0],
        latencies=tuple(row for result in results for row in result.latencies),
        probes=tuple(probe for result in results for probe in result.probes),
        skipped=tuple(reason for result in results for reason in result.skipped),
        interrupted=any(result.interrupted for result in results),
    )


@dataclass(frozen=True)
class _Competitor:
    subject: Subject
    row: Latency
    task: Callable[[], object] = field(repr=False)


def machine() -> dict[str, str]:
    """The machine, and the libraries that decide about its speed, as a result names them."""
    described = {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }
    for package in _PACKAGES:
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found = gpu.detect()
    if found is not None:
        described["gpu"] = f"{found.name}, driver {found.driver}"
        described["gpu clocks"] = gpu.clocks() or "not known: nvidia-smi does not say"
    return described


def _check_options(options: BenchOptions) -> None:
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


def _open(
    subject: Subject,
    name: str,
    options: BenchOptions,
    stack: ExitStack,
    skipped: list[str],
    report: Report,
) -> Iterator[_Competitor]:
    """A subject's competitors on one backend; none, with a reason, where it cannot run."""
    form = _form(subject, name)
    title = f"{subject.network} ({form})"
    report(f"loading {title} on {name}")
    for threads in (None,) if name in GPU_BACKENDS else options.threads:
        try:
            opened = _backend(subject, name, options, threads)
            if opened is None:
                skipped.append(f"{title} has no file for {name}")
                return
            backend, file, precision = opened
            stack.callback(backend.close)
            for batch in options.batches:
                inputs = _inputs(
                    subject.spec.core if name in TORCH_BACKENDS else subject.spec, batch
                )
                backend.run(inputs)  # what cannot run says so before the rounds begin
                row = Latency(
                    subject.network,
                    subject.spec.title,
                    form,
                    file,
                    name,
                    precision,
                    "host",
                    batch,
                    threads,
                )
                yield _Competitor(subject, row, partial(backend.run, inputs))
                if name in GPU_BACKENDS:
                    resident = cast(DeviceBackend, backend).resident
                    modes: tuple[tuple[Mode, bool], ...] = (("device", False), ("cuda graph", True))
                    for mode, as_graph in modes:
                        task = resident(inputs, as_graph)
                        yield _Competitor(subject, replace(row, mode=mode), task)
        except RexdeployError as error:
            if isinstance(error, UsageError):
                raise
            skipped.append(f"{title} on {name}: {error}")
            return


def _form(subject: Subject, backend: str) -> str:
    """What is timed: alignment shapes graphs, the PyTorch code of an aligned network is plain."""
    return "plain" if backend in TORCH_BACKENDS and subject.form.isdigit() else subject.form


def _backend(
    subject: Subject, name: str, options: BenchOptions, threads: int | None
) -> tuple[Backend, str, str] | None:
    """An opened backend, the file it runs, and its precision; None where there is no file."""
    if options.fp16 and name in FLOAT32_ONLY:
        raise BackendUnavailable("it computes float16 graphs in float32; leave out --fp16")
    if name not in TORCH_BACKENDS:
        file = subject.file(name, options.fp16)
        if file is None:
            return None
        for batch in options.batches:
            if file.batch is not None and not file.batch.min <= batch <= file.batch.max:
                raise UsageError(
                    f"batch: got {batch}, but {subject.network} on {name} takes "
                    f"{file.batch.min} to {file.batch.max}; give --batch {file.batch.opt}"
                )
        # Competitors take turns: whose turn it is has the cores to itself.
        backend = open_backend(name, file.data, subject.spec, threads, spin=True)
        return backend, file.name, file.precision
    module = subject.module
    if module is None:
        return None
    from rexdeploy.backends.pytorch import PyTorchBackend, TorchOptions

    settings = TorchOptions(
        cuda=name in GPU_BACKENDS,
        compiled=name.endswith("-compile"),
        fp16=options.fp16,
        channels_last=True,
        threads=threads,
        chunk=None,
    )
    return PyTorchBackend(module, settings), "PyTorch code", "fp16" if options.fp16 else "fp32"


def _inputs(spec: ModelSpec, batch: int) -> Images:
    """What the files take; PyTorch's code, which is the core, takes the core's."""
    pool = images.model_input(images.synthetic_pixels(min(batch, 8), spec.preprocess, seed=2), spec)
    return cast(Images, np.ascontiguousarray(pool[np.arange(batch) % len(pool)]))


def _probes(
    competitors: Sequence[_Competitor], options: BenchOptions, skipped: list[str]
) -> tuple[list[Probe], list[Callable[[], object]]]:
    """The machine's own rates, for every number of threads (None: the GPU) in the race."""
    try:
        from rexdeploy import roofline
    except ImportError:
        skipped.append("the roofline: counting and measuring it needs torch")
        return [], []
    probes: list[Probe] = []
    tasks: list[Callable[[], object]] = []
    for threads in sorted({c.row.threads for c in competitors}, key=lambda n: n or 0):
        tasks += roofline.probes(threads, cuda=threads is None, half=options.fp16)
        probes += [
            Probe("matrix product", roofline.MATRIX_FLOPS, threads, ()),
            Probe("copy", roofline.COPY_BYTES, threads, ()),
        ]
    return probes, tasks


def _rates(probes: Sequence[Probe]) -> dict[int | None, Rates]:
    if not probes:
        return {}
    from rexdeploy.roofline import Rates

    return {
        product.threads: Rates(product.rate, copy.rate)
        for product, copy in zip(probes[::2], probes[1::2], strict=True)
    }


def _with_limits(row: Latency, layers: list[Layer] | None, rates: Rates | None) -> Latency:
    """The row beside the fastest that this machine could be, by the published arithmetic."""
    if rates is None or layers is None:
        return row
    from rexdeploy.roofline import matrix_ms, roofline_ms

    value_bytes = 2 if row.precision == "fp16" else 4
    return replace(
        row,
        matrix_ms=matrix_ms(layers, row.batch, rates),
        roofline_ms=roofline_ms(layers, row.batch, rates, value_bytes),
    )


def _layers(subject: Subject) -> list[Layer] | None:
    module = subject.module
    if module is None:
        return None
    from rexdeploy.models.layers import layers

    return layers(module, subject.spec.preprocess.height)


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
                task()  # the one before it has left its own weights in the caches
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
