"""Reads any ONNX graph and says what is in it; the one place where a file becomes a graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto, TensorProto
from onnx.external_data_helper import (
    ExternalDataInfo,
    load_external_data_for_model,
    uses_external_data,
)

from rexdeploy.errors import UsageError, first_line
from rexdeploy.files import MAX_GRAPH_BYTES, file_size, open_plain, read_plain
from rexdeploy.graphs.bounds import check_functions


class NotOnnx(UsageError):
    """Bytes that are no ONNX model, or none that the standard allows."""


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
        *((part.node, part) for part in with_branches(model.graph)),
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


def put_nodes(graph: GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Puts these in place of the graph's nodes, which may be among them."""
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def with_branches(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those of its control flow."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                yield from with_branches(branch)


def shapes(graph: GraphProto) -> dict[str, list[int]]:
    """Shapes by tensor name; a dimension that is open is 0."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes.setdefault(value.name, [dim.dim_value for dim in dims])
    return shapes
