"""rexdeploy tune-precision: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, print_table, progress, say
from rexdeploy.cli.shared import BundleArgument, Json, Quiet, command_line, only_warned_of
from rexdeploy.machine import bounded

if TYPE_CHECKING:
    from rexdeploy.parity.ranges import Ranges
    from rexdeploy.steps.tune_precision import Trial, Tuning


def tune_precision(
    bundle: BundleArgument = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to tune over [default: synthetic ones]."),
    ] = None,
    samples: Annotated[int, typer.Option(help="How many images at the most.")] = 16,
    max_blocks: Annotated[int, typer.Option(help="How many blocks may stay float32.")] = 6,
    backend: Annotated[
        str,
        typer.Option(
            help="What runs the trials: onnxruntime, or on a GPU tensorrt or tensorrt-rtx."
        ),
    ] = "onnxruntime",
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Find the few blocks, and nodes in them, that must stay in float32.

    For a network whose FP16 graph overflows or leaves its limit. The mixed graph takes the place
    of the bundle's fp16.onnx, and build-trt --fp16 builds it. Interrupted, the same command goes
    on where it was. Exit code 3: no set of so few blocks is enough.

    \b
    Example:
    rexdeploy tune-precision rexnet_1.5 --images photos/
    """
    check_json(json)
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.steps.tune_precision import tune_precision as run

    with bounded(), progress(quiet) as report:
        result = run(
            bundle,
            images=images,
            samples=samples,
            max_blocks=max_blocks,
            backend=backend,
            command=command_line(),
            report=report,
        )
    if not quiet and json != Path("-"):
        show_tuning(result)
    with only_warned_of(not result.healed):
        emit(json, result)
    if not result.healed:
        raise VerificationFailed(
            f"no {max_blocks} blocks in float32 bring the FP16 graph within its limits (error "
            f"{result.limits.error:.2g}, root mean square {result.limits.rms:.2g}); the best "
            f"found: {', '.join(result.best.float32)}, {result.best.rank:.2g} times its limit; "
            f"{result.overflowing} blocks hold values beyond float16; "
            "nothing was written: try more --max-blocks, or build-trt --bf16"
        )


def show_ranges(result: Ranges) -> None:
    """Every block's largest values, and what float16 makes of them."""
    lines = [
        (
            block.name,
            f"{block.output:.4g}",
            f"{block.inside:.4g}",
            f"{block.inside / result.fp16_max:.1%}",
            f"{block.inside / result.bf16_max:.0e}",
            f"{block.node.name} ({block.node.op_type})",
            block.verdict,
        )
        for block in result.blocks
    ]
    columns = ("block", "output", "inside", "of FP16", "of BF16", "largest at", "in FP16")
    print_table(columns, lines)
    say(
        f"Largest absolute values over {result.images} images; FP16 holds {result.fp16_max:g}, "
        f"BF16 {result.bf16_max:.2g}"
    )


def show_tuning(result: Tuning) -> None:
    """The ranges, what was found, and what comes next."""
    show_ranges(result.ranges)
    resumed = f", {result.resumed} more from an earlier run" if result.resumed else ""
    say(
        f"{result.bundle.path}: {result.images}, {result.trials} trials{resumed}",
        f"  plain FP16: {_error_of(result.plain)} (limits: error {result.limits.error:.2g}, root "
        f"mean square {result.limits.rms:.2g})",
    )
    if not result.best.float32:
        mixed = result.bundle.manifest.find_file("fp16.onnx")
        earlier = mixed.kept_in_float32 if mixed else None
        say(
            "  nothing has to stay float32",
            f"  kept: the bundle's fp16.onnx, which an earlier search has mixed ({earlier} in "
            "float32)"
            if earlier
            else None,
            "next: rexdeploy build-trt --fp16",
        )
    elif result.healed:
        say(
            f"  in float32: {_kept(result.best)}",
            f"  mixed: {_error_of(result.best)}",
            f"  written: {result.bundle.path / (result.written or '')}",
            "next: rexdeploy build-trt --fp16",
        )


def _kept(trial: Trial) -> str:
    blocks = ", ".join(trial.float32)
    return f"{blocks}; of these {', '.join(trial.nodes)}" if trial.nodes else blocks


def _error_of(trial: Trial) -> str:
    if trial.error is None:
        return "NaN or infinite logits"
    return f"error {trial.error:.2g} of the signal"
