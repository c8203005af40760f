"""Who takes part in a benchmark: every network on every backend that runs it, and runs it right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from rexdeploy.backends import GPU_BACKENDS, TORCH_BACKENDS, Backend, DeviceBackend, open_backend
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.interleaved import Task
from rexdeploy.timing.machine_rates import Place, computes_in
from rexdeploy.timing.model_file import ModelFile
from rexdeploy.timing.networks import Network
from rexdeploy.timing.outputs import ExpectedOutputs, expected_outputs, inputs

FLOAT32_ONLY = ("onnxruntime", "openvino")
"""Backends that keep float32 inside a float16 graph on a CPU: its time is not float16's."""
Mode = Literal["host", "device", "cuda graph"]
"""What a sample holds: from and to host memory; on images that are on the GPU already; the same
as one launch of a CUDA graph."""


@dataclass(frozen=True)
class BenchOptions:
    """What to time; every combination is a configuration, and all take turns in every round."""

    backends: tuple[str, ...] = ("onnxruntime",)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)  # of the CPU backends
    rounds: int = 30
    fp16: bool = False  # float16 graphs and modules; engines are what they were built as


@dataclass(frozen=True)
class Latency:
    """Samples of one configuration, in the order they were taken."""

    network: str  # a bundle's name, or another network's
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
    # See bench/roofline.py; None where it cannot be counted. At batch 1 caches beat its bandwidth:
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
class Configuration:
    """One row to be, and how to run it once."""

    network: Network
    row: Latency
    task: Task = field(repr=False)

    @property
    def place(self) -> Place:
        """Where it computes, and in what."""
        return self.row.threads, computes_in(self.row.threads, self.row.precision)

    @property
    def title(self) -> str:
        row = self.row
        mode = "" if row.mode == "host" else f", {row.mode}"
        return f"{row.network} ({row.form}) on {row.backend}, batch {row.batch}{mode}"


class Loader:
    """Opens one network's configurations; what cannot run, or runs wrongly, has a reason."""

    def __init__(
        self,
        network: Network,
        options: BenchOptions,
        stack: ExitStack,
        skipped: list[str],
        failures: list[str],
    ) -> None:
        self.network, self.options, self.stack = network, options, stack
        self.skipped, self.failures = skipped, failures

    def title(self, name: str) -> str:
        return f"{self.network.name} ({_form(self.network, name)})"

    def configurations(self, name: str) -> Iterator[Configuration]:
        """Of one backend, in every mode, at every batch size and number of threads."""
        for threads in (None,) if name in GPU_BACKENDS else self.options.threads:
            try:
                file = _file(self.network, name, self.options)
            except UsageError:
                raise
            except RexdeployError as error:
                self.skipped.append(f"{self.title(name)} on {name}: {error}")
                return
            if file is None:
                self.skipped.append(f"{self.title(name)} has no file for {name}")
                return
            try:
                backend = _backend(self.network, file, name, self.options, threads)
            except RexdeployError as error:
                self.skipped.append(f"{self.title(name)} on {name}: {error}")
                return
            self.stack.callback(backend.close)
            for batch in self.options.batches:
                try:
                    yield from self._at(batch, backend, file, threads)
                except RexdeployError as error:  # such as too little memory: others may fit
                    self.skipped.append(f"{self.title(name)} on {name}, batch {batch}: {error}")

    def _at(
        self, batch: int, backend: Backend, file: ModelFile, threads: int | None
    ) -> Iterator[Configuration]:
        name, spec = backend.name, self.network.spec
        if name in TORCH_BACKENDS:
            spec = spec.core
        batch_inputs = inputs(spec, batch)
        outputs = backend.run(batch_inputs)  # what cannot run says so before the rounds begin
        row = Latency(
            network=self.network.name,
            model=self.network.spec.title,
            form=_form(self.network, name),
            file=file.name,
            backend=name,
            precision=file.precision,
            mode="host",
            batch=batch,
            threads=threads,
        )
        host = Configuration(self.network, row, Task(partial(backend.run, batch_inputs)))
        if name not in GPU_BACKENDS:
            yield host
            return
        known = self._expected
        if known is None:  # then it can at least be finite, and the same in every mode
            known = ExpectedOutputs.of(outputs, spec)

        def is_right(title: str, outputs: npt.NDArray[np.float32]) -> bool:
            fault = known.fault(outputs, spec, file.precision)
            if fault is not None:
                self.failures.append(f"{title}: {fault}")
            return fault is None

        if is_right(host.title, outputs):
            yield host
        modes: tuple[tuple[Mode, bool], ...] = (("device", False), ("cuda graph", True))
        for mode, as_graph in modes:
            configuration = replace(host, row=replace(row, mode=mode))
            try:
                resident = cast(DeviceBackend, backend).resident(batch_inputs, as_graph)
                resident.run()
                if is_right(configuration.title, resident.outputs()):
                    yield replace(configuration, task=Task(resident.run))
            except RexdeployError as error:
                self.skipped.append(f"{configuration.title}: {error}")

    @cached_property
    def _expected(self) -> ExpectedOutputs | None:
        return expected_outputs(self.network.spec, self.network.module, self._float32_graph)

    def _float32_graph(self) -> bytes | None:
        file = self.network.file("onnxruntime", False)
        return file.data if file else None


def _form(network: Network, backend: str) -> str:
    """What is timed: alignment shapes graphs, the PyTorch code of an aligned network is plain."""
    return "plain" if backend in TORCH_BACKENDS and network.form.isdigit() else network.form


def _file(network: Network, name: str, options: BenchOptions) -> ModelFile | None:
    """What a backend runs; None where there is nothing. Raises UsageError for unusable batches."""
    if options.fp16 and name in FLOAT32_ONLY:
        raise BackendUnavailable("it computes float16 graphs in float32; leave out --fp16")
    if name in TORCH_BACKENDS:
        if network.module is None:
            return None
        return ModelFile("PyTorch code", b"", "fp16" if options.fp16 else "fp32", None)
    file = network.file(name, options.fp16)
    for batch in options.batches:
        if file and file.batch and not file.batch.min <= batch <= file.batch.max:
            raise UsageError(
                f"batch: got {batch}, but {network.name} on {name} takes "
                f"{file.batch.min} to {file.batch.max}; give --batch {file.batch.opt}"
            )
    return file


def _backend(
    network: Network, file: ModelFile, name: str, options: BenchOptions, threads: int | None
) -> Backend:
    if name not in TORCH_BACKENDS:
        # Configurations take turns: whose turn it is has the cores to itself.
        return open_backend(name, file.data, network.spec, threads, spin=True, kernels="eager")
    from rexdeploy.backends.pytorch import PyTorchBackend, TorchOptions

    module = network.module
    assert module is not None
    settings = TorchOptions(
        cuda=name in GPU_BACKENDS,
        compiled=name.endswith("-compile"),
        fp16=options.fp16,
        channels_last=True,
        threads=threads,
        chunk=None,
    )
    return PyTorchBackend(module, settings)
