"""Finds a ReXNet's blocks in an ONNX graph by its structure, whatever its tensors are called."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import ModelProto, NodeProto

from rexdeploy.bundle.precision import PRECISIONS
from rexdeploy.errors import UsageError
from rexdeploy.graphs.read import graph_inputs

FLOATING = tuple(kind.onnx for name, kind in PRECISIONS.items() if name != "int8")
# What may stand between a convolution and its activation's output, in any exporter's writing.
_LINEAR = {"BatchNormalization", "Cast", "Identity"}
_ACTIVATION = {"Sigmoid", "Mul", "Clip", "Relu", "Min", "Max", "HardSwish", "HardSigmoid", "Swish"}
_POOLS = {"GlobalAveragePool", "AveragePool", "ReduceMean"}


@dataclass(frozen=True)
class Block:
    """A link of the chain that a ReXNet is: all of the image passes through `input` and `output`.

    `extra_inputs` are earlier tensors of which the block reads the shape (the batch size) only.
    """

    name: str  # "stem", "block 1", ..., "head" (1x1 convolution, activation), "classifier"
    input: str  # names of tensors
    output: str
    nodes: tuple[int, ...]  # positions in the graph, ascending
    extra_inputs: tuple[str, ...]


def find_blocks(model: ModelProto) -> tuple[Block, ...]:
    """The graph's stem, bottlenecks, head and classifier, in order.

    A bottleneck is what lies between the inputs of one depthwise convolution's expansion and the
    next one's: names play no part, so that the graphs of other exporters and of other code, padded
    or not, in float16 or mixed, are cut at the same places. Raises UsageError for a graph that is
    no such chain.
    """
    graph = _Graph(model)
    depthwise = [node for node in graph.nodes if _is_depthwise(node)]
    pools = [node for node in graph.nodes if node.op_type in _POOLS]
    if not depthwise or not pools:
        raise UsageError(
            f"no blocks found: got {len(depthwise)} depthwise convolutions and {len(pools)} "
            "average pools, expected a ReXNet classifier"
        )
    head = graph.expansion(pools[-1].input[0])
    if head is None:
        raise UsageError(
            "no blocks found: expected a 1x1 convolution with an activation before the last "
            "average pool, as a ReXNet classifier has"
        )
    starts = [graph.entry(node) for node in depthwise]
    cuts = [
        graph.input,
        *starts,
        graph.uncast(head.input[0]),
        graph.uncast(pools[-1].input[0]),
        model.graph.output[0].name,
    ]
    numbered = [f"block {number}" for number in range(1, len(depthwise) + 1)]
    names = ["stem", *numbered, "head", "classifier"]
    blocks: list[Block] = []
    before: set[int] = set()
    for name, start, end in zip(names, cuts[:-1], cuts[1:], strict=True):
        nodes, extra = graph.between(start, end, before)
        if not nodes:
            raise UsageError(f"no blocks found: nothing lies between '{start}' and '{end}'")
        blocks.append(Block(name, start, end, tuple(sorted(nodes)), tuple(sorted(extra))))
        before |= nodes
    return tuple(blocks)


class _Graph:
    """Who makes and who reads each tensor."""

    def __init__(self, model: ModelProto) -> None:
        self.nodes: list[NodeProto] = list(model.graph.node)
        inputs = [value.name for value in graph_inputs(model)]
        if len(inputs) != 1 or len(model.graph.output) != 1:
            raise UsageError(
                f"no blocks found: got {len(inputs)} inputs and {len(model.graph.output)} "
                "outputs, expected one of each"
            )
        self.input = inputs[0]
        self._weights = {weight.name: list(weight.dims) for weight in model.graph.initializer}
        self._makers = {
            name: position for position, node in enumerate(self.nodes) for name in node.output
        }
        self._image: set[int] = set()  # nodes whose values depend on the image's
        for position, node in enumerate(self.nodes):
            if any(self._is_image(name) for name in _data_inputs(node)):
                self._image.add(position)

    def maker(self, tensor: str) -> NodeProto | None:
        position = self._makers.get(tensor)
        return None if position is None else self.nodes[position]

    def uncast(self, tensor: str) -> str:
        """The tensor before any casts: where a mixed graph's shortcut may branch off, too."""
        maker = self.maker(tensor)
        while maker is not None and maker.op_type == "Cast":
            tensor = maker.input[0]
            maker = self.maker(tensor)
        return tensor

    def entry(self, depthwise: NodeProto) -> str:
        """Where a depthwise convolution's bottleneck begins."""
        expansion = self.expansion(depthwise.input[0])
        return self.uncast((expansion or depthwise).input[0])

    def expansion(self, tensor: str) -> NodeProto | None:
        """The 1x1 convolution whose activation `tensor` is; None if it is anything else.

        A projection is no expansion: nothing but a shortcut follows it, and no activation.
        """
        activated = False
        sources: set[int] = set()
        pending = [tensor]
        while pending:
            position = self._makers.get(pending.pop())
            if position not in self._image:
                continue
            node = self.nodes[position]
            if node.op_type in _LINEAR or node.op_type in _ACTIVATION:
                activated |= node.op_type in _ACTIVATION
                pending += node.input
            else:
                sources.add(position)
        found = [self.nodes[position] for position in sources]
        if not activated or len(found) != 1 or not self._is_pointwise(found[0]):
            return None
        return found[0]

    def _is_pointwise(self, node: NodeProto) -> bool:
        if node.op_type != "Conv" or _is_depthwise(node):
            return False
        # ONNX takes it from the weight where it is left out, as torch 2.9's exporter does.
        kernel = next((list(a.ints) for a in node.attribute if a.name == "kernel_shape"), None)
        return set(kernel or self._weights.get(node.input[1], [])[2:]) <= {1}

    def between(self, start: str, end: str, before: set[int]) -> tuple[set[int], set[str]]:
        """The nodes from one tensor to another, and tensors further up whose shape they read.

        Raises UsageError if image data reaches `end` by a way that leaves `start` out.
        """
        nodes: set[int] = set()
        extra: set[str] = set()
        pending = [] if start == end else [end]
        while pending:
            position = self._makers.get(pending.pop())
            if position is None or position in nodes:
                continue
            nodes.add(position)
            node = self.nodes[position]
            for name in node.input:
                is_earlier = name == self.input or self._makers.get(name) in before
                if name == start:
                    continue
                if not (is_earlier and self._is_image(name)):
                    pending.append(name)
                elif name in _data_inputs(node):
                    raise UsageError(
                        f"no blocks found: tensor '{name}' bypasses '{start}', so the graph is no "
                        "chain of ReXNet's blocks"
                    )
                else:
                    extra.add(name)
        return nodes, extra

    def _is_image(self, tensor: str) -> bool:
        return tensor == self.input or self._makers.get(tensor) in self._image


def _data_inputs(node: NodeProto) -> list[str]:
    """The inputs whose values the node works on, and not their shape or type alone."""
    if node.op_type == "Shape":
        return []
    return list(node.input[:1] if node.op_type == "CastLike" else node.input)


def _is_depthwise(node: NodeProto) -> bool:
    return node.op_type == "Conv" and any(a.name == "group" and a.i > 1 for a in node.attribute)
