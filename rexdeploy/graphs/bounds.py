"""How much a graph would take, by its own words alone: before any library believes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx
from onnx import GraphProto, ModelProto, NodeProto, ValueInfoProto, helper
from onnx.inliner import inline_local_functions

from rexdeploy.errors import UsageError

MAX_NODES = 1_000_000
"""Of a graph whose functions are written out: functions of functions double with every level."""
MAX_RUN_BYTES = 12 << 30
"""Of all tensors that a graph has in memory at once, by their shapes.

ReXNet 3.0 takes 2.7 GiB for 64 images of 224 x 224, and 10, the widest there is, about 11.
"""
_SMALL_BYTES = 4096  # of a weight that a shape may be computed from
_UNKNOWN_ITEM_BYTES = 8  # strings, and types that numpy has none for


def check_functions(model: ModelProto, name: str) -> None:
    """Raises UsageError where writing out a model's functions would not end, or be too long."""
    functions = {(item.domain, item.name, item.overload): item for item in model.functions}
    if not functions:
        return
    counts: dict[tuple[str, str, str], int | None] = {}  # None: not done yet

    def count(nodes: Iterable[NodeProto]) -> int:
        total = 0
        for node in nodes:
            total += 1 + sum(count(branch.node) for branch in _branches(node))
            key = (node.domain, node.op_type, node.overload)
            if key not in functions:
                continue
            if key not in counts:
                counts[key] = None
                counts[key] = count(functions[key].node)
            inner = counts[key]
            if inner is None:
                raise RecursionError
            total += inner
        return total

    try:
        nodes = count(model.graph.node)
    except RecursionError:
        raise UsageError(
            f"{name} has a function that calls itself, or hundreds in each other; expected an "
            "ONNX model whose functions can be written out"
        ) from None
    if nodes > MAX_NODES:
        raise UsageError(
            f"{name} has {nodes} nodes once its functions are written out, expected at most "
            f"{MAX_NODES}"
        )


def check_memory(model: ModelProto, rows: int, image: Sequence[int], name: str) -> None:
    """Raises UsageError for a graph that takes more than MAX_RUN_BYTES for `rows` images.

    `image` is the shape of one. Of a shape that hangs on values, nothing can be told beforehand.
    """
    needed = peak_bytes(model, (rows, *image))
    if needed > MAX_RUN_BYTES:
        raise UsageError(
            f"{name} takes {needed / (1 << 30):.1f} GiB of memory at a batch of {rows}, by the "
            f"shapes of its tensors, expected at most {MAX_RUN_BYTES >> 30}; give a smaller one, "
            "or one of a smaller batch or image"
        )


def peak_bytes(model: ModelProto, shape: Sequence[int]) -> int:
    """What the graph's tensors take at the most at one time, for an input of that shape.

    What hangs on constants alone counts all the time: a runtime computes it when it loads.
    """
    light = _without_weights(model, shape)
    if light.functions:
        light = inline_local_functions(light)
    try:
        graph = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except onnx.shape_inference.InferenceError:  # shapes that contradict each other
        graph = light.graph
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    return _peak(graph, weights)


def _without_weights(model: ModelProto, shape: Sequence[int]) -> ModelProto:
    """The model with inputs in place of its larger weights, and with `shape` where it is open."""
    graph = model.graph
    small = [tensor for tensor in graph.initializer if tensor.ByteSize() <= _SMALL_BYTES]
    large = [
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        for tensor in graph.initializer
        if tensor.ByteSize() > _SMALL_BYTES
    ] + [
        helper.make_tensor_value_info(tensor.values.name, tensor.values.data_type, tensor.dims)
        for tensor in graph.sparse_initializer
    ]
    weights = {item.name for item in (*small, *large)}
    images = [value for value in graph.input if value.name not in weights]
    light = helper.make_model(
        helper.make_graph(
            graph.node,
            graph.name or "graph",
            [*(_filled(value, shape) for value in images[:1]), *images[1:], *large],
            graph.output,
            small,
        ),
        opset_imports=model.opset_import,
        ir_version=max(model.ir_version, 4),  # from which on weights need not be inputs
        functions=model.functions,
    )
    for value in light.graph.output:  # what comes out, the nodes say
        value.type.tensor_type.ClearField("shape")
    return light


def _filled(value: ValueInfoProto, shape: Sequence[int]) -> ValueInfoProto:
    """An input with its open dimensions, or all of an unknown shape, as in `shape`."""
    tensor = value.type.tensor_type
    dims = [dim.dim_value for dim in tensor.shape.dim]
    if len(dims) != len(shape):
        filled = list(dims if dims else shape)
    else:
        filled = [own if own > 0 else given for own, given in zip(dims, shape, strict=True)]
    return helper.make_tensor_value_info(value.name, tensor.elem_type, filled)


def _peak(graph: GraphProto, weights: Iterable[str]) -> int:
    """The most bytes that a graph's tensors take together while it runs, node by node."""
    sizes = {tensor.name: _size(tensor.data_type, tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        tensor = value.type.tensor_type
        sizes[value.name] = _size(tensor.elem_type, [dim.dim_value for dim in tensor.shape.dim])
    always = {*weights, *(tensor.name for tensor in graph.initializer)}
    last: dict[str, int] = {}  # the node that reads a tensor last
    for position, node in enumerate(graph.node):
        for name in _read(node):
            last[name] = position
    live = sum(sizes.get(name, 0) for name in always | {value.name for value in graph.input})
    peak = live
    given = {value.name for value in graph.output}
    for position, node in enumerate(graph.node):
        live += sum(sizes.get(name, 0) for name in node.output)
        inner = sum(_peak(branch, ()) for branch in _branches(node))
        peak = max(peak, live + inner)
        if always.issuperset(_read(node)):
            always.update(node.output)
        done = {name for name in node.input if last[name] == position}
        done.update(name for name in node.output if name not in last)
        live -= sum(sizes.get(name, 0) for name in done - always - given)
    return peak


def _size(kind: int, dims: Sequence[int]) -> int:
    """A tensor's bytes; 0 where a dimension is not known."""
    count = 1
    for dim in dims:
        count *= max(dim, 0)
    try:
        return count * helper.tensor_dtype_to_np_dtype(kind).itemsize
    except KeyError:
        return count * _UNKNOWN_ITEM_BYTES


def _read(node: NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those that its branches take from around them among them."""
    yield from (name for name in node.input if name)
    for branch in _branches(node):
        for inner in branch.node:
            yield from _read(inner)


def _branches(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
