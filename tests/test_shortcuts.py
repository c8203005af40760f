"""TensorRT's form of the aligned graphs: the same logits, plain Adds, and nobody else's graph."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from rexdeploy.arrays import Float32
from rexdeploy.backends import tensorrt_build
from rexdeploy.backends.tensorrt_build import EngineSettings
from rexdeploy.bundle.manifest import DEFAULT_BATCH, Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.graphs.cast import to_fp16
from rexdeploy.graphs.shortcuts import to_plain_adds
from rexdeploy.images import sets
from rexdeploy.parity.compare import Signal
from tests.helpers import nodes_of

Change = Callable[[ModelProto], None]
FORMATS = ["v1_original", "lite_original"]


def _exported(bundle: Bundle) -> ModelProto:
    artifact = bundle.manifest.find("onnx")
    assert artifact is not None
    return onnx.load_from_string(bundle.read(artifact))


@pytest.fixture(scope="module", params=FORMATS)
def graphs(request: pytest.FixtureRequest) -> tuple[ModelProto, ModelProto]:
    """An aligned graph as exported, and TensorRT's form of it."""
    model = _exported(request.getfixturevalue(request.param))
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
    model = to_plain_adds(_exported(v1_original))
    if precision == "fp16":
        model = to_fp16(model)
    settings = EngineSettings("rtx", DEFAULT_BATCH)
    assert len(tensorrt_build.build(model.SerializeToString(), settings).layers) <= 120


def _chain() -> ModelProto:
    """Three blocks of 8, 12 and 16 channels, their shortcuts in parts, and one of 16 without.

    Two convolutions share their bias, and one tensor has a name that the pass would choose.
    """
    rng = np.random.default_rng(0)
    weights: dict[str, Float32] = {"shared": rng.standard_normal(8).astype(np.float32)}
    nodes: list[onnx.NodeProto] = []

    def conv(name: str, source: str, columns: int, rows: int, bias: str | None = None) -> str:
        weights[f"{name}.weight"] = rng.standard_normal((rows, columns, 1, 1)).astype(np.float32)
        if bias is None:
            bias = f"{name}.bias"
            weights[bias] = rng.standard_normal(rows).astype(np.float32)
        nodes.append(helper.make_node("Conv", [source, f"{name}.weight", bias], [name], name=name))
        return name

    def node(kind: str, output: str, *inputs: str) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output))
        return output

    trunk, width = conv("stem", "x", 3, 8, "shared"), 8
    for index, rest in enumerate((4, 4, 0)):
        taken = f"project{index}.weight_padded" if index == 0 else f"relu{index}"
        hidden = node("Relu", taken, conv(f"expand{index}", trunk, width, 6))
        project = conv(f"project{index}", hidden, 6, width, None if index else "shared")
        total = node("Add", f"add{index}", project, trunk)
        if rest:
            conv(f"rest{index}", hidden, 6, rest)
            total = node("Concat", f"cat{index}", total, f"rest{index}")
            nodes[-1].attribute.append(helper.make_attribute("axis", 1))
        trunk, width = total, width + rest
    node("GlobalAveragePool", "pool", conv("head", trunk, width, 5))
    node("Flatten", "y", "pool")
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def test_a_whole_chain_gets_its_last_blocks_width() -> None:
    model = _chain()
    plain = to_plain_adds(model)
    shapes = _shapes(plain)
    widths = {name: shapes[name][1] for add in nodes_of(plain, "Add") for name in add.input}
    assert set(widths) == {"stem", "project0", "cat0", "project1", "cat1", "project2"}
    assert set(widths.values()) == {16}
    pool = np.random.default_rng(1).standard_normal((3, 3, 4, 4)).astype(np.float32)
    (before,), (after,) = _run(model, pool), _run(plain, pool)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()
    assert to_plain_adds(plain) == plain


def _node(model: ModelProto, name: str) -> onnx.NodeProto:
    found: onnx.NodeProto = next(node for node in model.graph.node if node.name == name)
    return found


def _insert_after(model: ModelProto, name: str, *added: onnx.NodeProto) -> None:
    nodes = list(model.graph.node)
    place = nodes.index(_node(model, name)) + 1
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:place], *added, *nodes[place:]])


def _another_reader(model: ModelProto) -> None:
    _insert_after(model, "cat0", helper.make_node("Relu", ["cat0"], ["seen"], name="seen"))
    model.graph.output.append(helper.make_tensor_value_info("seen", 1, ["n", 12, 4, 4]))


def _trunk_is_an_output(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("cat1", 1, ["n", 16, 4, 4]))


def _part_is_an_output(model: ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("rest0", 1, ["n", 4, 4, 4]))


def _part_is_read_elsewhere(model: ModelProto) -> None:
    _insert_after(model, "add1", helper.make_node("Relu", ["add1"], ["seen"], name="seen"))
    model.graph.output.append(helper.make_tensor_value_info("seen", 1, ["n", 12, 4, 4]))


def _weight_is_fed(model: ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("head.weight", 1, [5, 16, 1, 1]))


def _weight_is_computed(model: ModelProto) -> None:
    computed = helper.make_node("Neg", ["expand1.weight"], ["negative"], name="negative")
    _insert_after(model, "stem", computed)
    _node(model, "expand1").input[1] = "negative"


def _reader_has_groups(model: ModelProto) -> None:
    _node(model, "expand0").attribute.append(helper.make_attribute("group", 2))
    for tensor in model.graph.initializer:
        if tensor.name == "expand0.weight":
            halves = numpy_helper.to_array(tensor)[:, :4]
            tensor.CopyFrom(numpy_helper.from_array(halves, tensor.name))


def _trunk_begins_with_an_activation(model: ModelProto) -> None:
    _node(model, "stem").output[0] = "raw"
    _insert_after(model, "stem", helper.make_node("Relu", ["raw"], ["stem"], name="activation"))


def _parts_differ_in_settings(model: ModelProto) -> None:
    _node(model, "rest0").attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))


def _parts_read_different_tensors(model: ModelProto) -> None:
    _node(model, "rest1").input[0] = "expand1"


def _parts_in_the_other_order(model: ModelProto) -> None:
    concat = _node(model, "cat0")
    concat.input[:] = list(reversed(concat.input))


def _parts_are_cut_from_one_convolution(model: ModelProto) -> None:
    """As `--align off` and timm's export have it."""
    for name in ("project0", "rest0"):
        model.graph.node.remove(_node(model, name))
    weight = np.random.default_rng(2).standard_normal((12, 6, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "both.weight"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([8, 4]), "sizes"))
    source = _node(model, "expand0").output[0]
    _insert_after(
        model,
        "expand0",
        helper.make_node("Conv", [source, "both.weight"], ["both"], name="both"),
        helper.make_node("Split", ["both", "sizes"], ["project0", "rest0"], name="cut", axis=1),
    )


def _control_flow_reads_the_trunk(model: ModelProto) -> None:
    value = helper.make_tensor_value_info("inner", 1, None)
    branch = helper.make_graph(
        [helper.make_node("Relu", ["cat0"], ["inner"])], "branch", [], [value]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    choose = helper.make_node(
        "If", ["always"], ["chosen"], name="if", then_branch=branch, else_branch=branch
    )
    _insert_after(model, "cat0", choose)
    model.graph.output.append(helper.make_tensor_value_info("chosen", 1, ["n", 12, 4, 4]))


@pytest.mark.parametrize(
    "change",
    [
        _another_reader,
        _trunk_is_an_output,
        _part_is_an_output,
        _part_is_read_elsewhere,
        _weight_is_fed,
        _weight_is_computed,
        _reader_has_groups,
        _trunk_begins_with_an_activation,
        _parts_differ_in_settings,
        _parts_read_different_tensors,
        _parts_in_the_other_order,
        _parts_are_cut_from_one_convolution,
        _control_flow_reads_the_trunk,
    ],
)
def test_a_graph_of_another_structure_comes_back_as_it_was(change: Change) -> None:
    model = _chain()
    change(model)
    onnx.checker.check_model(model, full_check=True)
    assert to_plain_adds(model) == model
