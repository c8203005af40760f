"""The typed FP16 graph: an ONNX model whose arithmetic is float16, with float32 input and output.

TensorRT 11 takes the graph's types literally and has no FP16 switch, so the precision of an engine
is decided here. Our own conversion, since the known converters clamp weights silently (onnxruntime
1.32: to 1e-7 and 1e4), which is a change of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.manifest import Precision

ARITHMETIC_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

_FLOAT, _HALF = TensorProto.FLOAT, TensorProto.FLOAT16
_FP16_MAX = float(np.finfo(np.float16).max)


def to_fp16(model: ModelProto, keep: Collection[str] = ()) -> ModelProto:
    """A copy of `model` in float16, but for its inputs and outputs, which stay float32.

    The nodes named in `keep` (see `node_name`) stay float32 as well, with casts around them.

    Every operator that ONNX defines for float16 is converted; others (and inputs such as Resize's
    scales) stay float32 behind casts. Raises UsageError for graphs with control flow and
    VerificationFailed for weights beyond float16's range.
    """
    converted = ModelProto()
    converted.CopyFrom(onnx.shape_inference.infer_shapes(model, data_prop=True))
    _Conversion(converted, keep).run()
    onnx.checker.check_model(converted, full_check=True)
    return converted


def parse(data: bytes, name: str) -> ModelProto:
    """Reads and checks an ONNX model; raises UsageError that names the file."""
    try:
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, and more
        reason = (str(error).strip().splitlines() or ["not a protobuf"])[0]
        raise UsageError(f"{name} is not a valid ONNX model ({reason})") from None
    return model


def precision_of(model: ModelProto) -> Precision | None:
    """The type of the model's convolutions and matrix products; None if it is mixed or other."""
    types = set(_arithmetic_types(model))
    if types == {_FLOAT}:
        return "fp32"
    return "fp16" if types == {_HALF} else None


def node_name(node: NodeProto) -> str:
    """A node's name; TensorRT's parser calls a nameless node after its first output."""
    return node.name or f"node_of_{node.output[0]}"


def beyond_fp16(model: ModelProto) -> set[str]:
    """The nodes that have a weight which float16 cannot hold."""
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == _FLOAT and _largest(tensor) > _FP16_MAX
    }
    return {node_name(node) for node in model.graph.node if large & set(node.input)}


def kept_float32(model: ModelProto) -> set[str]:
    """The names of the convolutions and matrix products whose weights are float32."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = _element_types(graph)
    return {
        node_name(node)
        for node in graph.node
        if node.op_type in ARITHMETIC_OPS and types.get(node.input[1]) == _FLOAT
    }


class _Conversion:
    """One pass over a topologically sorted graph, in place."""

    def __init__(self, model: ModelProto, keep: Collection[str]) -> None:
        self.graph = model.graph
        self.keep = keep
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.types = _element_types(self.graph)
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.cast_names: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        outputs = [output.name for output in self.graph.output]
        for node in list(self.graph.node):
            self._convert(node)
        for name in outputs:
            if self.types.get(name) == _HALF:
                self._restore_output(name)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]  # of float32 tensors; the checker infers them again
        used = {name for node in self.nodes for name in node.input} | set(outputs)
        kept = [tensor for tensor in self.weights.values() if tensor.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _convert(self, node: NodeProto) -> None:
        if any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            raise UsageError(
                f"node '{node.name}' is control flow ({node.op_type}), which --fp16 does not "
                "convert; export the graph in float16 from its framework and leave out --fp16"
            )
        halves = set() if node_name(node) in self.keep else self._half_parameters(node)
        for index, name in enumerate(node.input):
            if self.types.get(name) in (_FLOAT, _HALF):
                wanted = _HALF if ("in", index) in halves else _FLOAT
                node.input[index] = self._as_type(name, wanted)
        self.nodes.append(node)
        for index, name in enumerate(node.output):
            if self.types.get(name) == _FLOAT and ("out", index) in halves:
                self.types[name] = _HALF

    def _half_parameters(self, node: NodeProto) -> set[tuple[str, int]]:
        """The node's float32 inputs and outputs that the operator also defines for float16.

        An output counts only if its type is tied to an input's: the output of a Cast or a
        ConstantOfShape is what its attribute says.
        """
        if node.domain not in self.opsets or not onnx.defs.has(
            node.op_type, self.opsets[node.domain], node.domain
        ):
            return set()  # a custom operator: keep it as it is
        schema = onnx.defs.get_schema(node.op_type, self.opsets[node.domain], node.domain)
        variables = {
            constraint.type_param_str
            for constraint in schema.type_constraints
            if {"tensor(float)", "tensor(float16)"} <= set(constraint.allowed_type_strs)
        }
        inputs = {
            index: _formal(schema.inputs, index).type_str
            for index, name in enumerate(node.input)
            if self.types.get(name) in (_FLOAT, _HALF)
        }
        outputs = {
            index: _formal(schema.outputs, index).type_str for index in range(len(node.output))
        }
        bound = variables & set(inputs.values())
        return {("in", index) for index, variable in inputs.items() if variable in bound} | {
            ("out", index) for index, variable in outputs.items() if variable in bound
        }

    def _as_type(self, name: str, wanted: int) -> str:
        """The name of tensor `name` in the type `wanted`, casting it (once) if need be."""
        if self.types[name] == wanted:
            return name
        if (name, wanted) not in self.cast_names:
            new_name = self._unused(f"{name}_{'fp16' if wanted == _HALF else 'fp32'}")
            self.cast_names[name, wanted] = new_name
            self.types[new_name] = wanted
            if name in self.weights and wanted == _HALF:
                self.weights[new_name] = _half_weight(self.weights[name], new_name)
            else:
                self.nodes.append(_cast(name, new_name, wanted))
        return self.cast_names[name, wanted]

    def _unused(self, name: str) -> str:
        """The name, or a longer one if a tensor of the graph has it already."""
        taken = self.types.keys() | {used for node in self.graph.node for used in node.output}
        while name in taken:
            name += "_"
        return name

    def _restore_output(self, name: str) -> None:
        """Renames the float16 tensor behind the graph output `name`, and casts it back."""
        inner = self._unused(f"{name}_fp16")
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, used in enumerate(names):
                    if used == name:
                        names[index] = inner
        self.nodes.append(_cast(inner, name, _FLOAT))


def _half_weight(tensor: TensorProto, name: str) -> TensorProto:
    values = numpy_helper.to_array(tensor)
    largest = _largest(tensor)
    if largest > _FP16_MAX:
        raise VerificationFailed(
            f"weight '{tensor.name}' has a value of {largest:.3g}, beyond float16's "
            f"{_FP16_MAX:g}; deploy this network in float32 (leave out --fp16)"
        )
    return numpy_helper.from_array(values.astype(np.float16), name)


def _largest(tensor: TensorProto) -> float:
    """The largest absolute value that is finite.

    An infinite bound (an open Clip) is meant; a finite value that overflows is a broken weight.
    """
    values = numpy_helper.to_array(tensor)
    return float(np.abs(values[np.isfinite(values)]).max(initial=0))


def _cast(source: str, target: str, to: int) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)


def _formal(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """The formal parameter of argument `index`; the last one may be variadic (Concat's inputs)."""
    return parameters[min(index, len(parameters) - 1)]


def _element_types(graph: GraphProto) -> dict[str, int]:
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _arithmetic_types(model: ModelProto) -> Iterator[int]:
    """The element type of the weights or second operand of every convolution and product."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = _element_types(graph)
    for node in graph.node:
        if node.op_type in ARITHMETIC_OPS:
            yield types.get(node.input[1], 0)
