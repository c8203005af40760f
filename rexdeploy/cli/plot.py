"""Pictures: latencies and accuracies, errors block by block, ways of serving, learning curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rexdeploy.cli.console import check_json, output_file
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from rexdeploy.parity.localize import Localization
    from rexdeploy.serving.tuning import Sweep
    from rexdeploy.steps.evaluate import Evaluation
    from rexdeploy.steps.finetune import FinetuneResult
    from rexdeploy.steps.quantize import Quantization
    from rexdeploy.timing.configurations import Latency
    from rexdeploy.timing.harness import Benchmark


FORMATS = (".png", ".svg", ".pdf")
_MIN_NETWORKS = 4  # fewer points of accuracy against latency say nothing


def check_plot(path: Path) -> None:
    """Raises UsageError or BackendUnavailable if no picture can be written there."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"plot: got '{path}', expected a file that ends in {', '.join(FORMATS)}")
    check_json(path)
    _pyplot()


def plot_benchmark(result: Benchmark, path: Path) -> None:
    """Writes bars of median latencies, and published top-1 accuracy against them where known."""
    known = accuracies(result.latencies)
    if len(known) < _MIN_NETWORKS:
        known = {}
    rows = _one_setting(result.latencies)
    pyplot = _pyplot()
    height = max(4.0, 0.28 * len(rows) + 1.5)
    figure, axes = pyplot.subplots(
        1, 2 if known else 1, figsize=(14 if known else 8, height), squeeze=False
    )
    _draw_bars(axes[0][0], rows)
    if known:
        _draw_accuracy(axes[0][1], rows, known)
    figure.suptitle(_title(result))
    figure.tight_layout()
    _save(figure, path)
    pyplot.close(figure)


def plot_localizations(results: Sequence[Localization], file: Path) -> None:
    """Draws every walk's error block by block: so far, and each block's own with its limit.

    Infinite errors stand as triangles at the top. Raises RexdeployError where it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 * max(1, len(results))), layout="constrained")
    for row, result in enumerate(results, start=1):
        axes = figure.add_subplot(len(results), 1, row)
        names = [block.name for block in result.blocks]
        series = {
            "error so far, of the tensor's spread": [block.total for block in result.blocks],
            "its own, of the tensor's size": [block.own for block in result.blocks],
        }
        errors = np.array(list(series.values()))
        top = 10 * float(errors[np.isfinite(errors)].max(initial=result.limit))
        for label, values in series.items():
            points = np.array(values)
            (line,) = axes.plot(
                names, np.where(np.isfinite(points), points, top), ".-", label=label
            )
            infinite = [index for index, value in enumerate(points) if not np.isfinite(value)]
            axes.plot(infinite, [top] * len(infinite), "^", color=line.get_color())
        axes.axhline(result.limit, color="gray", linestyle="--", label="limit on a block's own")
        axes.set_yscale("log")
        axes.set_title(f"{result.reference} -> {result.candidate}")
        axes.tick_params(axis="x", rotation=60)
        axes.grid(alpha=0.3)
        if result.culprit is not None:
            index = names.index(result.culprit.block)
            axes.axvline(index, color="red", alpha=0.4)
            axes.annotate(
                f"{result.culprit.node.name} ({result.culprit.node.op_type})",
                (index, result.limit),
                color="red",
            )
        axes.legend(fontsize="small")
    _save(figure, file)


def plot_sweep(result: Sweep, file: Path) -> None:
    """Draws every way of serving: latency against images a second, a point for each load.

    Raises UsageError where it cannot be written.
    """
    from matplotlib.figure import Figure

    from rexdeploy.serving.tuning import describe

    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(result.rows):
        kept = row.settings == result.kept
        loads = sorted(row.loads, key=lambda load: load.connections)
        axes.plot(
            [load.per_second for load in loads],
            [load.p99_ms for load in loads],
            ["o-", "s--", "^:"][index // 10 % 3],  # there are ten colours
            linewidth=3 if kept else 1,
            label=describe(row.settings, result.batch) + (" (kept)" if kept else ""),
        )
        for load in loads:
            axes.annotate(str(load.connections), (load.per_second, load.p99_ms), fontsize=7)
    axes.axhline(result.bound_ms, color="gray", linestyle="--", label="the bound")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images a second (each point: that many connections)")
    axes.set_ylabel("99th percentile of the latency, ms")
    axes.set_title(f"{result.images}; bound {result.bound_ms:g} ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, file)


def plot_evaluation(result: Evaluation, file: Path) -> None:
    """Draws every file's top-1 against its time for an image, both with their 95 % intervals.

    Files whose time says nothing stand at the right edge. Raises RexdeployError where it cannot be
    written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    slowest = max((row.ms_per_image.value for row in result.rows if row.ms_per_image), default=1.0)
    for row in result.rows:
        top1, time = row.top1, row.ms_per_image
        x = time.value if time else 1.15 * slowest
        axes.errorbar(
            [x],
            [100 * top1.value],
            yerr=[[100 * (top1.value - top1.low)], [100 * (top1.high - top1.value)]],
            xerr=[[x - time.low], [time.high - x]] if time else None,
            fmt="o" if time else "x",
            capsize=3,
            label=f"{row.file} ({row.backend})" + ("" if time else ": time not measured"),
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("ms an image, in batches, while others are decoded")
    axes.set_ylabel(f"top-1 accuracy, % of {result.images} images")
    axes.set_title(f"{result.model}; {result.machine['processor']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, file)


def plot_quantization(result: Quantization, file: Path) -> None:
    """Draws what every timed INT8 graph loses against its time, beside the float32 graph's.

    Raises RexdeployError where it cannot be written, or nothing was timed.
    """
    from matplotlib.figure import Figure

    if not result.timed or result.float32_ms is None:
        raise RexdeployError(f"{file}: there is nothing to draw: no graph was timed here")
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([result.float32_ms], [0], "s", label="float32")
    for row in result.timed:
        verdict = "passes" if row.trial.passes else "misses its bar"
        axes.plot(
            [row.ms],
            [row.trial.rms],
            "o" if row.trial.passes else "x",
            label=f"{row.trial.title}: {row.ratio} times as fast, {verdict}",
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ms, batch 1, one thread (medians)")
    axes.set_ylabel("root mean square error of the logits, in units of signal")
    axes.set_title(f"{result.bundle.path.name}; {result.machine['processor']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, file)


def plot_training(result: FinetuneResult, file: Path) -> None:
    """Draws a training's losses and top-1 epoch by epoch, and marks the one that was kept."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    numbers = [epoch.number for epoch in result.epochs]
    axes.plot(numbers, [epoch.loss for epoch in result.epochs], ".-", label="training loss")
    axes.plot(numbers, [epoch.val_loss for epoch in result.epochs], ".-", label="validation loss")
    axes.axvline(result.best.number, color="gray", linestyle="--", label="kept")
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    right = axes.twinx()
    right.plot(
        numbers,
        [100 * epoch.correct / result.validation_images for epoch in result.epochs],
        ".-",
        color="C2",
        label="validation top-1",
    )
    right.set_ylabel("top-1 accuracy, %")
    lines = [*axes.get_lines(), *right.get_lines()]
    axes.legend(lines, [str(line.get_label()) for line in lines], fontsize="small")
    axes.grid(alpha=0.3)
    axes.set_title(
        f"{result.family} {result.width:g}, {len(result.classes)} classes, top-1 "
        f"{result.top1:.1%} of {result.validation_images} images"
    )
    _save(figure, file)


def accuracies(rows: Sequence[Latency]) -> dict[str, tuple[str, float]]:
    """Family and published ImageNet-1k top-1 (percent) of every network that has one."""
    from rexdeploy.models.zoo import paper_rows, published

    known: dict[str, tuple[str, float]] = {
        row.network: (row.family, row.top1) for row in paper_rows()
    }
    for entry in published():
        if entry.top1 is not None:
            known[f"{entry.family}_{entry.width:.1f}"] = (entry.family, entry.top1)
    return {row.network: known[row.network] for row in rows if row.network in known}


def _one_setting(rows: Sequence[Latency]) -> list[Latency]:
    """The rows of the first batch size and number of threads (and the GPU's): bars to compare."""
    first = rows[0]
    threads = next((row.threads for row in rows if row.threads is not None), None)
    return [row for row in rows if row.batch == first.batch and row.threads in (threads, None)]


def _draw_bars(axes: Axes, rows: Sequence[Latency]) -> None:
    backends = list(dict.fromkeys(_backend(row) for row in rows))
    for position, row in enumerate(rows):
        median = row.percentile_ms(50)
        low, high = row.percentile_ms(25), row.percentile_ms(75)
        axes.barh(
            position,
            median,
            xerr=[[median - low], [high - median]],
            color=f"C{backends.index(_backend(row)) % 10}",
        )
        axes.text(max(median, high), position, f" {median:.1f}", va="center", ha="left", fontsize=8)
    axes.set_yticks(range(len(rows)))
    axes.set_yticklabels([f"{row.network} {row.form}, {_backend(row)}" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("median latency, ms (bars: the middle half of the samples)")


def _draw_accuracy(
    axes: Axes, rows: Sequence[Latency], known: dict[str, tuple[str, float]]
) -> None:
    """One line for each family and backend, from small to large networks."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row.network in known and row.mode == "host":
            family, top1 = known[row.network]
            label = f"{family} {_form(row)}, {row.backend}"
            lines.setdefault(label, []).append((row.percentile_ms(50), top1, row.network))
    for label, points in lines.items():
        points.sort(key=lambda point: point[1])
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], marker="o", label=label)
        for x, y, name in points:
            axes.annotate(name, (x, y), fontsize=7, xytext=(4, -8), textcoords="offset points")
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel("published top-1 accuracy, % (ImageNet-1k)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _save(figure: Figure, path: Path) -> None:
    """Draws into the file, whole or not at all."""
    kind = path.suffix.lower().removeprefix(".")
    with output_file(path) as file:
        figure.savefig(
            file, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None
        )


def _form(row: Latency) -> str:
    return f"aligned to {row.form}" if row.form.isdigit() else row.form


def _backend(row: Latency) -> str:
    return row.backend if row.mode == "host" else f"{row.backend} ({row.mode})"


def _title(result: Benchmark) -> str:
    row = result.latencies[0]
    threads = next((r.threads for r in result.latencies if r.threads is not None), None)
    where = f"{threads} thread{'s' * (threads > 1)}" if threads else "GPU"
    machine = result.machine.get("gpu") if threads is None else None
    return (
        f"{machine or result.machine['processor']}; batch {row.batch}, {where}; medians of "
        f"{result.rounds} interleaved rounds"
    )


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise BackendUnavailable("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")  # no screen
    # Text as text, and the same bytes for the same figures: pictures are committed.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "rexdeploy"}
    from matplotlib import pyplot

    return pyplot
