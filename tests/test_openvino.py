"""OpenVINO: float32 logits on the CPU, and files that it must refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rexdeploy.backends import open_backend
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import sets
from rexdeploy.parity.compare import Signal
from tests import planted
from tests.helpers import entry, graph, run_cli, saved

pytest.importorskip("openvino", reason="OpenVINO is not installed")


def test_its_logits_are_onnxruntimes_in_float32(small_v1_original: Bundle) -> None:
    """Where a processor has bfloat16, OpenVINO's own default would be off by a whole signal."""
    spec = small_v1_original.manifest.model
    data = small_v1_original.read(entry(small_v1_original, "fp32.onnx"))
    pool = sets.synthetic(5, spec.preprocess, seed=3)
    logits = []
    for name in ("onnxruntime", "openvino"):
        backend = open_backend(name, data, spec, threads=1)
        logits.append(backend.run(pool))
        backend.close()
    error = np.abs(logits[0] - logits[1]).max() / Signal.of(logits[0]).size
    assert error < 1e-3
    with pytest.raises(RexdeployError, match="this model was closed"):
        backend.run(pool)


def test_verify_runs_it_where_it_is_asked_for(small_v1: Bundle) -> None:
    folder = small_v1.path.parents[1]
    result = run_cli("verify", "small_v1", "--backend", "openvino", "--samples", "4", cwd=folder)
    assert result.code == 0, result.err
    assert "torch -> fp32.onnx (openvino)" in result.out
    assert "(onnxruntime)" not in result.out
    reason = "OpenVINO computes in float32 here, which says nothing of a 16-bit graph"
    assert f"skipped fp16.onnx (openvino): {reason}" in result.out


def test_a_candidate_for_a_required_openvino_passes_if_sound_and_fails_if_not(
    small_v1: Bundle, tmp_path: Path
) -> None:
    """Issue: the bundle's own file for it was counted as one that did not run, and failed it."""
    model = graph(small_v1)
    sound = saved(model, tmp_path / "sound.onnx")
    wrong = saved(planted.swapped_channels(model), tmp_path / "wrong.onnx")
    command = ("verify", "small_v1", "--require", "openvino", "--samples", "4", "--candidate")
    result = run_cli(*command, sound, cwd=tmp_path)
    assert result.code == 0, result.err
    assert "torch -> sound.onnx (openvino)" in result.out
    failed = run_cli(*command, wrong, cwd=tmp_path)
    assert failed.code == 3
    assert "broken edge torch -> wrong.onnx (openvino): " in failed.err


def test_a_16_bit_candidate_does_not_satisfy_a_required_openvino(
    small_v1: Bundle, tmp_path: Path
) -> None:
    """OpenVINO says nothing of float16 here, and must not be said to have run."""
    saved(graph(small_v1, "fp16.onnx"), tmp_path / "half.onnx")
    arguments = ("--candidate", "half.onnx", "--require", "openvino", "--samples", "4")
    result = run_cli("verify", "small_v1", *arguments, cwd=tmp_path)
    assert result.code == 3
    assert "required backend openvino did not run" in result.err


def test_hostile_files_and_other_shapes_are_refused(small_v1_original: Bundle) -> None:
    spec = small_v1_original.manifest.model
    data = small_v1_original.read(entry(small_v1_original, "fp32.onnx"))
    for hostile in (b"", b"garbage" * 100, data[:1000], data[:-1000]):
        with pytest.raises(UsageError, match="not an ONNX model that openvino can load"):
            open_backend("openvino", hostile, spec)
    with pytest.raises(UsageError, match=r"expected one input \[N, 3, 64, 64\] and one output"):
        open_backend("openvino", data, replace(spec, num_classes=9))
