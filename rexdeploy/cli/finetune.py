"""rexdeploy finetune: its words."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, progress, say
from rexdeploy.cli.shared import Json, Quiet, leave_with
from rexdeploy.machine import bounded
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.steps.finetune import FinetuneResult


def finetune(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Images to train on: DIR/CLASS/IMAGE.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="A checkpoint to begin with, or 'pretrained' for timm's published weights; other "
            "classes get a new classifier [default: an untrained network].",
            metavar="FILE",
        ),
    ] = None,
    lite: Annotated[bool, typer.Option("--lite", help="ReXNet-lite: ReLU6, no SE.")] = False,
    width: Annotated[
        float | None,
        typer.Option(help="Width multiplier [default: the checkpoint's, or 1.0].", metavar="FLOAT"),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Height and width, pixels [default: the checkpoint's, or 224]."),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Times to see every image [default: the recipe's, 20 or 400]")
    ] = None,
    recipe: Annotated[
        str,
        typer.Option(
            help="small (AdamW, moved and turned images) or published (SGD, RandAugment, averaged "
            "weights)."
        ),
    ] = "small",
    batch: Annotated[
        int | None,
        typer.Option(help="Images a step, of all processes [default: the recipe's, 64 or 512]."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Highest learning rate [default: the recipe's, in proportion to the batch]."
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Images to validate by [default: a tenth of every class's]."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read images [default: one a processor, at most 8]."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The checkpoint to write.")] = Path(
        "finetuned.safetensors"
    ),
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace --out's file, or another training's state for it."),
    ] = False,
    qat: Annotated[
        str | None,
        typer.Option(
            metavar="BUNDLE",
            help="Learn with INT8's rounding in it: the network of a bundle whose INT8 missed its "
            "bar.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the learning curve: .png, .svg or .pdf."),
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Train a network on your own images, and write the checkpoint that export takes.

    After each epoch the network is validated with the preprocessing that it will be served with,
    and --out keeps the best. FILE.training has the rest: interrupted or killed, the same command
    goes on after the last whole epoch, on a CPU to the same bytes. A GPU is used if there is one;
    several, or several processes, with torchrun. Exit code 3: the loss is NaN or infinite.

    \b
    Example:
    rexdeploy finetune train/ --lite --width 0.5 --image-size 64 --out mine.safetensors
    torchrun --nproc-per-node 2 -m rexdeploy finetune train/ --recipe published
    """
    first = os.environ.get("RANK", "0") == "0"
    quiet = quiet or not first
    if first:
        check_json(json)
        if plot is not None:
            from rexdeploy.cli.plot import check_plot

            check_plot(plot)
    from rexdeploy.steps.finetune import finetune as run

    # A worker that reads images dies with its process: there is nothing to unwind.
    signal.signal(signal.SIGINT, leave_with(f"; the same command goes on ({out}.training)"))
    with bounded(), progress(quiet) as report:
        result = run(
            folder,
            weights=weights,
            lite=lite,
            width=width,
            image_size=image_size,
            epochs=epochs,
            recipe=recipe,
            batch=batch,
            lr=lr,
            val=val,
            seed=seed,
            workers=workers,
            out=out,
            force=force,
            qat=qat,
            report=report,
        )
    if not first:
        return
    if not quiet and json != Path("-"):
        show_training(result)
    emit(json, result)
    if plot is not None:
        from rexdeploy.cli.plot import plot_training

        plot_training(result, plot)


def show_training(result: FinetuneResult) -> None:
    """What was trained, how good it is, and what was left out."""
    for file, why in list(result.unreadable.items())[:10]:
        say(f"left out: {one_line(f'{file}: {why}')}", to_stderr=True)
    best, resumed = result.best, f", {result.resumed} of them by an earlier run"
    left_out = f", {len(result.unreadable)} that cannot be read left out"
    say(
        f"{result.out}: {result.family} {result.width:g}, {len(result.classes)} classes, "
        f"{result.image_size} pixels",
        f"  {result.training_images} images to train on, {result.validation_images} to validate by"
        + left_out * bool(result.unreadable),
        f"  {len(result.epochs)} epochs{resumed * bool(result.resumed)}; kept: epoch "
        f"{best.number}, top-1 {result.top1:.2%}, loss {best.val_loss:.3f}",
        f"next: rexdeploy export --weights {result.out}",
    )
