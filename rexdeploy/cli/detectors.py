"""What `export`, `verify` and `predict` say of detectors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rexdeploy.cli.console import describe_artifact, emit, print_table, progress, say
from rexdeploy.cli.shared import command_line
from rexdeploy.errors import UsageError
from rexdeploy.machine import bounded
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.detection.export import DetectorExport
    from rexdeploy.detection.verify import DetectorVerification
    from rexdeploy.inference.detections import DetectionRow


def is_detector(bundle: Path | None, root: Path | None = None) -> bool:
    """Whether a command's bundle holds a detector; raises UsageError where there is none."""
    from rexdeploy.bundle.manifest import TASKS
    from rexdeploy.bundle.store import DEFAULT_ROOT, Bundle

    found = Bundle.find(bundle, root or DEFAULT_ROOT, tasks=TASKS)
    return found.manifest.model.task != "classify"


def only_for(what: str, **given: bool) -> None:
    """Raises UsageError for the options that were given and that `what` has not."""
    options = [f"--{name.replace('_', '-')}" for name, is_given in given.items() if is_given]
    if options:
        raise UsageError(f"{', '.join(options)}: {what}; leave it out")


def show_detector_export(result: DetectorExport) -> None:
    """The new bundle's graphs, and how far they are from the network."""
    bundle, whole = result.bundle, result.whole
    worst = max(result.comparisons, key=lambda comparison: comparison.share)
    untrained = None
    if not result.heads_trained:
        untrained = "  the heads are untrained (seeded): what it detects means nothing"
    say(
        bundle.manifest.model.title,
        *(
            f"  {describe_artifact(bundle, item)}, {result.nodes[item.role]} nodes"
            for item in bundle.manifest.artifacts
            if item.role is not None and item.role in result.nodes
        ),
        f"  {worst.reference} -> {worst.candidate}: {worst.share:.0%} of its limit, the largest of "
        f"{len(result.comparisons)} tensors",
        f"  {whole.unmatched} of {whole.expected + whole.found} detections without a partner "
        f"(limit {whole.limit})",
        untrained,
        f"next: rexdeploy verify {bundle.path}",
    )


def build_engines(
    bundle: Path | None,
    root: Path,
    fp16: bool,
    target: list[str],
    workspace: int | None,
    quiet: bool,
    json: Path | None,
) -> None:
    """`build-trt` of a detector's bundle: an engine a stage."""
    from rexdeploy.bundle.manifest import DETECTORS
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.detection.engines import build_detector as run

    with bounded(), progress(quiet) as report:
        result = run(
            Bundle.find(bundle, root, tasks=DETECTORS),
            fp16=fp16,
            target=target,
            workspace=workspace,
            command=command_line(),
            report=report,
        )
    emit(json, result)
    if quiet or json == Path("-"):
        return
    say(result.bundle.manifest.model.title)
    for engine in result.engines:
        say(
            f"  {describe_artifact(result.bundle, engine)}, for {engine.targets}",
            f"  precision: {engine.proof.summary}" if engine.proof else None,
        )
    say("next: rexdeploy verify")


def show_detector_verification(bundle: Bundle, result: DetectorVerification) -> None:
    """Every tensor, the detections, what was skipped and why, and the verdict."""
    from rexdeploy.parity.compare import correlation_text

    say(f"{bundle.path}, {result.model}: {result.images}, each stage given the reference's inputs")
    print_table(
        ("edge", "error / limit", "rms / limit", "column r / limit", "verdict"),
        [
            (
                f"{edge.reference} -> {edge.candidate}",
                f"{edge.error:.2g} / {edge.limits.error:.2g}",
                f"{edge.rms:.2g} / {edge.limits.rms:.2g}",
                f"{correlation_text(edge.correlation)} / "
                f"{correlation_text(edge.limits.correlation)}",
                "FAILED" if edge.failures else "ok",
            )
            for edge in result.edges
        ],
    )
    for item in result.sets:
        say(
            f"{item.reference} -> {item.candidate} from end to end, {item.images} images: "
            f"{item.unmatched} of {item.expected + item.found} detections without a partner, limit "
            f"{item.limit}: {'FAILED' if item.failures else 'ok'}"
        )
    for skip in result.skipped:
        say(f"skipped {skip.file}: {skip.reason}")
    if not result.failures:
        unproven = f"; NOT verified: {len(result.skipped)} skipped" if result.skipped else ""
        say(f"passed: {len(result.edges)} tensors are within their limits{unproven}")


def run_detection(
    image: list[Path],
    bundle: Path | None,
    score: float,
    max_detections: int,
    draw: Path | None,
    backend: str,
    require_signature: Path | None,
    quiet: bool,
    json: Path | None,
) -> None:
    """`predict` with a detector: what each image shows, and its exit code."""
    from rexdeploy.inference.detections import detect as run

    silent = quiet or json == Path("-")
    result = run(
        image,
        bundle,
        score=score,
        max_detections=max_detections,
        draw=draw,
        backend=backend,
        require_signature=require_signature,
        began=lambda detector: None if silent else say(f"{detector.title} on {detector.backend}"),
        each=lambda row: show_objects(row, silent),
    )
    emit(json, result)
    if draw is not None and not silent:
        say(f"drawn: {draw}")
    if result.errors:
        raise typer.Exit(UsageError.exit_code)


def show_objects(row: DetectionRow, silent: bool) -> None:
    """One image's objects, unless `silent`; on stderr, why it has none."""
    if row.error is not None:
        say("error: " + one_line(f"{row.file}: {row.error}"), to_stderr=True)
    elif not silent:
        lines = (
            f"  {item.score:7.2%}  {item.label}  " + " ".join(f"{side:.0f}" for side in item.box)
            for item in row.objects
        )
        say(row.file, *(lines if row.objects else ("  nothing",)))
