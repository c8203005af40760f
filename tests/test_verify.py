"""Verification of what is right: it passes, says what it left out, and refuses what it cannot."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper

from rexdeploy.arrays import Float32
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.manifest import BatchRange, to_json
from rexdeploy.bundle.precision import Precision
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.graphs.blocks import find_blocks
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.emulate import with_peaks
from rexdeploy.images import sets
from rexdeploy.images.decode import normalise
from rexdeploy.images.sets import synthetic
from rexdeploy.models.rexnet import ReXNetV1_lite
from rexdeploy.steps.build_trt import build_trt
from rexdeploy.steps.verify import verify
from tests import planted
from tests.helpers import (
    assert_refused,
    copied,
    edit_weights,
    entry,
    folder_state,
    graph,
    nodes_of,
    run_cli,
    run_program,
    saved,
    with_file,
    with_notes,
)

FAST: dict[str, Any] = {"samples": 6}
HALF_ENGINE: dict[str, Any] = {"fp16": True, "flavor": "rtx", "target": ("sm89",)}
ENGINE = "fp16.rtx-sm89.engine"


def test_a_sound_bundle_passes_and_the_engine_is_skipped_in_sight(small_v1: Bundle) -> None:
    result = verify(small_v1, **FAST)
    assert result.passed, result.failures
    errors = {f"{edge.reference} -> {edge.candidate}": edge.error for edge in result.edges}
    assert errors["torch -> fp32.onnx (onnxruntime)"] < 2e-4
    assert 1e-3 < errors["fp32.tensorrt.onnx -> fp16.onnx (onnxruntime)"] < 0.4
    assert errors["fp32.onnx -> fp32.tensorrt.onnx (onnxruntime)"] < 1e-4
    assert [total.candidate for total in result.totals] == [
        "fp32.tensorrt.onnx (onnxruntime)",
        "fp16.onnx (onnxruntime)",
    ]
    assert result.batches == (1, 2, 5, 8)
    ran = {edge.candidate for edge in result.edges}
    skipped = {skip.candidate: skip.reason for skip in result.skipped}
    engine = f"{ENGINE} (tensorrt-rtx)"
    assert (engine in ran) != (engine in skipped)
    assert all(skipped.values())
    assert {file: list(proof.macs) for file, proof in result.proofs.items()} == {
        "fp32.onnx": ["Float"],
        "fp32.tensorrt.onnx": ["Float"],
        "fp16.onnx": ["Half"],
        ENGINE: ["Half"],
    }
    result.store(small_v1)
    assert entry(Bundle.open(small_v1.path), "verify.json").kind == "report"


def test_lite_and_timm_bundles_pass_on_photographs(
    small_lite_original: Bundle, timm_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    for bundle in (small_lite_original, timm_original):
        result = verify(copied(bundle, tmp_path / bundle.path.name), images=photos)
        assert result.passed, result.failures
        assert result.images.startswith("2 images of ")


def test_a_result_that_cannot_be_stored_is_still_told(small_v1: Bundle, tmp_path: Path) -> None:
    (small_v1.path / "verify.json").mkdir()
    before = folder_state(small_v1.path)
    result = run_cli("verify", "--samples", "2", cwd=tmp_path)
    assert result.code == 0
    assert "passed: " in result.out
    assert "warning: verify.json is not stored: " in result.err
    assert "verify.json is a folder where the bundle needs a file" in result.err
    assert folder_state(small_v1.path) == before
    assert run_cli("verify", "--samples", "2", "--quiet", cwd=tmp_path).code == 0


def test_a_broken_bundle_exits_3_whatever_becomes_of_the_output(small_v1: Bundle) -> None:
    planted.plant(small_v1, "fp32.onnx", planted.swapped_channels)
    folder = small_v1.path.parents[1]
    command = f"{sys.executable} -m rexdeploy verify --samples 2"
    for shell in (f"{command} | true; exit ${{PIPESTATUS[0]}}", f"{command} >/dev/full"):
        answer = run_program("bash", "-c", shell, cwd=folder)
        assert answer.returncode == 3, answer
        assert "broken edge torch -> fp32.onnx" in answer.stderr
        assert "Traceback" not in answer.stderr
    quiet = run_cli("verify", "--samples", "2", "--quiet", cwd=folder)
    assert (quiet.code, quiet.out) == (3, "")
    assert "broken edge torch -> fp32.onnx" in quiet.error_lines[0]


def test_the_command_exits_3_and_names_the_edge(small_v1: Bundle, tmp_path: Path) -> None:
    planted.plant(small_v1, "fp32.onnx", planted.swapped_channels)
    result = run_cli("verify", "--samples", "4", "--json", "out.json", cwd=tmp_path)
    assert result.code == 3
    assert "broken edge torch -> fp32.onnx (onnxruntime)" in result.error_lines[0]
    assert "FAILED" in result.out
    assert '"failures"' in (tmp_path / "out.json").read_text()


# What is run, and what is left out


@pytest.mark.parametrize(
    ("options", "failure"),
    [
        ({"require": ("tensorrt",)}, "required backend tensorrt did not run: "),
        ({"backend": ("tensorrt",)}, "nothing was compared: fewer than two backends ran"),
    ],
)
def test_a_backend_that_cannot_run_where_it_must_is_a_failure(
    small_v1: Bundle, options: dict[str, Any], failure: str
) -> None:
    result = verify(small_v1, **FAST | options)
    if any("(tensorrt" in edge.candidate for edge in result.edges):
        pytest.skip("this machine runs the engine")
    assert result.failures[0].startswith(failure)
    assert not result.passed


def test_what_backend_leaves_out_is_said(small_v1: Bundle) -> None:
    result = verify(small_v1, **FAST | {"backend": ("onnxruntime",)})
    assert result.passed
    assert [(skip.candidate, skip.reason) for skip in result.skipped] == [
        (ENGINE, "left out: --backend onnxruntime does not run it")
    ]


def test_a_required_backend_must_run_every_file_of_its_own(small_v1: Bundle) -> None:
    """A 16-bit graph is none of OpenVINO's, which computes in float32: no reason to fail."""
    pytest.importorskip("openvino")
    result = verify(small_v1, **FAST | {"require": ("openvino",)})
    assert result.passed, result.failures
    assert [skip.candidate for skip in result.skipped if skip.backend == "openvino"] == [
        "fp16.onnx (openvino)"
    ]


def test_a_candidate_runs_on_the_backends_that_are_required(
    small_v1: Bundle, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    path = saved(graph(small_v1), tmp_path / "copy.onnx")
    result = verify(small_v1, **FAST | {"candidate": path, "require": ("openvino",)})
    assert result.passed, result.failures
    assert [edge.candidate for edge in result.edges] == [
        "copy.onnx (onnxruntime)",
        "copy.onnx (openvino)",
    ]


def test_an_engine_of_another_version_is_not_run(small_v1_original: Bundle, tmp_path: Path) -> None:
    """The header's version bytes say 1.2.3.4; TensorRT itself would look at them on a GPU only."""
    plan = bytearray((small_v1_original.path / ENGINE).read_bytes())
    plan[24:28] = bytes([1, 2, 3, 4])
    other = tmp_path / "other.engine"
    other.write_bytes(plan)
    result = verify(small_v1_original, **FAST | {"candidate": other})
    assert result.skipped[0].reason.startswith("the engine was built by TensorRT-RTX 1.2.3.4 and")
    assert not result.passed
    other.write_bytes(plan[: len(plan) // 2])
    with pytest.raises(UsageError, match="truncated TensorRT-RTX engine"):
        verify(small_v1_original, **FAST | {"candidate": other})


def test_graphs_are_run_at_all_sizes_of_all_engines_and_never_at_one_alone(
    small_lite: Bundle,
) -> None:
    """The first engine's range was all that the graphs were run at."""
    plan = small_lite.read(entry(small_lite, ENGINE))
    alone = with_notes(small_lite, ENGINE, batch=BatchRange(1, 1, 1))
    good = verify(alone, samples=4)
    assert good.passed, good.failures
    assert good.batches == (1, 5, 8)
    wide = replace(entry(alone, ENGINE), file="wide.engine", batch=BatchRange(1, 16, 24))
    both = alone.update(wide, files={wide.file: plan})
    assert verify(both, samples=4).batches == (1, 5, 16, 24)


def test_a_graph_of_any_size_runs_at_one_whatever_its_engines_take(small_lite: Bundle) -> None:
    """A bundle with an engine for two images at once, and a graph that can take no others."""
    root, engine = entry(small_lite, "fp32.onnx"), entry(small_lite, ENGINE)
    plan = small_lite.read(engine)
    data = planted.fixed_reshape(graph(small_lite), 2).SerializeToString()
    wrong = replace(root, sha256=sha256(data))
    only = replace(engine, batch=BatchRange(2, 2, 2), parent_sha256=wrong.sha256)
    bundle = small_lite.update(wrong, only, files={root.file: data, engine.file: plan})
    result = verify(bundle, samples=4)
    assert result.failures[0].startswith("broken edge torch -> fp32.onnx (onnxruntime): ")
    assert "failed on a batch of 1" in result.failures[0]


# Images


def test_images_are_taken_from_all_over_a_folder(
    small_lite: Bundle, photos: Path, tmp_path: Path
) -> None:
    """The first two by name are one picture, which would be refused."""
    for name, photo in (("a/1.png", "china"), ("a/2.png", "china"), ("b/3.png", "flower")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"{photo}.png", tmp_path / "tree" / name)
    result = verify(small_lite, images=tmp_path / "tree", samples=2)
    assert result.passed
    assert result.images.startswith("2 images of ")


def test_logits_that_do_not_vary_are_refused(small_lite: Bundle) -> None:
    """A freshly initialised network agrees with any broken export of itself."""
    torch.manual_seed(0)
    fresh = ReXNetV1_lite(multiplier=small_lite.manifest.model.width or 1, classes=10)
    data = safetensors.torch.save(dict(fresh.state_dict()))
    weights = replace(entry(small_lite, "weights.safetensors"), sha256=sha256(data))
    root = replace(entry(small_lite, "fp32.onnx"), parent_sha256=weights.sha256)
    bundle = small_lite.update(weights, root, files={weights.file: data})
    with pytest.raises(UsageError, match="do not vary over the 8 images"):
        verify(bundle, **FAST)


def _with_gate_at(bundle: Bundle, peak: float, images: Float32) -> Bundle:
    """The bundle built anew with a squeeze-excitation whose hidden values peak there.

    The network is what it was: the weights after it undo what those before it do.
    """
    root = graph(bundle)
    inside = {root.graph.node[position].name for position in find_blocks(root)[10].nodes}
    convs = [node for node in nodes_of(root, "Conv") if node.name in inside]
    squeeze, excite = convs[2], convs[3]
    model, outputs = with_peaks(root, [squeeze.output[0]])
    session = GraphSession(model.SerializeToString())
    (name,) = outputs.values()
    factor = peak / float(session.run({root.graph.input[0].name: images}, [name])[name])
    grown = edit_weights(root, squeeze.input[1:3], lambda values: values * factor)
    scaled = edit_weights(grown, [excite.input[1]], lambda values: values / factor)
    return build_trt(planted.plant(bundle, "fp32.onnx", lambda _: scaled), **HALF_ENGINE).bundle


def test_values_that_overflow_on_other_images_are_found_or_warned_of(
    small_v1: Bundle, tmp_path: Path
) -> None:
    """Issue 10: 60,000 over smooth images passed, and was NaN on every photograph."""
    sound = verify(small_v1, **FAST)
    assert [room.file for room in sound.headroom] == ["fp16.onnx"]
    assert not sound.headroom[0].is_low
    spec = small_v1.manifest.model.preprocess
    high = _with_gate_at(small_v1, 60_000, synthetic(16, spec, seed=1))
    result = verify(high)
    assert "logits are NaN or infinite" in result.failures[0]
    assert result.headroom[0].factor < 1
    pool, _ = sets.pool(None, 16, spec, 64)
    near = _with_gate_at(high, 20_000, normalise(pool[:16], spec))
    shown = run_cli("verify", near.path, "--samples", "16", cwd=tmp_path)
    assert shown.code == 0, shown.err
    assert "warning: fp16.onnx: below 8 times, other images may overflow" in shown.out


# What is refused


def test_unknown_backends_and_sample_counts_are_refused(small_v1_original: Bundle) -> None:
    for options in (FAST | {"require": ("cuda",)}, FAST | {"backend": ("ncnn",)}):
        with pytest.raises(UsageError, match="expected one of onnxruntime, onnxruntime-cuda"):
            verify(small_v1_original, **options)
    with pytest.raises(UsageError, match="samples: got 1, expected 2 to"):
        verify(small_v1_original, samples=1)


def test_a_damaged_file_is_refused_and_nothing_changes(small_v1: Bundle, tmp_path: Path) -> None:
    for file in ("weights.safetensors", "fp16.onnx", ENGINE):
        path = small_v1.path / file
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        before = folder_state(small_v1.path)
        assert_refused(
            run_cli("verify", small_v1.path, "--samples", "2", cwd=tmp_path),
            file,
            "not the file the manifest describes",
        )
        assert folder_state(small_v1.path) == before
        path.write_bytes(good)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # With BGR in all of its graphs they would agree with each other.
        ({"family": "onnx", "width": None}, "own ONNX graph, and lists weights.safetensors"),
        ({"mean": (0.5, 0.5, 0.5)}, "preprocessing is not that of fp32.onnx"),
    ],
)
def test_a_manifest_that_says_another_network_is_refused(
    small_v1: Bundle, change: dict[str, Any], message: str
) -> None:
    spec = small_v1.manifest.model
    if "mean" in change:
        change = {"preprocess": replace(spec.preprocess, **change)}
    data = to_json(replace(small_v1.manifest, model=replace(spec, **change)))
    (small_v1.path / "manifest.json").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        verify(Bundle.open(small_v1.path), **FAST)


def test_a_verdict_is_not_stored_over_files_that_it_did_not_judge(small_lite: Bundle) -> None:
    result = verify(small_lite, samples=2)
    planted.plant(small_lite, "fp16.onnx", planted.swapped_channels)  # another command's
    with pytest.raises(UsageError, match="was changed by another command meanwhile"):
        result.store(small_lite)
    assert Bundle.open(small_lite.path).manifest.find_file("verify.json") is None
    verify(Bundle.open(small_lite.path), **FAST).store(Bundle.open(small_lite.path))


# Candidates from elsewhere


def test_a_candidate_is_judged_by_its_logits(small_v1: Bundle, tmp_path: Path) -> None:
    """A graph without our metadata, under other names."""
    model = graph(small_v1)
    del model.metadata_props[:]
    good = saved(model, tmp_path / "good.onnx")
    bad = saved(planted.weight_off_by_one_percent(model), tmp_path / "bad.onnx")
    before = folder_state(small_v1.path)
    assert verify(small_v1, **FAST | {"candidate": good}).passed
    result = verify(small_v1, **FAST | {"candidate": bad})
    assert result.failures[0].startswith("broken edge torch -> bad.onnx (onnxruntime)")
    assert folder_state(small_v1.path) == before


def test_unusable_candidates_are_refused(
    small_v1_original: Bundle, timm_original: Bundle, small_lite_original: Bundle, tmp_path: Path
) -> None:
    size, double, classes = (
        graph(bundle) for bundle in (small_v1_original, small_v1_original, small_lite_original)
    )
    size.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 225
    double.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    del classes.metadata_props[:]
    garbage = tmp_path / "garbage.bin"
    garbage.write_bytes(b"\x01\x02" * 500)
    for path, message in (
        (timm_original.path / "fp32.onnx", "is a rexnet 1.3, expected rexnet 0.3"),
        (small_lite_original.path / "fp16.onnx", "is a rexnet_lite 0.3, expected rexnet 0.3"),
        (
            saved(classes, tmp_path / "classes.onnx"),
            r"expected one tensor\(float\) input \[N, 3, 64, 64\] and one output",
        ),
        (saved(size, tmp_path / "size.onnx"), "size.onnx"),
        (saved(double, tmp_path / "double.onnx"), "double.onnx"),
        (garbage, "is not a valid ONNX model .*, and no TensorRT engine either"),
        (tmp_path / "missing.onnx", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            verify(small_v1_original, **FAST | {"candidate": path})


@pytest.mark.parametrize("text", [None, "{}", "[1"])
def test_a_candidate_for_other_preprocessing_is_refused(
    small_v1: Bundle, tmp_path: Path, text: str | None
) -> None:
    spec = replace(small_v1.manifest.model.preprocess, mean=(0.5, 0.5, 0.5))
    model = graph(small_v1)
    for prop in model.metadata_props:
        if prop.key == "rexdeploy.preprocess":
            prop.value = to_json(spec).decode() if text is None else text
    path = saved(model, tmp_path / "other.onnx")
    expected = "metadata rexdeploy.preprocess is damaged" if text == "[1" else "other preprocessing"
    with pytest.raises(UsageError, match=expected):
        verify(small_v1, **FAST | {"candidate": path})


def test_a_type_without_limits_is_an_error_that_names_the_option(
    small_lite_original: Bundle, tmp_path: Path
) -> None:
    path = saved(planted.double_product(graph(small_lite_original)), tmp_path / "double.onnx")
    with pytest.raises(UsageError, match=r"computes in DOUBLE, .* say with --precision"):
        verify(small_lite_original, **FAST | {"candidate": path})
    told = FAST | {"candidate": path, "precision": "fp32"}
    assert verify(small_lite_original, **told).passed
    loose = verify(small_lite_original, **told | {"precision": "fp16"})
    assert loose.edges[0].limits.rms == 0.15


def test_a_graph_that_lists_its_weights_first_is_run_at_every_size(
    small_lite_original: Bundle, tmp_path: Path
) -> None:
    """The first weight's channels were taken for a fixed batch size, at which rows repeat."""
    model = planted.copied_rows(graph(small_lite_original), 32)
    image = onnx.ValueInfoProto.FromString(model.graph.input[0].SerializeToString())
    weight = nodes_of(model, "Conv")[0].input[1]
    (stem,) = (item for item in model.graph.initializer if item.name == weight)
    listed = helper.make_tensor_value_info(stem.name, TensorProto.FLOAT, list(stem.dims))
    model.graph.input.insert(0, listed)
    path = saved(model, tmp_path / "listed.onnx")
    result = verify(small_lite_original, samples=4, candidate=path)
    assert result.batches == (1, 5, 8, 64)
    assert result.failures[0].startswith("broken edge torch -> listed.onnx (onnxruntime): error")
    image.type.tensor_type.shape.dim[0].dim_value = 5000
    del model.graph.input[:]
    model.graph.input.append(image)
    saved(model, path)
    with pytest.raises(UsageError, match="takes batches of exactly 5000, expected 1 to 4096"):
        verify(small_lite_original, samples=4, candidate=path)


def test_weights_beside_a_graph_are_covered_by_no_hash(
    small_lite: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the current folder, they could be any; a candidate's own are taken in."""
    apart = tmp_path / "apart.onnx"
    onnx.save(graph(small_lite), apart, save_as_external_data=True, location="apart.bin")
    assert verify(small_lite, **FAST | {"candidate": apart}).passed
    bundle = with_file(small_lite, "fp32.onnx", apart.read_bytes())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"fp32\.onnx keeps weights in another file"):
        verify(bundle, **FAST)


def test_foreign_conversions_are_held_to_what_their_own_rounding_does(
    small_v1: Bundle, tmp_path: Path
) -> None:
    """Names of its own, and weights that round apart from ours: no twin, and no false alarm."""
    model = planted.renamed(to_precision(graph(small_v1), "fp16"))
    sound = saved(model, tmp_path / "sound.onnx")
    wrong = saved(planted.swapped_channels(model), tmp_path / "wrong.onnx")
    good = verify(small_v1, **FAST | {"candidate": sound})
    assert good.passed, good.failures
    assert [edge.reference for edge in good.edges] == ["torch"]
    assert good.edges[0].error < good.edges[0].limits.error < 1
    assert not verify(small_v1, **FAST | {"candidate": wrong}).passed


def test_a_float16_graph_made_of_somebodys_own_must_be_it_too(
    small_v1: Bundle, tmp_path: Path
) -> None:
    model = graph(small_v1)
    del model.metadata_props[:]
    own = saved(model, tmp_path / "own.onnx")
    made = run_cli(
        "build-trt", "--onnx", own, "--fp16", "--flavor", "rtx", "--target", "sm89", cwd=tmp_path
    )
    assert made.code == 0, made.err
    bundle = Bundle.open(tmp_path / "artifacts" / "own")
    assert verify(bundle, **FAST).passed
    wrong = planted.plant(
        bundle,
        "fp16.onnx",
        lambda half: planted.one_channel_off_by_one_percent(planted.renamed(half)),
    )
    assert "its nodes are others" in verify(wrong, **FAST).failures[0]


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_a_graphs_own_types_decide_its_limit(small_v1: Bundle, precision: Precision | None) -> None:
    """A manifest that calls float32 something else does not loosen the limit."""
    bundle = planted.plant(small_v1, "fp32.onnx", planted.weight_off_by_one_percent)
    root = entry(bundle, "fp32.onnx")
    artifacts = tuple(
        replace(item, precision=precision) if item == root else item
        for item in bundle.manifest.artifacts
    )
    edited = to_json(replace(bundle.manifest, artifacts=artifacts))
    (bundle.path / "manifest.json").write_bytes(edited)
    result = verify(Bundle.open(bundle.path), **FAST)
    assert result.edges[0].limits.error < 5e-3
    assert not result.passed
