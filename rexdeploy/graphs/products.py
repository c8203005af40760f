"""A graph's convolutions and matrix products: their types and their arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import onnx.version_converter
from onnx import ModelProto, NodeProto, TensorProto
from onnx.inliner import inline_local_functions

from rexdeploy.bundle.precision import PRECISIONS, TYPE_NAMES, Precision
from rexdeploy.errors import UsageError, first_line
from rexdeploy.graphs.read import element_types, node_name, shapes, type_name, with_branches


@dataclass(frozen=True)
class Product:
    """A convolution or matrix product of an ONNX graph; as a Layer, the graph's own."""

    name: str
    precision: str  # its weights' type in the graph, by TensorRT-RTX's names
    macs: int | None  # multiply-accumulates for one image; None where shapes do not tell
    weights_count: int = field(default=0, compare=False)  # values; 0 where shapes do not tell

    @property
    def onnx_nodes(self) -> tuple[str, ...]:
        return (self.name,)


ARITHMETIC_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_TYPE_NAMES = {kind.onnx: kind.rtx for kind in PRECISIONS.values()}


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
    for part in with_branches(graph):  # a branch may read what is around it
        types |= element_types(part)
        known = shapes(part)
        producers = {name: node for node in part.node for name in node.output}
        found += [
            Product(
                node_name(node),
                _computed_type(node, types, producers),
                _macs(node, known) if part is graph else None,  # a branch may run, or not
                math.prod(known.get(node.input[1], [0])),
            )
            for node in part.node
            if node.op_type in ARITHMETIC_OPS and node.domain in ("", "ai.onnx")
        ]
    return found


def _computed_type(node: NodeProto, types: dict[str, int], producers: dict[str, NodeProto]) -> str:
    """The type of a product's weights; int8 only where both its operands are dequantised before."""

    def operand(index: int) -> int:
        name = node.input[index]
        producer = producers.get(name)
        is_stored = producer is not None and producer.op_type == "DequantizeLinear"
        return types.get(producer.input[0] if producer is not None and is_stored else name, 0)

    kind = operand(1)
    eight_bits = (TensorProto.INT8, TensorProto.UINT8)
    if kind == TensorProto.INT8 and operand(0) not in eight_bits:
        kind = operand(0)  # int8 in the file only: the arithmetic is that of what it reads
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
