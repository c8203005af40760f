"""TensorRT's form of an aligned graph: every shortcut is one Add of two tensors of equal width.

`models/align.py` cuts the last convolution of a block in two where the shortcut reaches only some
of its channels, and joins the parts by Concat: the fastest form in ONNX Runtime on a CPU. TensorRT
fuses a plain Add into the convolution before it and leaves a Concat alone: of V1 1.0,
TensorRT-RTX 1.7 makes 106 layers of this form and 148 of the other.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, numpy_helper

PLAIN_ADDS_REVISION = "1"
"""Of `to_plain_adds`: raise it with every change of what the pass makes."""


def to_plain_adds(model: ModelProto) -> ModelProto:
    """A copy of `model` in which all tensors of a shortcut chain have the chain's greatest width.

    The channels that are added are zero: zero rows and bias in the convolutions that produce a
    tensor, zero columns in those that read it. A graph in which that is not all there is to a
    chain (another operator reads it, a weight is not a constant, ...) comes back as it was.
    """
    rewritten = _copy(model)
    if not _Rewrite(rewritten.graph).run():
        return _copy(model)
    rewritten = onnx.shape_inference.infer_shapes(rewritten)
    onnx.checker.check_model(rewritten, full_check=True)
    return rewritten


class _Rewrite:
    """One pass over a topologically sorted graph, in place."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        fed = {value.name for value in graph.input}  # such a weight may be replaced by a caller
        self.weights = {
            tensor.name: tensor for tensor in graph.initializer if tensor.name not in fed
        }
        self.outputs = {value.name for value in graph.output}
        self.changed: set[str] = set()  # tensors whose shape is not what it was
        self._index()

    def run(self) -> bool:
        """Whether there was something to rewrite, and all of it could be."""
        if any(a.HasField("g") or a.graphs for node in self.graph.node for a in node.attribute):
            return False  # control flow may read any tensor
        shared = self._merge_parts()
        widths = self._widths(shared)
        wanted = self._wanted_widths(widths, set(shared))
        if not wanted:
            return False
        self.changed |= wanted.keys()
        for node in self.graph.node:
            if self._is_plain(node) and {node.input[0], node.output[0]} & wanted.keys():
                self._pad(node, wanted)
        self._tidy()
        return True

    def _merge_parts(self) -> dict[str, int]:
        """Makes one convolution and one Add of every shortcut that is in parts.

        Gives, by the Add's output, how many channels of it the shortcut reaches.
        """
        shared: dict[str, int] = {}
        dropped: list[NodeProto] = []
        for concat in self.graph.node:
            parts = self._parts(concat)
            if parts is None:
                continue
            add, project, rest = parts
            shared[concat.output[0]] = len(self._value(project.input[1]))
            for index in range(1, len(project.input)):  # weights and bias
                name = project.input[index]
                rows = [self._value(name), self._value(rest.input[index])]
                project.input[index] = self._new_weight(name, np.concatenate(rows))
            self.changed |= {project.output[0], rest.output[0], add.output[0]}
            add.output[0] = concat.output[0]
            dropped += [concat, rest]
        for node in dropped:
            self.graph.node.remove(node)
        self._index()
        return shared

    def _parts(self, concat: NodeProto) -> tuple[NodeProto, NodeProto, NodeProto] | None:
        """The nodes of Concat(Add(project(h), x), rest(h)): Add, project, rest."""
        if concat.op_type != "Concat" or len(concat.input) != 2 or concat.attribute[0].i != 1:
            return None
        add, rest = (self.producers.get(name) for name in concat.input)
        if add is None or rest is None or add.op_type != "Add" or not self._is_plain(rest):
            return None
        for name in add.input:
            project = self.producers.get(name)
            if (
                project is not None
                and self._is_plain(project)
                and _settings(project) == _settings(rest)
                and self._value(project.input[1]).shape[1:] == self._value(rest.input[1]).shape[1:]
                and all(self._is_used_once(node) for node in (add, project, rest))
            ):
                return add, project, rest
        return None

    def _widths(self, shared: dict[str, int]) -> dict[str, int]:
        """Channels of every convolution's and Add's output, where they are certain."""
        widths: dict[str, int] = {}
        for node in self.graph.node:
            if self._is_plain(node):
                widths[node.output[0]] = len(self._value(node.input[1]))
            elif node.op_type == "Add":
                output = node.output[0]
                got = sorted(widths.get(name, 0) for name in node.input)
                if got[0] == shared.get(output, got[1]):
                    widths[output] = got[1]
        return widths

    def _wanted_widths(self, widths: dict[str, int], merged: set[str]) -> dict[str, int]:
        """The width of every tensor of a chain with a shortcut that was in parts.

        Empty if there is no such chain, or one that cannot be padded.
        """
        chains: list[set[str]] = []
        for node in self.graph.node:
            if node.op_type == "Add":
                linked = {*node.input, node.output[0]}
                linked = linked.union(*(chain for chain in chains if chain & linked))
                chains = [chain for chain in chains if not chain & linked] + [linked]
        wanted: dict[str, int] = {}
        for chain in chains:
            if not chain & merged:
                continue
            if not all(self._can_be_padded(name) and widths.get(name) for name in chain):
                return {}
            wanted |= dict.fromkeys(chain, max(widths[name] for name in chain))
        return wanted

    def _can_be_padded(self, name: str) -> bool:
        """Whether only convolutions and Adds touch the tensor."""
        producer = self.producers.get(name)
        return (
            name not in self.outputs
            and producer is not None
            and (producer.op_type == "Add" or self._is_plain(producer))
            and all(
                node.op_type == "Add" or (self._is_plain(node) and name not in node.input[1:])
                for node in self.consumers[name]
            )
        )

    def _pad(self, conv: NodeProto, wanted: dict[str, int]) -> None:
        """Gives a convolution zero columns for its input's width, zero rows for its output's."""
        weight = self._value(conv.input[1])
        rows = wanted.get(conv.output[0], weight.shape[0])
        columns = wanted.get(conv.input[0], weight.shape[1])
        sizes = [(rows, columns, *weight.shape[2:]), (rows,)]
        for index, name in list(enumerate(conv.input))[1:]:
            size = sizes[index - 1]
            value = self._value(name)
            if value.shape != size:
                padding = [(0, new - old) for new, old in zip(size, value.shape, strict=True)]
                conv.input[index] = self._new_weight(name, np.pad(value, padding))

    def _tidy(self) -> None:
        """Removes the weights that nothing reads any more, and shapes that are no longer so."""
        used = {name for node in self.graph.node for name in node.input} | self.outputs
        for name in self.weights.keys() - used:
            self.graph.initializer.remove(self.weights[name])
        kept = [value for value in self.graph.value_info if value.name not in self.changed]
        del self.graph.value_info[:]
        self.graph.value_info.extend(kept)

    def _index(self) -> None:
        """Who writes and who reads each tensor."""
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.consumers[name].append(node)

    def _is_plain(self, node: NodeProto) -> bool:
        """Whether it is a convolution of one group whose weights (and bias) are constants."""
        return (
            node.op_type == "Conv"
            and not node.domain
            and all(attribute.i == 1 for attribute in node.attribute if attribute.name == "group")
            and all(name in self.weights for name in node.input[1:])
        )

    def _is_used_once(self, node: NodeProto) -> bool:
        return len(self.consumers[node.output[0]]) == 1 and node.output[0] not in self.outputs

    def _value(self, name: str) -> npt.NDArray[np.generic]:
        return numpy_helper.to_array(self.weights[name])

    def _new_weight(self, name: str, value: npt.NDArray[np.generic]) -> str:
        """Adds a constant (another node may read the old one) and gives its name."""
        taken = {*self.producers, *self.consumers, *self.weights}
        name += "_padded"
        while name in taken:
            name += "_"
        self.graph.initializer.append(numpy_helper.from_array(value, name))
        self.weights[name] = self.graph.initializer[-1]
        return name


def _settings(conv: NodeProto) -> tuple[str, int, list[bytes]]:
    """What two convolutions have in common if they can be one, beside their weights' shapes."""
    attributes = sorted(a.SerializeToString(deterministic=True) for a in conv.attribute)
    return conv.input[0], len(conv.input), attributes


def _copy(model: ModelProto) -> ModelProto:
    copied = ModelProto()
    copied.CopyFrom(model)
    return copied
