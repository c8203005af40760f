"""Inspecting files: what is told of graphs and engines, and files that are neither."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from rexdeploy import machine
from rexdeploy.bundle.manifest import to_json
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.steps.inspect import inspect
from tests.helpers import assert_refused, folder_state, run_cli

ENGINE = "fp16.rtx-sm89.engine"

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


def test_an_engine_in_its_bundle_shows_the_proof_of_its_build(small_v1_original: Bundle) -> None:
    before = folder_state(small_v1_original.path)
    result = inspect(small_v1_original.path / ENGINE)
    assert result.kind == "TensorRT-RTX engine"
    assert result.header is not None
    assert result.header.targets == ("sm89",)
    assert result.place is not None
    assert result.place.chain == (
        "weights.safetensors", "fp32.onnx", "fp32.tensorrt.onnx", "fp16.onnx", ENGINE,
    )  # fmt: skip
    assert result.place.artifact.sha256 == result.sha256
    assert result.proof is not None
    assert result.proof.layers["Float"] == 1  # that reads the float32 image
    assert "what its build reported" in result.proof_of
    if machine.detect() is None:
        assert [(r.ready, r.reason) for r in result.runners] == [
            (False, "no NVIDIA GPU on this machine")
        ]
    assert folder_state(small_v1_original.path) == before


def test_an_engine_outside_a_bundle_has_a_header_and_no_proof(
    small_v1_original: Bundle, tmp_path: Path
) -> None:
    shutil.copy(small_v1_original.path / ENGINE, tmp_path / "alone.plan")
    result = inspect(tmp_path / "alone.plan")
    assert result.header is not None
    assert (result.place, result.proof) == (None, None)
    assert result.proof_of.startswith("skipped: ")
    shown = run_cli("inspect", "alone.plan", cwd=tmp_path)
    assert shown.code == 0
    assert "  precision: skipped: " in shown.out
    assert "Half" not in shown.out


def test_an_engine_that_a_bundle_does_not_list_gets_no_proof_from_it(small_v1: Bundle) -> None:
    shutil.copy(small_v1.path / ENGINE, small_v1.path / "other.engine")
    assert inspect(small_v1.path / "other.engine").proof_of.startswith("skipped: ")


def test_an_engine_that_changed_since_its_proof_is_refused(
    small_v1: Bundle, tmp_path: Path
) -> None:
    path = small_v1.path / ENGINE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_refused(run_cli("inspect", path, cwd=tmp_path), "not the file the manifest describes")


def test_an_engine_of_a_bundle_without_proofs_is_skipped(small_v1: Bundle) -> None:
    artifacts = tuple(replace(item, proof=None) for item in small_v1.manifest.artifacts)
    path = small_v1.path / "manifest.json"
    path.write_bytes(to_json(replace(small_v1.manifest, artifacts=artifacts)))
    result = inspect(small_v1.path / ENGINE)
    assert result.proof is None
    assert result.proof_of.startswith("skipped: the manifest holds no proof")


def test_a_graph_is_proven_by_its_types(small_v1_original: Bundle, tmp_path: Path) -> None:
    result = inspect(small_v1_original.path / "fp16.onnx")
    assert result.graph is not None
    assert result.graph.inputs == ("input float [batch, 3, 64, 64]",)
    assert result.graph.metadata["rexdeploy.family"] == "rexnet"
    assert result.proof is not None
    assert result.proof.macs.keys() == {"Half"}
    assert [runner.ready for runner in result.runners] == [True]
    shown = run_cli("inspect", small_v1_original.path / "fp32.onnx", "--json", "-", cwd=tmp_path)
    assert json.loads(shown.out)["proof"]["macs"].keys() == {"Float"}


def test_a_graph_that_is_not_what_its_manifest_says_exits_3(
    small_v1: Bundle, tmp_path: Path
) -> None:
    """The float32 graph under the float16 one's name, hash and all."""
    full, half = (small_v1.manifest.find("onnx", name) for name in ("fp32", "fp16"))
    assert full is not None
    assert half is not None
    model = onnx.load_from_string(small_v1.read(full))
    model.producer_name = "other"  # a file of its own, so that hashes tell the two apart
    data = model.SerializeToString()
    small_v1.update(replace(half, sha256=sha256(data)), files={half.file: data})
    shown = run_cli("inspect", small_v1.path / "fp16.onnx", cwd=tmp_path)
    assert shown.code == 3
    assert "  not as asked: node_" in shown.out
    assert "and 68 more" in shown.out
    assert "not in the precision asked for: 0 of 78 layers in Half" in shown.error_lines[0]


def test_a_graph_with_weights_beside_it_is_read(small_v1_original: Bundle, tmp_path: Path) -> None:
    model = onnx.load(small_v1_original.path / "fp32.onnx")
    onnx.save(
        model,
        tmp_path / "split.onnx",
        save_as_external_data=True,
        location="split.data",
        size_threshold=0,
    )
    result = inspect(tmp_path / "split.onnx")
    assert result.proof is not None
    assert result.proof.macs.keys() == {"Float"}
    assert [runner.ready for runner in result.runners] == [True]


def test_a_graph_that_no_backend_takes_says_why(small_v1_original: Bundle, tmp_path: Path) -> None:
    model = onnx.load(small_v1_original.path / "fp32.onnx")
    model.graph.node[0].domain = "somebody"
    model.opset_import.append(onnx.helper.make_opsetid("somebody", 1))
    (tmp_path / "custom.onnx").write_bytes(model.SerializeToString())
    result = inspect(tmp_path / "custom.onnx")
    assert [runner.ready for runner in result.runners] == [False]
    assert "somebody" in result.runners[0].reason


def test_text_of_a_graph_does_not_steer_the_terminal(
    small_v1_original: Bundle, tmp_path: Path
) -> None:
    model = onnx.load(small_v1_original.path / "fp32.onnx")
    onnx.helper.set_model_props(model, {"note": "\x1b[2J\nbundle: forged" + "x" * 9999})
    (tmp_path / "loud.onnx").write_bytes(model.SerializeToString())
    shown = run_cli("inspect", "loud.onnx", cwd=tmp_path).out
    assert "\x1b" not in shown
    assert "\n  note = \\x1b[2J bundle: forged" in shown
    assert len(shown) < 2000


def test_an_engine_of_another_version_is_shown_and_exits_2(
    small_v1_original: Bundle, tmp_path: Path
) -> None:
    plan = bytearray((small_v1_original.path / ENGINE).read_bytes())
    plan[24:28] = bytes([1, 2, 3, 4])
    (tmp_path / "other.engine").write_bytes(plan)
    shown = run_cli("inspect", "other.engine", cwd=tmp_path)
    assert shown.code == 2
    assert "  version 1.2.3.4, for sm89" in shown.out
    assert len(shown.error_lines) == 1
    assert "TensorRT-RTX 1.2.3.4 built it, and this machine has" in shown.error_lines[0]


def test_files_that_are_neither_are_refused_in_one_line(
    small_v1_original: Bundle, tmp_path: Path
) -> None:
    plan = (small_v1_original.path / ENGINE).read_bytes()
    graph = (small_v1_original.path / "fp32.onnx").read_bytes()
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    files = {
        "empty.onnx": b"",
        "cut.engine": plan[:1000],
        "stub.engine": b"vtrt",
        "long.engine": plan + b"\0",
        "cut.plan": b"ftrt" + bytes(10),
        "cut.onnx": graph[: len(graph) // 2],
        "noise.engine": np.random.default_rng(0).bytes(5000),
        "zeros.onnx": bytes(5000),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in (*files, "picture.png", "missing.onnx"):
        assert_refused(run_cli("inspect", name, cwd=tmp_path), name)
    assert_refused(
        run_cli("inspect", small_v1_original.path, cwd=tmp_path), "is a folder, expected a"
    )
    manifest = small_v1_original.path / "manifest.json"
    assert_refused(run_cli("inspect", manifest, cwd=tmp_path), "manifest.json is not a valid ONNX")
