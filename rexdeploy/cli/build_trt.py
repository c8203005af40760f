"""rexdeploy build-trt: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, describe_artifact, emit, progress, say
from rexdeploy.cli.shared import BundleArgument, Json, Quiet, command_line
from rexdeploy.errors import UsageError
from rexdeploy.machine import bounded

if TYPE_CHECKING:
    from rexdeploy.steps.build_trt import BuildResult


def build_trt(
    bundle: BundleArgument = None,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in float16, and prove it.")] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Compute in bfloat16, and prove it.")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute in int8, from quantize's graph, and prove it.")
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(metavar="MIN:OPT:MAX", help="Batch sizes to accept [default: 1:8:64]."),
    ] = None,
    flavor: Annotated[
        str,
        typer.Option(
            help="auto, tensorrt (for this machine's GPU) or rtx (TensorRT-RTX, needs no GPU)."
        ),
    ] = "auto",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="RTX: compute capability to build for, such as sm89; repeatable "
            "[default: sm80 and newer].",
            show_default=False,
        ),
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="Scratch memory limit.")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Build somebody's own ONNX classifier (ImageNet preprocessing)."
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of bundles, for --onnx and to find the latest in.")
    ] = Path("artifacts"),
    force: Annotated[bool, typer.Option("--force", help="Build even if nothing changed.")] = False,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Build a TensorRT engine and prove its precision.

    The proof is the built engine's own layer report: an --fp16 or --bf16 engine with a
    convolution in float32 is an error.

    \b
    Example:
    rexdeploy build-trt --fp16 --batch 1:8:32
    rexdeploy build-trt artifacts/rexnet_1.5 --fp16 --target sm86 --target sm89
    """
    check_json(json)
    from rexdeploy.bundle.manifest import BatchRange
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.steps.build_trt import build_trt as run
    from rexdeploy.steps.import_onnx import import_onnx

    if onnx is not None and bundle is not None:
        raise UsageError("got a bundle and --onnx, expected one of them")
    batches = None if batch is None else BatchRange.parse(batch)
    if onnx is None:
        from rexdeploy.cli.detectors import build_engines, is_detector, only_for

        if is_detector(bundle, out):
            only_for(
                "a detector's engines have no such option",
                bf16=bf16,
                int8=int8,
                batch=batch is not None,
                flavor=flavor not in ("auto", "rtx"),
                force=force,
            )
            build_engines(bundle, out, fp16, target or [], workspace, quiet, json)
            return
    command = command_line()
    with bounded(), progress(quiet) as report:
        result = run(
            import_onnx(onnx, out=out, batch=batches, force=force, command=command)
            if onnx
            else Bundle.find(bundle, out),
            fp16=fp16,
            bf16=bf16,
            int8=int8,
            batch=batches,
            flavor=flavor,
            target=target or (),
            workspace=workspace,
            force=force,
            command=command,
            report=report,
        )
    emit(json, result)
    if not quiet and json != Path("-"):
        show_build(result)


def show_build(result: BuildResult) -> None:
    """The engine, and the proof of its precision."""
    model, engine = result.bundle.manifest.model, result.engine
    say(
        model.title,
        f"  {describe_artifact(result.bundle, result.engine)}",
        f"  {engine.flavor} {engine.built_with.get('version')}, for {engine.targets}",
        f"  precision: {result.engine.proof.summary}" if result.engine.proof else None,
        "  INT8 on TensorRT-RTX: expect no gain over FP16 until one is measured on the GPU"
        if engine.precision == "int8" and engine.flavor == "rtx"
        else None,
        "  preprocessing is taken to be ImageNet's (mean, std, 87.5 % centre crop)"
        if model.family == "onnx"
        else None,
        "  unchanged: answered from the bundle (--force rebuilds)" if result.reused else None,
        "next: rexdeploy verify",
    )
