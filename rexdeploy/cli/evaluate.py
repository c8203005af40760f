"""rexdeploy evaluate: its words."""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, print_table, progress, progress_bar, say
from rexdeploy.cli.shared import Json, Quiet, RequireSignature, interrupted, leave_with
from rexdeploy.errors import VerificationFailed
from rexdeploy.machine import bounded
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.inference.accuracy import Accuracy
    from rexdeploy.intervals import Interval
    from rexdeploy.steps.evaluate import Evaluation

_SHOWN = 5  # unreadable images, and kinds of changed answers, that are printed; --json has more


def evaluate(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Labelled images: CLASS/IMAGE.")],
    bundle: Annotated[
        Path | None,
        typer.Option(help="A bundle's folder or its name under artifacts/ [default: the latest]."),
    ] = None,
    mapping: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lines of a folder's or image's name and its class."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="Run on this only, 'pytorch' being the reference; may be repeated."),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(help="Run this file of the bundle only; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first images of every class.")] = None,
    sample: Annotated[
        int | None, typer.Option(help="Random images, of every class in proportion.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
    crop_pct: Annotated[
        float | None,
        typer.Option(help="To compare: another share of the image than the bundle's."),
    ] = None,
    interpolation: Annotated[
        str | None,
        typer.Option(help="To compare: bicubic or bilinear."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="An image that cannot be read is an error.")
    ] = False,
    require_signature: RequireSignature = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw accuracy against latency (.png, .svg, .pdf)."),
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Measure the accuracy of every file of a bundle over labelled images.

    The reference and every graph and engine that runs here get the same images. A folder in DIR is
    a class: its label, its synset of ImageNet, or its index. --mapping FILE gives classes to
    folders or images by lines of a name and a class; ImageNet's lists (val.txt, a synset an image,
    LOC_val_solution.csv) are such files. Each file's top-1 is compared with the first one's image
    by image: the difference with its 95 % interval, and McNemar's exact p.

    Interrupted or killed, the same command goes on where it was. Exit code 3: a file failed, or
    gave NaN or infinite values.

    \b
    Example:
    rexdeploy evaluate val/ --bundle mine
    rexdeploy evaluate ILSVRC2012_img_val/ --mapping val.txt --sample 5000
    """
    check_json(json)
    if plot is not None:
        from rexdeploy.cli.plot import check_plot

        check_plot(plot)
    from rexdeploy.steps.evaluate import evaluate as run

    warnings.filterwarnings("ignore", module="PIL")  # what it cannot read is counted
    with bounded(), contextlib.ExitStack() as stack:
        phases = stack.enter_context(contextlib.ExitStack())
        report = phases.enter_context(progress(quiet))
        bar: list[Callable[[int], None]] = []

        def counted(done: int, total: int) -> None:
            if not bar:
                phases.close()  # the spinner: the bar is there in its stead
                signal.signal(
                    signal.SIGINT, leave_with("; the same command goes on where this one was")
                )
                stack.callback(signal.signal, signal.SIGINT, interrupted)
                bar.append(stack.enter_context(progress_bar(quiet, "evaluating", done, total)))
            bar[0](done)

        result = run(
            folder,
            bundle,
            mapping=mapping,
            backend=backend or (),
            file=file or (),
            limit=limit,
            sample=sample,
            seed=seed,
            crop_pct=crop_pct,
            interpolation=interpolation,
            strict=strict,
            require_signature=require_signature,
            report=report,
            counted=counted,
        )
    if not quiet and json != Path("-"):
        show_evaluation(result)
    emit(json, result)
    if plot is not None:
        from rexdeploy.cli.plot import plot_evaluation

        plot_evaluation(result, plot)
    if result.failures:
        raise VerificationFailed("; ".join(result.failures))


def show_evaluation(result: Evaluation) -> None:
    """How the images were prepared, a row for each file, and what the files change."""
    spec = result.preprocess
    say(
        f"{result.bundle}, {result.model}: {result.images} images of {result.classes} classes "
        f"({result.folder}, by {result.read_as})"
        + f", {result.resumed} of them by an earlier run"
        * bool(result.resumed),
        f"  {spec.height} x {spec.width} pixels, the centre {spec.crop_pct:.4g} of the image, "
        f"{spec.interpolation}, mean {_numbers(spec.mean)}, std {_numbers(spec.std)}",
        "  NOT the bundle's own preprocessing: for comparison only"
        if result.compared_only
        else None,
    )
    columns = ("file", "top-1 %", "top-5", "agrees", "difference", "p", "ECE", "ms")
    print_table(columns, map(_line, result.rows))
    first, published = result.rows[0], result.published
    say(
        "in per cent, intervals of 95 %; ECE: calibration error; ms: an image in batches of 32"
        + f"; difference: of top-1 from {result.baseline}'s" * (len(result.rows) > 1),
        f"published for these weights: top-1 {published.top1} %, top-5 {published.top5} % "
        f"(here {100 * (first.top1.value):.1f} % of these {result.images} images)"
        if published
        else None,
    )
    for row in result.rows[1:]:
        changes = ", ".join(
            f"{item.images} x {item.label}: {item.before} -> {item.after}"
            for item in row.changed[:_SHOWN]
        )
        if row.paired and changes:
            say(
                one_line(
                    f"{row.file} ({row.backend}) loses {row.paired.lost} and wins "
                    f"{row.paired.won}; its other answers: {changes}",
                    400,
                )
            )
    if any(row.emulated for row in result.rows):
        say(
            "(emulated): rounded as a 16-bit engine rounds, in a float32 run: its time says nothing"
        )
    for skip in result.skipped:
        say(one_line(f"skipped {skip.name}: {skip.reason}"))
    if result.unreadable:
        say(f"{len(result.unreadable)} images cannot be read and are left out:")
        say(*(one_line(f"  {it.name}: {it.reason}") for it in result.unreadable[:_SHOWN]))


def _line(row: Accuracy) -> tuple[str, ...]:
    paired = row.paired
    return (
        f"{row.file} ({row.backend}{', emulated' * row.emulated})",
        _percent(row.top1),
        "-" if row.top5 is None else f"{100 * row.top5.value:.1f}",
        "-" if row.agreement is None else f"{100 * row.agreement:.1f}",
        "-" if paired is None else _points(paired.difference),
        "-" if paired is None else f"{paired.p_value:.2g}",
        f"{100 * row.calibration_error:.1f}",
        "-" if row.ms_per_image is None else f"{row.ms_per_image.value:.2f}",
    )


def _percent(share: Interval) -> str:
    return f"{100 * share.value:.2f} ({100 * share.low:.1f}-{100 * share.high:.1f})"


def _points(share: Interval) -> str:
    return f"{100 * share.value:+.2f} ({100 * share.low:+.2f} {100 * share.high:+.2f})"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
