"""The TensorRT adapter, against a real TensorRT-RTX: builds, proofs, headers, errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rexdeploy.backends import tensorrt_api, tensorrt_build
from rexdeploy.backends.tensorrt_api import read_header
from rexdeploy.backends.tensorrt_build import BuiltEngine, EngineSettings, Layer, parse_layers
from rexdeploy.backends.trt_load import DIAGNOSES
from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.precision import Precision
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.products import Product, products
from rexdeploy.parity.layer_types import prove
from tests.helpers import entry, small_graph

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SETTINGS = EngineSettings("rtx", BatchRange(1, 2, 4), ("sm86", "sm89"))


def _graph(bundle: Bundle, precision: Precision) -> bytes:
    return bundle.read(entry(bundle, f"{precision}.onnx"))


def _products(model: bytes) -> list[Product]:
    return products(onnx.load_from_string(model))


def _named(*names: str) -> list[Product]:
    return [Product(name, "Half", 1000) for name in names]


@pytest.fixture(scope="module")
def engines(v1_original: Bundle) -> dict[str, BuiltEngine]:
    return {
        precision: tensorrt_build.build(_graph(v1_original, precision), SETTINGS)
        for precision in ("fp32", "fp16")
    }


def test_an_fp16_graph_gives_an_engine_that_is_provably_half(
    engines: dict[str, BuiltEngine], v1_original: Bundle
) -> None:
    convolutions = _products(_graph(v1_original, "fp16"))
    for wanted in ("Half", None):
        proof = prove(engines["fp16"].layers, convolutions, wanted)
        assert (proof.differing, proof.not_found) == ((), ())
        assert proof.layers["Float"] == 1  # that reads the float32 image
        assert proof.macs == {"Half": sum(product.macs or 0 for product in convolutions)}
        assert proof.holds


def test_an_fp32_engine_is_not_taken_for_half(
    engines: dict[str, BuiltEngine], v1_original: Bundle
) -> None:
    """The trap of the field: a build that "sets fp16" and gives float32."""
    convolutions = _products(_graph(v1_original, "fp32"))
    proof = prove(engines["fp32"].layers, convolutions, "Half")
    assert proof.layers["Half"] == 0
    assert len(proof.differing) >= 70
    assert not proof.holds
    assert proof.summary.startswith("0 of ")
    # Against its own graph's types it is what was asked for; against another graph's it is not.
    assert prove(engines["fp32"].layers, convolutions).holds
    assert not prove(engines["fp32"].layers, _products(_graph(v1_original, "fp16"))).holds


def test_one_float_convolution_among_half_ones_is_named() -> None:
    """A graph whose stem stays float32: mostly Half, but not an FP16 engine."""
    rng = np.random.default_rng(0)
    stem = rng.standard_normal((32, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["s"], name="slow"),
        helper.make_node("Relu", ["s"], ["r"], name="relu"),
        helper.make_node("Cast", ["r"], ["h0"], name="cast", to=TensorProto.FLOAT16),
    ]
    weights = {"stem": stem}
    for index in range(12):
        weights[f"w{index}"] = rng.standard_normal((32, 32, 3, 3)).astype(np.float16)
        nodes += [
            helper.make_node(
                "Conv", [f"h{index}", f"w{index}"], [f"c{index}"], name=f"fast{index}"
            ),
            helper.make_node("Relu", [f"c{index}"], [f"h{index + 1}"], name=f"relu{index}"),
        ]
    model = small_graph(
        nodes, ["n", 3, 64, 64], weights, "h12", ["n", 32, 38, 38], TensorProto.FLOAT16
    )
    built = tensorrt_build.build(model.SerializeToString(), SETTINGS)
    found = products(model)
    proof = prove(built.layers, found, "Half")
    assert proof.share("Half") > 0.5
    assert not proof.holds
    assert len(proof.differing) == 1, built.layers
    assert proof.macs["Float"] == 62 * 62 * 32 * 3 * 9
    assert proof.macs["Half"] == sum((62 - 2 * i) ** 2 * 32 * 32 * 9 for i in range(1, 13))
    assert prove(built.layers, found).holds  # mixed, as the graph asks


def test_an_engine_with_no_known_convolution_is_not_proven() -> None:
    layers = parse_layers(
        "Name: a, LayerType: kgen, Inputs: [ { Name: x, Datatype: Half }], "
        "Outputs: [ { Name: y, Datatype: Half }], TacticName: , Metadata: "
    )
    assert layers[0].precision == "Half"
    assert prove(layers, _named("conv"), "Half").not_found == ("conv",)
    assert not prove(layers, _named("conv"), "Half").holds
    assert not prove((), [], "Half").holds


def test_the_report_of_full_tensorrt_is_read_too() -> None:
    """Its inspector writes "Format/Datatype" and spells the types FP16 and FP32."""
    half = "Format/Datatype: Channel major FP16 format where channel % 8 == 0 }"
    full = "Format/Datatype: Row major linear FP32 }"
    report = (
        "Name: conv + silu, LayerType: CaskConvolution, "
        f"Inputs: [ {{ Name: x, Location: Device, Dimensions: [8,3,224,224], {half}], "
        f"Outputs: [ {{ Name: y, Location: Device, Dimensions: [8,32,112,112], {half}], "
        "ParameterType: Convolution, Weights: {Type: Half, Count: 864}, Bias: {Type: Half, "
        "Count: 32}, TacticName: t, Metadata: [ONNX Layer: node_Conv_1]\x1e[ONNX Layer: silu]\n"
        f"Name: pool, LayerType: Reformat, Inputs: [ {{ Name: y, Dimensions: [8,32,1,1], {full}], "
        f"Outputs: [ {{ Name: z, Location: Device, Dimensions: [8,32], {full}], "
        "TacticName: t, Metadata: [ONNX Layer: node_Gemm_2]"
    )
    first, second = parse_layers(report)
    assert (first.precision, first.onnx_nodes) == ("Half", ("node_Conv_1", "silu"))
    assert (second.precision, second.onnx_nodes) == ("Float", ("node_Gemm_2",))
    proof = prove((first, second), _named("node_Conv_1", "node_Gemm_2"), "Half")
    assert (proof.differing, proof.macs) == (("pool",), {"Half": 1000, "Float": 1000})


def test_a_plans_header_tells_version_and_targets(engines: dict[str, BuiltEngine]) -> None:
    header = read_header(engines["fp16"].plan)
    assert header.flavor == "rtx"
    assert header.version == trt.__version__
    assert header.targets == ("sm86", "sm89")


@pytest.mark.parametrize("keep", [5, 63, 64, 1000, -1])
def test_a_truncated_plan_is_noticed_without_a_gpu(
    engines: dict[str, BuiltEngine], keep: int
) -> None:
    """TensorRT itself notices neither this nor a flipped byte before its GPU step."""
    with pytest.raises(UsageError, match="truncated TensorRT-RTX engine"):
        read_header(engines["fp16"].plan[:keep])


@given(st.binary(max_size=300))
def test_arbitrary_bytes_have_a_header_or_are_refused(data: bytes) -> None:
    for plan in (data, b"vtrt" + data):
        try:
            header = read_header(plan)
        except UsageError:
            continue
        assert header.flavor in tensorrt_api.FLAVORS


def test_a_full_tensorrt_plan_tells_its_version_where_trtexec_reads_it() -> None:
    plan = b"ftrt" + bytes(20) + bytes([10, 13, 3, 9]) + bytes(100)
    assert read_header(plan) == tensorrt_api.PlanHeader("tensorrt", "10.13.3.9", ())
    assert read_header(b"ftrt\1" + plan[5:]).version is None  # a format that we do not know
    with pytest.raises(UsageError, match="a truncated TensorRT engine: got 27 bytes"):
        read_header(plan[:27])


def test_int8_weights_make_an_int8_layer() -> None:
    """A quantised convolution (Q/DQ): the graph's type and the engine's layer say Int8."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-127, 127, (64, 64, 3, 3)).astype(np.int8),
        "scale": np.float32(0.02),
        "zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="d"),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["e"], name="e"),
        helper.make_node("Conv", ["d", "e"], ["y"], name="conv"),
    ]
    model = small_graph(nodes, ["n", 64, 32, 32], weights, output_shape=["n", 64, 30, 30])
    found = products(model)
    assert found == [Product("conv", "Int8", 30 * 30 * 64 * 64 * 9)]
    built = tensorrt_build.build(model.SerializeToString(), SETTINGS)
    assert prove(built.layers, found).macs == {"Int8": 30 * 30 * 64 * 64 * 9}


@pytest.mark.parametrize("model", [b"", b"garbage", b"\x08\x0a" * 50])
def test_parser_errors_are_in_the_message(model: bytes) -> None:
    with pytest.raises(RexdeployError, match="TensorRT-RTX cannot parse the ONNX graph: ") as error:
        tensorrt_build.build(model, SETTINGS)
    assert "\n" not in str(error.value)


def test_every_unsupported_operator_is_named() -> None:
    nodes = [
        helper.make_node("Unknown1", ["x"], ["a"], name="first", domain="somebody"),
        helper.make_node("Unknown2", ["a"], ["y"], name="second", domain="somebody"),
    ]
    model = small_graph(nodes, ["n", 3, 8, 8], {}, output_shape=["n", 3, 8, 8])
    model.opset_import.append(helper.make_opsetid("somebody", 1))
    with pytest.raises(RexdeployError, match=r"node Unknown1 first.*node Unknown2 second"):
        tensorrt_build.build(model.SerializeToString(), SETTINGS)


def test_every_diagnosis_of_rtx_has_words() -> None:
    assert set(DIAGNOSES) == set(trt.EngineInvalidityDiagnostics.__members__)


def test_an_rtx_engine_is_built_so_that_it_can_be_captured(
    v1_original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real builder's own configuration is asked when it builds, which is all it shows."""
    asked: list[bool] = []
    real = trt.Builder.build_serialized_network

    def build(builder: Any, network: Any, config: Any) -> Any:
        flags = trt.BuilderFlag.REQUIRE_USER_ALLOCATION, trt.BuilderFlag.TF32
        asked.extend(config.get_flag(flag) for flag in flags)
        return real(builder, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", build)
    assert tensorrt_build.build(_graph(v1_original, "fp16"), SETTINGS).layers
    assert asked == [True, False]


def test_every_target_name_is_one_that_rtx_knows() -> None:
    known = set(trt.ComputeCapability.__members__)
    assert {name.upper() for name in tensorrt_api.target_names()} <= known


def test_without_targets_the_engine_is_for_sm80_and_newer(v1_original: Bundle) -> None:
    settings = EngineSettings("rtx", BatchRange(1, 1, 1), workspace_mib=512)
    header = read_header(tensorrt_build.build(_graph(v1_original, "fp16"), settings).plan)
    assert header.targets == ("sm80", "sm86", "sm89", "sm120", "sm121")


def test_foreign_graphs_convert_and_build_too() -> None:
    """A graph with a MatMul head and nameless nodes, as other exporters write it."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((16, 3, 3, 3)).astype(np.float32),
        "m": rng.standard_normal((16, 10)).astype(np.float32),
        "axes": np.array([2, 3]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("ReduceMean", ["r", "axes"], ["p"], keepdims=0),
        helper.make_node("MatMul", ["p", "m"], ["y"]),
    ]
    model = small_graph(nodes, ["n", 3, 32, 32], weights, output_shape=["n", 10])
    built = tensorrt_build.build(to_precision(model, "fp16").SerializeToString(), SETTINGS)
    found = products(to_precision(model, "fp16"))
    assert [product.name for product in found] == ["node_of_c", "node_of_y_fp16"]
    assert prove(built.layers, found, "Half").holds, built.layers


def test_a_flavor_that_is_not_installed_names_its_extra() -> None:
    if tensorrt_api.importlib.util.find_spec("tensorrt"):  # type: ignore[attr-defined]
        pytest.skip("full TensorRT is installed here")
    with pytest.raises(BackendUnavailable, match=r"pip install 'rexdeploy\[tensorrt\]'"):
        tensorrt_api.load("tensorrt")


@pytest.mark.parametrize(
    ("inputs", "outputs", "weights", "expected"),
    [
        (("Half", "Float"), ("Half",), None, "Float"),  # computed weights, in float32
        (("Float", "Half"), ("Half",), None, "Float"),
        (("BFloat16", "Half"), ("Half",), None, "BFloat16"),
        (("Half",), ("Float",), None, "Half"),
        (("UInt8",), ("Half", "Float"), None, "Float"),
        (("Float",), ("Half",), "Half", "Half"),  # a cast fused into a convolution
        (("Int32",), ("Int64",), None, "Int32/Int64"),
    ],
)
def test_a_layer_without_constants_is_of_its_widest_input(
    inputs: tuple[str, ...], outputs: tuple[str, ...], weights: str | None, expected: str
) -> None:
    assert Layer("a", inputs, outputs, weights, ("a",)).precision == expected
