"""rexdeploy verify: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, print_table, progress, say
from rexdeploy.cli.shared import (
    BundleArgument,
    Json,
    Quiet,
    RequireSignature,
    command_line,
    only_warned_of,
)
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.machine import bounded
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.detection.verify import DetectorVerification
    from rexdeploy.parity.localize import Localization
    from rexdeploy.steps.verify import Verification


def verify(
    bundle: BundleArgument = None,
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Images to compare over [default: synthetic ones]."),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="How many images at the most [default: 16, of a detector 2]."),
    ] = None,
    candidate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Judge this ONNX or engine instead of the bundle's."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            help="Use only this backend (onnxruntime, onnxruntime-cuda, openvino, tensorrt, "
            "tensorrt-rtx); "
            "repeatable.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(help="Fail if this backend cannot run; repeatable.", show_default=False),
    ] = None,
    localize: Annotated[
        bool,
        typer.Option(
            "--localize",
            help="Print every block's own error, and walk the 16-bit graphs' blocks, too.",
        ),
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(
            help="With --candidate: fp32, fp16 or bf16, where it does not tell [default: judged "
            "as fp32].",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the walk's errors; a .png or .svg."),
    ] = None,
    require_signature: RequireSignature = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Compare the logits of every file with the network's.

    Errors are in units of signal: the spread of the reference's logits over the images; their
    limits follow what rounding does in this network. Exit code 3 names the broken edge. What
    cannot run here is 'skipped', which is not a pass.

    \b
    Example:
    rexdeploy verify --images photos/ --require tensorrt
    rexdeploy verify --candidate other.onnx --localize
    """
    check_json(json)
    if plot is not None:
        from rexdeploy.cli.plot import check_plot, plot_localizations

        check_plot(plot)
        if not localize:
            raise UsageError("--plot draws what --localize finds: give both")
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.cli.detectors import is_detector, only_for
    from rexdeploy.errors import VerificationFailed

    if is_detector(bundle):
        only_for(
            "not for a detector's bundle",
            candidate=candidate is not None,
            backend=bool(backend),
            require=bool(require),
            localize=localize,
            precision=precision is not None,
        )
        _verify_detector(bundle, images, samples, require_signature, quiet, json)
        return
    from rexdeploy.steps.verify import verify as run

    opened = Bundle.find(bundle)
    with bounded(), progress(quiet) as report:
        result = run(
            opened,
            images=images,
            samples=samples,
            candidate=candidate,
            backend=backend or (),
            require=require or (),
            localize=localize,
            precision=precision,
            require_signature=require_signature,
            report=report,
        )
    if not quiet and json != Path("-"):
        show_verification(opened, result, every_block=localize)
    if candidate is None and require_signature is None:  # storing drops the signature
        _store(opened, result)
    with only_warned_of(bool(result.failures)):
        emit(json, result)
        if plot is not None:
            plot_localizations(result.localizations, plot)
    if result.failures:
        raise VerificationFailed("; ".join(result.failures))


def _verify_detector(
    bundle: Path | None,
    images: Path | None,
    samples: int | None,
    require_signature: Path | None,
    quiet: bool,
    json: Path | None,
) -> None:
    from rexdeploy.bundle.manifest import TASKS
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.cli.detectors import show_detector_verification
    from rexdeploy.detection.verify import SAMPLES, verify_detector
    from rexdeploy.errors import VerificationFailed

    opened = Bundle.find(bundle, tasks=TASKS)
    with bounded(), progress(quiet) as report:
        result = verify_detector(
            opened,
            images=images,
            samples=SAMPLES if samples is None else samples,
            require_signature=require_signature,
            report=report,
        )
    if not quiet and json != Path("-"):
        show_detector_verification(opened, result)
    if require_signature is None:  # storing drops the signature
        _store(opened, result)
    with only_warned_of(bool(result.failures)):
        emit(json, result)
    if result.failures:
        raise VerificationFailed("; ".join(result.failures))


def _store(bundle: Bundle, result: Verification | DetectorVerification) -> None:
    """Keeps the result in the bundle, where it can be written: on a serving machine it may not."""
    from rexdeploy.bundle.store import SIGNATURE

    signed = (bundle.path / SIGNATURE).exists()
    try:
        result.store(bundle, command_line())
        if signed:
            say(
                f"warning: {SIGNATURE} is dropped, since verify.json is new: sign again; with "
                "--require-signature nothing is stored",
                to_stderr=True,
            )
    except RexdeployError as error:
        say(one_line(f"warning: verify.json is not stored: {error}"), to_stderr=True)


def show_verification(bundle: Bundle, result: Verification, every_block: bool) -> None:
    """Every comparison, what was skipped and why, and the verdict."""
    from rexdeploy.parity.compare import correlation_text
    from rexdeploy.parity.ranges import HEADROOM

    batches = ", ".join(map(str, result.batches)) or "none"
    say(
        f"{bundle.path}, {result.model}: {result.images}, batches {batches}; "
        f"signal {result.signal:.3g}" + f" ({result.compared})" * (result.compared != "logits")
    )
    columns = ("edge", "error / limit", "rms / limit", "class r / limit", "top-1", "verdict")
    lines = [
        (
            f"{comparison.reference} -> {comparison.candidate}",
            f"{comparison.error:.2g} / {comparison.limits.error:.2g}",
            f"{comparison.rms:.2g} / {comparison.limits.rms:.2g}",
            f"{correlation_text(comparison.correlation)} / "
            f"{correlation_text(comparison.limits.correlation)}",
            f"{comparison.top1:.1%}",
            "FAILED" if comparison.failures else "ok",
        )
        for comparison in (*result.edges, *result.totals)
    ]
    for verdict, items in (("FAILED", result.broken), ("skipped", result.skipped)):
        lines += [(f"{item.reference} -> {item.candidate}", *"----", verdict) for item in items]
    print_table(columns, lines)
    for skip in result.skipped:
        say(f"skipped {skip.candidate}: {skip.reason}")
    for localization in result.localizations:
        if every_block:
            show_localization(localization)
        elif not localization.over:
            worst = max(localization.blocks, key=lambda block: block.own)
            say(
                f"{localization.candidate}: each of {len(localization.blocks)} blocks does what "
                f"{localization.reference}'s does (worst {worst.own:.1e} of its size, limit "
                f"{localization.limit:g})"
            )
    for reason in result.not_localized:
        say(f"not walked: {reason}")
    for room in result.headroom:
        say(
            f"{room.file}: largest float16 value {room.peak:.4g} (node {room.node}), "
            f"{room.factor:.3g} times within its range"
        )
        if room.is_low:
            say(
                f"warning: {room.file}: below {HEADROOM:g} times, other images may overflow: judge "
                "it over your own (--images), or see 'rexdeploy tune-precision' and "
                "build-trt --bf16"
            )
    if result.images.endswith("synthetic images"):
        say("synthetic images show what computes wrongly; --images DIR shows what yours do")
    if not result.failures:
        unproven = f"; NOT verified: {len(result.skipped)} skipped" if result.skipped else ""
        edges = "1 edge is within its limits"
        if len(result.edges) > 1:
            edges = f"{len(result.edges)} edges are within their limits"
        say(f"passed: {edges}{unproven}")


def show_localization(result: Localization) -> None:
    """The error block by block, and the first block and node that add more than their share."""
    say(
        "",
        f"{result.reference} -> {result.candidate} block by block, {result.images} images: of the "
        "tensor's spread; and of its size,",
        "when the block is given the reference's own input",
    )
    lines = [
        (
            block.name,
            f"{block.total:.1e}",
            f"{block.own:.1e}",
            f"{result.limit:g}",
            "OVER" if block.name in result.over else "ok",
        )
        for block in result.blocks
    ]
    print_table(("block", "error so far", "its own", "limit", ""), lines)
    culprit = result.culprit
    if culprit is None and result.is_finite:
        say(f"{result.candidate}: no block stands out")
        return
    if culprit is None:
        say(
            f"{result.candidate}: NaN or infinite values from {result.first_nonfinite} on, though "
            "no block makes them of the reference's own input"
        )
        return
    weight = f", weights {culprit.node.weight}" if culprit.node.weight else ""
    say(
        f"{result.candidate}: leaves {result.reference} in {culprit.block}, first at node "
        f"{culprit.node.name} ({culprit.node.op_type}{weight})"
    )
