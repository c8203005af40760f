"""What rounding to 16 bits does to a graph, computed apart from the graph that was converted.

A 16-bit graph is held against its float32 parent rounded at the same places. Made here from the
parent's own nodes and weights, and only told by the candidate *where* it rounds, this twin shares
nothing with the converter. In ONNX Runtime the two agree to the bit, so that whatever else is wrong
with the graph stands out, however small it is beside the rounding.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rexdeploy.bundle.precision import PRECISIONS
from rexdeploy.errors import BackendUnavailable
from rexdeploy.graphs.cast import cast_node
from rexdeploy.graphs.read import element_types, node_name, put_nodes

SIXTEEN_BITS = frozenset(kind.onnx for kind in PRECISIONS.values() if kind.size_bytes == 2)

_PEAK = "/peak"


@dataclass(frozen=True)
class Twin:
    """A float32 graph that rounds where another graph computes in 16 bits."""

    model: ModelProto
    rounded: dict[str, str]  # tensors before they are rounded to float16, and the node of each
    float32: frozenset[str]  # names of the parent's nodes that are not rounded


def twin(parent: ModelProto, candidate: ModelProto) -> Twin | None:
    """The float32 graph `parent`, rounded wherever `candidate` computes in 16 bits.

    None where the candidate has not the parent's nodes by their outputs' names, casts aside.
    """
    there = _Types(candidate)
    model = ModelProto()
    model.CopyFrom(onnx.shape_inference.infer_shapes(parent, data_prop=True))
    types = element_types(model.graph)
    nodes: list[NodeProto] = []
    made: set[str] = set()  # rounded copies
    is_rounded: dict[str, int] = {}  # tensors that their maker rounds, and to what
    exact: dict[str, str] = {}
    untouched = []
    for node in model.graph.node:
        match = there.node(node)
        if match is None:
            return None
        other, outputs = match
        touched = False
        for index, name in enumerate(node.input):
            kind = there.narrowest(other.input[index]) if index < len(other.input) else 0
            if types.get(name) != TensorProto.FLOAT or kind not in SIXTEEN_BITS:
                continue
            if is_rounded.get(name) == kind:
                continue
            touched |= there.of(other.input[index]) == kind
            key = f"{name}/{kind}"
            if key not in made:
                made.add(key)
                nodes += _round(name, key, kind)  # weights too: onnxruntime rounds, not we
            node.input[index] = key
        after: list[NodeProto] = []
        for index, name in enumerate(list(node.output)):
            kind = there.of(name)  # a graph's output is float32, and rounded before it is cast
            if kind not in SIXTEEN_BITS and index < len(outputs):
                kind = there.of(outputs[index])
            if types.get(name) != TensorProto.FLOAT or kind not in SIXTEEN_BITS:
                continue
            touched = True
            before = f"{name}/exact"
            node.output[index] = before
            after += _round(before, name, kind)
            is_rounded[name] = kind
            if kind == TensorProto.FLOAT16:
                exact[before] = node_name(node)
        if not touched:
            untouched.append(node_name(node))
        nodes += [node, *after]
    put_nodes(model.graph, nodes)
    del model.graph.value_info[:]
    return Twin(model, exact, frozenset(untouched))


def widened(model: ModelProto) -> ModelProto:
    """The graph with float32 in place of all its 16-bit types: its own weights, no rounding.

    Against it the graph shows how much its rounding does, whoever has made it and from what.
    """
    wide = ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for tensor in graph.initializer:
        _widen(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            elif attribute.name in ("to", "dtype") and attribute.i in SIXTEEN_BITS:
                attribute.i = TensorProto.FLOAT
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type in SIXTEEN_BITS:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del graph.value_info[:]
    return wide


def sixteen_bit_types(model: ModelProto) -> frozenset[int]:
    """Which 16-bit types any tensor of the graph has."""
    types = element_types(onnx.shape_inference.infer_shapes(model, data_prop=True).graph)
    return frozenset(types.values()) & SIXTEEN_BITS


def with_peaks(model: ModelProto, tensors: Iterable[str]) -> tuple[ModelProto, dict[str, str]]:
    """A copy that also puts out the largest absolute value of each of these tensors.

    Returns it with the names of the new outputs (scalars), by tensor.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    outputs = {}
    for name in tensors:
        outputs[name] = name + _PEAK
        copy.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"{name}/abs"]),
                helper.make_node("ReduceMax", [f"{name}/abs"], [outputs[name]], keepdims=0),
            ]
        )
        copy.graph.output.append(
            helper.make_tensor_value_info(outputs[name], TensorProto.FLOAT, [])
        )
    return copy, outputs


class _Types:
    """The element types of a graph's tensors, and its nodes by what they put out."""

    def __init__(self, model: ModelProto) -> None:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._types = element_types(inferred)
        self._makers = {name: node for node in inferred.node for name in node.output if name}

    def of(self, name: str) -> int:
        return self._types.get(name, 0)

    def narrowest(self, name: str) -> int:
        """The type of a tensor, or that from which a cast has just widened it."""
        maker = self._makers.get(name)
        if (
            maker is not None
            and maker.op_type == "Cast"
            and self.of(maker.input[0]) in SIXTEEN_BITS
        ):
            return self.of(maker.input[0])
        return self.of(name)

    def node(self, node: NodeProto) -> tuple[NodeProto, Sequence[str]] | None:
        """The node that does the same here, and its outputs' names; None if there is none.

        A graph's output keeps its name and type by a cast, behind which the node's own lies.
        """
        maker = self._makers.get(node.output[0])
        if maker is not None and maker.op_type == "Cast" and node.op_type != "Cast":
            maker = self._makers.get(maker.input[0])
        if maker is None or maker.op_type != node.op_type:
            return None
        return maker, list(maker.output)


def _round(source: str, target: str, kind: int) -> list[NodeProto]:
    narrow = f"{target}/narrow"
    return [
        helper.make_node("Cast", [source], [narrow], to=kind),
        helper.make_node("Cast", [narrow], [target], to=TensorProto.FLOAT),
    ]


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in SIXTEEN_BITS:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def as_typed(model: ModelProto) -> ModelProto:
    """A copy that ONNX Runtime on a CPU computes in the graph's own types, with all types told.

    Raises BackendUnavailable where it does not round float16 (`check_literal`).
    """
    copy = ModelProto()
    copy.CopyFrom(onnx.shape_inference.infer_shapes(model, data_prop=True))
    types = element_types(copy.graph).values()
    if TensorProto.BFLOAT16 in types:
        _emulate_bf16(copy.graph)
    elif TensorProto.FLOAT16 in types:
        check_literal()
        _make_literal(copy.graph)
    return copy


def _make_literal(graph: GraphProto) -> None:
    """Makes onnxruntime round every float16 tensor of the graph.

    Between float16 nodes that it has no float16 code for, onnxruntime (1.32, on x86, at every
    optimisation level) keeps float32 and rounds nothing: an overflow that an engine would have is
    not seen. Two Concats of one tensor, which it has in float16 and does not remove, make it round;
    a single one between other nodes it would do in float32 as well.
    """
    halves = {
        value.name
        for value in [*graph.value_info, *graph.output]
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
        and len(value.type.tensor_type.shape.dim)  # Concat takes no scalars
    }
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for index, name in enumerate(node.output):
            if name in halves:
                stages = [f"{name}/unrounded", f"{name}/rounded", name]
                node.output[index] = stages[0]
                nodes += [
                    helper.make_node("Concat", [source], [target], axis=0)
                    for source, target in itertools.pairwise(stages)
                ]
    put_nodes(graph, nodes)


def check_literal() -> None:
    """Raises BackendUnavailable unless `_make_literal` really makes onnxruntime round here.

    Without that, no float16 graph that onnxruntime runs can be judged: 60000 + 60000 would be
    120000, where an engine has infinity. Cheap after the first call in a process.
    """
    found = _literal_sum()
    if not math.isinf(found):
        raise BackendUnavailable(
            f"onnxruntime computes float16 graphs in a wider type here: 60000 + 60000 gave "
            f"{found:g}, expected infinity, so a 16-bit graph cannot be judged; "
            "install another onnxruntime"
        )


@functools.cache
def _literal_sum() -> float:
    """60000 + 60000 in float16, made literal: halved in the graph, and doubled here."""
    import onnxruntime

    half = TensorProto.FLOAT16
    graph = helper.make_graph(
        [
            helper.make_node("Add", ["x", "x"], ["sum"]),
            helper.make_node("Mul", ["sum", "half"], ["y"]),
        ],
        "rounding",
        [helper.make_tensor_value_info("x", half, [1])],
        [helper.make_tensor_value_info("y", half, [1])],
        [numpy_helper.from_array(np.array([0.5], np.float16), "half")],
        value_info=[helper.make_tensor_value_info("sum", half, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    _make_literal(model.graph)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": np.array([60000], np.float16)})
    return 2 * float(result[0])


def _emulate_bf16(graph: GraphProto) -> None:
    """Makes a bfloat16 graph compute in float32 and round every tensor to bfloat16.

    onnxruntime (1.32) has bfloat16 casts and no bfloat16 arithmetic on a CPU. It rounds what a GPU
    rounds, products accumulated in float32 included; an engine that fuses nodes rounds less often.
    """
    rounded = {name for name, kind in element_types(graph).items() if kind == TensorProto.BFLOAT16}
    nodes: list[NodeProto] = []
    widened: set[str] = set()
    for node in graph.node:
        outputs = list(node.output)
        if node.op_type != "Cast":
            for index, name in enumerate(node.input):
                if name in rounded:
                    node.input[index] = f"{name}_widened"
                    if name not in widened:
                        widened.add(name)
                        nodes.append(cast_node(name, f"{name}_widened", TensorProto.FLOAT))
            for index, name in enumerate(outputs):
                if name in rounded:
                    node.output[index] = f"{name}_exact"
        nodes.append(node)
        for name, inner in zip(outputs, node.output, strict=True):
            if name != inner:
                nodes.append(cast_node(inner, name, TensorProto.BFLOAT16))
    put_nodes(graph, nodes)
