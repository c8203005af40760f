"""The float16 graph: types, values, and graphs that cannot be converted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, TensorProto, helper

from rexdeploy import arrays
from rexdeploy.bundle.precision import PRECISIONS, Precision
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.emulate import as_typed
from rexdeploy.graphs.products import precision_of
from tests.helpers import edit_weights, graph, nodes_of, small_graph


def _model(nodes: list[onnx.NodeProto], weights: Mapping[str, object], out: int = 1) -> ModelProto:
    """A graph from `x` (float32 [2, 3, 8, 8]) to `y`."""
    return small_graph(nodes, [2, 3, 8, 8], weights, output_type=out)


def _run(model: ModelProto, x: arrays.Float32) -> arrays.Float32:
    session = ort.InferenceSession(model.SerializeToString())
    result: arrays.Float32 = session.run(None, {session.get_inputs()[0].name: x})[0]
    return result


X = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
KERNEL = np.random.default_rng(1).standard_normal((4, 3, 3, 3)).astype(np.float32)


def _assert_converted_inside(model: ModelProto, half: ModelProto) -> None:
    """Float32 in and out, two casts, and no float32 weight is left."""
    assert [
        value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)
    ] == [TensorProto.FLOAT] * 2
    assert len(nodes_of(half, "Cast")) == 2
    assert not [t.name for t in half.graph.initializer if t.data_type == TensorProto.FLOAT]
    assert half.metadata_props == model.metadata_props


def test_our_graph_is_half_throughout_and_float32_outside(small_v1_original: Bundle) -> None:
    model = graph(small_v1_original)
    half = to_precision(model, "fp16")
    assert (precision_of(model), precision_of(half)) == ("fp32", "fp16")
    _assert_converted_inside(model, half)


def test_a_converted_graph_rounds_and_no_more() -> None:
    model = _model([helper.make_node("Conv", ["x", "w"], ["y"], name="conv")], {"w": KERNEL})
    half, exact = _run(to_precision(model, "fp16"), X), _run(model, X)
    assert half.dtype == np.float32
    assert 0 < np.abs(half - exact).max() < 2e-2


def test_an_operator_without_a_half_form_stays_float32() -> None:
    """Resize takes half data but only float32 scales; Multinomial-like ops take none at all."""
    scales = np.array([1, 1, 2, 2], dtype=np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Resize", ["c", "", "scales"], ["y"], name="resize", mode="nearest"),
    ]
    model = _model(nodes, {"w": KERNEL, "scales": scales})
    half = to_precision(model, "fp16")
    by_name = {tensor.name: tensor for tensor in half.graph.initializer}
    assert by_name["scales"].data_type == TensorProto.FLOAT
    assert _run(half, X).shape == (2, 4, 12, 12)


def test_a_tensor_needed_in_both_types_is_cast_once_for_each() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="a"),
        helper.make_node("Sigmoid", ["x"], ["b"], name="b"),
        helper.make_node("Add", ["a", "b"], ["y"], name="add"),
    ]
    half = to_precision(_model(nodes, {}), "fp16")
    assert len(nodes_of(half, "Cast")) == 2
    np.testing.assert_allclose(_run(half, X), _run(_model(nodes, {}), X), atol=1e-2)


def test_casts_to_float32_inside_the_graph_are_kept() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], name="to_int", to=TensorProto.INT64),
        helper.make_node("Cast", ["i"], ["f"], name="to_float", to=TensorProto.FLOAT),
        helper.make_node("Add", ["f", "x"], ["y"], name="add"),
    ]
    model = _model(nodes, {})
    np.testing.assert_allclose(_run(to_precision(model, "fp16"), X), _run(model, X), atol=1e-2)


def test_weights_beyond_half_are_an_error_not_an_infinity(small_v1_original: Bundle) -> None:
    model = graph(small_v1_original)
    weight = nodes_of(model, "Conv")[3].input[1]
    broken = edit_weights(model, [weight], lambda values: values * 1e6)
    with pytest.raises(VerificationFailed, match="beyond float16's 65504"):
        to_precision(broken, "fp16")


def test_an_open_bound_stays_open() -> None:
    bounds: dict[str, object] = {"low": np.float32(0), "high": np.float32(np.inf)}
    node = helper.make_node("Clip", ["x", "low", "high"], ["y"], name="clip")
    np.testing.assert_allclose(
        _run(to_precision(_model([node], bounds), "fp16"), X), np.maximum(X, 0), atol=1e-2
    )


def test_our_graph_is_bfloat16_throughout_and_float32_outside(small_v1_original: Bundle) -> None:
    model = graph(small_v1_original)
    half = to_precision(model, "bf16")
    assert precision_of(half) == "bf16"
    assert [entry.version for entry in half.opset_import] == [22]
    _assert_converted_inside(model, half)
    assert [node.name for node in model.graph.node] == [
        node.name for node in half.graph.node if node.op_type != "Cast"
    ]


def test_bfloat16_weights_are_the_nearest_ones() -> None:
    """Bit for bit torch's rounding, ties to even, subnormals, the largest and open bounds."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 0x7F7F0000, 5000, dtype=np.uint32)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F80FFFF, 1, 0x8000, 0x7F800000], np.uint32)
    values = np.concatenate([ties, ties | 0x80000000, bits]).view(np.float32)[:4800]
    values = values.reshape(600, 1, 1, 8, 1)  # beside x's [2, 3, 8, 8]
    node = helper.make_node("Mul", ["x", "w"], ["y"], name="mul")
    half = to_precision(_model([node], {"w": values}), "bf16")
    (weight,) = half.graph.initializer
    expected = torch.from_numpy(values).bfloat16().view(torch.int16)
    assert weight.raw_data == expected.numpy().tobytes()


def test_a_weight_beyond_bfloat16_is_an_error() -> None:
    node = helper.make_node("Mul", ["x", "w"], ["y"], name="mul")
    huge = np.array([np.finfo(np.float32).max], dtype=np.float32)
    with pytest.raises(VerificationFailed, match="beyond bfloat16's 3.3895e\\+38"):
        to_precision(_model([node], {"w": huge}), "bf16")


def test_the_emulation_rounds_every_tensor_to_bfloat16() -> None:
    """Against torch, which computes each of these in float32 and rounds the result."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Add", ["c", "c"], ["d"], name="add"),
        helper.make_node("Mul", ["d", "x1"], ["y"], name="mul"),
    ]
    scale = np.full((1, 4, 1, 1), 1.0009765625, np.float32)  # 1 in bfloat16
    emulated = as_typed(to_precision(_model(nodes, {"w": KERNEL, "x1": scale}), "bf16"))
    onnx.checker.check_model(emulated, full_check=True)
    got = torch.from_numpy(_run(emulated, X))
    assert torch.equal(got, got.bfloat16().float())
    exact = torch.nn.functional.conv2d(
        torch.from_numpy(X).bfloat16().float(), torch.from_numpy(KERNEL).bfloat16().float()
    )
    torch.testing.assert_close(got, 2 * exact.bfloat16().float(), rtol=2**-8, atol=1e-6)
    assert not torch.allclose(got, 2 * exact, rtol=1e-4, atol=1e-6)


def test_a_graph_that_cannot_reach_bfloat16s_opset_is_refused() -> None:
    """Upsample went away in opset 10."""
    scales = np.array([1, 1, 2, 2], dtype=np.float32)
    model = _model([helper.make_node("Upsample", ["x", "s"], ["y"], name="up")], {"s": scales})
    model.opset_import[0].version = 7
    with pytest.raises(UsageError, match="cannot be brought from opset 7 to 22, which bfloat16"):
        to_precision(model, "bf16")


def test_control_flow_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    node = helper.make_node(
        "If", ["condition"], ["y"], name="choice", then_branch=branch, else_branch=branch
    )
    with pytest.raises(UsageError, match=r"'choice' is control flow \(If\)"):
        to_precision(_model([node], {"condition": np.array(True)}), "fp16")


def test_mixed_precision_is_neither() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Cast", ["c"], ["h"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["h", "v"], ["y"], name="half"),
    ]
    weights = {"w": KERNEL, "v": np.ones((2, 4, 1, 1), dtype=np.float16)}
    assert precision_of(_model(nodes, weights, out=TensorProto.FLOAT16)) is None


@pytest.mark.parametrize("taken", ["x_fp16", "w_fp16", "y_fp16", "c_fp16"])
def test_names_that_the_graph_has_already_are_not_taken_again(taken: str) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("Add", ["c", taken], ["y"], name="add"),
    ]
    offset = np.full((1, 4, 1, 1), 7, dtype=np.float32)
    model = _model(nodes, {"w": KERNEL, taken: offset})
    np.testing.assert_allclose(_run(to_precision(model, "fp16"), X), _run(model, X), atol=5e-2)


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_has_one_type_by_all_its_names(name: Precision) -> None:
    kind = PRECISIONS[name]
    assert TensorProto.DataType.Name(kind.onnx) == kind.title.replace("32", "").upper()
    numbers = helper.tensor_dtype_to_np_dtype(kind.onnx)
    assert (numbers.name, numbers.itemsize) == (kind.title, kind.size_bytes)
    limits: Any = ml_dtypes.iinfo if name == "int8" else ml_dtypes.finfo
    assert kind.largest == pytest.approx(float(limits(numbers).max), rel=1e-6)
    assert getattr(torch, kind.title).itemsize == kind.size_bytes
