"""What a proof of precision counts, on graphs and layers whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from rexdeploy.bundle.precision import PrecisionProof
from rexdeploy.bundle.store import Bundle
from rexdeploy.graphs.products import Product, products
from rexdeploy.models import zoo
from rexdeploy.parity.layer_types import prove
from tests.helpers import graph, small_graph


@dataclass(frozen=True)
class _Layer:
    name: str
    precision: str
    onnx_nodes: tuple[str, ...] = ()
    weights_count: int = 0


def _model(
    node: onnx.NodeProto, weights: tuple[int, ...], shape: list[str | int | None]
) -> ModelProto:
    return small_graph([node], shape, {"w": np.zeros(weights, np.float32)})


@pytest.mark.parametrize(
    ("operator", "attributes", "weights", "shape", "macs"),
    [
        ("Conv", {}, (8, 3, 3, 3), ["n", 3, 10, 12], 8 * 8 * 10 * 3 * 9),
        ("Conv", {}, (8, 3, 3, 3), [4, 3, 10, 12], 8 * 8 * 10 * 3 * 9),  # for one image
        ("Conv", {"group": 6}, (6, 1, 3, 3), ["n", 6, 10, 10], 6 * 8 * 8 * 9),
        ("Conv", {"strides": [2, 2]}, (8, 3, 1, 1), ["n", 3, 10, 10], 8 * 5 * 5 * 3),
        ("Conv", {}, (8, 3, 3, 3), ["n", 3, "height", 10], None),
        ("ConvTranspose", {"strides": [2, 2]}, (3, 8, 2, 2), ["n", 3, 5, 5], 25 * 3 * 8 * 4),
        ("Gemm", {}, (16, 10), ["n", 16], 160),
        ("Gemm", {"transB": 1}, (10, 16), ["n", 16], 160),
        ("MatMul", {}, (16, 10), ["n", 7, 16], 7 * 160),
    ],
)
def test_multiply_accumulates_of_one_image(
    operator: str,
    attributes: dict[str, Any],
    weights: tuple[int, ...],
    shape: list[str | int | None],
    macs: int | None,
) -> None:
    node = helper.make_node(operator, ["x", "w"], ["y"], name="it", **attributes)
    assert products(_model(node, weights, shape)) == [Product("it", "Float", macs)]


def test_a_networks_arithmetic_is_the_published_one_and_its_padding(v1_original: Bundle) -> None:
    found = products(graph(v1_original, "fp16.onnx"))
    total = sum(product.macs or 0 for product in found)
    published = zoo.cost("rexnet", 1.0).macs
    assert {product.precision for product in found} == {"Half"}
    # Padded to 16 it is 1.11 times as much; one width for a shortcut chain makes it 1.22.
    assert published < total < 1.25 * published


def test_products_in_branches_are_counted_and_their_cost_is_not_known() -> None:
    convolution = helper.make_node("Conv", ["x", "w"], ["z"], name="inner")
    branch = helper.make_graph(
        [convolution], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    node = helper.make_node("If", ["c"], ["y"], name="if", then_branch=branch, else_branch=branch)
    model = _model(node, (8, 3, 3, 3), ["n", 3, 8, 8])
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    found = products(model)
    assert [product.name for product in found] == ["inner", "inner"]
    proof = prove(found, found)
    assert (proof.layers, proof.macs) == ({"Float": 2}, {})


def test_a_layer_that_only_lays_out_a_products_input_is_not_the_product() -> None:
    """TensorRT-RTX 1.7 names the first convolution in the layer that normalises uint8 images."""
    product = Product("conv", "Half", 7, weights_count=864)
    laying = _Layer("pixels", "Float", ("conv",), weights_count=3)
    real = _Layer("conv", "Half", ("conv",), weights_count=900)
    assert prove([laying, real], [product], "Half").differing == ()
    # Without a layer that could hold all of the weights, any may be the product.
    assert prove([laying, replace(real, weights_count=432)], [product], "Half").differing == (
        "pixels",
    )
    assert prove([laying], [product], "Half").differing == ("pixels",)


def test_a_product_in_two_layers_counts_in_the_wider_type() -> None:
    layers = [_Layer("a", "Float", ("conv",)), _Layer("b", "Half", ("conv",))]
    proof = prove(layers, [Product("conv", "Half", 7)], "Half")
    assert proof.macs == {"Float": 7}
    assert (proof.differing, proof.holds) == (("a",), False)


def test_layers_of_no_floating_type_count_for_nothing() -> None:
    layers = [_Layer("a", "Half", ("conv",)), _Layer("shape", "Int32"), _Layer("void", "")]
    proof = prove(layers, [Product("conv", "Half", 7)], "Half")
    assert proof.layers == {"Half": 1}
    assert proof.summary == "1 of 1 layers in Half (100%), 100% of 7e-09 GMACs in Half"


def test_mostly_other_layers_are_not_the_asked_type() -> None:
    layers = [_Layer("a", "Half", ("conv",)), *(_Layer(f"f{n}", "Float") for n in range(3))]
    assert not prove(layers, [Product("conv", "Half", 7)], "Half").holds
    assert prove(layers, [Product("conv", "Half", 7)]).holds


def test_a_manifest_cannot_hold_an_impossible_proof() -> None:
    for layers in ({"Quarter": 1}, {"Half": -1}):
        with pytest.raises(ValueError, match="impossible proof"):
            PrecisionProof("Half", layers)


def test_of_our_own_graphs_every_layer_has_to_be_in_the_asked_type() -> None:
    conv = _Layer("conv", "Half", ("conv",))
    product = [Product("conv", "Half", 7)]
    odd = _Layer("sigmoid", "Float", ("sigmoid",))
    assert prove([conv, odd], product, "Half").holds  # somebody's own graph
    strict = prove([conv, odd], product, "Half", frozenset())
    assert (strict.differing, strict.holds) == (("sigmoid",), False)
    # The interface is float32 by design, copies of TensorRT's name no node, integers do not count.
    others = [
        _Layer("pixels", "Float", ("interface/scaled", "cast")),
        _Layer("copy", "Float"),
        _Layer("shape", "Int32", ("shape",)),
    ]
    wide = [conv, _Layer("pool", "Half", ("pool",)), *others]
    assert prove(wide, product, "Half", frozenset({"interface/scaled"})).holds
    assert prove(wide, product, "Half", frozenset()).differing == ("pixels",)
    # Each product's own type is all that can be asked of a mixed graph.
    assert prove([conv, odd], product, None, frozenset()).holds
