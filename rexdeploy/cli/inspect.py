"""rexdeploy inspect: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, listed, progress, say
from rexdeploy.cli.shared import Json, Quiet
from rexdeploy.errors import RexdeployError
from rexdeploy.machine import bounded
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.steps.inspect import Inspection


def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX graph or an engine.")],
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Show what a graph or an engine is, in which types it computes, and what can run it here.

    Needs no GPU. Exit code 3: it does not compute in the precision that its bundle says.

    \b
    Example:
    rexdeploy inspect artifacts/rexnet_1.5/fp16.onnx
    """
    check_json(json)
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.steps.inspect import inspect as run

    with bounded(), progress(quiet) as report:
        result = run(file, report=report)
    emit(json, result)
    if not quiet and json != Path("-"):
        show_inspection(result)
    if result.proof is not None and not result.proof.holds:
        raise VerificationFailed(f"{file}: not in the precision asked for: {result.proof.summary}")
    for runner in result.runners:
        if runner.conflict:
            raise RexdeployError(f"{file}: {runner.reason}")


def show_inspection(result: Inspection) -> None:
    """The file's header or signature, its place, the proof of its precision, what runs it here."""
    header, graph, place, proof = result.header, result.graph, result.place, result.proof
    say(f"{result.file}: {result.kind}, {result.size_bytes / 2**20:.1f} MiB")
    if header is not None:
        targets = f", for {', '.join(header.targets)}" if header.targets else ""
        say(f"  version {header.version or 'not told by its header'}{targets}")
    if graph is not None:
        say(
            f"  opset {graph.opset}, {graph.nodes} nodes",
            *(f"  input {line}" for line in graph.inputs),
            *(f"  output {line}" for line in graph.outputs),
            *(f"  {one_line(f'{name} = {text}', 160)}" for name, text in graph.metadata.items()),
        )
    if place is None:
        say("  bundle: in none")
    else:
        say(f"  bundle: {place.bundle}, {place.model}: {' -> '.join(place.chain)}")
        if place.artifact.batch is not None:
            say(f"  batch {place.artifact.batch}")
    say(
        f"  precision: {proof.summary}" if proof else None,
        f"  precision, by: {result.proof_of}" if proof else f"  precision: {result.proof_of}",
        f"  not as asked: {listed(proof.differing)}" if proof and proof.differing else None,
        f"  not found in it: {listed(proof.not_found)}" if proof and proof.not_found else None,
        *(
            f"  {runner.backend}: {'can load it here (not run)' if runner.ready else 'no: '}"
            f"{runner.reason}"
            for runner in result.runners
        ),
    )
