"""Precision tuning: it heals what float16 breaks, with few blocks, and goes on where it stopped."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

from rexdeploy import machine
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, UsageError, VerificationFailed
from rexdeploy.graphs.blocks import find_blocks
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.products import precision_of, products
from rexdeploy.graphs.wrapper import forms, unwrap
from rexdeploy.images.sets import varied
from rexdeploy.parity import block_by_block
from rexdeploy.parity.block_by_block import GraphWalk
from rexdeploy.parity.localize import OWN_LIMITS, localize
from rexdeploy.parity.ranges import measure_ranges
from rexdeploy.steps.build_trt import build_trt
from rexdeploy.steps.tune_precision import STATE, tune_precision
from rexdeploy.steps.verify import verify
from tests import planted
from tests.helpers import assert_refused, edit_weights, entry, graph, nodes_of, run_cli, with_file

OPTIONS: dict[str, Any] = {"samples": 4}
ENGINE: dict[str, Any] = {"fp16": True, "flavor": "rtx", "target": ("sm89",)}


def _scaled(model: ModelProto, first: int, second: int, by: float) -> ModelProto:
    """One convolution's output times `by`, which the weights of a later one undo.

    Between them stands a ReLU, or a SiLU on values so large that it is one.
    """
    convs = nodes_of(model, "Conv")
    grown = edit_weights(model, convs[first].input[1:3], lambda values: values * np.float32(by))
    return edit_weights(grown, [convs[second].input[1]], lambda values: values / np.float32(by))


def _overflowing_se(model: ModelProto) -> ModelProto:
    """The squeezed vector of block 10 passes 65504; the network is what it was."""
    inside = {model.graph.node[position].name for position in find_blocks(model)[10].nodes}
    numbers = [i for i, node in enumerate(nodes_of(model, "Conv")) if node.name in inside]
    return _scaled(model, numbers[2], numbers[3], 5e4)


def _overflowing_head(model: ModelProto) -> ModelProto:
    """The last features pass 65504, and so do some of the weights that make them."""
    return _scaled(model, -2, -1, 2e6)


def _kept(model: ModelProto) -> set[str]:
    """The convolutions and matrix products that are float32."""
    return {product.name for product in products(model) if product.precision == "Float"}


def test_an_overflowing_se_is_healed_by_its_block(small_pixels: Bundle) -> None:
    """In a graph that takes pixels and gives probabilities: its interface is left alone."""
    bundle = planted.plant(small_pixels, "fp32.onnx", _overflowing_se)
    model = unwrap(graph(bundle, "fp32.onnx"))
    walked = localize(
        GraphWalk(model),
        GraphWalk(to_precision(model, "fp16")),
        varied(4, Preprocess(64, 64), seed=1),
        names=("float32", "float16"),
        limit=OWN_LIMITS["fp16"],
    )
    assert walked.culprit is not None  # the weights fit: it is what they make that does not
    assert walked.culprit.block == "block 10"
    result = tune_precision(bundle, **OPTIONS)
    assert result.plain.error is None
    assert result.best.float32 == ("block 10",)
    assert result.healed
    assert 0 < (result.best.error or 0) < result.limits.error
    assert [block.name for block in result.ranges.blocks if block.verdict == "OVERFLOWS"] == [
        "block 10"
    ]
    half = entry(result.bundle, "fp16.onnx")
    assert half.built_with["float32"] == "block 10"
    mixed = graph(result.bundle, "fp16.onnx")
    assert precision_of(mixed) is half.precision is None
    assert forms(mixed) == ("uint8", "probabilities")
    # Of the block's five convolutions the two at the squeezed vector, if an engine keeps those.
    assert len(_kept(mixed)) == (2 if result.best.nodes else 5)
    assert not result.best.nodes or half.built_with["float32_nodes"]
    assert result.bundle.manifest.find("engine") is None  # it was of the plain graph
    verified = verify(result.bundle, samples=4)
    assert verified.passed, verified.failures
    assert verified.edges[-1].candidate == "fp16.onnx (onnxruntime)"
    assert verified.edges[-1].reference == "fp32.tensorrt.onnx, rounded"
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    built = build_trt(result.bundle, **ENGINE)
    assert built.engine.parent_sha256 == half.sha256
    assert built.engine.file == "mixed.rtx-sm89.engine"
    assert built.engine.proof is not None
    assert built.engine.proof.holds
    assert 0.8 < built.engine.proof.share("Half") < 1


def test_an_interrupted_search_of_an_overflowing_head_goes_on(small_v1: Bundle) -> None:
    """Head and classifier: the tensor between them is what float16 cannot hold."""
    bundle = planted.plant(small_v1, "fp32.onnx", _overflowing_head)

    def interrupt(message: str) -> None:
        if message.startswith("trial 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune_precision(bundle, **OPTIONS, report=interrupt)
    steps: list[str] = []
    result = tune_precision(Bundle.open(bundle.path), **OPTIONS, report=steps.append)
    assert result.best.float32 == ("head", "classifier")
    assert result.healed
    assert result.resumed == 2
    assert any("trial 3 of at most 14: " in step for step in steps)
    assert not any("trial 2 of" in step for step in steps)
    assert any("s left" in step for step in steps)
    again = tune_precision(result.bundle, **OPTIONS)
    assert again.trials == 0
    assert again.best == result.best
    few = tune_precision(again.bundle, samples=3, max_blocks=1)
    assert few.resumed == 0  # other images are another search
    assert not few.healed
    assert few.written is None


def test_what_cannot_be_healed_ends_with_the_best_set_and_exit_3(
    small_v1: Bundle, tmp_path: Path
) -> None:
    bundle = planted.plant(small_v1, "fp32.onnx", _overflowing_head)
    result = run_cli(
        "tune-precision", "--samples", "3", "--max-blocks", "1", "--json", "out.json", cwd=tmp_path
    )
    assert result.code == 3
    assert len(result.error_lines) == 1
    assert "the best found: head" in result.error_lines[0]
    assert "nothing was written" in result.error_lines[0]
    assert "OVERFLOWS" in result.out
    assert '"healed": false' in (tmp_path / "out.json").read_text()
    assert Bundle.open(bundle.path).manifest.find_file("fp16.onnx") is None  # went with its parent


def test_a_sound_network_keeps_nothing(small_lite: Bundle, tmp_path: Path) -> None:
    before = small_lite.manifest
    result = run_cli("tune-precision", "--samples", "2", cwd=tmp_path)
    assert result.code == 0
    assert "nothing has to stay float32" in result.out
    after = Bundle.open(small_lite.path)
    assert {item.file for item in after.manifest.artifacts} - {STATE} == {
        item.file for item in before.artifacts
    }
    # What an earlier search has mixed, on other images say, is not undone by images that pass.
    full = graph(after, "fp32.tensorrt.onnx")
    data = to_precision(full, "fp16", {nodes_of(full, "Conv")[3].name}).SerializeToString()
    notes = {"float32": "block 1"}
    mixed = with_file(after, "fp16.onnx", data, precision=None, built_with=notes)
    again = run_cli("tune-precision", "--samples", "2", cwd=tmp_path)
    assert again.code == 0
    assert "kept: the bundle's fp16.onnx, which an earlier search has mixed (block 1" in again.out
    assert entry(Bundle.open(small_lite.path), "fp16.onnx") == entry(mixed, "fp16.onnx")


def test_an_engine_that_undoes_what_was_kept_is_refused(small_lite: Bundle) -> None:
    """TensorRT-RTX makes Half again of a lone convolution between casts."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    full = graph(small_lite, "fp32.tensorrt.onnx")
    single = nodes_of(full, "Conv")[20].name
    data = to_precision(full, "fp16", {single}).SerializeToString()
    bundle = with_file(small_lite, "fp16.onnx", data, precision=None)
    assert _kept(graph(bundle, "fp16.onnx")) == {single}
    with pytest.raises(VerificationFailed, match="the engine is not in its graph's types"):
        build_trt(bundle, **ENGINE)


def test_unusable_requests_are_refused(small_lite: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples: got 1, expected 2 to"):
        tune_precision(small_lite, samples=1)
    with pytest.raises(UsageError, match="max blocks: got 0"):
        tune_precision(small_lite, max_blocks=0)
    with pytest.raises(UsageError, match="backend: got 'openvino', expected one of onnxruntime"):
        tune_precision(small_lite, backend="openvino")
    if machine.detect() is None and importlib.util.find_spec("tensorrt_rtx"):
        with pytest.raises(BackendUnavailable, match="no NVIDIA GPU driver"):
            tune_precision(small_lite, **OPTIONS | {"samples": 2, "backend": "tensorrt-rtx"})
    assert_refused(
        run_cli("tune-precision", "--images", "nowhere", cwd=tmp_path), "expected a folder"
    )
    half = planted.plant(small_lite, "fp32.onnx", lambda model: to_precision(model, "fp16"))
    with pytest.raises(UsageError, match="is not a float32 graph"):
        tune_precision(half, **OPTIONS)


def test_ranges_take_one_session_a_block_however_many_images(
    small_lite_original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    class Counted(GraphSession):
        def __init__(self, model: bytes) -> None:
            made.append(model)
            super().__init__(model)

    monkeypatch.setattr(block_by_block, "GraphSession", Counted)
    walk = GraphWalk(graph(small_lite_original))
    ranges = measure_ranges(walk, varied(3, Preprocess(64, 64), seed=1))
    assert len(made) == len(walk.blocks) == len(ranges.blocks) == 19


def test_kept_nodes_are_float32_and_the_others_half(small_lite_original: Bundle) -> None:
    full = graph(small_lite_original)
    kept = {node.name for node in nodes_of(full, "Conv")[3:6]}
    mixed = to_precision(full, "fp16", kept)
    onnx.checker.check_model(mixed, full_check=True)
    assert _kept(mixed) == kept
    assert _kept(to_precision(full, "fp16")) == set()
