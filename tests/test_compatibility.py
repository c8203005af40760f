"""What an earlier rexdeploy has written goes on working.

data/format1.txz was written by the rexdeploy of 25 November 2026 (commit b892639), whose
modules lay in one folder: `export --weights W --image-size 32 --labels L --name old` of a
V1 0.1 of two classes, `verify`, and `triton old --backend python`.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import safetensors.torch

from rexdeploy import load
from rexdeploy.bundle.manifest import Artifact
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.serving.deploy import deploy
from rexdeploy.serving.repository import deployed
from rexdeploy.steps.export import export
from tests.helpers import ROOT, run_cli


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    with tarfile.open(ROOT / "tests" / "data" / "format1.txz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "artifacts"


def test_a_bundle_of_format_1_is_read_verified_and_run(artifacts: Path, photos: Path) -> None:
    bundle = Bundle.open(artifacts / "old")
    assert bundle.manifest.model.title == "rexnet 0.1"
    files = {"weights.safetensors", "fp32.onnx", "labels.txt", "verify.json"}
    assert {artifact.file for artifact in bundle.manifest.artifacts} == files
    with load(bundle, "onnxruntime") as fast, load(bundle, "pytorch") as reference:
        (one,), (other,) = (it.classify([photos / "flower.png"]) for it in (fast, reference))
    assert {prediction.label for prediction in one} == {"cat", "dog"}
    for first, second in zip(one, other, strict=True):
        assert first.label == second.label
        assert first.probability == pytest.approx(second.probability, abs=1e-3)
    assert run_cli("verify", "old", cwd=artifacts.parent).code == 0


def test_an_engine_is_built_from_a_graph_of_format_1(artifacts: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    result = run_cli("build-trt", "old", "--fp16", "--batch", "1:1:1", cwd=artifacts.parent)
    assert result.code == 0, result
    made = Bundle.open(artifacts / "old").manifest
    (engine,) = (artifact for artifact in made.artifacts if artifact.kind == "engine")
    chain: list[Artifact] = [engine]
    by_hash = {artifact.sha256: artifact for artifact in made.artifacts}
    while chain[-1].parent_sha256:
        chain.append(by_hash[chain[-1].parent_sha256])
    assert [artifact.file for artifact in chain[1:]] == [
        "fp16.onnx",
        "fp32.tensorrt.onnx",
        "fp32.onnx",
        "weights.safetensors",
    ]


def test_a_repository_takes_a_next_version_and_its_first_one_still_runs(artifacts: Path) -> None:
    (found,) = deployed(artifacts / "triton")
    assert (found.name, found.version, found.signature.num_classes) == ("old", 1, 2)
    before = sha256((artifacts / "triton" / "old" / "config.pbtxt").read_bytes())
    weights = safetensors.torch.load_file(artifacts / "old" / "weights.safetensors")
    next(iter(weights.values())).mul_(2)
    safetensors.torch.save_file(weights, artifacts / "next.safetensors")
    bundle = export(
        weights=artifacts / "next.safetensors",
        image_size=32,
        name="old",
        labels=artifacts / "old" / "labels.txt",
        out=artifacts,
    ).bundle
    added = deploy(bundle, artifacts / "triton", "python", "old")
    assert added.version == 2
    (found,) = deployed(artifacts / "triton")
    assert found.version == 2
    assert sha256((artifacts / "triton" / "old" / "config.pbtxt").read_bytes()) == before
    for model in ("old", "old_preprocess"):
        first = artifacts / "triton" / model / "1" / "model.py"
        code = f"import runpy; assert runpy.run_path({str(first)!r})['TritonPythonModel']"
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_newer_format_is_one_line_that_names_both(artifacts: Path) -> None:
    manifest = artifacts / "old" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 3, "task": "track"'))
    result = run_cli("verify", "old", cwd=artifacts.parent)
    assert result.code == 2
    (line,) = result.error_lines
    assert "got manifest format 3, this rexdeploy reads 1 and 2" in line
