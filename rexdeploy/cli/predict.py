"""rexdeploy predict: its words."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, progress_bar, say
from rexdeploy.cli.shared import (
    Json,
    Quiet,
    RequireSignature,
    find_bundle,
    interrupted,
    leave_with,
)
from rexdeploy.errors import UsageError
from rexdeploy.text import one_line, printable

if TYPE_CHECKING:
    from rexdeploy.inference.classifier import Classifier
    from rexdeploy.inference.rows import Results
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
    """Classify images with the best backend present.

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
    """
    check_json(json)
    if force and out is None:
        raise UsageError("--force is about the file that --out names: give both")
    from rexdeploy.inference.classifier import load
    from rexdeploy.inference.rows import Header, Results, check_out
    from rexdeploy.inference.stream import classify_files, expand

    if out is not None:
        check_out(out)
    # Pillow's remarks on odd files would stand between ours; what it cannot read is an error.
    warnings.filterwarnings("ignore", module="PIL")
    files = expand(image)
    silent = quiet or json == Path("-")
    with load(find_bundle(bundle, require_signature), backend) as classifier:
        answer: dict[str, object] = {
            "model": classifier.title,
            "backend": classifier.backend,
            "passed_over": classifier.passed_over,
        }
        if out is not None:
            show_runner(classifier, quiet, silent)
            header = Header.of(classifier, image, top)
            with Results(out, header, force) as results:
                _classify_into(results, classifier, files, quiet)
            emit(
                json,
                lambda: (
                    answer
                    | {"out": printable(str(out)), "rows": results.rows, "errors": results.errors}
                ),
            )
            if not silent:
                show_results(results)
            return
        told = False
        kept: list[Row] = []
        errors = 0
        for row in chain.from_iterable(classify_files(classifier, files, top)):
            if row.error is None and not told:
                told = True
                show_runner(classifier, quiet, silent)
            show_row(row, silent)
            errors += row.error is not None
            if json is not None:
                kept.append(row)
    emit(json, lambda: answer | {"images": kept})
    if errors:
        raise typer.Exit(UsageError.exit_code)


def _classify_into(
    results: Results, classifier: Classifier, files: Sequence[str], quiet: bool
) -> None:
    """Adds the rows of the files that have none yet; Ctrl-C leaves at once, with what is done."""
    from rexdeploy.inference.stream import classify_files

    signal.signal(
        signal.SIGINT,
        leave_with(f"; {results.path} keeps what is done, and the same command goes on"),
    )
    left = [file for file in files if printable(file) not in results.done]
    with progress_bar(quiet, "classifying", results.rows, results.rows + len(left)) as show:
        for rows in classify_files(classifier, left, results.top):
            results.append(rows)
            show(results.rows)
        results.finish()
    signal.signal(signal.SIGINT, interrupted)


def show_runner(classifier: Classifier, quiet: bool, silent: bool) -> None:
    """What runs, unless `silent`, and on stderr, unless `quiet`, why nothing better does."""
    if not quiet:
        reasons = (one_line(f"passed over: {reason}") for reason in classifier.passed_over)
        say(*reasons, to_stderr=True)
    if not silent:
        say(f"{classifier.title} on {classifier.backend}")


def show_row(row: Row, silent: bool) -> None:
    """One image's classes, unless `silent`; on stderr, why it has none."""
    if row.error is not None:
        say("error: " + one_line(f"{row.file}: {row.error}"), to_stderr=True)
    elif not silent:
        lines = (f"  {item.probability:7.2%}  {item.label}" for item in row.predictions)
        say(row.file, *lines)


def show_results(results: Results) -> None:
    """How many rows a results file has, and how many of them are errors."""
    before = f", {len(results.done)} of them by an earlier run" if results.done else ""
    errors = f"; {results.errors} could not be read: see column error" if results.errors else ""
    say(f"  {results.out}, {results.rows} rows{before}{errors}")
