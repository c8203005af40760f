"""The typed FP16 or BF16 graph: arithmetic in 16 bits, with float32 input and output.

TensorRT 11 takes the graph's types literally and has no FP16 switch, so the precision of an engine
is decided here. Our own conversion, since the known converters clamp weights silently (onnxruntime
1.32: to 1e-7 and 1e4), which is a change of the model.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_model,
    uses_external_data,
)
from onnx.inliner import inline_local_functions

from rexdeploy.bounds import check_functions
from rexdeploy.bundle.precision import TYPE_NAMES, Precision
from rexdeploy.errors import UsageError, VerificationFailed, first_line
from rexdeploy.files import MAX_GRAPH_BYTES, file_size, open_plain, read_plain
from rexdeploy.proof import Product

ARITHMETIC_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

_FLOAT, _HALF, _BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
_TYPE_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "Float",
    TensorProto.FLOAT16: "Half",
    TensorProto.BFLOAT16: "BFloat16",
    TensorProto.INT8: "Int8",
}
FP16_MAX = float(np.finfo(np.float16).max)
BF16_MAX = 3.3895e38  # float32's range, at 8 bits of precision
_LOW_TYPES: dict[int, tuple[str, str]] = {
    _HALF: ("fp16", "tensor(float16)"),
    _BF16: ("bf16", "tensor(bfloat16)"),
}
BF16_OPSET = 22  # the first in which ONNX defines Conv for bfloat16

FP16_REVISION = "1"
"""Of `to_fp16`: raise it with every change of what the conversion makes."""
BF16_REVISION = "1"
"""Of `to_bf16`, likewise."""


class NotOnnx(UsageError):
    """Bytes that are no ONNX model, or none that the standard allows."""


def to_fp16(model: ModelProto, keep: Collection[str] = ()) -> ModelProto:
    """A copy of `model` in float16, but for its inputs and outputs, which stay float32.

    The nodes named in `keep` (see `node_name`) stay float32 as well, with casts around them.

    Every operator that ONNX defines for float16 is converted; others (and inputs such as Resize's
    scales) stay float32 behind casts. Raises UsageError for graphs with control flow and
    VerificationFailed for weights beyond float16's range.
    """
    return _converted(model, _HALF, keep)


def to_bf16(model: ModelProto) -> ModelProto:
    """A copy of `model` in bfloat16, like `to_fp16`, at opset 22 or later.

    Raises UsageError, too, for graphs that cannot be brought to that opset.
    """
    opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
    if opset < BF16_OPSET:
        try:
            model = onnx.version_converter.convert_version(model, BF16_OPSET)
        except Exception as error:  # the converter's errors are RuntimeErrors and C++'s
            reason = first_line(error, "no reason given")
            raise UsageError(
                f"the graph cannot be brought from opset {opset} to {BF16_OPSET}, which bfloat16 "
                f"needs ({reason}); export it with --opset {BF16_OPSET}"
            ) from None
    return _converted(model, _BF16)


def emulate_bf16(model: ModelProto) -> ModelProto:
    """A copy of a bfloat16 graph that computes in float32 and rounds every tensor to bfloat16.

    For runtimes that have bfloat16 casts and no bfloat16 arithmetic (onnxruntime 1.32 on a CPU).
    It rounds what a GPU rounds, products accumulated in float32 included; an engine that fuses
    nodes rounds less often.
    """
    emulated = ModelProto()
    emulated.CopyFrom(onnx.shape_inference.infer_shapes(model, data_prop=True))
    graph = emulated.graph
    rounded = {name for name, kind in element_types(graph).items() if kind == _BF16}
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
                        nodes.append(_cast(name, f"{name}_widened", _FLOAT))
            for index, name in enumerate(outputs):
                if name in rounded:
                    node.output[index] = f"{name}_exact"
        nodes.append(node)
        for name, inner in zip(outputs, node.output, strict=True):
            if name != inner:
                nodes.append(_cast(inner, name, _BF16))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    return emulated


def parse(data: bytes, name: str) -> ModelProto:
    """Reads and checks an ONNX model; raises UsageError, or NotOnnx, that names the file."""
    try:
        model = onnx.load_from_string(data)
        check_functions(model, name)
        onnx.checker.check_model(model)
    except UsageError:
        raise
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, and more
        reason = first_line(error, "not a protobuf")
        raise NotOnnx(f"{name} is not a valid ONNX model ({reason})") from None
    if any(uses_external_data(tensor) for tensor in _tensors(model)):
        raise UsageError(
            f"{name} keeps weights in another file, which no hash of it covers; expected one file "
            "(onnx.load and onnx.save make it one)"
        )
    return model


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model holds, of its functions and its sparse ones too."""
    for nodes, graph in (
        *((part.node, part) for part in _with_branches(model.graph)),
        *((function.node, None) for function in model.functions),
    ):
        sparse = list(graph.sparse_initializer) if graph else []
        yield from graph.initializer if graph else ()
        for node in nodes:
            for attribute in node.attribute:
                yield from (attribute.t, *attribute.tensors)
                sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
        for tensor in sparse:
            yield from (tensor.values, tensor.indices)


def read_with_external_data(path: Path) -> bytes:
    """The model at `path` in one piece; weights that lie in a file beside it are taken in.

    Raises OSError where `path` cannot be read, UsageError where the file beside it cannot, or holds
    more than one graph can.
    """
    data = read_plain(path, MAX_GRAPH_BYTES)
    try:
        model = onnx.load_from_string(data)
        infos = [
            ExternalDataInfo(tensor) for tensor in _tensors(model) if uses_external_data(tensor)
        ]
    except Exception:  # not a model, or its data is nowhere: parse() says which
        return data
    if not infos:
        return data
    needed = 0
    for info in infos:
        beside = path.parent / info.location
        try:
            with open_plain(beside) as file:
                needed += info.length or max(0, file_size(file) - (info.offset or 0))
        except OSError as error:
            raise UsageError(
                f"{path} keeps weights in {beside}, which cannot be read ({error.strerror})"
            ) from None
    if needed > MAX_GRAPH_BYTES:
        raise UsageError(
            f"{path} keeps {needed} bytes of weights in other files, expected at most "
            f"{MAX_GRAPH_BYTES}: one ONNX file holds no more"
        )
    try:
        load_external_data_for_model(model, str(path.parent))
        data = model.SerializeToString()
    except Exception:  # outside of the folder, or too short: parse() says that it is not here
        pass
    return data


def precision_of(model: ModelProto) -> Precision | None:
    """The type of the model's convolutions and matrix products; None if it is mixed or other."""
    types = {product.precision for product in products(model)}
    return next((name for name, kind in TYPE_NAMES.items() if types == {kind}), None)


def products(model: ModelProto) -> list[Product]:
    """The model's convolutions and matrix products, with their types and costs.

    TensorRT's parser calls a nameless node after its first output, and so are they here.
    """
    try:
        if model.functions:
            model = inline_local_functions(model)
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # InferenceError, and what the inliner raises
        raise UsageError(
            f"the graph's types and shapes contradict each other ({first_line(error)}); export it "
            "again"
        ) from None
    found = []
    types: dict[str, int] = {}
    for part in _with_branches(graph):  # a branch may read what is around it
        types |= element_types(part)
        shapes = _shapes(part)
        producers = {name: node for node in part.node for name in node.output}
        found += [
            Product(
                node_name(node),
                _stored_type(node.input[1], types, producers),
                _macs(node, shapes) if part is graph else None,  # a branch may run, or not
                math.prod(shapes.get(node.input[1], [0])),
            )
            for node in part.node
            if node.op_type in ARITHMETIC_OPS and node.domain in ("", "ai.onnx")
        ]
    return found


def describe(model: ModelProto) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What goes in and out: `input float [batch, 3, 224, 224]`; "?" is a size that is not told."""

    def line(value: onnx.ValueInfoProto) -> str:
        tensor = value.type.tensor_type
        sizes = [str(dim.dim_value or dim.dim_param or "?") for dim in tensor.shape.dim]
        kind = type_name(tensor.elem_type).lower()
        return f"{value.name} {kind} [{', '.join(sizes)}]"

    inputs, outputs = graph_inputs(model), model.graph.output
    return tuple(map(line, inputs)), tuple(map(line, outputs))


def graph_inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """What a caller feeds: older graphs list their weights among the inputs, too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def element_types(graph: GraphProto) -> dict[str, int]:
    """The element type of every tensor that the graph tells."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        types[value.name] = value.type.tensor_type.elem_type
    return types


def type_name(kind: int) -> str:
    """ONNX's name of an element type: `FLOAT`, or `type 99` where there is no such type."""
    known = kind in TensorProto.DataType.values()
    return str(TensorProto.DataType.Name(kind)) if known else f"type {kind}"


def node_name(node: NodeProto) -> str:
    """A node's name; TensorRT's parser calls a nameless node after its first output."""
    return node.name or f"node_of_{node.output[0]}"


def beyond_fp16(model: ModelProto) -> set[str]:
    """The nodes that have a weight which float16 cannot hold."""
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == _FLOAT and _largest(tensor) > FP16_MAX
    }
    return {node_name(node) for node in model.graph.node if large & set(node.input)}


def _converted(model: ModelProto, low: int, keep: Collection[str] = ()) -> ModelProto:
    converted = ModelProto()
    converted.CopyFrom(onnx.shape_inference.infer_shapes(model, data_prop=True))
    _Conversion(converted, low, keep).run()
    try:
        onnx.checker.check_model(converted, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UsageError(
            f"the graph's {_LOW_TYPES[low][0]} form is not valid ({first_line(error)}); are its "
            "own types and shapes right?"
        ) from None
    return converted


class _Conversion:
    """One pass over a topologically sorted graph, in place, from float32 to the type `low`."""

    def __init__(self, model: ModelProto, low: int, keep: Collection[str]) -> None:
        self.low = low
        self.suffix, self.schema_type = _LOW_TYPES[low]
        self.graph = model.graph
        self.keep = keep
        self.opsets = {entry.domain: entry.version for entry in model.opset_import}
        self.types = element_types(self.graph)
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.nodes: list[NodeProto] = []
        self.cast_names: dict[tuple[str, int], str] = {}

    def run(self) -> None:
        outputs = [output.name for output in self.graph.output]
        for node in list(self.graph.node):
            self._convert(node)
        for name in outputs:
            if self.types.get(name) == self.low:
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
                f"node '{node.name}' is control flow ({node.op_type}), which --{self.suffix} does "
                "not convert; export the graph in that type from its framework and leave out "
                f"--{self.suffix}"
            )
        halves = set() if node_name(node) in self.keep else self._half_parameters(node)
        for index, name in enumerate(node.input):
            if self.types.get(name) in (_FLOAT, self.low):
                wanted = self.low if ("in", index) in halves else _FLOAT
                node.input[index] = self._as_type(name, wanted)
        self.nodes.append(node)
        for index, name in enumerate(node.output):
            if self.types.get(name) == _FLOAT and ("out", index) in halves:
                self.types[name] = self.low

    def _half_parameters(self, node: NodeProto) -> set[tuple[str, int]]:
        """The node's float32 inputs and outputs that the operator also defines for `low`.

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
            if {"tensor(float)", self.schema_type} <= set(constraint.allowed_type_strs)
        }
        inputs = {
            index: _formal(schema.inputs, index).type_str
            for index, name in enumerate(node.input)
            if self.types.get(name) in (_FLOAT, self.low)
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
            new_name = self._unused(f"{name}_{self.suffix if wanted == self.low else 'fp32'}")
            self.cast_names[name, wanted] = new_name
            self.types[new_name] = wanted
            if name in self.weights and wanted == self.low:
                self.weights[new_name] = (_half_weight if wanted == _HALF else _bf16_weight)(
                    self.weights[name], new_name
                )
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
        """Renames the tensor of type `low` behind the graph output `name`, and casts it back."""
        inner = self._unused(f"{name}_{self.suffix}")
        for node in self.nodes:
            for names in (node.input, node.output):
                for index, used in enumerate(names):
                    if used == name:
                        names[index] = inner
        self.nodes.append(_cast(inner, name, _FLOAT))


def _half_weight(tensor: TensorProto, name: str) -> TensorProto:
    values = _checked(tensor, "float16", FP16_MAX)
    return numpy_helper.from_array(values.astype(np.float16), name)


def _bf16_weight(tensor: TensorProto, name: str) -> TensorProto:
    values = _checked(tensor, "bfloat16", BF16_MAX)
    return numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), name)


def _checked(tensor: TensorProto, kind: str, limit: float) -> npt.NDArray[Any]:
    """The tensor's values; raises VerificationFailed for any that the type cannot hold."""
    values = numpy_helper.to_array(tensor)
    largest = _largest(tensor)
    if largest > limit:
        raise VerificationFailed(
            f"weight '{tensor.name}' has a value of {largest:.3g}, beyond {kind}'s "
            f"{limit:g}; 'rexdeploy tune-precision' keeps such blocks in float32, and --bf16 holds "
            "them"
        )
    return values


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


def _with_branches(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those of its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                yield from _with_branches(branch)


def _stored_type(name: str, types: dict[str, int], producers: dict[str, NodeProto]) -> str:
    """The type of a product's operand; Int8 where it is dequantised just before."""
    producer = producers.get(name)
    if producer is not None and producer.op_type == "DequantizeLinear":
        name = producer.input[0]
    kind = types.get(name, 0)
    return _TYPE_NAMES.get(kind) or type_name(kind)


def _macs(node: NodeProto, shapes: dict[str, list[int]]) -> int | None:
    """Multiply-accumulates for one image; None where the shapes are not known.

    The first dimension of what a node computes on is the batch, whatever its size.
    """
    if any(name not in shapes for name in (*node.input[:2], node.output[0])):
        return None
    data, weights, output = (shapes[name] for name in (*node.input[:2], node.output[0]))
    if not data:
        return None
    if node.op_type == "ConvTranspose":
        factors = [*data[1:], *weights[1:]]
    elif node.op_type == "Conv":
        factors = [*output[1:], *weights[1:]]
    else:
        transposed = any(item.name == "transA" and item.i for item in node.attribute)
        factors = [*output[1:], data[0 if transposed else -1]]
    return math.prod(factors) if all(size > 0 for size in factors) else None


def _shapes(graph: GraphProto) -> dict[str, list[int]]:
    """Shapes by tensor name; a dimension that is open is 0."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes.setdefault(value.name, [dim.dim_value for dim in dims])
    return shapes
