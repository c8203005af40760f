"""The graph that an engine is built from, and the steps to it from a bundle's first graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx
from onnx import ModelProto

from rexdeploy.bundle import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.interface import change_core
from rexdeploy.manifest import Artifact, Precision
from rexdeploy.precision import parse, to_bf16, to_fp16
from rexdeploy.progress import Report
from rexdeploy.shortcuts import to_plain_adds


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
    source: Source, root: Artifact, wanted: Precision | None, command: str, report: Report
) -> Form:
    """The graph to build an engine of the `wanted` precision from (None: as the root is).

    Each step is a file, so that `verify` can hold each to a limit of its own: TensorRT's form of
    the shortcuts is exact, float16 is not. A step's file that is in the bundle already is taken as
    it is: a float16 graph can be one that tune-precision has mixed. Raises UsageError for a root
    that is not float32 where another precision is wanted.
    """
    steps = []
    if root.built_with.get("align", "off") != "off":  # our own export, of a known structure
        notes = {"shortcuts": "plain adds"}
        steps.append(_Step("fp32.tensorrt.onnx", root.precision, to_plain_adds, notes))
    if wanted is not None and root.precision != wanted:
        if root.precision != "fp32":
            raise UsageError(
                f"{root.file} is a graph in {root.precision or 'mixed or other types'}; --{wanted} "
                "needs one in float32"
            )
        convert = to_fp16 if wanted == "fp16" else to_bf16
        steps.append(_Step(f"{wanted}.onnx", wanted, convert, {}))
    artifact, data = root, source.read(root)
    made: list[Artifact] = []
    files: dict[str, bytes] = {}
    for step in steps:
        existing = source.bundle.manifest.find_file(step.file)
        if existing is not None and existing.parent_sha256 == artifact.sha256:
            try:
                artifact, data = existing, source.read(existing)
                continue
            except UsageError as error:
                report(f"making it again, since {error}")
        report(f"making {step.file}")
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


@dataclass(frozen=True)
class _Step:
    """A form of a graph that is kept as a file of its own."""

    file: str
    precision: Precision | None
    make: Callable[[ModelProto], ModelProto]
    notes: dict[str, str]  # for built_with
