"""uint8 input and probabilities: the same network, in every form of it and through every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto

from rexdeploy.arrays import UInt8, softmax
from rexdeploy.backends import open_backend
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.graphs.read import element_types
from rexdeploy.graphs.wrapper import change_core, forms, interface_nodes, unwrap
from rexdeploy.images import decode, sets
from rexdeploy.inference.classifier import load
from rexdeploy.parity.compare import comparable
from rexdeploy.steps.verify import verify
from rexdeploy.timing.configurations import BenchOptions
from rexdeploy.timing.harness import time_networks
from rexdeploy.timing.networks import BundleNetwork
from tests.helpers import assert_refused, edit_weights, entry, graph, nodes_of, run_cli, with_file

FAST: dict[str, Any] = {"samples": 4}


@pytest.fixture(scope="module")
def pool(small_v1_original: Bundle) -> UInt8:
    return sets.synthetic_pixels(5, small_v1_original.manifest.model.preprocess, seed=9)


def test_the_manifest_and_the_graph_say_what_goes_in_and_out(small_pixels_original: Bundle) -> None:
    spec = small_pixels_original.manifest.model
    assert (spec.input, spec.input_shape, spec.output) == ("uint8", (64, 64, 3), "probabilities")
    for file in ("fp32.onnx", "fp32.tensorrt.onnx", "fp16.onnx"):
        model = graph(small_pixels_original, file)
        assert forms(model) == ("uint8", "probabilities")
        (given,), (answer,) = model.graph.input, model.graph.output
        assert (given.name, answer.name) == (spec.input_name, spec.output_name)
        shape = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
        assert shape == ["batch", 64, 64, 3]
        assert answer.type.tensor_type.elem_type == TensorProto.FLOAT


def test_normalisation_and_softmax_stay_float32_in_a_float16_graph(
    small_pixels_original: Bundle,
) -> None:
    model = graph(small_pixels_original, "fp16.onnx")
    types = element_types(onnx.shape_inference.infer_shapes(model).graph)
    (softmax_node,) = nodes_of(model, "Softmax")
    assert types[softmax_node.input[0]] == types[softmax_node.output[0]] == TensorProto.FLOAT
    for node in model.graph.node:
        if node.name.startswith("interface/"):
            kinds = {types[name] for name in (*node.input, *node.output)}
            assert kinds <= {TensorProto.FLOAT, TensorProto.UINT8}, node.name
    assert {types[node.input[1]] for node in nodes_of(model, "Conv")} == {TensorProto.FLOAT16}
    engine = entry(small_pixels_original, "fp16.rtx-sm89.engine")
    assert engine.proof is not None
    assert engine.proof.holds
    assert engine.proof.macs.keys() == {"Half"}


def test_pixels_and_probabilities_are_those_of_the_float32_bundle(
    small_v1_original: Bundle, small_pixels_original: Bundle, pool: UInt8
) -> None:
    normalised = decode.normalise(pool, small_v1_original.manifest.model.preprocess)
    with load(small_v1_original, "onnxruntime") as plain:
        logits = plain.logits(normalised)
        expected = softmax(logits)
        np.testing.assert_array_equal(plain.probabilities(normalised), expected)
    for backend in ("onnxruntime", "pytorch"):
        with load(small_pixels_original, backend) as classifier:
            assert np.abs(classifier.probabilities(pool) - expected).max() < 1e-5
            with pytest.raises(UsageError, match="give probabilities; use probabilities()"):
                classifier.logits(pool)
            with pytest.raises(UsageError, match=r"got float32 of shape \(5, 3, 64, 64\), exp"):
                classifier.probabilities(normalised)


def test_openvino_takes_pixels_too(small_pixels_original: Bundle, pool: UInt8) -> None:
    pytest.importorskip("openvino")
    graph = entry(small_pixels_original, "fp32.onnx")
    answers = []
    for name in ("onnxruntime", "openvino"):
        backend = open_backend(
            name, small_pixels_original.read(graph), small_pixels_original.manifest.model
        )
        answers.append(backend.run(pool))
        backend.close()
    assert np.abs(answers[0] - answers[1]).max() < 1e-5


def test_the_core_is_the_float32_bundles_graph(
    small_v1_original: Bundle, small_pixels_original: Bundle
) -> None:
    core, plain = (
        unwrap(graph(small_pixels_original, "fp32.onnx")),
        graph(small_v1_original, "fp32.onnx"),
    )
    for field in ("node", "initializer", "input", "output"):
        ours, theirs = (list(getattr(model.graph, field)) for model in (core, plain))
        assert sorted(map(str, ours)) == sorted(map(str, theirs)), field
    onnx.checker.check_model(core, full_check=True)
    assert unwrap(plain) is plain


def test_a_change_that_changes_nothing_gives_the_graph_itself(
    small_pixels_original: Bundle,
) -> None:
    model = graph(small_pixels_original, "fp32.onnx")
    assert change_core(model, lambda core: core) is model
    assert change_core(model, lambda core: edit_weights(core, [], abs)) is model


def test_verify_compares_log_probabilities_and_says_so(
    small_pixels: Bundle, small_v1_original: Bundle, tmp_path: Path
) -> None:
    result = verify(small_pixels, **FAST)
    assert result.passed
    assert result.compared == "log-probabilities"
    assert [edge.candidate for edge in result.edges if "fp32.onnx" in edge.candidate]
    # A softmax takes one number an image: what is left has almost the same signal.
    plain = verify(small_v1_original, **FAST)
    assert plain.compared == "logits"
    assert result.signal == pytest.approx(plain.signal, rel=0.05)
    told = run_cli("verify", small_pixels.path, "--samples", "4", "-q", "--json", "-", cwd=tmp_path)
    assert '"compared": "log-probabilities"' in told.out


def _other_normalisation(model: ModelProto) -> ModelProto:
    return edit_weights(model, ["interface/scale"], lambda values: values[::-1])


def _no_offset(model: ModelProto) -> ModelProto:
    return edit_weights(model, ["interface/offset"], lambda values: 0 * values)


def _weight_off_by_one_percent(model: ModelProto) -> ModelProto:
    return edit_weights(model, [nodes_of(model, "Conv")[2].input[1]], lambda values: values * 1.01)


def _softmax_over_images(model: ModelProto) -> ModelProto:
    changed = edit_weights(model, [], abs)
    nodes_of(changed, "Softmax")[0].attribute[0].i = 0
    return changed


@pytest.mark.parametrize(
    "defect",
    [_other_normalisation, _no_offset, _weight_off_by_one_percent, _softmax_over_images],
    ids=lambda defect: defect.__name__,
)
def test_a_defect_in_or_behind_the_interface_breaks_its_edge(
    small_pixels: Bundle, defect: object
) -> None:
    assert callable(defect)
    changed = defect(graph(small_pixels, "fp32.onnx"))
    result = verify(with_file(small_pixels, "fp32.onnx", changed.SerializeToString()), **FAST)
    assert "torch -> fp32.onnx" in result.failures[0]


def test_a_file_of_another_interface_is_judged_by_its_own(
    small_v1_original: Bundle, small_pixels_original: Bundle
) -> None:
    """Each bundle's graph against the other's reference: the same weights, so both pass."""
    for judge, other in (
        (small_v1_original, small_pixels_original),
        (small_pixels_original, small_v1_original),
    ):
        candidate = other.path / "fp32.onnx"
        result = verify(judge, **FAST | {"candidate": candidate})
        assert result.passed, result.failures
    assert result.compared == "logits"


def test_localize_walks_the_core(small_pixels: Bundle) -> None:
    weight = nodes_of(graph(small_pixels, "fp32.onnx"), "Conv")[2].input[1]
    changed = edit_weights(graph(small_pixels, "fp32.onnx"), [weight], lambda values: 1.1 * values)
    broken = with_file(small_pixels, "fp32.onnx", changed.SerializeToString())
    result = verify(broken, **FAST | {"localize": True})
    (walk,) = (item for item in result.localizations if item.candidate == "fp32.onnx")
    assert walk.culprit is not None
    assert walk.culprit.node.weight == weight
    assert [block.name for block in walk.blocks][:2] == ["stem", "block 1"]


def test_bench_feeds_each_form_what_it_takes(small_pixels_original: Bundle) -> None:
    options = BenchOptions(backends=("onnxruntime", "pytorch"), rounds=1, batches=(2,))
    result = time_networks([BundleNetwork(small_pixels_original)], options)
    assert {row.backend for row in result.latencies} == {"onnxruntime", "pytorch"}
    assert result.skipped == ()


def test_unknown_forms_are_refused(tmp_path: Path) -> None:
    asked = run_cli("export", "--input", "uint4", cwd=tmp_path)
    assert_refused(asked, "input: got 'uint4', expected float32 or uint8")
    asked = run_cli("export", "--output", "labels", cwd=tmp_path)
    assert_refused(asked, "output: got 'labels', expected logits or probabilities")


def test_probabilities_compare_as_the_logits_they_come_from() -> None:
    logits = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    probabilities = softmax(logits).astype(np.float32)
    ours = comparable(logits, "logits", "log-probabilities")
    assert np.array_equal(ours, comparable(probabilities, "probabilities", "log-probabilities"))
    np.testing.assert_allclose(ours, logits - logits.mean(axis=1, keepdims=True), atol=1e-5)
    assert comparable(logits, "logits", "logits") is logits
    assert not np.isfinite(comparable(logits * np.nan, "probabilities", "log-probabilities")).any()
    with pytest.raises(UsageError, match="a softmax cannot be undone"):
        comparable(probabilities, "probabilities", "logits")


def test_a_graph_with_a_scope_of_our_name_is_not_cut_apart(
    small_v1_original: Bundle, small_pixels_original: Bundle
) -> None:
    """Somebody's own nodes may be called `interface/...`, a Softmax of theirs among them."""
    model = graph(small_v1_original, "fp32.onnx")
    for index, node in enumerate(model.graph.node[:40]):
        node.name = f"interface/{index}"
    model.graph.node[3].name = "interface/softmax"
    model.graph.node[4].name = "interface/float"
    assert unwrap(model) is model
    assert interface_nodes(model) == frozenset()
    assert change_core(model, lambda core: core) == model

    # Inside our own interface, theirs are of the core.
    ours = graph(small_pixels_original, "fp32.onnx")
    inner = next(node for node in ours.graph.node if node.op_type == "Conv")
    inner.name = "interface/conv"
    core = unwrap(ours)
    assert "interface/conv" in {node.name for node in core.graph.node}
    assert len(core.graph.node) == len(ours.graph.node) - 5
    assert len(interface_nodes(ours)) == 5


@pytest.mark.parametrize("part", ["float", "nchw", "scaled", "shifted"])
def test_an_interface_of_another_structure_stays_in_the_core(
    small_pixels_original: Bundle, part: str
) -> None:
    model = graph(small_pixels_original, "fp32.onnx")
    (node,) = (node for node in model.graph.node if node.name == f"interface/{part}")
    node.op_type = "Identity"
    assert interface_nodes(model) == {"interface/softmax"}
    assert {f"interface/{name}" for name in ("scale", "offset")} <= {
        item.name for item in unwrap(model).graph.initializer
    }
