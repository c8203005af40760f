"""What quantisation does to a graph, computed apart from whoever quantised it.

An INT8 graph is held against its float32 parent, rounded at the same places with the same scales.
This twin is made of the parent's own nodes and weights; of the candidate it takes only *where* it
rounds and *how finely*. It rounds by plain arithmetic (divide, round, clip, multiply), and so does
the candidate beside it (`written_out`): no library's int8 code has a part in it, and whatever else
is wrong with a graph stands out, however small it is beside the rounding. How an int8 kernel
differs from that arithmetic is another question, and has limits of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rexdeploy.arrays import Float32
from rexdeploy.graphs.read import put_nodes

_QUANTIZE, _DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_BIAS = 2  # its place among a convolution's inputs
_ABSORBED = ("Clip", "Relu")  # the quantiser leaves them out where the range ends as they do


def is_quantized(model: ModelProto) -> bool:
    """Whether a graph has Q/DQ pairs."""
    return any(node.op_type in (_QUANTIZE, _DEQUANTIZE) for node in model.graph.node)


def written_out(model: ModelProto) -> ModelProto | None:
    """A quantised graph with its Q/DQ pairs as float32 arithmetic; None for what that cannot do."""
    copy = ModelProto()
    copy.CopyFrom(model)
    found = _Quantized(model)
    if found.is_strange:
        return None
    arithmetic = _Arithmetic()
    nodes: list[NodeProto] = []
    for node in copy.graph.node:
        if node.op_type == _QUANTIZE:
            continue
        if node.op_type == _DEQUANTIZE:
            weight = found.weights.get(node.output[0])
            if weight is not None:
                arithmetic.constant(node.output[0], weight)
                continue
            source, scales = found.activations[node.output[0]]
            nodes += arithmetic.rounded(source, node.output[0], scales)
            continue
        nodes.append(node)
    _finish(copy, nodes, arithmetic)
    return copy


def quantized_twin(
    parent: ModelProto, candidate: ModelProto, own_biases: bool
) -> ModelProto | None:
    """The float32 graph `parent`, rounded as `candidate` is quantised.

    Weights are the parent's, rounded by the candidate's scales. So are biases, unless the candidate
    has `own_biases`: corrected ones. None where the candidate has not the parent's nodes, by their
    outputs' names and attributes, Q/DQ pairs aside.
    """
    found = _Quantized(candidate)
    if found.is_strange:
        return None
    copy = ModelProto()
    copy.CopyFrom(parent)
    weights = {tensor.name: tensor for tensor in parent.graph.initializer}
    given = {value.name for value in parent.graph.output}
    arithmetic = _Arithmetic()
    nodes: list[NodeProto] = []
    made: dict[tuple[str, _Scales], str] = {}
    used: set[str] = set()
    for node in copy.graph.node:
        other = found.maker(node.output[0], node.op_type)
        if other is None:
            if node.op_type in _ABSORBED:  # what it reads is not rounded before it
                nodes.append(node)
                continue
            # Its output may be that of the activation behind it, which was left out.
            other = found.absorbing(node, parent)
        if other is None or not _alike(node, other) or len(node.input) != len(other.input):
            return None
        used.add(other.output[0])
        for index, (name, there) in enumerate(zip(node.input, other.input, strict=True)):
            is_bias = node.op_type == "Conv" and index == _BIAS
            if is_bias and own_biases:
                own = f"{name}/{there}"
                bias = found.constant(there)
                if bias is None or name not in weights:
                    return None
                arithmetic.constants[own] = numpy_helper.from_array(bias, own)
                node.input[index] = own
            elif there in found.weights:
                if name not in weights:
                    return None
                value = numpy_helper.to_array(weights[name])
                rounded = found.weights[there]
                if value.shape != rounded.value.shape:
                    return None
                if not (found.fits(other) if index == _BIAS else rounded.fits(value)):
                    return None
                own = f"{name}/{there}"
                arithmetic.constant(own, rounded.of(value))
                node.input[index] = own
            elif there in found.activations:
                source, scales = found.activations[there]
                if source not in (name, found.renamed(name)):
                    return None
                if (name, scales) not in made:
                    made[name, scales] = f"{name}/rounded{len(made)}"
                    nodes += arithmetic.rounded(name, made[name, scales], scales)
                node.input[index] = made[name, scales]
            elif there in found.constants and name in weights and there != name:
                return None
        nodes.append(node)
    if used != found.others:
        return None
    for name in given:  # an output may be rounded, too
        if name in found.activations:
            inner = f"{name}/exact"
            for node in nodes:
                node.output[:] = [inner if item == name else item for item in node.output]
                node.input[:] = [inner if item == name else item for item in node.input]
            nodes += arithmetic.rounded(inner, name, found.activations[name][1])
    _finish(copy, nodes, arithmetic)
    return copy


@dataclass(frozen=True)
class _Scales:
    """How an activation is rounded: to whole multiples of `scale`, from `low` to `high` of them."""

    scale: float
    zero: int
    low: int
    high: int


@dataclass(frozen=True)
class _Weight:
    """A rounded constant, and how it was rounded."""

    value: Float32  # after rounding
    scale: Float32  # that `value`'s axis is broadcast to
    zero: Float32
    kind: int  # TensorProto.DataType of its codes

    def fits(self, value: Float32) -> bool:
        """Whether the scales are those of such weights: by their largest values, of 7 or 8 bits.

        Of scales that nobody would take, rounding alone would pass for the network.
        """
        axes = tuple(axis for axis, size in enumerate(self.scale.shape) if size == 1)
        largest = np.abs(value).max(axis=axes, keepdims=True, initial=0)
        ratio = 127 * self.scale.reshape(largest.shape) / np.where(largest > 0, largest, np.inf)
        return bool(((ratio > 0.99) & (ratio < _COARSEST) | (largest == 0)).all())

    def of(self, value: Float32) -> _Weight:
        """Another constant, rounded alike.

        Of a bias, in 32 bits, the last bit is how its maker divided: within one step it is as here.
        """
        low, high = _BOUNDS[self.kind]
        codes = np.clip(np.rint(value / self.scale) + self.zero, low, high)
        rounded = ((codes - self.zero) * self.scale).astype(np.float32)
        if self.kind == TensorProto.INT32:
            is_near = np.abs(rounded - self.value) <= 1.5 * self.scale
            rounded = np.where(is_near, self.value, rounded).astype(np.float32)
        return _Weight(rounded, self.scale, self.zero, self.kind)


_COARSEST = 2.05  # of a 7-bit weight; 8 bits have 1
_BOUNDS: dict[int, tuple[int, int]] = {
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT8: (0, 255),
    TensorProto.INT32: (-(2**31), 2**31 - 1),
}


@dataclass
class _Arithmetic:
    """Nodes that round by float32 arithmetic, and their constants."""

    constants: dict[str, TensorProto] = field(default_factory=dict)

    def constant(self, name: str, weight: _Weight) -> None:
        self.constants[name] = numpy_helper.from_array(weight.value, name)

    def rounded(self, source: str, target: str, scales: _Scales) -> list[NodeProto]:
        """As QuantizeLinear is defined: x / scale, to the nearest even, plus zero, saturated."""
        names = {}
        for key in ("scale", "zero", "low", "high"):
            value = np.array(getattr(scales, key), np.float32)
            names[key] = f"/round/{key}/{value!s}"
            self.constants[names[key]] = numpy_helper.from_array(value, names[key])
        stages = [f"{target}/{index}" for index in range(5)]
        return [
            helper.make_node("Div", [source, names["scale"]], [stages[0]]),
            helper.make_node("Round", [stages[0]], [stages[1]]),
            helper.make_node("Add", [stages[1], names["zero"]], [stages[2]]),
            helper.make_node("Clip", [stages[2], names["low"], names["high"]], [stages[3]]),
            helper.make_node("Sub", [stages[3], names["zero"]], [stages[4]]),
            helper.make_node("Mul", [stages[4], names["scale"]], [target]),
        ]


class _Quantized:
    """What a graph's Q/DQ pairs say, and its other nodes."""

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._given = {value.name for value in graph.output}
        self.weights: dict[str, _Weight] = {}  # by the tensor that a DequantizeLinear puts out
        self.activations: dict[str, tuple[str, _Scales]] = {}  # likewise, with what is rounded
        self.others = {
            node.output[0] for node in graph.node if node.op_type not in (_QUANTIZE, _DEQUANTIZE)
        }
        self.is_strange = not all(
            self._read(node) for node in graph.node if node.op_type == _DEQUANTIZE
        )

    def maker(self, name: str, kind: str) -> NodeProto | None:
        """The node of that operator which puts a tensor out, whatever the tensor is called here."""
        maker = self._makers.get(name)
        if maker is not None and maker.op_type == _DEQUANTIZE and name in self.activations:
            maker = self._makers.get(self.activations[name][0])
        return maker if maker is not None and maker.op_type == kind else None

    def fits(self, node: NodeProto) -> bool:
        """Whether a product's bias has the scales of its sums: input's times weights'."""
        if node.input[0] not in self.activations or node.input[1] not in self.weights:
            return False
        weight = self.weights[node.input[1]].scale.ravel()
        sums = self.activations[node.input[0]][1].scale * weight
        own = self.weights[node.input[_BIAS]].scale.ravel()
        return own.size in (1, sums.size) and np.allclose(own, sums, rtol=1e-2, atol=0)

    def constant(self, name: str) -> Float32 | None:
        """A constant's values, rounded or not."""
        if name in self.weights:
            return self.weights[name].value
        tensor = self.constants.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor).astype(np.float32)

    def absorbing(self, node: NodeProto, parent: ModelProto) -> NodeProto | None:
        """The node here that puts out what the activation behind `node` does in the parent."""
        readers = [item for item in parent.graph.node if node.output[0] in item.input]
        if len(readers) != 1 or readers[0].op_type not in _ABSORBED:
            return None
        return self.maker(readers[0].output[0], node.op_type)

    def renamed(self, name: str) -> str | None:
        """What a graph's output, which keeps its name behind a rounding, is called before it."""
        return self.activations[name][0] if name in self.activations else None

    def _read(self, node: NodeProto) -> bool:
        """Takes in a DequantizeLinear; False for what is no plain Q/DQ pair of 8 bits."""
        scale = self.constants.get(node.input[1])
        if scale is None:
            return False
        steps = numpy_helper.to_array(scale).astype(np.float32)
        code = self.constants.get(node.input[0])
        zeros = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        zero = np.zeros_like(steps) if zeros is None else numpy_helper.to_array(zeros)
        if not np.isfinite(steps).all() or (steps <= 0).any():
            return False
        if code is not None:
            codes = numpy_helper.to_array(code)
            if code.data_type not in _BOUNDS or zero.size != steps.size:
                return False
            shape = [1] * codes.ndim
            if steps.size > 1:
                axis = next((item.i for item in node.attribute if item.name == "axis"), 1)
                if not -codes.ndim <= axis < codes.ndim or codes.shape[axis] != steps.size:
                    return False
                shape[axis] = steps.size
            steps = steps.reshape(shape)
            zero = zero.astype(np.float32).reshape(shape)
            value = ((codes.astype(np.float64) - zero) * steps).astype(np.float32)
            self.weights[node.output[0]] = _Weight(value, steps, zero, code.data_type)
            return True
        maker = self._makers.get(node.input[0])
        if maker is None or maker.op_type != _QUANTIZE or maker.input[1:] != node.input[1:]:
            return False
        kind = TensorProto.UINT8 if zeros is None else zeros.data_type
        if steps.size != 1 or kind not in (TensorProto.INT8, TensorProto.UINT8):
            return False
        scales = _Scales(float(steps.item()), int(zero.item()), *_BOUNDS[kind])
        self.activations[node.output[0]] = (maker.input[0], scales)
        return True


def _alike(first: NodeProto, second: NodeProto) -> bool:
    """Whether two nodes have the same attributes, in any order."""
    return sorted(item.SerializeToString() for item in first.attribute) == sorted(
        item.SerializeToString() for item in second.attribute
    )


def _finish(model: ModelProto, nodes: Sequence[NodeProto], arithmetic: _Arithmetic) -> None:
    put_nodes(model.graph, nodes)
    used = {name for node in nodes for name in node.input}
    kept = [
        tensor
        for tensor in (*model.graph.initializer, *arithmetic.constants.values())
        if tensor.name in used
    ]
    del model.graph.initializer[:], model.graph.value_info[:]
    model.graph.initializer.extend(kept)
