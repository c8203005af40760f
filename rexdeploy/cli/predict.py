"""rexdeploy predict: its words."""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, progress_bar, say
from rexdeploy.cli.shared import Json, Quiet, RequireSignature, interrupted, leave_with
from rexdeploy.errors import UsageError
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.inference.classifier import Classifier
    from rexdeploy.inference.predict import Predictions
    from rexdeploy.inference.stream import Row


def predict(
    image: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, and folders of them.")
    ],
    bundle: Annotated[
        Path | None,
        typer.Option(help="A bundle's folder or name [default: the latest].", metavar="BUNDLE"),
    ] = None,
    top: Annotated[int, typer.Option(help="Classes to give for an image.", min=1)] = 5,
    backend: Annotated[
        str,
        typer.Option(
            help="auto, tensorrt, tensorrt-rtx, onnxruntime-cuda, onnxruntime, openvino or pytorch."
        ),
    ] = "auto",
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A detector's: draw boxes and masks (.png, .jpg); several images' into a folder.",
        ),
    ] = None,
    score: Annotated[
        float | None, typer.Option(help="A detector's: least score of an object [default: 0.05].")
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option(help="A detector's: most objects of an image [default: 100].")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a row for each image: .csv, .jsonl or .parquet."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace --out's file, or another command's unfinished rows for it."
        ),
    ] = False,
    require_signature: RequireSignature = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Classify images, or detect objects, with the best backend present.

    An image that cannot be read does not stop the others: it is a line on stderr, and the exit
    code is 2. With --out it is a row with its error, and the exit code is 0.

    --out writes the columns file, error, class_1, label_1, probability_1, class_2 and so on; in
    .jsonl a line has file, error and a list of predictions. Until all are there, the rows are in
    FILE.partial: interrupted or killed, the same command goes on where it was. It takes in images
    that are new in a folder, and does not read again what has its row.

    \b
    Example:
    rexdeploy predict cat.jpg --bundle rexnet_1.5
    rexdeploy predict photos/ --out results.csv
    rexdeploy predict street.jpg --bundle rexnet_1.0_detect --draw out.png
    """
    check_json(json)
    from rexdeploy.cli.detectors import is_detector, only_for, run_detection

    if is_detector(bundle):
        only_for("a detector has no such option", top=top != 5, out=out is not None, force=force)
        run_detection(
            image,
            bundle,
            0.05 if score is None else score,
            100 if max_detections is None else max_detections,
            draw,
            backend,
            require_signature,
            quiet,
            json,
        )
        return
    only_for(
        "for detectors, and this bundle holds a classifier",
        draw=draw is not None,
        score=score is not None,
        max_detections=max_detections is not None,
    )
    from rexdeploy.inference.predict import predict as run

    # Pillow's remarks on odd files would stand between ours; what it cannot read is an error.
    warnings.filterwarnings("ignore", module="PIL")
    silent = quiet or json == Path("-")
    running: list[Classifier] = []
    kept: list[Row] = []

    def began(classifier: Classifier) -> None:
        running.append(classifier)
        if out is not None:
            show_runner(running.pop(), quiet, silent)

    def each(row: Row) -> None:
        if row.error is None and running:
            show_runner(running.pop(), quiet, silent)
        show_row(row, silent)
        if json is not None:
            kept.append(row)

    with contextlib.ExitStack() as stack:
        result = run(
            image,
            bundle,
            top=top,
            backend=backend,
            out=out,
            force=force,
            require_signature=require_signature,
            began=began,
            each=each,
            report=_progress(stack, quiet, out),
        )
    if out is not None:
        emit(json, result)
        if not silent:
            show_results(result)
        return
    emit(json, replace(result, images=tuple(kept)))
    if result.errors:
        raise typer.Exit(UsageError.exit_code)


def _progress(
    stack: contextlib.ExitStack, quiet: bool, out: Path | None
) -> Callable[[int, int], None]:
    """A bar from its first call on; meanwhile Ctrl-C leaves at once, with what is done."""
    shown: list[Callable[[int], None]] = []

    def report(done: int, total: int) -> None:
        if not shown:
            message = f"; {out}.partial keeps what is done, and the same command goes on"
            signal.signal(signal.SIGINT, leave_with(message))
            stack.callback(signal.signal, signal.SIGINT, interrupted)
            bar = progress_bar(quiet, "classifying", done, total)
            shown.append(stack.enter_context(bar))
        shown[0](done)

    return report


def show_runner(classifier: Classifier, quiet: bool, silent: bool) -> None:
    """What runs, unless `silent`, and on stderr, unless `quiet`, why nothing better does."""
    if not quiet:
        reasons = (one_line(f"passed over: {reason}") for reason in classifier.passed_over)
        say(*reasons, to_stderr=True)
    if not silent:
        of = " (INT8)" if classifier.artifact.is_int8 else ""
        say(f"{classifier.title} on {classifier.backend}{of}")


def show_row(row: Row, silent: bool) -> None:
    """One image's classes, unless `silent`; on stderr, why it has none."""
    if row.error is not None:
        say("error: " + one_line(f"{row.file}: {row.error}"), to_stderr=True)
    elif not silent:
        lines = (f"  {item.probability:7.2%}  {item.label}" for item in row.predictions)
        say(row.file, *lines)


def show_results(result: Predictions) -> None:
    """How many rows a results file has, and how many of them are errors."""
    before = f", {result.before} of them by an earlier run" if result.before else ""
    errors = f"; {result.errors} could not be read: see column error" if result.errors else ""
    say(f"  {result.out}, {result.rows} rows{before}{errors}")
