"""TensorRT's form of the aligned graphs: the same logits, plain Adds, and nobody else's graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, helper

from rexdeploy.arrays import Float32
from rexdeploy.backends import tensorrt_build
from rexdeploy.backends.tensorrt_build import EngineSettings
from rexdeploy.bundle.manifest import DEFAULT_BATCH, Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.engine_graph import to_plain_adds
from rexdeploy.images import sets
from rexdeploy.models.rexnet import v1_config
from rexdeploy.parity.compare import Signal
from tests.helpers import graph, nodes_of

FORMATS = ["v1_original", "lite_original"]


@pytest.fixture(scope="module", params=FORMATS)
def graphs(request: pytest.FixtureRequest) -> tuple[ModelProto, ModelProto]:
    """An aligned graph as exported, and TensorRT's form of it."""
    model = graph(request.getfixturevalue(request.param))
    before = model.SerializeToString(deterministic=True)
    plain = to_plain_adds(model)
    assert model.SerializeToString(deterministic=True) == before
    return model, plain


def _run(model: ModelProto, pool: Float32, *names: str) -> list[Float32]:
    """The graph's output, and the tensors named, as extra outputs of a copy."""
    copy = ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(copy.SerializeToString(), options, ["CPUExecutionProvider"])
    outputs: list[Float32] = session.run(None, {copy.graph.input[0].name: pool})
    return outputs


def _pool(model: ModelProto, count: int) -> Float32:
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    return sets.synthetic(count, Preprocess(size, size), seed=3)


def _shapes(model: ModelProto) -> dict[str, list[int | str]]:
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*model.graph.input, *model.graph.value_info, *model.graph.output]
    }


def test_the_logits_stay_as_they_were(graphs: tuple[ModelProto, ModelProto]) -> None:
    model, plain = graphs
    pool = _pool(model, 4)
    (before,), (after,) = _run(model, pool), _run(plain, pool)
    assert np.abs(after - before).max() <= 1e-5 * Signal.of(before).size


def test_every_shortcut_is_one_add_of_two_tensors_of_equal_width(
    graphs: tuple[ModelProto, ModelProto],
) -> None:
    model, plain = graphs
    assert len(nodes_of(model, "Concat")) >= 5
    assert nodes_of(plain, "Concat") == []
    adds = nodes_of(plain, "Add")
    assert len(adds) == len(nodes_of(model, "Add")) == 11
    shapes = _shapes(plain)
    for add in adds:
        first, second, total = (shapes[name] for name in (*add.input, add.output[0]))
        assert first == second == total
    joined = len(nodes_of(model, "Concat"))
    assert len(nodes_of(plain, "Conv")) == len(nodes_of(model, "Conv")) - joined


def test_what_is_said_of_the_graph_is_true(graphs: tuple[ModelProto, ModelProto]) -> None:
    """Its shapes are those that a fresh inference gives; names, metadata and signature stay."""
    model, plain = graphs
    bare = ModelProto()
    bare.CopyFrom(plain)
    del bare.graph.value_info[:]
    inferred = _shapes(onnx.shape_inference.infer_shapes(bare, strict_mode=True))
    said = _shapes(plain)
    assert said == {name: inferred[name] for name in said}
    written = {name for node in plain.graph.node for name in node.output}
    assert written <= said.keys()
    names = [node.name for node in plain.graph.node]
    assert len(set(names)) == len(names)
    assert set(names) <= {node.name for node in model.graph.node}
    assert list(plain.metadata_props) == list(model.metadata_props)
    assert list(plain.graph.input) == list(model.graph.input)
    assert list(plain.graph.output) == list(model.graph.output)
    read = {name for node in plain.graph.node for name in node.input}
    assert {tensor.name for tensor in plain.graph.initializer} <= read


def _parts(model: ModelProto) -> dict[str, list[str]]:
    """The outputs of the convolutions that become one, by the name of the first."""
    writers = {name: node for node in model.graph.node for name in node.output}
    parts = {}
    for concat in nodes_of(model, "Concat"):
        total, rest = concat.input
        (project,) = (
            name
            for name in writers[total].input
            if writers[name].input[0] == writers[rest].input[0]
        )
        parts[project] = [project, rest]
    return parts


def test_the_added_channels_are_zero_at_run_time(graphs: tuple[ModelProto, ModelProto]) -> None:
    """In every tensor that a shortcut touches; the other channels are the exported graph's."""
    model, plain = graphs
    parts = _parts(model)
    chained = sorted({name for add in nodes_of(plain, "Add") for name in (*add.input, *add.output)})
    names = [parts.get(name, [name]) for name in chained]
    pool = _pool(model, 2)
    values = iter(_run(model, pool, *(name for group in names for name in group))[1:])
    expected = [np.concatenate([next(values) for _ in group], axis=1) for group in names]
    padded = 0
    for name, wide, narrow in zip(chained, _run(plain, pool, *chained)[1:], expected, strict=True):
        channels = narrow.shape[1]
        assert np.abs(wide[:, :channels] - narrow).max() <= 1e-5 * np.abs(narrow).max(), name
        assert not wide[:, channels:].any(), name
        padded += wide.shape[1] > channels
    assert padded >= 10


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_makes_at_most_120_layers_of_v1_1_0(v1_original: Bundle, precision: str) -> None:
    """By the build's own report, at the default batch range and targets."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = to_plain_adds(graph(v1_original))
    if precision == "fp16":
        model = to_precision(model, "fp16")
    settings = EngineSettings("rtx", DEFAULT_BATCH)
    assert len(tensorrt_build.build(model.SerializeToString(), settings).layers) <= 120


def test_it_is_the_network_that_torch_exports_with_wide_shortcuts(v1_original: Bundle) -> None:
    """Every tensor of a chain as wide as the widest after it: three lines in torch, ten seconds."""
    model = graph(v1_original)
    plain = to_plain_adds(model)
    sizes = {tensor.name: list(tensor.dims)[:1] for tensor in plain.graph.initializer}
    widths = {node.name: sizes[node.input[1]] for node in nodes_of(plain, "Conv")}
    names = {node.input[1]: node.name for node in nodes_of(model, "Conv")}
    own = {tensor.name: next(iter(tensor.dims), 0) for tensor in model.graph.initializer}
    blocks = sorted(
        (name.removesuffix(".project.weight") for name in own if name.endswith(".project.weight")),
        key=lambda name: int(name.rpartition(".")[2]),
    )
    outputs = [
        own[f"{block}.project.weight"] + own.get(f"{block}.rest.weight", 0) for block in blocks
    ]
    config = v1_config(1.0)
    carried = list(outputs)
    for index in range(len(blocks) - 2, -1, -1):
        if config.blocks[index + 1].has_shortcut:
            carried[index] = max(outputs[index], carried[index + 1])
    assert [widths[names[f"{block}.project.weight"]] for block in blocks] == [[n] for n in carried]
    assert carried != outputs


def _other_names(model: ModelProto) -> None:
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = name.replace("features", "layers").replace("rest", "other")
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("features", "layers").replace("rest", "other")


def test_a_graph_of_other_names_comes_back_as_it_was(v1_original: Bundle) -> None:
    model = graph(v1_original)
    _other_names(model)
    assert to_plain_adds(model) == model


def test_biases_that_are_shared_or_dropped_as_zeros_are_no_hindrance(lite_original: Bundle) -> None:
    """As the simplifier leaves a squeeze-excitation that has never been trained."""
    model = graph(lite_original)
    convs = {node.input[1].removesuffix(".weight"): node for node in nodes_of(model, "Conv")}
    convs["features.6.project"].input[2] = convs["features.5.project"].input[2]
    del convs["features.9.project"].input[2]
    del convs["features.10.rest"].input[2]
    plain = to_plain_adds(model)
    assert nodes_of(plain, "Concat") == []
    pool = _pool(model, 2)
    (before,), (after,) = _run(model, pool), _run(plain, pool)
    assert np.abs(after - before).max() <= 1e-5 * Signal.of(before).size


def test_again_it_changes_nothing(v1_original: Bundle) -> None:
    plain = to_plain_adds(graph(v1_original))
    assert to_plain_adds(plain) == plain
