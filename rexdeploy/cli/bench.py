"""rexdeploy bench: its words."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, fail, print_table, progress, say
from rexdeploy.cli.shared import EXIT_INTERRUPTED, Json, Quiet, interrupted, only_warned_of
from rexdeploy.errors import UsageError

if TYPE_CHECKING:
    from rexdeploy.models.zoo import PaperRow
    from rexdeploy.timing.configurations import Latency
    from rexdeploy.timing.harness import Benchmark


def bench(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[BUNDLE]...",
            help="Bundles' folders or names [default: the latest one].",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        list[str],
        typer.Option(
            help="pytorch, pytorch-compile, onnxruntime, openvino; on a GPU pytorch-cuda, "
            "pytorch-cuda-compile, onnxruntime-cuda, tensorrt, tensorrt-rtx; repeatable."
        ),
    ] = ["onnxruntime"],  # noqa: B006 - typer's form of a repeatable option
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Also time the bundles' networks as 'plain' (not aligned), '8' or '16' (aligned), "
            "'published' (its in-place shortcut) or 'timm' (its own model), or any model of timm, "
            "such as efficientnet_b0; repeatable.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N[,N]", help="Batch sizes.")] = "1",
    threads: Annotated[str, typer.Option(metavar="N[,N]", help="Threads on a CPU.")] = "1",
    rounds: Annotated[int, typer.Option(help="Timed runs of each competitor.")] = 30,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Graphs and PyTorch in float16 (engines are as built).")
    ] = False,
    table: Annotated[
        str | None,
        typer.Option(
            metavar="paper",
            help="'paper': time the networks of the published comparison tables instead, one "
            "image on a CPU and 64 on a GPU, and print them in the published layout.",
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Time networks side by side on this machine.

    All competitors take turns in every round, so that a drifting machine hits them alike. The
    ratio is the time of the network's first row, at equal batch size and threads, by the row's:
    the median over the rounds, with its 95 % interval from 6 rounds on. The share is of the
    machine's own matrix rate, timed in the same rounds, for the network's published arithmetic.

    \b
    Example:
    rexdeploy bench --compare plain --compare efficientnet_b0 --batch 1,16 --threads 1,2
    rexdeploy bench --table paper --backend pytorch --backend onnxruntime
    """
    check_json(json)
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.timing.harness import bench as run

    if plot is not None and plot == json:
        raise UsageError(f"got {plot} for --plot and --json, expected two files")
    if plot is not None:
        from rexdeploy.cli.plot import check_plot

        check_plot(plot)
    batches, counts = _numbers("batch", batch), _numbers("threads", threads)
    # Here Ctrl-C ends the rounds, and what was measured is printed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with progress(quiet) as report:
            result = run(
                bundles or None,
                backend=backend,
                compare=compare or (),
                batch=batches,
                threads=counts,
                rounds=rounds,
                fp16=fp16,
                table=table,
                report=report,
            )
    except KeyboardInterrupt:
        fail("interrupted before the first round was complete", EXIT_INTERRUPTED)
    signal.signal(signal.SIGINT, interrupted)
    if not quiet and json != Path("-"):
        if table:
            from rexdeploy.models.zoo import paper_rows

            show_published_table(result, paper_rows())
        else:
            show_benchmark(result)
    with only_warned_of(bool(result.failures)):
        emit(json, result)
        if plot is not None:
            from rexdeploy.cli.plot import plot_benchmark

            plot_benchmark(result, plot)
    if result.failures:
        raise VerificationFailed("; ".join(result.failures))
    if result.interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    """Reads `1,16`."""
    if not all(part.isdecimal() and len(part) < 10 for part in text.split(",")):
        raise UsageError(f"{name}: got '{text}', expected numbers such as 1 or 1,16")
    return tuple(int(part) for part in text.split(","))


def show_benchmark(result: Benchmark) -> None:
    """Percentiles of every competitor, its relative speed, and how near it is to the machine's.

    No share of the roofline: at batch 1 the weights and activations stay in the caches, and most
    networks would look nearer to the machine's limit than they are.
    """
    from rexdeploy.interleaved import paired_ratio  # imports statistics

    _show_machine(result)
    firsts = {(row.network, row.batch, row.threads): row for row in reversed(result.latencies)}

    def first_of(row: Latency) -> Latency:
        return firsts[row.network, row.batch, row.threads]

    columns = (
        "network", "form", "backend", "precision", "batch", "threads", "p50 ms", "p90", "p99",
        "spread", "images/s", "ratio (95 %)", "of matrix",
    )  # fmt: skip
    lines = [
        (
            row.network,
            row.form,
            row.backend if row.mode == "host" else f"{row.backend}, {row.mode}",
            row.precision,
            str(row.batch),
            str(row.threads or "-"),
            *(f"{row.percentile_ms(percent):.2f}" for percent in (50, 90, 99)),
            f"{row.spread:.0%}",
            f"{row.images_per_s:.0f}",
            str(paired_ratio(first_of(row).samples_ms, row.samples_ms)),
            _share(row.matrix_ms, row),
        )
        for row in result.latencies
    ]
    print_table(columns, lines)
    _show_end(result)


def show_published_table(result: Benchmark, rows: Sequence[PaperRow]) -> None:
    """The published comparison tables in their own layout, with this machine's latencies."""
    _show_machine(result)
    backends = list(
        dict.fromkeys((row.backend, row.batch, row.threads, row.mode) for row in result.latencies)
    )
    columns = (
        "Model", "Input Res.", "Top-1 acc.", "Top-5 acc.", "FLOPs/params.",
        "published CPU/GPU",
        *(f"{name}, batch {batch}, {threads or 'GPU'}" for name, batch, threads, _ in backends),
    )  # fmt: skip
    medians = {
        (row.network, row.backend, row.batch, row.threads, row.mode): row.percentile_ms(50)
        for row in result.latencies
    }
    lines = [
        (
            row.network,
            f"{row.resolution}x{row.resolution}",
            f"{row.top1:.1f}",
            row.top5,
            f"{row.gmacs}B/{row.params_m}M",
            f"{row.cpu_ms:.0f}ms/{row.gpu_ms:.0f}ms",
            *(_milliseconds(medians.get((row.network, *backend))) for backend in backends),
        )
        for row in rows
    ]
    print_table(columns, lines)
    say(
        "Published: CPU is a Xeon E5-2630 v4 with one image; GPU a V100 with 64 images, for the "
        "lites two M40.",
        f"Here: medians of {result.rounds} rounds, by backend, batch and threads; untrained "
        "weights; ReXNets exported in the aligned form.",
    )
    _show_end(result)


def _show_machine(result: Benchmark) -> None:
    say(f"{result.machine['processor']}, {result.machine['cores']} cores")
    if "gpu" in result.machine:
        say(f"{result.machine['gpu']}; clocks {result.machine['gpu clocks']}")
    for probe in result.probes:
        where = "GPU" if probe.threads is None else f"{probe.threads} threads"
        unit = "Gflop/s" if probe.what == "matrix product" else "GB/s"
        say(f"  {probe.what}, {where}: {probe.rate / 1e9:.0f} {unit}")


def _show_end(result: Benchmark) -> None:
    for reason in result.skipped:
        say(f"skipped {reason}")
    if result.interrupted:
        say(f"interrupted after {result.rounds} rounds")


def _share(limit_ms: float | None, row: Latency) -> str:
    return "-" if limit_ms is None else f"{limit_ms / row.percentile_ms(50):.0%}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}ms"
