"""rexdeploy export: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, describe_artifact, emit, progress, say
from rexdeploy.cli.shared import Json, Quiet, command_line
from rexdeploy.machine import bounded

if TYPE_CHECKING:
    from rexdeploy.steps.export import ExportResult


def export(
    task: Annotated[
        str, typer.Option(help="classify, detect (Faster R-CNN) or segment (Mask R-CNN).")
    ] = "classify",
    width: Annotated[
        float | None,
        typer.Option(help="Width multiplier [default: the checkpoint's, or 1.0].", metavar="FLOAT"),
    ] = None,
    lite: Annotated[bool, typer.Option("--lite", help="ReXNet-lite: ReLU6, no SE.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(
            help="A .pth, .pt or .safetensors checkpoint, or 'pretrained' for timm's published "
            "weights [default: an untrained network].",
            metavar="FILE",
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Classes [default: the checkpoint's, or 1000].")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width of the input, pixels [default: what finetune has noted in the "
            "checkpoint, or 224]; a detector's short side [default: 800]."
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="'dynamic', or one fixed batch size.")] = "dynamic",
    opset: Annotated[int, typer.Option(help="ONNX operator set.")] = 18,
    no_simplify: Annotated[bool, typer.Option("--no-simplify", help="Do not run onnxsim.")] = False,
    align: Annotated[
        str,
        typer.Option(
            help="Zero-pad channels to a multiple, for speed and equal logits: auto, off, 8 or 16."
        ),
    ] = "auto",
    input: Annotated[  # noqa: A002 - the option's name
        str,
        typer.Option(help="float32 (normalised, NCHW), or uint8: RGB pixels, NHWC."),
    ] = "float32",
    output: Annotated[
        str, typer.Option(help="logits, or probabilities: their softmax.")
    ] = "logits",
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Text file, one class name a line [default: what finetune has noted in the "
            "checkpoint, or ImageNet's for 1000]."
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the bundle [default: such as rexnet_1.5].")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the bundle in.")] = Path("artifacts"),
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Export a checkpoint to a bundle with a checked ONNX graph.

    The graph is simplified, and its logits are compared with PyTorch's, before anything is
    written.

    \b
    Example:
    rexdeploy export --weights rexnetv1_1.5.pth
    rexdeploy export --weights pretrained --width 2.0
    """
    check_json(json)
    if task != "classify":
        from rexdeploy.cli.detectors import only_for

        only_for(
            "a detector has no such option",
            lite=lite,
            batch=batch != "dynamic",
            opset=opset != 18,
            no_simplify=no_simplify,
            align=align != "auto",
            input=input != "float32",
            output=output != "logits",
        )
        _export_detector(
            task, width, weights, num_classes, image_size, labels, name, out, quiet, json
        )
        return
    from rexdeploy.steps.export import export as run

    with bounded(), progress(quiet) as report:
        result = run(
            width=width,
            lite=lite,
            weights=weights,
            num_classes=num_classes,
            image_size=image_size,
            batch=batch,
            opset=opset,
            simplify=not no_simplify,
            align=align,
            input=input,
            output=output,
            labels=labels,
            name=name,
            out=out,
            command=command_line(),
            report=report,
        )
    emit(json, result)
    size = result.bundle.manifest.model.preprocess.height
    if not quiet and result.trained_at not in (None, size):
        say(
            f"warning: the network was trained at {result.trained_at} pixels and is exported for "
            f"{size}: its accuracy may be another",
            to_stderr=True,
        )
    if not quiet and json != Path("-"):
        show_export(result)


def _export_detector(
    task: str,
    width: float | None,
    weights: str | None,
    num_classes: int | None,
    image_size: int | None,
    labels: Path | None,
    name: str | None,
    out: Path,
    quiet: bool,
    json: Path | None,
) -> None:
    from rexdeploy.cli.detectors import show_detector_export
    from rexdeploy.detection.export import export_detector

    with bounded(), progress(quiet) as report:
        result = export_detector(
            task=task,
            width=width,
            weights=weights,
            num_classes=num_classes,
            image_size=image_size,
            labels=labels,
            name=name,
            out=out,
            command=command_line(),
            report=report,
        )
    emit(json, result)
    if not quiet and json != Path("-"):
        show_detector_export(result)


def show_export(result: ExportResult) -> None:
    """The new bundle's graph, and how far it is from the network."""
    graph = result.bundle.manifest.graph
    last = result.comparisons[-1]
    worst = max(result.comparisons, key=lambda comparison: comparison.error)
    model = result.bundle.manifest.model
    say(
        model.title,
        f"  {describe_artifact(result.bundle, graph)}, {result.nodes} nodes "
        f"({result.nodes_before} before simplification)",
        f"  channels padded to a multiple of {graph.multiple}"
        if graph and graph.multiple
        else None,
        f"  takes {model.input}, gives {model.output}" if model != model.core else None,
        f"  torch -> {last.candidate}: error {worst.error:.1e} of the signal "
        f"(limit {worst.limits.error:.1g}), top-1 agreement {last.top1:.0%}",
        "next: rexdeploy build-trt --fp16",
    )
