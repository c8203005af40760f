"""rexdeploy quantize: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, print_table, progress, say
from rexdeploy.cli.shared import BundleArgument, Json, Quiet, command_line, only_warned_of
from rexdeploy.machine import bounded
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.parity.int8_bar import Trial
    from rexdeploy.steps.quantize import Quantization


def quantize(
    calib: Annotated[
        Path, typer.Option(metavar="DIR", help="Images to take ranges from, 8 or more.")
    ],
    bundle: BundleArgument = None,
    target: Annotated[
        str, typer.Option(help="cpu (ONNX Runtime), or trt: a graph for build-trt --int8.")
    ] = "cpu",
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Labelled images to judge by: CLASS/IMAGE."),
    ] = None,
    agreement: Annotated[
        float, typer.Option(help="Without --data: least share of answers as the float32 graph's.")
    ] = 0.99,
    max_drop: Annotated[float, typer.Option(help="With --data: most points of top-1 lost.")] = 0.5,
    max_blocks: Annotated[int, typer.Option(help="How many blocks may stay float32.")] = 6,
    reduce_range: Annotated[
        bool,
        typer.Option("--reduce-range", help="7-bit weights, for x86 without VNNI [there: always]."),
    ] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write it although it is not accepted, and mark it so.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the one that is there.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw error against latency (.png, .svg, .pdf)."),
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Make an INT8 graph, and keep it only if it is accurate enough and faster.

    It goes into the bundle as int8.onnx. Where the plain one misses its bar, biases are corrected,
    channels equalised (no float32 logit changes by it), and the worst blocks given back to float32.
    Then it is timed beside the float32 graph. Interrupted, the same command goes on where it was.
    For TensorRT (--target trt) it is judged by its accuracy alone. Exit code 3: it is not
    accepted, and nothing was kept.

    \b
    Example:
    rexdeploy quantize mine --calib train/ --data val/
    """
    check_json(json)
    from rexdeploy.errors import UsageError, VerificationFailed
    from rexdeploy.steps.quantize import quantize as run

    if plot is not None:
        from rexdeploy.cli.plot import check_plot

        check_plot(plot)
        if target == "trt":
            raise UsageError("got --plot with --target trt, of which nothing is timed here")
    with bounded(), progress(quiet) as report:
        result = run(
            bundle,
            calib=calib,
            target=target,
            data=data,
            agreement=agreement,
            max_drop=max_drop,
            max_blocks=max_blocks,
            reduce_range=reduce_range,
            keep=keep,
            force=force,
            command=command_line(),
            report=report,
        )
    if not quiet and json != Path("-"):
        show_quantization(result)
    is_failure = bool(result.refused) and result.written is None
    with only_warned_of(is_failure):
        emit(json, result)
        if plot is not None:
            from rexdeploy.cli.plot import plot_quantization

            plot_quantization(result, plot)
    if is_failure:
        raise VerificationFailed(
            f"INT8 is not accepted: {'; '.join(result.refused)}; nothing was kept (--keep keeps it)"
        )


def show_quantization(result: Quantization) -> None:
    """What was tried, what it costs, and what comes next."""
    resumed = f", {result.resumed} trials by an earlier run" if result.resumed else ""
    say(
        f"{result.bundle.path}: ranges from {result.calibrated}, judged by {result.judged}"
        + resumed,
        f"  bar: {result.bar}",
        *(one_line(f"  warning: {text}", 300) for text in result.warnings),
    )
    print_table(
        ("trial", "rms", "agrees %", "top-1 lost", "passes"),
        [
            (
                trial.title,
                f"{trial.rms:.3g}",
                f"{100 * trial.agreement:.2f}",
                _lost(trial),
                "yes" if trial.passes else "no",
            )
            for trial in result.trials
        ],
    )
    say("rms: of the logits, in units of signal; top-1 lost: points, with its 95 % interval")
    best = result.best
    if best.float32:
        say(f"  in float32: {', '.join(best.float32)}")
    if result.float_operators:
        say(f"  operators that stay float32: {', '.join(result.float_operators)}")
    if result.timed:
        print_table(
            ("batch 1, one thread", "ms", "times as fast"),
            [
                ("float32", f"{result.float32_ms:.2f}", "1"),
                *((row.trial.title, f"{row.ms:.2f}", str(row.ratio)) for row in result.timed),
            ],
        )
        say(f"on {result.machine['processor']}")
    if result.products:
        whole, others = result.products
        say(f"  ONNX Runtime runs {whole} of {whole + others} products in int8")
    if result.written and result.refused:
        say(
            f"  written, NOT accepted: {result.bundle.path / result.written}: "
            f"{'; '.join(result.refused)}"
        )
    elif result.written:
        after = "verify" if result.target == "cpu" else "build-trt --int8"
        say(f"  accepted: {result.bundle.path / result.written}", f"next: rexdeploy {after}")


def _lost(trial: Trial) -> str:
    if trial.paired is None:
        return "-"
    shares = trial.paired.difference
    low, high = sorted((-shares.low, -shares.high))
    return f"{-100 * shares.value:+.2f} ({100 * low:+.2f} {100 * high:+.2f})"
