"""Verification: it passes what is right, and names the edge of every planted defect."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from rexdeploy.bundle import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.manifest import Precision, to_json
from rexdeploy.models.rexnet import ReXNetV1_lite
from rexdeploy.verify import Verification, VerifyOptions, store, verify
from tests.helpers import assert_refused, edit_weights, folder_state, nodes_of, run_cli

FAST = VerifyOptions(samples=6)
Defect = Callable[[ModelProto], ModelProto]


def _graph(bundle: Bundle, precision: Precision) -> ModelProto:
    artifact = bundle.manifest.find("onnx", precision)
    assert artifact is not None
    return onnx.load_from_string(bundle.read(artifact))


def _plant(bundle: Bundle, precision: Precision, defect: Defect) -> Bundle:
    """The bundle with a defect in one graph; the manifest agrees, only the logits can tell."""
    artifact = bundle.manifest.find("onnx", precision)
    assert artifact is not None
    model = defect(_graph(bundle, precision))
    onnx.checker.check_model(model, full_check=True)
    data = model.SerializeToString()
    return bundle.update(replace(artifact, sha256=sha256(data)), files={artifact.file: data})


def _weight_off_by_one_percent(model: ModelProto) -> ModelProto:
    return edit_weights(model, [nodes_of(model, "Conv")[2].input[1]], lambda values: values * 1.01)


def _swapped_channels(model: ModelProto) -> ModelProto:
    """BGR for RGB: the stem's input channels in reverse."""
    stem = nodes_of(model, "Conv")[0].input[1]
    return edit_weights(model, [stem], lambda values: values[:, ::-1])


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy


def _dropped_se(model: ModelProto) -> ModelProto:
    """The first squeeze-excitation's product passes its features through."""
    model = _copy(model)
    sigmoids = {
        node.output[0]
        for node in nodes_of(model, "Sigmoid")
        if "Conv" in {p.op_type for p in model.graph.node if set(p.output) & set(node.input)}
    }
    for node in nodes_of(model, "Mul"):
        gates = [name for name in node.input if name in sigmoids]
        others = [name for name in node.input if name not in sigmoids]
        # The product of a SiLU has its sigmoid's own input as the other factor.
        if gates and not any(
            set(p.input) & set(others) and p.output[0] == gates[0] for p in model.graph.node
        ):
            node.op_type = "Identity"
            node.input[:] = others
            return model
    raise AssertionError("no squeeze-excitation found")


def _insert_before_output(model: ModelProto, *nodes: onnx.NodeProto) -> ModelProto:
    """Nodes from "inner" (what was the output) to the output's name."""
    model = _copy(model)
    output = model.graph.output[0].name
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == output:
                    names[index] = "inner"
    model.graph.node.extend(nodes)
    return model


def _shifted_rows(model: ModelProto) -> ModelProto:
    """Every image gets its neighbour's logits; at batch 1 nothing can be seen."""
    constants = {"zero": [0], "one": [1], "end": [2**31 - 1]}
    model = _insert_before_output(
        model,
        helper.make_node("Slice", ["inner", "one", "end", "zero"], ["tail"]),
        helper.make_node("Slice", ["inner", "zero", "one", "zero"], ["head"]),
        helper.make_node("Concat", ["tail", "head"], [model.graph.output[0].name], axis=0),
    )
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return model


def _constant_output(model: ModelProto) -> ModelProto:
    """What it would say of any image: its logits times zero, plus a bias."""
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    output = model.graph.output[0].name
    model = _insert_before_output(
        model,
        helper.make_node("Mul", ["inner", "nothing"], ["zeros"]),
        helper.make_node("Add", ["zeros", "always"], [output]),
    )
    always = np.random.default_rng(0).standard_normal(classes).astype(np.float32)
    for name, value in (("nothing", np.float32(0)), ("always", always)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    return model


def _forgotten_normalisation(model: ModelProto) -> ModelProto:
    """The graph is fed what a client sends who leaves out mean and std: pixels in [0, 1]."""
    model = _copy(model)
    source = model.graph.input[0].name
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == source:
                node.input[index] = "pixels"
    values = {
        "own_std": np.array([0.229, 0.224, 0.225], dtype=np.float32).reshape(1, 3, 1, 1),
        "own_mean": np.array([0.485, 0.456, 0.406], dtype=np.float32).reshape(1, 3, 1, 1),
    }
    for name, value in values.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    undo = [
        helper.make_node("Mul", [source, "own_std"], ["own_scaled"]),
        helper.make_node("Add", ["own_scaled", "own_mean"], ["pixels"]),
    ]
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*undo, *nodes])
    return model


STRUCTURAL = [
    _swapped_channels,
    _dropped_se,
    _shifted_rows,
    _constant_output,
    _forgotten_normalisation,
]


def _errors(result: Verification) -> dict[str, float]:
    return {f"{edge.reference} -> {edge.candidate}": edge.error for edge in result.edges}


def test_a_sound_bundle_passes_and_the_engine_is_skipped_in_sight(v1_bundle: Bundle) -> None:
    result = verify(v1_bundle, FAST)
    assert result.passed, result.failures
    errors = _errors(result)
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
    engine = "fp16.rtx-sm89.engine (tensorrt-rtx)"
    assert (engine in ran) != (engine in skipped)
    assert all(skipped.values())
    assert {file: list(proof.macs) for file, proof in result.proofs.items()} == {
        "fp32.onnx": ["Float"],
        "fp32.tensorrt.onnx": ["Float"],
        "fp16.onnx": ["Half"],
        "fp16.rtx-sm89.engine": ["Half"],
    }
    store(v1_bundle, result)
    written = Bundle.open(v1_bundle.path).manifest.find("report")
    assert written is not None
    assert written.file == "verify.json"


def test_lite_and_timm_bundles_pass_on_photographs(
    lite_original: Bundle, timm_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    for bundle in (lite_original, timm_original):
        copy = tmp_path / bundle.path.name
        shutil.copytree(bundle.path, copy)
        result = verify(Bundle.open(copy), VerifyOptions(images=photos))
        assert result.passed, result.failures
        assert result.images.startswith("2 images of ")


@pytest.mark.parametrize("defect", [_weight_off_by_one_percent, *STRUCTURAL])
def test_a_defect_in_the_onnx_graph_breaks_its_edge(v1_bundle: Bundle, defect: Defect) -> None:
    bundle = _plant(v1_bundle, "fp32", defect)
    result = verify(bundle, FAST)
    assert len(result.failures) == 1
    assert result.failures[0].startswith("broken edge torch -> fp32.onnx (onnxruntime): error ")


@pytest.mark.parametrize("defect", [_swapped_channels, _dropped_se])
def test_a_defect_in_the_fp16_graph_breaks_that_edge_alone(
    v1_bundle: Bundle, defect: Defect
) -> None:
    bundle = _plant(v1_bundle, "fp16", defect)
    result = verify(bundle, FAST)
    assert len(result.failures) == 1
    assert result.failures[0].startswith(
        "broken edge fp32.tensorrt.onnx -> fp16.onnx (onnxruntime)"
    )


def test_a_defect_in_lite_is_found_too(lite_bundle: Bundle) -> None:
    bundle = _plant(lite_bundle, "fp32", _weight_off_by_one_percent)
    assert verify(bundle, FAST).failures[0].startswith("broken edge torch -> fp32.onnx")


def test_infinite_logits_fail_and_are_counted(v1_bundle: Bundle) -> None:
    """An FP16 overflow: the head's weights as large as half allows."""

    def overflow(model: ModelProto) -> ModelProto:
        name = nodes_of(model, "Conv")[-1].input[1]
        return edit_weights(model, [name], lambda values: np.full_like(values, 60000))

    result = verify(_plant(v1_bundle, "fp16", overflow), FAST)
    broken = [edge for edge in result.edges if edge.nonfinite]
    assert len(broken) == 1
    assert "logits are NaN or infinite" in result.failures[0]


def _fixed_reshape(model: ModelProto, rows: int) -> ModelProto:
    """A batch size left in the graph: works at that size, fails or lies at others."""
    classes = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    output = model.graph.output[0].name
    edited = _insert_before_output(
        model, helper.make_node("Reshape", ["inner", "fixed"], [output], name="fixed")
    )
    shape = np.array([rows, classes if rows > 0 else -1])
    edited.graph.initializer.append(numpy_helper.from_array(shape, "fixed"))
    del edited.graph.value_info[:]
    return edited


@pytest.mark.parametrize("rows", [1, 2])
def test_a_graph_that_fails_at_some_batch_size_is_a_broken_edge(
    v1_bundle: Bundle, tmp_path: Path, rows: int
) -> None:
    path = tmp_path / "fixed.onnx"
    path.write_bytes(_fixed_reshape(_graph(v1_bundle, "fp32"), rows).SerializeToString())
    result = verify(v1_bundle, replace(FAST, candidate=path))
    assert result.failures[0].startswith("broken edge torch -> fixed.onnx (onnxruntime): ")
    assert "failed on a batch of" in result.failures[0]


def test_a_broken_bundle_exits_3_whatever_becomes_of_the_output(v1_bundle: Bundle) -> None:
    _plant(v1_bundle, "fp32", _swapped_channels)
    command = f"{sys.executable} -c 'from rexdeploy.cli import main; main()' verify --samples 2"
    for shell in (
        f"{command} | true; exit ${{PIPESTATUS[0]}}",
        f"{command} >/dev/full",
        f"{command} --quiet",
    ):
        answer = subprocess.run(
            ["bash", "-c", shell],
            cwd=v1_bundle.path.parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert answer.returncode == 3, answer
        assert "broken edge torch -> fp32.onnx" in answer.stderr
        assert "Traceback" not in answer.stderr


def test_a_result_that_cannot_be_stored_is_still_told(v1_bundle: Bundle, tmp_path: Path) -> None:
    (v1_bundle.path / "verify.json").mkdir()
    before = folder_state(v1_bundle.path)
    result = run_cli("verify", "--samples", "2", cwd=tmp_path)
    assert result.code == 0
    assert "passed: " in result.out
    assert "warning: verify.json is not stored: " in result.err
    assert "verify.json is a folder where the bundle needs a file" in result.err
    assert folder_state(v1_bundle.path) == before
    assert run_cli("verify", "--samples", "2", "--quiet", cwd=tmp_path).code == 0


@pytest.mark.parametrize("precision", [None, "fp16"])
def test_a_graphs_own_types_decide_its_limit(
    v1_bundle: Bundle, precision: Precision | None
) -> None:
    """A manifest that calls float32 something else does not loosen the limit."""
    bundle = _plant(v1_bundle, "fp32", _weight_off_by_one_percent)
    graph = bundle.manifest.find("onnx", "fp32")
    assert graph is not None
    edited = replace(
        bundle.manifest,
        artifacts=tuple(
            replace(item, precision=precision) if item == graph else item
            for item in bundle.manifest.artifacts
        ),
    )
    (bundle.path / "manifest.json").write_bytes(to_json(edited))
    result = verify(Bundle.open(bundle.path), FAST)
    assert result.edges[0].limit == 0.001
    assert not result.passed


def test_one_convolution_in_float32_is_not_float16_whatever_its_logits(
    v1_bundle: Bundle,
) -> None:
    def stem_in_float32(model: ModelProto) -> ModelProto:
        model = _copy(model)
        stem = nodes_of(model, "Conv")[0]
        at = list(model.graph.node).index(stem)
        casts = [
            helper.make_node("Cast", [name], [f"{name}_full"], to=TensorProto.FLOAT)
            for name in stem.input
        ]
        back = helper.make_node("Cast", ["stem_full"], [stem.output[0]], to=TensorProto.FLOAT16)
        stem.input[:] = [f"{name}_full" for name in stem.input]
        stem.output[:] = ["stem_full"]
        nodes = list(model.graph.node)
        del model.graph.node[:]
        model.graph.node.extend([*nodes[:at], *casts, *nodes[at : at + 1], back, *nodes[at + 1 :]])
        return model

    result = verify(_plant(v1_bundle, "fp16", stem_in_float32), FAST)
    assert len(result.failures) == 1
    assert "fp16.onnx is not in the precision that the manifest says: 75 of" in result.failures[0]


def test_preprocessing_that_was_edited_in_the_manifest_is_noticed(v1_bundle: Bundle) -> None:
    spec = v1_bundle.manifest.model
    edited = replace(spec, preprocess=replace(spec.preprocess, mean=(0.5, 0.5, 0.5)))
    data = to_json(replace(v1_bundle.manifest, model=edited))
    (v1_bundle.path / "manifest.json").write_bytes(data)
    with pytest.raises(UsageError, match="preprocessing is not that of fp32.onnx"):
        verify(Bundle.open(v1_bundle.path), FAST)


def test_images_are_taken_from_all_over_a_folder(
    lite_bundle: Bundle, photos: Path, tmp_path: Path
) -> None:
    """The first two by name are one picture, which would be refused."""
    for name, photo in (("a/1.png", "china"), ("a/2.png", "china"), ("b/3.png", "flower")):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(photos / f"{photo}.png", tmp_path / "tree" / name)
    result = verify(lite_bundle, VerifyOptions(images=tmp_path / "tree", samples=2))
    assert result.passed
    assert result.images.startswith("2 images of ")


def test_the_command_exits_3_and_names_the_edge(v1_bundle: Bundle, tmp_path: Path) -> None:
    _plant(v1_bundle, "fp32", _swapped_channels)
    result = run_cli("verify", "--samples", "4", "--json", "out.json", cwd=tmp_path)
    assert result.code == 3
    assert "broken edge torch -> fp32.onnx (onnxruntime)" in result.error_lines[0]
    assert "FAILED" in result.out
    assert '"failures"' in (tmp_path / "out.json").read_text()


def test_a_required_backend_that_cannot_run_is_a_failure(v1_bundle: Bundle) -> None:
    result = verify(v1_bundle, replace(FAST, require=("tensorrt",)))
    if any("(tensorrt" in edge.candidate for edge in result.edges):
        pytest.skip("this machine runs the engine")
    assert result.failures[0].startswith("required backend tensorrt did not run: ")
    assert not result.passed


def test_nothing_compared_is_a_failure(v1_bundle: Bundle) -> None:
    result = verify(v1_bundle, replace(FAST, backends=("tensorrt",)))
    if result.edges:
        pytest.skip("this machine runs the engine")
    assert result.failures[0].startswith("nothing was compared: fewer than two backends ran")


def test_unknown_backends_and_sample_counts_are_refused(v1_original: Bundle) -> None:
    for options in (replace(FAST, require=("cuda",)), replace(FAST, backends=("ncnn",))):
        with pytest.raises(UsageError, match="expected one of onnxruntime, onnxruntime-cuda"):
            verify(v1_original, options)
    with pytest.raises(UsageError, match="samples: got 1, expected 2 to"):
        verify(v1_original, VerifyOptions(samples=1))


def test_logits_that_do_not_vary_are_refused(lite_bundle: Bundle) -> None:
    """A freshly initialised network agrees with any broken export of itself."""
    torch.manual_seed(0)
    data = safetensors.torch.save(dict(ReXNetV1_lite(classes=10).state_dict()))
    weights = lite_bundle.manifest.find("weights")
    graph = lite_bundle.manifest.find("onnx", "fp32")
    assert weights is not None
    assert graph is not None
    fresh = replace(weights, sha256=sha256(data))
    bundle = lite_bundle.update(
        fresh, replace(graph, parent_sha256=fresh.sha256), files={weights.file: data}
    )
    with pytest.raises(UsageError, match="do not vary over the 6 images"):
        verify(bundle, FAST)


def test_a_damaged_file_is_refused_and_nothing_changes(v1_bundle: Bundle, tmp_path: Path) -> None:
    for file in ("weights.safetensors", "fp16.onnx", "fp16.rtx-sm89.engine"):
        path = v1_bundle.path / file
        good = path.read_bytes()
        path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        before = folder_state(v1_bundle.path)
        assert_refused(
            run_cli("verify", v1_bundle.path, "--samples", "2", cwd=tmp_path),
            file,
            "not the file the manifest describes",
        )
        assert folder_state(v1_bundle.path) == before
        path.write_bytes(good)


def test_a_candidate_from_elsewhere_is_judged_by_its_logits(
    v1_bundle: Bundle, tmp_path: Path
) -> None:
    """A graph without our metadata, under other names."""
    model = _graph(v1_bundle, "fp32")
    del model.metadata_props[:]
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    good.write_bytes(model.SerializeToString())
    bad.write_bytes(_weight_off_by_one_percent(model).SerializeToString())
    before = folder_state(v1_bundle.path)
    assert verify(v1_bundle, replace(FAST, candidate=good)).passed
    result = verify(v1_bundle, replace(FAST, candidate=bad))
    assert result.failures[0].startswith("broken edge torch -> bad.onnx (onnxruntime)")
    assert folder_state(v1_bundle.path) == before


def test_unusable_candidates_are_refused(
    v1_original: Bundle, timm_original: Bundle, lite_original: Bundle, tmp_path: Path
) -> None:
    model = _graph(v1_original, "fp32")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 225
    wrong_size = tmp_path / "size.onnx"
    wrong_size.write_bytes(model.SerializeToString())
    anonymous = _graph(lite_original, "fp32")
    del anonymous.metadata_props[:]
    other_classes = tmp_path / "classes.onnx"
    other_classes.write_bytes(anonymous.SerializeToString())
    garbage = tmp_path / "garbage.bin"
    garbage.write_bytes(b"\x01\x02" * 500)
    double = tmp_path / "double.onnx"
    typed = _graph(v1_original, "fp32")
    typed.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    double.write_bytes(typed.SerializeToString())
    for path, message in (
        (timm_original.path / "fp32.onnx", "is a rexnet 1.3, expected rexnet 1"),
        (lite_original.path / "fp16.onnx", "is a rexnet_lite 1, expected rexnet 1"),
        (other_classes, r"expected one tensor\(float\) input \[N, 3, 224, 224\] and one output"),
        (wrong_size, "size.onnx"),
        (double, "double.onnx"),
        (garbage, "is not a valid ONNX model .*, and no TensorRT engine either"),
        (tmp_path / "missing.onnx", "cannot be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(UsageError, match=message):
            verify(v1_original, replace(FAST, candidate=path))


def test_an_engine_of_another_version_is_not_run(v1_original: Bundle, tmp_path: Path) -> None:
    """The header's version bytes say 1.2.3.4; TensorRT itself would look at them on a GPU only."""
    plan = bytearray((v1_original.path / "fp16.rtx-sm89.engine").read_bytes())
    plan[24:28] = bytes([1, 2, 3, 4])
    other = tmp_path / "other.engine"
    other.write_bytes(plan)
    result = verify(v1_original, replace(FAST, candidate=other))
    assert result.skipped[0].reason.startswith("the engine was built by TensorRT-RTX 1.2.3.4 and")
    assert not result.passed
    other.write_bytes(plan[: len(plan) // 2])
    with pytest.raises(UsageError, match="truncated TensorRT-RTX engine"):
        verify(v1_original, replace(FAST, candidate=other))
