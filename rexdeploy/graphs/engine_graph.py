"""The graph that an engine is built from, and the steps to it from a bundle's first graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto

from rexdeploy.bundle.manifest import Artifact
from rexdeploy.bundle.precision import Precision
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.graphs.cast import BF16_REVISION, FP16_REVISION, to_bf16, to_fp16
from rexdeploy.graphs.read import parse
from rexdeploy.graphs.shortcuts import PLAIN_ADDS_REVISION, to_plain_adds
from rexdeploy.graphs.wrapper import change_core
from rexdeploy.progress import Report

REVISION = "revision"
"""In built_with: which revision of the pass that made the graph."""
TUNED = "float32"
"""In built_with of a graph that tune-precision mixed: what it keeps in float32."""


@dataclass(frozen=True)
class Source:
    """What an engine is built from: a bundle, and files that are not in it yet."""

    bundle: Bundle
    new_files: dict[str, bytes] = field(default_factory=dict)
    is_new: bool = False  # the bundle is yet to be written

    def read(self, artifact: Artifact) -> bytes:
        """An artifact's bytes, wherever they are; raises UsageError."""
        return self.new_files.get(artifact.file) or self.bundle.read(artifact)


@dataclass(frozen=True)
class Form:
    """A graph to build from, and those on the way to it that had to be made."""

    artifact: Artifact
    data: bytes
    made: tuple[Artifact, ...]  # parents first
    files: dict[str, bytes]  # of `made`, by name


def engine_form(
    source: Source,
    root: Artifact,
    wanted: Precision | None,
    command: str,
    report: Report,
    force: bool = False,
) -> Form:
    """The graph to build an engine of the `wanted` precision from (None: as the root is).

    Each step is a file, so that `verify` can hold each to a limit of its own: TensorRT's form of
    the shortcuts is exact, float16 is not. A step's file that is in the bundle already is taken as
    it is (a float16 graph can be one that tune-precision has mixed), unless another revision of the
    step's pass made it, or `force` asks for it anew. Where that loses what tune-precision has
    found, `report` is told so. Raises UsageError for a root that is not float32 where another
    precision is wanted.
    """
    steps = []
    if root.built_with.get("align", "off") != "off":  # our own export, of a known structure
        notes = {"shortcuts": "plain adds", REVISION: PLAIN_ADDS_REVISION}
        steps.append(_Step("fp32.tensorrt.onnx", root.precision, to_plain_adds, notes))
    if wanted is not None and root.precision != wanted:
        if root.precision != "fp32":
            raise UsageError(
                f"{root.file} is a graph in {root.precision or 'mixed or other types'}; --{wanted} "
                "needs one in float32"
            )
        convert = to_fp16 if wanted == "fp16" else to_bf16
        revision = FP16_REVISION if wanted == "fp16" else BF16_REVISION
        steps.append(_Step(f"{wanted}.onnx", wanted, convert, {REVISION: revision}))
    artifact, data = root, source.read(root)
    made: list[Artifact] = []
    files: dict[str, bytes] = {}
    for step in steps:
        existing = source.bundle.manifest.find_file(step.file)
        reason = None
        if existing is not None:
            reason = _out_of_date(existing, step, artifact, force)
            if reason is None:
                try:
                    artifact, data = existing, source.read(existing)
                    continue
                except UsageError as error:
                    reason = str(error)
        report(f"making {step.file}" + (f" again, since {reason}" if reason else ""))
        if existing is not None and TUNED in existing.built_with:
            report(
                f"{step.file} was tune-precision's, with {existing.built_with[TUNED]} in float32, "
                "and is replaced by the plain one; 'rexdeploy tune-precision' makes it again"
            )
        graph = parse(data, artifact.file)
        changed = change_core(graph, step.make)
        if changed == graph:
            continue  # every shortcut is a plain Add already
        data = changed.SerializeToString(deterministic=True)
        artifact = Artifact(
            "onnx",
            step.file,
            sha256(data),
            parent_sha256=artifact.sha256,
            precision=step.precision,
            batch=root.batch,
            built_with={"onnx": onnx.__version__} | step.notes,
            command=command,
        )
        made.append(artifact)
        files[step.file] = data
    return Form(artifact, data, tuple(made), files)


def _out_of_date(existing: Artifact, step: _Step, parent: Artifact, force: bool) -> str | None:
    """Why a step's file in the bundle is not what the step would make; None if it may be taken."""
    made_by, revision = existing.built_with.get(REVISION), step.notes[REVISION]
    if force:
        return "--force asks for it"
    if existing.parent_sha256 != parent.sha256:
        return f"it was not made from this {parent.file}"
    if made_by != revision:
        made_by = f"revision {made_by}" if made_by else "no known revision"
        return f"{made_by} of its pass made it, and this is revision {revision}"
    return None


@dataclass(frozen=True)
class _Step:
    """A form of a graph that is kept as a file of its own."""

    file: str
    precision: Precision | None
    make: Callable[[ModelProto], ModelProto]
    notes: dict[str, str]  # for built_with
