"""INT8: accepted only if accurate and faster, healed where a network is hard, and judged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper
from PIL import Image

from rexdeploy import machine
from rexdeploy.backends import open_backend
from rexdeploy.backends.tensorrt_build import Layer
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import INT8, INT8_TRT, Preprocess, to_json
from rexdeploy.bundle.store import Bundle, commit
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.graphs import quantize as ops
from rexdeploy.graphs.products import precision_of
from rexdeploy.images.calibration import CALIBRATED, read_pools
from rexdeploy.images.decode import normalise
from rexdeploy.images.sets import find, load_batch
from rexdeploy.inference.classifier import load
from rexdeploy.interleaved import Ratio
from rexdeploy.parity.quantized import quantized_twin, written_out
from rexdeploy.serving.deploy import _choose
from rexdeploy.steps import int8_search
from rexdeploy.steps.build_trt import build_trt
from rexdeploy.steps.evaluate import evaluate
from rexdeploy.steps.export import export
from rexdeploy.steps.import_onnx import import_onnx
from rexdeploy.steps.int8_search import STATES, _run
from rexdeploy.steps.quantize import FASTER, Quantization, quantize, slow
from rexdeploy.steps.verify import verify
from tests.drawn_images import write_drawn_images
from tests.helpers import (
    ROOT,
    assert_refused,
    copied,
    edit_weights,
    entry,
    folder_state,
    graph,
    nodes_of,
    run_cli,
    small_graph,
    with_file,
    with_notes,
)
from tests.planted import unbalanced
from tests.test_verify_defects import FAST

SPEC = Preprocess(32, 32)
DATA = ROOT / "tests" / "data"
# Seconds, and with --keep: whether it is faster here is the machine's word, not a test's.
KEPT: dict[str, Any] = {"keep": True}


@pytest.fixture(scope="module", autouse=True)
def _few_rounds() -> Iterator[None]:
    """Of timing, whose verdict no test asks for."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(int8_search, "ROUNDS", 8)
        yield


@pytest.fixture
def one_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges are taken by one method: for what does not depend on how many there are."""
    monkeypatch.setattr(ops, "METHODS", ("minmax",))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn dials: train/ to take ranges from, val/ to judge by."""
    folder = tmp_path_factory.mktemp("dials")
    write_drawn_images(folder / "train", 1, 144)
    write_drawn_images(folder / "val", 2, 1200)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """Bundles of the drawn networks, and of such made hard, each exported once."""
    folder = tmp_path_factory.mktemp("bundles")

    def bundle(name: str) -> Bundle:
        if not (folder / name).exists():
            weights = DATA / f"{name.replace('hard', 'drawn')}.safetensors"
            if name.startswith("hard"):
                weights = unbalanced(weights, folder / f"{name}.safetensors")
            export(weights=weights, image_size=32, name=name, out=folder)
        return Bundle.open(folder / name)

    return bundle


@pytest.fixture(scope="module")
def lite(made: Callable[[str], Bundle], images: Path) -> Quantization:
    """The drawn lite in int8, kept; copy its bundle before changing it."""
    bundle = copied(made("drawn_lite"), images / "int8")
    return quantize(bundle, calib=images / "train", data=images / "val", **KEPT)


@pytest.fixture
def accepted(lite: Quantization, tmp_path: Path) -> Bundle:
    """A copy of lite's bundle in which it is accepted, whatever this machine's clock said."""
    bundle = copied(lite.bundle, tmp_path / "lite")
    notes = dict(entry(bundle, INT8).built_with)
    notes.pop("refused", None)
    return with_notes(bundle, INT8, built_with=notes)


def logits(model: ModelProto, bundle: Bundle, folder: Path) -> np.ndarray:
    spec = bundle.manifest.model
    pixels = normalise(load_batch(find(folder)[:64], spec.preprocess), spec.preprocess)
    return open_backend("onnxruntime", model.SerializeToString(), spec.core).run(pixels)


# --- what is made


@pytest.mark.parametrize("name", ["drawn_lite", "drawn_v1"])
def test_a_trained_network_loses_less_than_half_a_point(
    made: Callable[[str], Bundle], images: Path, lite: Quantization, name: str
) -> None:
    result = lite
    if name != "drawn_lite":
        result = quantize(made(name), calib=images / "train", data=images / "val", **KEPT)
    paired = result.best.paired
    assert paired is not None
    assert -100 * paired.difference.value <= 0.5
    assert paired.difference.low <= paired.difference.value <= paired.difference.high
    assert result.best.passes
    # Not one of its products falls back to float32, in ONNX Runtime's own graph.
    whole, others = result.products or (0, 1)
    assert whole == len(nodes_of(graph(result.bundle), "Conv"))
    assert others == 0
    written = entry(result.bundle, INT8)
    assert (written.precision, written.parent_sha256) == (
        "int8",
        entry(result.bundle, "fp32.onnx").sha256,
    )
    assert verify(result.bundle, images=images / "val", **FAST).failures == ()


@pytest.mark.parametrize("name", ["hard_lite", "hard_v1"])
def test_a_network_that_plain_int8_breaks_is_healed(
    made: Callable[[str], Bundle], images: Path, name: str
) -> None:
    result = quantize(made(name), calib=images / "train", data=images / "val", **KEPT)
    lost = {trial.title: -100 * trial.paired.difference.value for trial in result.trials}  # type: ignore[union-attr]
    assert lost["minmax"] >= 10
    assert min(lost["entropy"], lost["percentile"]) > 2  # no range mends it
    assert result.best.equalized
    assert lost[result.best.title] <= 1
    # The equalised graph is a file of its own, and not a bit of a logit differs.
    equalized = graph(result.bundle, "fp32.equalized.onnx")
    own = graph(result.bundle)
    assert equalized.graph.initializer != own.graph.initializer
    before, after = (logits(model, result.bundle, images / "val") for model in (own, equalized))
    assert (before == after).all()
    parent = entry(result.bundle, "fp32.equalized.onnx").sha256
    assert entry(result.bundle, INT8).parent_sha256 == parent
    assert verify(result.bundle, images=images / "val", **FAST).failures == ()


@pytest.mark.usefixtures("one_method")
def test_blocks_are_given_back_where_nothing_else_is_enough(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    bundle = copied(made("drawn_lite"), tmp_path / "lite")
    measured: list[str] = []

    def report(text: str) -> None:
        if text.endswith("in int8 alone"):
            measured.append(text)
            if len(measured) == 3:
                raise KeyboardInterrupt

    asked: dict[str, Any] = {"agreement": 0.9999, "max_blocks": 2, "keep": True}
    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, calib=images / "train", report=report, **asked)
    result = quantize(Bundle.open(bundle.path), calib=images / "train", report=report, **asked)
    assert len(measured) == len(set(measured)) + 1  # the one that was interrupted
    tried = [trial for trial in result.trials if trial.float32]
    assert {len(trial.float32) for trial in tried} == {1, 2}
    whole = [trial for trial in result.trials if not trial.float32]
    assert min(trial.rms for trial in tried) < whole[0].rms
    kept = min(tried, key=lambda trial: trial.rank)
    assert result.best in (kept, *whole)
    # An interrupted search goes on where it was: nothing is made twice, and the result is equal.
    again = quantize(result.bundle, calib=images / "train", report=report, force=True, **asked)
    assert len(measured) == len(set(measured)) + 1
    assert again.resumed == len(result.trials)
    assert again.trials == result.trials
    assert entry(again.bundle, INT8).sha256 == entry(result.bundle, INT8).sha256
    other = quantize(result.bundle, calib=images / "train", agreement=0.5, keep=True, force=True)
    assert other.resumed == 0  # another bar: another search


def test_a_mixed_graph_says_so_and_is_judged(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    bundle = copied(made("drawn_lite"), tmp_path / "lite")
    model, ranges = graph(bundle), None
    pixels = normalise(
        load_batch(find(images / "train")[:16], bundle.manifest.model.preprocess),
        bundle.manifest.model.preprocess,
    )
    ranges = ops.calibrate(model, pixels, "minmax")
    kept = {node.name for node in nodes_of(model, "Conv")[:3]}
    mixed = ops.quantized(model, ranges, "cpu", kept)
    assert precision_of(mixed) is None
    assert precision_of(ops.quantized(model, ranges, "cpu")) == "int8"
    twin = quantized_twin(model, mixed, own_biases=False)
    assert twin is not None
    assert (
        logits(twin, bundle, images / "val") == logits(_written(mixed), bundle, images / "val")
    ).all()


def _written(model: ModelProto) -> ModelProto:
    found = written_out(model)
    assert found is not None
    return found


# --- what is accepted


@pytest.mark.parametrize(
    ("ratio", "is_slow"),
    [
        (Ratio(1.5, (FASTER, 1.6)), False),
        (Ratio(1.5, (FASTER - 1e-6, 1.6)), True),
        (Ratio(1.5, None), True),
        (Ratio(0.9, (0.8, 0.95)), True),
    ],
)
def test_faster_means_beyond_noise(ratio: Ratio, is_slow: bool) -> None:
    assert bool(slow(ratio)) == is_slow


@pytest.mark.usefixtures("one_method")
def test_what_misses_its_bar_is_not_kept_unless_asked_for(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    bundle = copied(made("drawn_lite"), tmp_path / "artifacts" / "lite")
    before = folder_state(bundle.path)
    asked = ("--agreement", "1", "--max-blocks", "0")
    common = ("quantize", "lite", "--calib", images / "train", *asked)
    result = run_cli(*common, cwd=tmp_path)
    assert result.code == 3
    assert "INT8 is not accepted: " in result.error_lines[-1]
    assert "of its answers are the float32 graph's" in result.error_lines[-1]
    after = folder_state(bundle.path)
    assert set(after) - set(before) == {STATES["cpu"]}  # what was tried, to go on from
    kept = run_cli(*common, "--keep", cwd=tmp_path)
    assert kept.code == 0
    assert "written, NOT accepted" in kept.out
    bundle = Bundle.open(bundle.path)
    assert entry(bundle, INT8).refused
    assert bundle.manifest.int8 is None
    with load(bundle) as classifier:  # and nothing takes it by itself
        assert classifier.artifact.file == "fp32.onnx"


def test_an_accepted_graph_answers_on_a_cpu(
    accepted: Bundle, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = find(images / "val")[:40]
    with load(accepted) as int8, load(accepted, "pytorch") as reference:
        assert (int8.artifact.file, int8.backend) == (INT8, "onnxruntime")
        batch = int8.prepare(some)
        answers, expected = (model.run(batch) for model in (int8, reference))
    assert (answers.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
    assert not np.allclose(answers, expected, atol=1e-3)
    # Triton's own onnxruntime asks nobody for VNNI; its Python backend chooses where it runs.
    chosen = {name: _choose(accepted.manifest, name, "")[1] for name in ("onnxruntime", "python")}
    assert [item.file for item in chosen["onnxruntime"]] == ["fp32.onnx"]
    assert [item.file for item in chosen["python"]] == ["fp32.onnx", INT8]
    monkeypatch.setattr(machine, "has_int8", lambda: False)
    with load(accepted) as elsewhere:  # whose sums would saturate
        assert elsewhere.artifact.file == "fp32.onnx"
    notes = entry(accepted, INT8).built_with | {"weight_bits": "7"}
    with load(with_notes(accepted, INT8, built_with=notes)) as reduced:
        assert reduced.artifact.file == INT8


def test_evaluate_has_a_row_for_it_with_its_own_time(accepted: Bundle, images: Path) -> None:
    rows = {row.file: row for row in evaluate(images / "val", accepted, sample=320).rows}
    assert (rows[INT8].emulated, rows[INT8].nonfinite) == (False, 0)
    assert rows[INT8].ms_per_image is not None
    assert 0.95 < (rows[INT8].agreement or 0) < 1


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        ("avx2 avx512_vnni", "x86_64", True),
        ("avx2 avx_vnni", "x86_64", True),
        ("avx2 avx512f", "x86_64", False),
        ("", "aarch64", True),
    ],
)
def test_processors_that_saturate_are_known(
    flags: str, kind: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: kind)
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"flags": flags})
    assert machine.has_int8() is expected


@pytest.mark.usefixtures("one_method")
def test_without_vnni_weights_have_seven_bits(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_int8", lambda: False)
    bundle = copied(made("drawn_lite"), tmp_path / "lite")
    result = quantize(bundle, calib=images / "train", agreement=0.5, **KEPT)
    assert result.reduced
    assert any("no VNNI" in text for text in result.warnings)
    model = graph(result.bundle, INT8)
    codes = [
        numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 4
    ]
    assert max(np.abs(code).max() for code in codes) == 64
    assert entry(result.bundle, INT8).needs_int8 is False


@pytest.mark.usefixtures("one_method")
def test_what_is_refused_now_is_no_longer_taken(
    accepted: Bundle, images: Path, made: Callable[[str], Bundle]
) -> None:
    """`--force` judges again: a graph that was accepted once does not outlive it."""
    result = quantize(accepted, calib=images / "train", agreement=1, max_blocks=0, force=True)
    assert not result.accepted
    assert result.written is None
    assert "judged again" in (entry(result.bundle, INT8).refused or "")
    with load(result.bundle) as classifier:
        assert classifier.artifact.file == "fp32.onnx"
    without = {
        key: value
        for key, value in entry(accepted, INT8).built_with.items()
        if key != "weight_bits"
    }
    assert with_notes(accepted, INT8, built_with=without).manifest.int8 is not None
    assert entry(with_notes(accepted, INT8, built_with=without), INT8).needs_int8
    assert not entry(made("drawn_lite"), "fp32.onnx").needs_int8


# --- what verify finds


def _codes(model: ModelProto, change: Callable[[np.ndarray], np.ndarray], kind: int) -> ModelProto:
    """A copy with the codes of its largest constant of that type changed."""
    edited = ModelProto()
    edited.CopyFrom(model)
    largest = max(
        (tensor for tensor in edited.graph.initializer if tensor.data_type == kind),
        key=lambda tensor: np.prod(tensor.dims),
    )
    values = numpy_helper.to_array(largest).copy()
    largest.CopyFrom(numpy_helper.from_array(change(values), largest.name))
    return edited


def swapped_weights(model: ModelProto) -> ModelProto:
    return _codes(model, lambda codes: codes[[1, 0, *range(2, len(codes))]], TensorProto.INT8)


def negated_channel(model: ModelProto) -> ModelProto:
    def change(codes: np.ndarray) -> np.ndarray:
        codes[3] = -codes[3]
        return codes

    return _codes(model, change, TensorProto.INT8)


def moved_bias(model: ModelProto) -> ModelProto:
    def change(codes: np.ndarray) -> np.ndarray:
        codes[5] += 4000
        return codes

    return _codes(model, change, TensorProto.INT32)


def another_stride(model: ModelProto) -> ModelProto:
    edited = ModelProto()
    edited.CopyFrom(model)
    clip = nodes_of(edited, "Conv")[4]
    padding = next(item for item in clip.attribute if item.name == "pads")
    padding.ints[:] = [padding.ints[0] + 1, padding.ints[1], padding.ints[2] - 1, padding.ints[3]]
    return edited


@pytest.mark.parametrize("defect", [swapped_weights, negated_channel, moved_bias])
def test_a_defect_in_its_codes_breaks_the_edge(
    accepted: Bundle, images: Path, defect: Callable[[ModelProto], ModelProto]
) -> None:
    """Each far below what rounding itself does to these logits."""
    changed = with_file(accepted, INT8, defect(graph(accepted, INT8)).SerializeToString())
    result = verify(changed, images=images / "val", **FAST)
    (failure,) = result.failures
    assert failure.startswith("broken edge fp32.onnx, rounded -> int8.onnx (as written): ")


def test_an_equalised_graph_is_its_parent_to_the_bit(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    """Its blocks cannot be walked, so that a defect must not hide below a limit on logits."""
    bundle = copied(made("hard_lite"), tmp_path / "hard")
    if bundle.manifest.find_file("fp32.equalized.onnx") is None:
        bundle = quantize(
            bundle, calib=images / "train", data=images / "val", max_blocks=0, **KEPT
        ).bundle
    name = "fp32.equalized.onnx"
    model = graph(bundle, name)
    weight = nodes_of(model, "Conv")[8].input[1]
    changed = edit_weights(model, [weight], lambda values: values * np.float32(1 + 1e-6))
    result = verify(
        with_file(bundle, name, changed.SerializeToString()), images=images / "val", **FAST
    )
    (failure,) = result.failures
    assert "broken edge fp32.onnx -> fp32.equalized.onnx" in failure
    assert "to the bit" in failure


def silent_channels(model: ModelProto) -> ModelProto:
    """Every convolution's strongest channel rounded to zero by a scale of its own."""
    edited = ModelProto()
    edited.CopyFrom(model)
    constants = {tensor.name: tensor for tensor in edited.graph.initializer}
    for node in edited.graph.node:
        codes = constants.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != TensorProto.INT8:
            continue
        values = numpy_helper.to_array(codes).copy()
        scale = numpy_helper.to_array(constants[node.input[1]]).copy()
        channel = int(np.argmax(scale))
        values[channel], scale[channel] = 0, scale[channel] * 1e6
        codes.CopyFrom(numpy_helper.from_array(values, codes.name))
        constants[node.input[1]].CopyFrom(numpy_helper.from_array(scale, node.input[1]))
    return edited


def moved_biases(model: ModelProto) -> ModelProto:
    """Each by thousands of steps, said to be a correction."""
    rng = np.random.default_rng(0)
    edited = ModelProto()
    edited.CopyFrom(model)
    for tensor in edited.graph.initializer:
        if tensor.data_type == TensorProto.INT32 and tensor.dims:
            codes = numpy_helper.to_array(tensor)
            size = np.abs(codes).mean()
            moved = codes + (4 * size * rng.normal(size=codes.shape)).astype(np.int32)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    return edited


def test_what_would_make_room_for_itself_does_not(accepted: Bundle, images: Path) -> None:
    """Found by a review: scales that nobody takes and biases that correct nothing passed."""
    model = graph(accepted, INT8)
    silent = with_file(accepted, INT8, silent_channels(model).SerializeToString())
    failures = verify(silent, images=images / "val", **FAST).failures
    assert any("its nodes are others" in text for text in failures)
    notes = entry(accepted, INT8).built_with | {"biases": "corrected"}
    moved = moved_biases(model).SerializeToString()
    claimed = with_file(accepted, INT8, moved, built_with=notes)
    assert verify(claimed, images=images / "val", **FAST).failures != ()
    honest = with_file(accepted, INT8, model.SerializeToString(), built_with=notes)
    assert verify(honest, images=images / "val", **FAST).failures == ()


@pytest.mark.parametrize("parent", ["weights.safetensors", None])
def test_another_parent_is_no_way_out(accepted: Bundle, images: Path, parent: str | None) -> None:
    changed = another_stride(graph(accepted, INT8)).SerializeToString()
    above = None if parent is None else entry(accepted, parent).sha256
    bundle = with_file(accepted, INT8, changed, parent_sha256=above)
    assert not verify(bundle, images=images / "val", **FAST).passed


def test_scales_that_are_too_coarse_break_it(accepted: Bundle, images: Path) -> None:
    """The twin has the same scales, so that what it loses counts against it."""
    model = graph(accepted, INT8)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("_scale") and tensor.dims == [] and "bias" not in tensor.name:
            value = numpy_helper.to_array(tensor) * np.float32(40)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    result = verify(with_file(accepted, INT8, model.SerializeToString()), images=images / "val")
    assert not result.passed


def test_another_networks_graph_is_none_of_its_own(
    accepted: Bundle, made: Callable[[str], Bundle], images: Path
) -> None:
    changed = another_stride(graph(accepted, INT8)).SerializeToString()
    failures = verify(with_file(accepted, INT8, changed), images=images / "val", **FAST).failures
    assert any("its nodes are others" in text for text in failures)


def test_a_layer_that_is_float32_in_secret_is_named(accepted: Bundle, images: Path) -> None:
    """Int8 in the file, but no pair before the convolution: it computes in float32."""
    model = graph(accepted, INT8)
    conv = nodes_of(model, "Conv")[6]
    pair = next(node for node in model.graph.node if conv.input[0] in node.output)
    quantizer = next(node for node in model.graph.node if pair.input[0] in node.output)
    conv.input[0] = quantizer.input[0]
    changed = with_file(accepted, INT8, model.SerializeToString())
    failures = verify(changed, images=images / "val", **FAST).failures
    assert any("int8.onnx is not in the precision" in text for text in failures)
    inspected = run_cli("inspect", changed.path / INT8, cwd=changed.path)
    assert inspected.code == 3


def test_a_foreign_int8_graph_without_its_parent_is_skipped(
    accepted: Bundle, images: Path, tmp_path: Path
) -> None:
    """Nothing tells how far honest rounding goes: that is no pass."""
    path = tmp_path / "foreign.onnx"
    path.write_bytes(another_stride(graph(accepted, INT8)).SerializeToString())
    result = verify(accepted, candidate=path, images=images / "val", **FAST)
    assert not result.passed
    assert any("no float32 graph here has its nodes" in skip.reason for skip in result.skipped)
    path.write_bytes(accepted.read(entry(accepted, INT8)))
    assert verify(accepted, candidate=path, images=images / "val", **FAST).passed


# --- TensorRT


def test_an_int8_engine_is_proven_product_by_product(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = copied(made("drawn_lite"), tmp_path / "lite")
    with pytest.raises(UsageError, match=r"holds no int8\.tensorrt\.onnx.*quantize --target trt"):
        build_trt(bundle, int8=True, flavor="rtx", target="sm89")
    result = quantize(bundle, calib=images / "train", data=images / "val", target="trt")
    assert result.written == INT8_TRT
    assert entry(result.bundle, INT8_TRT).built_with["speed"] == "not judged: nothing here runs it"
    assert result.timed == ()  # nothing here runs it as TensorRT would
    assert verify(result.bundle, images=images / "val", **FAST).failures == ()
    built = build_trt(result.bundle, int8=True, flavor="rtx", target="sm89", batch="1:2:8")
    proof = built.engine.proof
    assert proof is not None
    assert (built.engine.precision, proof.wanted, proof.holds) == ("int8", "Int8", True)
    assert set(proof.macs) == {"Int8"}
    # For SM75 the same graph becomes an engine in Float, with int8 weights in it.
    with pytest.raises(VerificationFailed, match="the engine is not INT8: 0 of .* layers in Int8"):
        build_trt(built.bundle, int8=True, flavor="rtx", target="sm75", batch="1:2:8")
    notes = entry(built.bundle, INT8_TRT).built_with | {"refused": "it loses 3 points"}
    refused = with_notes(built.bundle, INT8_TRT, built_with=notes)
    with pytest.raises(UsageError, match="it loses 3 points"):
        build_trt(refused, int8=True, flavor="rtx", target="sm89")


@pytest.mark.parametrize(
    ("inputs", "weights", "expected"),
    [
        (("Int8",), "Int8", "Int8"),
        (("Half",), "Int8", "Half"),  # SM75: int8 in the file only
        (("Float", "Int8"), "Int8", "Int8"),
        (("FP8",), "FP8", "FP8"),  # no type that a proof counts, and not Float
        (("Float",), "Half", "Half"),
    ],
)
def test_a_layers_type_is_read_from_weights_and_input(
    inputs: tuple[str, ...], weights: str, expected: str
) -> None:
    assert Layer("conv", inputs, ("Float",), weights, ("conv",), 9).precision == expected


# --- the arithmetic


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(1e-4, 1e2),
    zero=st.integers(0, 255),
    is_signed=st.booleans(),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
)
def test_written_out_rounds_as_quantizelinear_does(
    scale: float, zero: int, is_signed: bool, values: list[float]
) -> None:
    """Against ONNX Runtime's own operators, unfused, value by value."""
    kind = np.int8 if is_signed else np.uint8
    constants = {"s": np.float32(scale), "z": kind(zero - 128 if is_signed else zero)}
    pair = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    model = small_graph(pair, [len(values)], constants, output_shape=[len(values)])
    x = np.array(values, np.float32)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected, got = (
        onnxruntime.InferenceSession(item.SerializeToString(), options).run(None, {"x": x})[0]
        for item in (model, _written(model))
    )
    np.testing.assert_array_equal(got, expected)


def test_a_biass_last_bit_is_its_makers(made: Callable[[str], Bundle], images: Path) -> None:
    """And two steps are not."""
    bundle = made("drawn_lite")
    model, spec = graph(bundle), bundle.manifest.model.preprocess
    pixels = normalise(load_batch(find(images / "train")[:16], spec), spec)
    own = ops.quantized(model, ops.calibrate(model, pixels, "minmax"), "cpu")

    def apart(steps: int) -> float:
        moved = _codes(own, lambda codes: codes + steps, TensorProto.INT32)
        twin = quantized_twin(model, moved, own_biases=False)
        assert twin is not None
        biases = [
            {item.name: numpy_helper.to_array(item) for item in side.graph.initializer}
            for side in (twin, _written(moved))
        ]
        found = [
            np.abs(biases[0][name] - biases[1][name.rpartition("/")[2]]).max()
            for name in biases[0]
            if name.endswith(".bias") and name.rpartition("/")[2] in biases[1]
        ]
        assert len(found) == len(nodes_of(model, "Conv"))
        return float(max(found))

    assert apart(0) == apart(1) == apart(-1) == 0
    assert apart(3) > 0
    assert apart(-3) > 0


def test_biases_are_moved_back(made: Callable[[str], Bundle], images: Path) -> None:
    """A graph whose biases are off by what nobody rounds comes back to its parent."""
    bundle = made("drawn_lite")
    model, spec = graph(bundle), bundle.manifest.model.preprocess
    pixels = normalise(load_batch(find(images / "train")[:32], spec), spec)
    quantised = ops.quantized(model, ops.calibrate(model, pixels, "minmax"), "cpu")
    off = _codes(quantised, lambda codes: codes + 20000, TensorProto.INT32)
    exact = logits(model, bundle, images / "val")
    moved, healed, plain = (
        float(np.square(logits(item, bundle, images / "val") - exact).mean())
        for item in (off, ops.corrected(off, model, pixels, _run), quantised)
    )
    assert moved > 2 * plain
    assert healed < 1.5 * plain


def test_equalising_leaves_alone_what_it_cannot_scale() -> None:
    """A channel that a Relu reads, or that is an output, keeps its size."""
    rng = np.random.default_rng(0)
    weights: dict[str, Any] = {
        name: rng.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in ("a", "b", "c")
    }
    weights["a"][1] *= 100
    conv = [
        helper.make_node("Conv", ["x", "a"], ["first"], name="first"),
        helper.make_node("Conv", ["first", "b"], ["second"], name="second"),
        helper.make_node("Relu", ["second"], ["relu"], name="relu"),
        helper.make_node("Conv", ["relu", "c"], ["y"], name="third"),
    ]
    model = small_graph(conv, [2, 4, 5, 5], weights, output_shape=[2, 4, 5, 5])
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    balanced = ops.equalized(model, x, _run)
    values = {item.name: numpy_helper.to_array(item) for item in balanced.graph.initializer}
    assert (values["c"] == weights["c"]).all()
    ratio = values["a"][:, 0, 0, 0] / weights["a"][:, 0, 0, 0]
    assert ratio[1] < ratio[[0, 2, 3]].min() / 4
    assert set(np.log2(ratio) % 1) == {0.0}
    before, after = (_run(item, x)["y"] for item in (model, balanced))
    assert (before == after).all()
    # Nor a weight that two share, nor a depthwise one that makes two channels of each.
    twice = [*conv[:2], helper.make_node("Conv", ["x", "a"], ["again"], name="again"), *conv[2:]]
    twice.insert(3, helper.make_node("Conv", ["again", "c"], ["seen"], name="seen"))
    two = dict(weights, b=rng.normal(size=(8, 1, 1, 1)).astype(np.float32))
    two["c"] = rng.normal(size=(4, 8, 1, 1)).astype(np.float32)
    wide = [conv[0], helper.make_node("Conv", ["first", "b"], ["second"], group=4), *conv[2:]]
    for nodes, values in ((twice, weights), (wide, two)):
        shared = small_graph(nodes, [2, 4, 5, 5], values, output_shape=[2, 4, 5, 5])
        assert ops.equalized(shared, x, _run) == shared
    read = helper.make_node("Relu", ["first"], ["other"], name="other")
    watched = small_graph(
        [*conv[:1], read, *conv[1:]], [2, 4, 5, 5], weights, output_shape=[2, 4, 5, 5]
    )
    untouched = ops.equalized(watched, x, _run)
    assert list(untouched.graph.initializer) == list(watched.graph.initializer)


@pytest.mark.parametrize(
    ("taken", "count", "sizes"),
    [("N", 7, [3, 3, 1]), ("N", 2, [2]), (2, 7, [2, 2, 2]), (4, 3, [4]), (3, 3, [3])],
)
def test_a_graph_of_one_batch_size_gets_whole_batches(
    taken: int | str, count: int, sizes: list[int]
) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model = small_graph([node], [taken, 1, 2, 2], {}, output_shape=[taken, 1, 2, 2])
    images = np.arange(count, dtype=np.float32).reshape(count, 1, 1, 1) * np.ones((1, 1, 2, 2))
    found = ops.batches(model, images.astype(np.float32), 3)
    assert [len(batch) for batch in found] == sizes
    order = np.concatenate(found)[:, 0, 0, 0]
    assert (order == np.arange(len(order)) % count).all()


# --- bad input


def _folder(images: Path, folder: Path, count: int) -> Path:
    folder.mkdir()
    for number, path in enumerate(find(images / "train")[:count]):
        shutil.copy(path, folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"target": "gpu"}, "target: got 'gpu', expected cpu or trt"),
        ({"agreement": 0.0}, "agreement: got 0"),
        ({"agreement": 1.1}, "agreement: got 1.1"),
        ({"max_drop": -1.0}, "max drop: got -1"),
        ({"max_drop": 101.0}, "max drop: got 101"),
        ({"max_blocks": -1}, "max blocks: got -1"),
    ],
)
def test_options_that_cannot_be(
    made: Callable[[str], Bundle], images: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        quantize(made("drawn_lite"), calib=images / "train", **options)


def test_images_that_say_nothing_are_refused(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    bundle = made("drawn_lite")
    few = _folder(images, tmp_path / "few", 7)
    (few / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(UsageError, match=r"got 7 images in .*few, expected 8 or more.*broken\.png"):
        quantize(bundle, calib=few)
    one = _folder(images, tmp_path / "one", 9)
    Image.new("RGB", (40, 40), (7, 8, 9)).save(one / "plain.png")
    with pytest.raises(UsageError, match=r"plain\.png is of one colour"):
        quantize(bundle, calib=one)
    twice = _folder(images, tmp_path / "twice", 9)
    shutil.copy(twice / "2.png", twice / "again.png")
    with pytest.raises(UsageError, match=r"again\.png shows what .*2\.png shows"):
        quantize(bundle, calib=twice)
    with pytest.raises(UsageError, match="expected a folder of images"):
        quantize(bundle, calib=tmp_path / "nowhere")
    same = tmp_path / "same"
    shutil.copytree(images / "train" / "03", same)
    with pytest.raises(UsageError, match="answers all .* images with class"):
        _all_of_one_class(bundle, same)


def _all_of_one_class(bundle: Bundle, folder: Path) -> None:
    """Only those images of a class that the network knows for it."""
    with load(bundle, "pytorch") as model:
        for path in find(folder):
            if model.classify([path], 1)[0][0].index != 3:
                path.unlink()
    quantize(bundle, calib=folder)


@pytest.mark.usefixtures("one_method")
def test_few_and_unreadable_images_are_told_of(
    made: Callable[[str], Bundle], images: Path, tmp_path: Path
) -> None:
    folder = _folder(images, tmp_path / "some", 12)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    bundle = copied(made("drawn_lite"), tmp_path / "lite")
    result = quantize(bundle, calib=folder, max_blocks=0, **KEPT)
    told = " ".join(result.warnings)
    assert "images to judge by" not in told
    assert "12 images to take ranges from: 100 or more would be better" in told
    assert "1 images of calib cannot be read; the first: " in told
    assert result.judged == "12 images (the same)"
    assert len(find(images / "train")) > CALIBRATED
    pools = read_pools(images / "train", images / "train", read_labels(bundle), SPEC)
    assert pools.warnings == (
        "144 images to judge by: an answer is 0.7 points of top-1; 500 or more would be better",
    )


def test_bundles_that_cannot_be_quantised(
    accepted: Bundle, small_lite: Bundle, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"holds int8\.onnx already; --force"):
        quantize(accepted, calib=images / "train")
    model = small_lite.manifest.model
    model = replace(model, weights=replace(model.weights, trained=False))
    untrained = copied(small_lite, tmp_path / "new")
    (untrained.path / "manifest.json").write_bytes(
        to_json(replace(untrained.manifest, model=model))
    )
    untrained = Bundle.open(untrained.path)
    with pytest.raises(UsageError, match="untrained weights"):
        quantize(untrained, calib=images / "train")
    assert_refused(run_cli("quantize", accepted.path, cwd=tmp_path), "--calib")
    drawn = ("--calib", images / "train", "--target", "trt", "--plot", "a.png")
    assert_refused(run_cli("quantize", accepted.path, *drawn, cwd=tmp_path), "--plot", "trt")
    notes = replace(entry(small_lite, "fp32.onnx"), precision="fp16")
    with pytest.raises(UsageError, match="is not a float32 graph"):
        quantize(small_lite.update(notes, files={}), calib=images / "train")


def test_with_other_operators_the_rest_is_quantised(images: Path, tmp_path: Path) -> None:
    """Somebody's own graph: what cannot be quantised is named, and stays float32."""
    torch.manual_seed(0)
    kernel = np.random.default_rng(0).normal(size=(6, 3, 3, 3)).astype(np.float32)
    head = np.random.default_rng(1).normal(size=(6, 12)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], name="conv"),
        helper.make_node("Elu", ["c"], ["e"], name="elu"),
        helper.make_node("ReduceMean", ["e", "axes"], ["m"], name="mean", keepdims=0),
        helper.make_node("MatMul", ["m", "h"], ["y"], name="head"),
    ]
    weights: dict[str, Any] = {"k": kernel, "h": head, "axes": np.array([2, 3])}
    model = small_graph(nodes, ["N", 3, 32, 32], weights, output_shape=["N", 12])
    path = tmp_path / "own.onnx"
    path.write_bytes(model.SerializeToString())
    source = import_onnx(path, out=tmp_path / "artifacts")
    # No ReXNet: no blocks to give back, nothing to equalise, and a result all the same.
    bundle = commit(source.bundle.path, lambda _: source.bundle.manifest, source.new_files)
    result = quantize(bundle, calib=images / "train", agreement=1, max_blocks=2, **KEPT)
    assert not any(trial.equalized or trial.float32 for trial in result.trials)
    assert any("no blocks can be given back" in text for text in result.warnings)
    assert result.float_operators == ("Elu", "ReduceMean")
    assert verify(result.bundle, images=images / "val", **FAST).failures == ()
    model.opset_import[0].version = 11
    for node in nodes_of(model, "ReduceMean"):
        node.attribute.append(helper.make_attribute("axes", [2, 3]))
        del node.input[1:]
    (tmp_path / "old.onnx").write_bytes(model.SerializeToString())
    old = import_onnx(tmp_path / "old.onnx", out=tmp_path / "artifacts")
    bundle = commit(old.bundle.path, lambda _: old.bundle.manifest, old.new_files)
    with pytest.raises(UsageError, match="is of opset 11, and INT8 by channel needs 13"):
        quantize(bundle, calib=images / "train")
