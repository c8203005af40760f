"""The graph that an engine is built from, and the steps to it from a bundle's first graph.

TensorRT wants every shortcut as one Add of two tensors of equal width. `models/align.py` cuts the
last convolution of a block in two where the shortcut reaches only some of its channels, and joins
the parts by Concat: the fastest form in ONNX Runtime on a CPU. TensorRT fuses a plain Add into the
convolution before it and leaves a Concat alone: of V1 1.0, TensorRT-RTX 1.7 makes 106 layers of one
form and 148 of the other. torch exports the wide form node for node as `to_plain_adds` makes it,
but takes six to ten seconds more, in every export or on the machine that builds (V1 1.0).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

from rexdeploy.arrays import Float32
from rexdeploy.bundle.manifest import REVISION, Artifact
from rexdeploy.bundle.precision import Precision
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.graphs.cast import REVISIONS, to_precision
from rexdeploy.graphs.read import parse
from rexdeploy.graphs.wrapper import change_core
from rexdeploy.progress import Report


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
    if root.multiple:  # our own export, of a known structure
        notes = {"shortcuts": "plain adds", REVISION: PLAIN_ADDS_REVISION}
        steps.append(_Step("fp32.tensorrt.onnx", root.precision, to_plain_adds, notes))
    if wanted is not None and root.precision != wanted:
        if root.precision != "fp32":
            raise UsageError(
                f"{root.file} is a graph in {root.precision or 'mixed or other types'}; --{wanted} "
                "needs one in float32"
            )
        convert = functools.partial(to_precision, precision=wanted)
        steps.append(_Step(f"{wanted}.onnx", wanted, convert, {REVISION: REVISIONS[wanted]}))
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
        if existing is not None and existing.kept_in_float32:
            report(
                f"{step.file} was tune-precision's, with {existing.kept_in_float32} in float32, "
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
    made_by, revision = existing.revision, step.notes[REVISION]
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


PLAIN_ADDS_REVISION = "1"
"""Of `to_plain_adds`: raise it with every change of what the pass makes."""


def to_plain_adds(model: ModelProto) -> ModelProto:
    """A copy of an aligned export in which a shortcut's tensors all have the greatest width of all.

    The channels that are added are zero: zero rows and bias in the convolutions that produce a
    tensor, zero columns in those that read it. The parts are known by the names of their weights,
    which are those of `align.AlignedBottleneck`; a graph without them comes back as it was.
    """
    plain = ModelProto()
    plain.CopyFrom(model)
    nodes = plain.graph.node
    named = {n.input[1].removesuffix(".weight"): n for n in nodes if n.op_type == "Conv"}
    blocks = [name.removesuffix(".project") for name in named if name.endswith(".project")]
    if not any(f"{block}.rest" in named for block in blocks):
        return plain
    parameters = _Parameters(plain.graph)
    width = 0  # of the next block's output, where its shortcut brings this one's
    for block in reversed(blocks):
        project, rest = named[f"{block}.project"], named.get(f"{block}.rest")
        weight, bias = parameters.get(project)
        trunk = project.output[0]
        adds = [node for node in nodes if node.op_type == "Add" and trunk in node.input]
        # Its own shortcut is all that reads it; that of the next block is not.
        add = adds[0] if adds and parameters.readers[trunk] == 1 else None
        if add is not None:
            trunk = add.output[0]
        if rest is not None and add is not None:  # only a shortcut leaves a rest
            parts = zip((weight, bias), parameters.get(rest), strict=True)
            weight, bias = map(np.concatenate, parts)
            (concat,) = (node for node in nodes if rest.output[0] in node.input)
            trunk = add.output[0] = concat.output[0]
            nodes.remove(concat)
            nodes.remove(rest)
        width = max(width, len(weight))
        parameters.put(project, _wider(weight, 0, width), _wider(bias, 0, width))
        for conv in nodes:
            if conv.op_type == "Conv" and conv.input[0] == trunk:
                columns, own_bias = parameters.get(conv)
                parameters.put(conv, _wider(columns, 1, width), own_bias)
        width = width if add is not None else 0
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in plain.graph.initializer if tensor.name in used]
    del plain.graph.initializer[:], plain.graph.value_info[:]
    plain.graph.initializer.extend(kept)
    plain = onnx.shape_inference.infer_shapes(plain)
    onnx.checker.check_model(plain, full_check=True)
    return plain


class _Parameters:
    """The weights and biases of a graph's convolutions."""

    def __init__(self, graph: GraphProto) -> None:
        self.tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.readers = Counter(name for node in graph.node for name in node.input)
        self._graph = graph

    def get(self, conv: NodeProto) -> tuple[Float32, Float32]:
        """A weight and a bias; of zeros, where the simplifier has dropped such a one."""
        weight: Float32 = self.tensors[conv.input[1]]
        if len(conv.input) > 2:
            return weight, self.tensors[conv.input[2]]
        return weight, np.zeros(len(weight), np.float32)

    def put(self, conv: NodeProto, weight: Float32, bias: Float32) -> None:
        """Gives a convolution wider ones than it has; who else reads the old ones keeps them."""
        if weight.shape == self.tensors[conv.input[1]].shape:
            return
        own = f"{conv.output[0]}_wide"
        del conv.input[1:]
        for name, value in ((f"{own}_weight", weight), (f"{own}_bias", bias)):
            conv.input.append(name)
            self.tensors[name] = value
            self._graph.initializer.append(numpy_helper.from_array(value, name))


def _wider(value: Float32, axis: int, width: int) -> Float32:
    """The array with zeros up to `width` along an axis."""
    padding = [(0, 0)] * value.ndim
    padding[axis] = (0, width - value.shape[axis])
    return np.pad(value, padding)
