"""A manifest whose preprocessing was edited: the graph's own metadata tells, wherever it is run."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.bundle.metadata import read_metadata
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.inference.classifier import load
from rexdeploy.serving import deploy
from tests.helpers import assert_refused, run_cli, run_python


def _edit(bundle: Bundle, change: Callable[[dict[str, list[float]]], None]) -> None:
    file = bundle.path / "manifest.json"
    document = json.loads(file.read_text())
    change(document["model"]["preprocess"])
    file.write_text(json.dumps(document))


def _one_bit(preprocess: dict[str, list[float]]) -> None:
    preprocess["std"][0] = 0.228  # 0x38 for 0x39: '8' for '9'


@pytest.mark.parametrize("backend", ["onnxruntime", "pytorch", "openvino"])
def test_predict_and_load_refuse_it(
    backend: str, small_v1: Bundle, photos: Path, tmp_path: Path
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="OpenVINO is not installed")
    command = ("predict", photos / "china.png", "--backend", backend, "--quiet")
    assert run_cli(*command, cwd=tmp_path).code == 0
    _edit(small_v1, _one_bit)
    message = "the manifest's preprocessing is not that of fp32.onnx; make it again: rexdeploy"
    assert_refused(run_cli(*command, cwd=tmp_path), message)
    with pytest.raises(UsageError, match=message):
        load(small_v1.path, backend)


@pytest.mark.parametrize("command", [("verify", "--samples", "2"), ("triton",)])
def test_so_do_the_other_commands(
    command: tuple[str, ...], small_v1: Bundle, tmp_path: Path
) -> None:
    _edit(small_v1, _one_bit)
    result = run_cli(*command, "--quiet", cwd=tmp_path)
    assert_refused(result, "the manifest's preprocessing is not that of fp32.onnx")
    assert not (tmp_path / "artifacts" / "triton").exists()


def test_what_cannot_be_compared_is_said(small_v1: Bundle) -> None:
    """The graph does not run here, and its file is gone."""
    with load(small_v1, "pytorch") as classifier:
        assert classifier.passed_over == ()
    (small_v1.path / "fp32.onnx").unlink()
    with load(small_v1, "pytorch") as classifier:
        (line,) = classifier.passed_over
    assert line.startswith("comparing the preprocessing with fp32.onnx's: ")
    assert "fp32.onnx cannot be read (No such file or directory)" in line


def test_a_version_in_a_model_repository_is_held_to_its_graph(
    small_v1: Bundle, tmp_path: Path
) -> None:
    deploy.deploy(small_v1, tmp_path / "models", "python")
    version = Bundle.open(tmp_path / "models" / small_v1.path.name / "1")
    load(version).close()
    _edit(version, _one_bit)
    with pytest.raises(UsageError, match="the manifest's preprocessing is not that of fp32.onnx"):
        load(version.path)


def test_somebodys_own_graph_says_nothing_and_may_have_any(
    small_v1: Bundle, tmp_path: Path
) -> None:
    graph = onnx.load(small_v1.path / "fp32.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "own.onnx")
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    command = ("build-trt", "--onnx", "own.onnx", "--flavor", "rtx", "--target", "sm89")
    assert run_cli(*command, cwd=tmp_path).code == 0
    own = Bundle.open(tmp_path / "artifacts" / "own")
    _edit(own, _one_bit)
    load(own.path, "onnxruntime").close()


def test_metadata_is_read_as_onnx_reads_it(small_v1_original: Bundle, tmp_path: Path) -> None:
    for file in ("fp32.onnx", "fp16.onnx"):
        data = (small_v1_original.path / file).read_bytes()
        expected = {e.key: e.value for e in onnx.load_from_string(data).metadata_props}
        assert read_metadata(data, file) == expected
    model = onnx.ModelProto(ir_version=10, producer_name="x" * 300)
    long = {"a": "1" * 20_000, "": "", "ü": "\n", "rexdeploy.preprocess": "{}"}
    onnx.helper.set_model_props(model, long)
    assert read_metadata(model.SerializeToString(), "m") == long
    assert read_metadata(b"", "m") == {}


@given(st.binary(max_size=40))
def test_any_bytes_are_metadata_or_refused(data: bytes) -> None:
    found: dict[str, str] = {}
    with contextlib.suppress(UsageError):
        found = read_metadata(data, "m")
    assert all(isinstance(text, str) for pair in found.items() for text in pair)


def test_many_fields_and_long_numbers_end_soon() -> None:
    for data in (b"\x08\x01" * 5_000_000, b"\x80" * 1_000_000, b"\x72\xff\xff\xff\xff\x0f"):
        with pytest.raises(UsageError, match="not a readable ONNX model"):
            read_metadata(data, "m")


def test_comparing_needs_neither_onnx_nor_torch(small_v1: Bundle) -> None:
    _edit(small_v1, _one_bit)
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'google.protobuf'):\n"
        "    sys.modules[name] = None\n"
        "import rexdeploy\n"
        "rexdeploy.load(sys.argv[1])\n"
    )
    answer = run_python(code, small_v1.path)
    assert "UsageError" in answer.stderr.splitlines()[-1]
    assert "preprocessing is not that of fp32.onnx" in answer.stderr


@pytest.mark.parametrize(
    ("name", "parent", "message"),
    [
        ("fp16.onnx", "fp16.onnx", "fp16.onnx is said to be made from itself"),
        ("fp32.tensorrt.onnx", "fp16.onnx", "was made from is made from it in a circle"),
    ],
)
def test_a_circle_of_parents_is_refused(
    name: str, parent: str, message: str, small_v1_original: Bundle, tmp_path: Path
) -> None:
    path = shutil.copytree(small_v1_original.path, tmp_path / "b")
    document = json.loads((path / "manifest.json").read_text())
    items = {item["file"]: item for item in document["artifacts"]}
    items[name]["parent_sha256"] = items[parent]["sha256"]
    (path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match=message):
        Bundle.open(path)
