"""Latency of networks on the backends of this machine: interleaved rounds, raw samples kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rexdeploy.backends import ENGINE_BACKENDS, GPU_BACKENDS, ONNX_BACKENDS, TORCH_BACKENDS
from rexdeploy.bundle.precision import PRECISIONS
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, VerificationFailed
from rexdeploy.interleaved import Rounds, Task, time_rounds
from rexdeploy.machine import machine
from rexdeploy.progress import Report, Result, several, silent
from rexdeploy.text import one_line
from rexdeploy.timing import machine_rates
from rexdeploy.timing.configurations import BenchOptions, Configuration, Latency, Loader
from rexdeploy.timing.machine_rates import Probe, computes_in
from rexdeploy.timing.networks import Network, compared, published_table

if TYPE_CHECKING:
    from rexdeploy.models.layers import Layer
    from rexdeploy.timing.roofline import Rates


__all__ = [
    "BACKENDS",
    "BenchOptions",
    "Benchmark",
    "Latency",
    "bench",
    "bench_published_table",
    "machine",
    "time_networks",
]
BACKENDS = (*TORCH_BACKENDS, *ONNX_BACKENDS, *ENGINE_BACKENDS)
MAX_ROUNDS = 100_000


@dataclass(frozen=True, repr=False)
class Benchmark(Result):
    """One run of the harness, with the machine that it ran on."""

    machine: dict[str, str]
    rounds: int
    latencies: tuple[Latency, ...]
    probes: tuple[Probe, ...]
    skipped: tuple[str, ...]  # configurations that cannot run here, with the reason
    interrupted: bool  # by Ctrl-C: the rounds so far are kept
    failures: tuple[str, ...] = ()  # configurations whose outputs are not their network's: no rows

    def __repr__(self) -> str:
        parts = [f"<Benchmark of {len(self.latencies)} rows, {self.rounds} rounds"]
        fastest = max(self.latencies, key=lambda row: row.images_per_s, default=None)
        if fastest is not None:
            what = f"{fastest.images_per_s:.0f}, {fastest.network} on {fastest.backend}"
            parts.append(f"most images a second {what}")
        if self.failures:
            parts.append(f"FAILED, {self.failures[0]}")
        elif self.interrupted:
            parts.append("interrupted")
        return one_line("; ".join(parts) + ">", 240)


def bench(
    bundles: Bundle | Path | str | Sequence[Bundle | Path | str] | None = None,
    *,
    backend: str | Sequence[str] = BenchOptions.backends,
    compare: str | Sequence[str] = (),
    batch: int | Sequence[int] = BenchOptions.batches,
    threads: int | Sequence[int] = BenchOptions.threads,
    rounds: int = BenchOptions.rounds,
    fp16: bool = BenchOptions.fp16,
    table: str | None = None,
    report: Report = silent,
) -> Benchmark:
    """Times networks side by side on this machine: every backend, batch size and thread count.

    `bundles` are bundles, their folders or their names in artifacts/, or None: the latest one
    there. `compare` names forms of their networks (plain, 8, 16, published, timm) or models of
    timm. `fp16` times graphs and PyTorch in float16. `table` is "paper" for the networks of the
    published tables instead. Ctrl-C ends it with the rounds that are complete.

    What is wrong is in the result's `failures`. Raises UsageError for unusable options,
    BackendUnavailable where nothing can run, and VerificationFailed where all that runs is wrong.

    Example: `rexdeploy.bench("rexnet_1.5", compare="plain", batch=[1, 16]).latencies`
    """
    options = BenchOptions(several(backend), several(batch), several(threads), rounds, fp16)
    if table not in (None, "paper"):
        raise UsageError(f"table: got '{table}', expected paper")
    if table is not None:
        if bundles or compare or options.batches != BenchOptions.batches:
            raise UsageError(
                "--table paper times its own networks at their own batch sizes: leave out bundles, "
                "--compare and --batch"
            )
        return bench_published_table(options, report)
    found = [Bundle.find(one) for one in several(bundles) or (None,)]
    return time_networks(compared(found, several(compare)), options, report)


def time_networks(
    networks: Sequence[Network], options: BenchOptions, report: Report = silent
) -> Benchmark:
    """Times every network on every backend, batch size and number of threads.

    Each round times every configuration once, so that a machine that drifts hits all of them alike,
    and after an untimed run, as a server that runs one network would find its caches. A GPU's row
    counts only after its outputs were downloaded and compared with the network's own (`outputs`).
    Ctrl-C ends it with the rounds that are complete. Raises UsageError for unusable options,
    BackendUnavailable where nothing can run, and VerificationFailed where all that runs is wrong.
    """
    _check_options(options)
    skipped: list[str] = []
    failures: list[str] = []
    with ExitStack() as stack:
        configurations: list[Configuration] = []
        opened: set[tuple[int, str]] = set()
        for network in networks:
            loader = Loader(network, options, stack, skipped, failures)
            for name in options.backends:
                # The PyTorch code of two forms of a network can be the very same module.
                owner = network.module if name in TORCH_BACKENDS else network
                if owner is None or (id(owner), name) not in opened:
                    opened.add((id(owner), name))
                    report(f"loading {loader.title(name)} on {name}")
                    configurations += loader.configurations(name)
        _check_any(configurations, skipped, failures)
        probed = machine_rates.make(
            {configuration.place for configuration in configurations}, skipped
        )
        tasks = [task for _, task in probed] + [
            configuration.task for configuration in configurations
        ]
        timed = time_rounds(tasks, options.rounds, report)
        # Everything is put together before anything is closed.
        measured = _probes(probed, timed, skipped)
        rows = _rows(configurations, timed, len(probed), measured, skipped)
        _check_any(rows, skipped, failures)
        return Benchmark(
            machine=_machine_for(rows),
            rounds=timed.count,
            latencies=tuple(rows),
            probes=tuple(measured),
            skipped=tuple(skipped),
            interrupted=timed.interrupted,
            failures=tuple(failures),
        )


def bench_published_table(options: BenchOptions, report: Report = silent) -> Benchmark:
    """The networks of the published comparison tables at their batch sizes: CPU 1, GPU 64.

    ReXNets' graphs are in our aligned form, EfficientNets are timm's.

    Raises what `time_networks` raises where nothing of it can run, and BackendUnavailable where
    timm is missing.
    """
    _check_options(options)
    report("making the networks of the published tables")
    networks = published_table()
    on_gpu = tuple(name for name in options.backends if name in GPU_BACKENDS)
    on_cpu = tuple(name for name in options.backends if name not in GPU_BACKENDS)
    results: list[Benchmark] = []
    faults: list[RexdeployError] = []
    for backends, batch in ((on_cpu, 1), (on_gpu, 64)):
        if backends and not (results and results[-1].interrupted):
            here = replace(options, backends=backends, batches=(batch,))
            try:
                results.append(time_networks(networks, here, report))
            except (BackendUnavailable, VerificationFailed) as error:
                faults.append(error)  # of the CPUs or of the GPU: the other half stays
    if not results:
        raise faults[0]
    wrong = [str(fault) for fault in faults if isinstance(fault, VerificationFailed)]
    missing = [str(fault) for fault in faults if not isinstance(fault, VerificationFailed)]
    return replace(
        results[0],
        latencies=tuple(row for result in results for row in result.latencies),
        probes=tuple(probe for result in results for probe in result.probes),
        skipped=(*(reason for result in results for reason in result.skipped), *missing),
        interrupted=any(result.interrupted for result in results),
        failures=(*(reason for result in results for reason in result.failures), *wrong),
    )


def _machine_for(rows: Sequence[Latency]) -> dict[str, str]:
    """The machine, with how PyTorch ran on its GPU, where it did."""
    described = machine()
    if any(row.backend.startswith("pytorch-cuda") for row in rows):
        from rexdeploy.backends.pytorch import CUDA_SETTINGS

        described["pytorch on the gpu"] = CUDA_SETTINGS
    return described


def _check_any(found: Sequence[object], skipped: Sequence[str], failures: Sequence[str]) -> None:
    """Raises where nothing is left to time, or to tell."""
    if found:
        return
    if failures:
        raise VerificationFailed("; ".join([*failures, *skipped]))
    raise BackendUnavailable(f"nothing to time: {'; '.join(skipped)}")


def _check_options(options: BenchOptions) -> None:
    for name in options.backends:
        if name not in BACKENDS:
            raise UsageError(f"backend: got '{name}', expected one of {', '.join(BACKENDS)}")
    if not 1 <= options.rounds <= MAX_ROUNDS:
        raise UsageError(f"rounds: got {options.rounds}, expected 1 to {MAX_ROUNDS}")
    cores = os.cpu_count() or 1
    for threads in options.threads:
        if not (isinstance(threads, int) and 1 <= threads <= cores):
            raise UsageError(f"threads: got {threads}, expected 1 to this machine's {cores}")
    for batch in options.batches:
        if not (isinstance(batch, int) and batch >= 1):
            raise UsageError(f"batch: got {batch}, expected 1 or more")


def _probes(probed: Sequence[tuple[Probe, Task]], timed: Rounds, skipped: list[str]) -> list[Probe]:
    """The probes with their samples, less those that failed."""
    measured = []
    for place, (probe, _) in enumerate(probed):
        if place in timed.faults:
            skipped.append(f"the roofline's {probe.what}: {timed.faults[place]}")
        else:
            measured.append(replace(probe, samples_ms=timed.samples_ms[place]))
    return measured


def _rows(
    configurations: Sequence[Configuration],
    timed: Rounds,
    first: int,
    measured: Sequence[Probe],
    skipped: list[str],
) -> list[Latency]:
    """The configurations' rows with their samples and limits, less those that failed."""
    rates = machine_rates.rates(measured)
    layers: dict[int, list[Layer] | None] = {}
    rows = []
    for place, configuration in enumerate(configurations, first):
        if place in timed.faults:
            skipped.append(f"{configuration.title}: {timed.faults[place]}")
            continue
        row = replace(configuration.row, samples_ms=timed.samples_ms[place])
        network = configuration.network
        if rates and id(network) not in layers:
            layers[id(network)] = _layers(network)
        found = layers.get(id(network))
        rows.append(_with_limits(row, found, rates.get(configuration.place)))
    return rows


def _with_limits(row: Latency, layers: list[Layer] | None, rates: Rates | None) -> Latency:
    """The row beside the fastest that this machine could be, by the published arithmetic."""
    if rates is None or layers is None:
        return row
    from rexdeploy.timing.roofline import matrix_ms, roofline_ms

    value_bytes = PRECISIONS[computes_in(row.threads, row.precision)].size_bytes
    return replace(
        row,
        matrix_ms=matrix_ms(layers, row.batch, rates),
        roofline_ms=roofline_ms(layers, row.batch, rates, value_bytes),
    )


def _layers(network: Network) -> list[Layer] | None:
    module = network.module
    if module is None:
        return None
    from rexdeploy.models.layers import layers

    return layers(module, network.spec.preprocess.height)
