"""What a graph takes and gives: pixels or float32 images in, logits or probabilities out.

Both are a few float32 nodes around one core, which maps float32 NCHW images to logits. Whatever
rewrites or walks a graph works on the core, so that the normalisation and the softmax stay float32
in every precision, and no code has to know of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from rexdeploy.bundle.manifest import InputForm, ModelSpec, OutputForm
from rexdeploy.graphs.read import graph_inputs

PIXELS, PROBABILITIES = "pixels", "probabilities"  # names of the outer input and output
_OURS = "interface/"  # how the names of these nodes and their constants begin
_WEIGHTS = (_OURS + "scale", _OURS + "offset")
_INNER = tuple(_OURS + name for name in ("float", "nchw", "scaled"))  # tensors between the nodes


def wrap(core: ModelProto, spec: ModelSpec) -> ModelProto:
    """A copy of the core with the input and output of the spec around it.

    uint8 RGB `[N, H, W, 3]` is normalised in the graph; probabilities are the softmax in float32.
    """
    before: list[NodeProto] = []
    after: list[NodeProto] = []
    weights: list[TensorProto] = []
    image, logits = core.graph.input[0], core.graph.output[0]
    outer_input, outer_output = image, logits
    if spec.input == "uint8":
        outer_input = _like(image, PIXELS, TensorProto.UINT8, spec.input_shape)
        mean, std = np.array(spec.preprocess.mean), np.array(spec.preprocess.std)
        weights = [
            numpy_helper.from_array(value.astype(np.float32).reshape(3, 1, 1), name)
            for name, value in zip(_WEIGHTS, (1 / (255 * std), -mean / std), strict=True)
        ]
        before = _nodes_before(image.name)
    if spec.output == "probabilities":
        outer_output = _like(logits, PROBABILITIES, TensorProto.FLOAT, (spec.num_classes,))
        after = _nodes_after(logits.name)
    return _assembled(core, before, after, weights, outer_input, outer_output)


def _nodes_before(image: str) -> list[NodeProto]:
    """From PIXELS to the core's input.

    The Cast comes first: TensorRT takes uint8 only where a Cast follows at once. Then the
    Transpose: three values at a time, ONNX Runtime 1.32 multiplies at an eighth of the speed.
    """
    (float_, nchw, scaled), (scale, offset) = _INNER, _WEIGHTS
    return [
        helper.make_node("Cast", [PIXELS], [float_], float_, to=TensorProto.FLOAT),
        helper.make_node("Transpose", [float_], [nchw], nchw, perm=[0, 3, 1, 2]),
        helper.make_node("Mul", [nchw, scale], [scaled], scaled),
        helper.make_node("Add", [scaled, offset], [image], _OURS + "shifted"),
    ]


def _nodes_after(logits: str) -> list[NodeProto]:
    return [helper.make_node("Softmax", [logits], [PROBABILITIES], _OURS + "softmax", axis=1)]


def unwrap(model: ModelProto) -> ModelProto:
    """The core of a graph that `wrap` has made; any other graph as it is."""
    before, after = _parts(model)
    if not before and not after:
        return model
    image, logits = model.graph.input[0], model.graph.output[0]
    if before:
        height, width = (dim.dim_value for dim in image.type.tensor_type.shape.dim[1:3])
        image = _like(image, before[-1].output[0], TensorProto.FLOAT, (3, height, width))
    if after:
        classes = logits.type.tensor_type.shape.dim[1].dim_value
        logits = _like(logits, after[0].input[0], TensorProto.FLOAT, (classes,))
    core = ModelProto()
    core.CopyFrom(model)
    ours = interface_nodes(model)
    kept = [node for node in model.graph.node if node.name not in ours]
    weights = [item for item in model.graph.initializer if not (before and item.name in _WEIGHTS)]
    _replace(core, kept, weights, image, logits)
    return core


def change_core(model: ModelProto, change: Callable[[ModelProto], ModelProto]) -> ModelProto:
    """`change` applied to the core of a graph, with the graph's own interface around the result."""
    core = unwrap(model)
    changed = change(core)
    if core is model:
        return changed
    if changed == core:
        return model
    before, after = _parts(model)
    weights = [item for item in model.graph.initializer if before and item.name in _WEIGHTS]
    return _assembled(changed, before, after, weights, model.graph.input[0], model.graph.output[0])


def interface_nodes(model: ModelProto) -> frozenset[str]:
    """The names of the nodes that `wrap` has put around a core; of any other graph, none."""
    before, after = _parts(model)
    return frozenset(node.name for node in [*before, *after])


def forms(model: ModelProto) -> tuple[InputForm, OutputForm]:
    """What anybody's classifier takes and gives, as its graph shows."""
    inputs = graph_inputs(model)
    takes_pixels = bool(inputs) and inputs[0].type.tensor_type.elem_type == TensorProto.UINT8
    given = {value.name for value in model.graph.output}
    ends_in_softmax = any(
        node.op_type == "Softmax" and given & set(node.output) for node in model.graph.node
    )
    return (
        "uint8" if takes_pixels else "float32",
        "probabilities" if ends_in_softmax else "logits",
    )


def _parts(model: ModelProto) -> tuple[list[NodeProto], list[NodeProto]]:
    """Our nodes before and after the core.

    Known by the whole structure that `wrap` makes: somebody's own graph may well have a scope of
    our name in it, of which nothing may be cut off.
    """
    graph = model.graph
    readers = Counter(name for node in graph.node for name in node.input)
    named: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        named.setdefault(node.name, []).append(node)

    def found(expected: list[NodeProto]) -> list[NodeProto]:
        """The graph's nodes that are these, each the only reader of its inputs; all or none."""
        nodes = [node for wanted in expected for node in named.get(wanted.name, [])]
        same = len(nodes) == len(expected) and all(
            (node.op_type, node.input, node.output) == (wanted.op_type, wanted.input, wanted.output)
            and all(readers[name] == 1 for name in node.input)
            for node, wanted in zip(nodes, expected, strict=True)
        )
        return nodes if same else []

    before: list[NodeProto] = []
    last, softmax = named.get(_OURS + "shifted"), named.get(_OURS + "softmax")
    stored = {item.name for item in graph.initializer}
    is_first = bool(graph.input) and graph.input[0].name == PIXELS and _rank(graph.input[0]) == 4
    if last and last[0].output and is_first and stored.issuperset(_WEIGHTS):
        before = found(_nodes_before(last[0].output[0]))
    after: list[NodeProto] = []
    is_last = [value.name for value in graph.output] == [PROBABILITIES]
    if softmax and softmax[0].input and is_last and _rank(graph.output[0]) == 2:
        after = found(_nodes_after(softmax[0].input[0]))
    return before, after


def _assembled(
    core: ModelProto,
    before: list[NodeProto],
    after: list[NodeProto],
    weights: list[TensorProto],
    outer_input: ValueInfoProto,
    outer_output: ValueInfoProto,
) -> ModelProto:
    model = ModelProto()
    model.CopyFrom(core)
    nodes = [*before, *core.graph.node, *after]
    _replace(model, nodes, [*core.graph.initializer, *weights], outer_input, outer_output)
    return model


def _replace(
    model: ModelProto,
    nodes: list[NodeProto],
    weights: list[TensorProto],
    image: ValueInfoProto,
    output: ValueInfoProto,
) -> None:
    """Puts these in place of the model's own; they are not parts of that very model."""
    graph = model.graph
    known = {*_INNER, image.name, output.name}
    for old, new in (
        (graph.node, nodes),
        (graph.initializer, weights),
        (graph.input, [image]),
        (graph.output, [output]),
        (graph.value_info, [value for value in graph.value_info if value.name not in known]),
    ):
        del old[:]
        old.extend(new)


def _rank(value: ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _like(value: ValueInfoProto, name: str, kind: int, shape: tuple[int, ...]) -> ValueInfoProto:
    """A tensor of `value`'s batch dimension, and of this type and shape after it."""
    batch = value.type.tensor_type.shape.dim[0]
    first = batch.dim_value if batch.HasField("dim_value") else batch.dim_param
    return helper.make_tensor_value_info(name, kind, [first, *shape])
