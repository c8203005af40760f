"""float16 and bfloat16 graphs, made from float32 ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rexdeploy.bundle.precision import PRECISIONS, Precision
from rexdeploy.errors import UsageError, VerificationFailed, first_line
from rexdeploy.graphs.read import element_types, node_name, put_nodes

_FLOAT = TensorProto.FLOAT
BF16_OPSET = 22  # the first in which ONNX defines Conv for bfloat16
REVISIONS: dict[Precision, str] = {"fp16": "1", "bf16": "1"}
"""Of `to_precision`: raise one with every change of what the conversion to that type makes."""


def to_precision(model: ModelProto, precision: Precision, keep: Collection[str] = ()) -> ModelProto:
    """A copy of a float32 graph in "fp16" or "bf16", with inputs and outputs still in float32.

    The nodes named in `keep` (see `node_name`) stay float32 as well, with casts around them. So
    does, behind casts, what ONNX does not define in that type: whole operators, and inputs such as
    Resize's scales. A bfloat16 graph is of opset 22 or later.

    Raises UsageError for graphs with control flow and those that cannot be brought to that opset,
    and VerificationFailed for weights beyond the type's range.
    """
    if precision == "bf16":
        model = _at_opset(model, BF16_OPSET)
    converted = ModelProto()
    converted.CopyFrom(onnx.shape_inference.infer_shapes(model, data_prop=True))
    _Conversion(converted, precision, keep).run()
    try:
        onnx.checker.check_model(converted, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UsageError(
            f"the graph's {precision} form is not valid ({first_line(error)}); are its "
            "own types and shapes right?"
        ) from None
    return converted


def _at_opset(model: ModelProto, least: int) -> ModelProto:
    opset = next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0)
    if opset >= least:
        return model
    try:
        return onnx.version_converter.convert_version(model, least)
    except Exception as error:  # the converter's errors are RuntimeErrors and C++'s
        reason = first_line(error, "no reason given")
        raise UsageError(
            f"the graph cannot be brought from opset {opset} to {least}, which bfloat16 "
            f"needs ({reason}); export it with --opset {least}"
        ) from None


def beyond_fp16(model: ModelProto) -> set[str]:
    """The nodes that have a weight which float16 cannot hold."""
    large = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == _FLOAT and _largest(tensor) > PRECISIONS["fp16"].largest
    }
    return {node_name(node) for node in model.graph.node if large & set(node.input)}


class _Conversion:
    """One pass over a topologically sorted graph, in place, from float32 to the type `low`."""

    def __init__(self, model: ModelProto, low: Precision, keep: Collection[str]) -> None:
        self.suffix, self.type = low, PRECISIONS[low]
        self.low, self.schema_type = self.type.onnx, f"tensor({self.type.title})"
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
        put_nodes(self.graph, self.nodes)
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
                self.weights[new_name] = self._weight(self.weights[name], new_name)
            else:
                self.nodes.append(cast_node(name, new_name, wanted))
        return self.cast_names[name, wanted]

    def _weight(self, tensor: TensorProto, name: str) -> TensorProto:
        """The weight in the type `low`; raises VerificationFailed for a value beyond it."""
        largest = _largest(tensor)
        if largest > self.type.largest:
            raise VerificationFailed(
                f"weight '{tensor.name}' has a value of {largest:.3g}, beyond {self.type.title}'s "
                f"{self.type.largest:.5g}; 'rexdeploy tune-precision' keeps such blocks in "
                "float32, and --bf16 holds them"
            )
        values = numpy_helper.to_array(tensor)
        return numpy_helper.from_array(
            values.astype(helper.tensor_dtype_to_np_dtype(self.low)), name
        )

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
        self.nodes.append(cast_node(inner, name, _FLOAT))


def _largest(tensor: TensorProto) -> float:
    """The largest absolute value that is finite.

    An infinite bound (an open Clip) is meant; a finite value that overflows is a broken weight.
    """
    values = numpy_helper.to_array(tensor)
    return float(np.abs(values[np.isfinite(values)]).max(initial=0))


def cast_node(source: str, target: str, to: int) -> NodeProto:
    """A Cast of `source` to the ONNX type `to`, as the tensor `target`."""
    return helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to)


def _formal(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """The formal parameter of argument `index`; the last one may be variadic (Concat's inputs)."""
    return parameters[min(index, len(parameters) - 1)]
