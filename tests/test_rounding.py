"""Twins: a float32 graph rounded where a 16-bit graph rounds agrees with it to the bit."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper

from rexdeploy.arrays import Float32, Images
from rexdeploy.bundle.precision import Precision
from rexdeploy.bundle.store import Bundle
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.emulate import as_typed, sixteen_bit_types, twin, widened, with_peaks
from rexdeploy.graphs.read import element_types, node_name
from rexdeploy.graphs.wrapper import unwrap
from rexdeploy.images.sets import varied
from tests.helpers import edit_weights, graph, nodes_of, small_graph

HALF, BFLOAT16 = TensorProto.FLOAT16, TensorProto.BFLOAT16


def _run(model: ModelProto, images: Images) -> Float32:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options)
    return np.asarray(session.run(None, {session.get_inputs()[0].name: images})[0])


@pytest.mark.parametrize("which", ["small_v1_original", "small_lite_original", "timm_original"])
@pytest.mark.parametrize("narrow", ["fp16", "bf16"])
def test_a_graph_computes_its_parent_rounded_to_the_bit(
    which: str, narrow: Precision, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(which)
    parent = graph(bundle, "fp32.tensorrt.onnx")
    images = varied(4, bundle.manifest.model.preprocess, seed=7)
    converted = to_precision(parent, narrow)
    found = twin(parent, converted)
    assert found is not None
    assert found.float32 == frozenset()
    rounded, exact = _run(found.model, images), _run(parent, images)
    np.testing.assert_array_equal(_run(as_typed(converted), images), rounded)
    assert np.abs(rounded - exact).max() > 1e-3 * exact.std()


def test_a_mixed_graph_is_rounded_where_it_is_float16(small_v1_original: Bundle) -> None:
    parent = graph(small_v1_original, "fp32.tensorrt.onnx")
    images = varied(3, small_v1_original.manifest.model.preprocess, seed=7)
    names = [node_name(node) for node in parent.graph.node]
    kept = set(names[20:60])
    mixed = to_precision(parent, "fp16", kept)
    found = twin(parent, mixed)
    assert found is not None
    assert found.float32 == kept
    np.testing.assert_array_equal(_run(as_typed(mixed), images), _run(found.model, images))
    whole = _run(as_typed(to_precision(parent, "fp16")), images)
    assert np.any(_run(as_typed(mixed), images) != whole)
    # Rounded is what a float16 node puts out: the peaks are those of float16 tensors only.
    assert set(found.rounded.values()) == set(names) - kept - _shapes_only(parent)


def _shapes_only(model: ModelProto) -> set[str]:
    types = element_types(onnx.shape_inference.infer_shapes(model).graph)
    return {
        node_name(node) for node in model.graph.node if types[node.output[0]] != TensorProto.FLOAT
    }


def test_a_float32_graph_is_its_own_twin(small_v1_original: Bundle) -> None:
    parent = graph(small_v1_original, "fp32.onnx")
    found = twin(parent, parent)
    assert found is not None
    assert found.rounded == {}
    assert found.model.graph.node == parent.graph.node


def test_pixels_and_probabilities_stay_float32(small_pixels_original: Bundle) -> None:
    parent = graph(small_pixels_original, "fp32.tensorrt.onnx")
    half = graph(small_pixels_original, "fp16.onnx")
    found = twin(parent, half)
    assert found is not None
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_run(as_typed(half), pixels), _run(found.model, pixels))
    core = twin(unwrap(parent), unwrap(half))
    assert core is not None
    assert set(core.rounded.values()) == set(found.rounded.values())


def test_another_network_has_no_twin(
    small_v1_original: Bundle, small_lite_original: Bundle
) -> None:
    parent = graph(small_v1_original, "fp32.onnx")
    assert twin(parent, graph(small_lite_original, "fp16.onnx")) is None
    changed = to_precision(parent, "fp16")
    clip = nodes_of(changed, "Sigmoid")[0]
    clip.op_type = "Tanh"
    assert twin(parent, changed) is None


def test_a_twin_is_blind_to_what_is_wrong_with_the_graph(small_v1_original: Bundle) -> None:
    """It takes nothing from the candidate but the places where it rounds."""
    parent = graph(small_v1_original, "fp32.tensorrt.onnx")
    half = to_precision(parent, "fp16")
    weight = nodes_of(half, "Conv")[5].input[1]
    wrong = edit_weights(half, [weight], lambda values: values * 1.5)
    good, bad = twin(parent, half), twin(parent, wrong)
    assert good is not None
    assert bad is not None
    assert good.model == bad.model


def test_a_widened_graph_has_its_own_weights_and_rounds_nothing(small_v1_original: Bundle) -> None:
    half = to_precision(graph(small_v1_original, "fp32.onnx"), "fp16")
    wide = widened(half)
    assert sixteen_bit_types(half) == {HALF}
    assert sixteen_bit_types(wide) == frozenset()
    images = varied(2, small_v1_original.manifest.model.preprocess, seed=7)
    rounded, exact = _run(as_typed(half), images), _run(wide, images)
    error = np.abs(rounded - exact).max() / exact.std()
    assert 1e-4 < error < 0.5
    assert (
        sixteen_bit_types(widened(to_precision(graph(small_v1_original, "fp32.onnx"), "bf16")))
        == frozenset()
    )


def test_peaks_are_the_largest_absolute_values() -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    weights = {"w": np.array([1, -2, 3], np.float32)}
    model = small_graph(nodes, ["n", 3], weights, "z", ["n", 3])
    copy, outputs = with_peaks(model, ["y", "z"])
    onnx.checker.check_model(copy, full_check=True)
    session = ort.InferenceSession(copy.SerializeToString())
    x = np.array([[1, 5, 2], [0, 1, -4]], np.float32)
    _, *peaks = session.run(["z", outputs["y"], outputs["z"]], {"x": x})
    assert [float(peak) for peak in peaks] == [12, 6]
