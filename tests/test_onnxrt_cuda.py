"""ONNX Runtime and PyTorch on a GPU, without one: nothing may run on the CPU in its place.

A session of the CPU's stands in for one of CUDA's, and says that it is one; ONNX Runtime's own
Python, which falls back, is the real one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import ModelProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as bindings

from rexdeploy import machine
from rexdeploy.backends import open_backend
from rexdeploy.backends.onnxrt import load_session
from rexdeploy.backends.pytorch import use_cuda
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.read import parse
from rexdeploy.steps.verify import verify
from rexdeploy.timing.configurations import BenchOptions
from rexdeploy.timing.harness import time_networks
from rexdeploy.timing.model_file import ModelFile
from rexdeploy.timing.networks import BundleNetwork
from rexdeploy.timing.outputs import inputs
from tests.helpers import small_graph

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
BENCH = BenchOptions(("onnxruntime-cuda", "onnxruntime"), batches=(1, 2), rounds=1)
FOUND = machine.Gpu("Stand-in", "8.9", "CUDA 13.0")


@dataclass
class Behaviour:
    """What the stand-in does."""

    on_cpu: set[str] | None = None  # operators that it leaves there; None: it has no such table
    is_there: bool = True  # its provider, once a session is made
    fails_to_load: Exception | None = None
    fails_to_run: Exception | None = None  # after the first time
    ignores_keywords: bool = False  # of making a session, which are documented nowhere
    captured_run_fails: bool = False
    preloaded: str | None = None  # what NVIDIA_TF32_OVERRIDE was when libraries were loaded


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Behaviour:
    behaviour = Behaviour(on_cpu=set())

    class Session(ort.InferenceSession):  # type: ignore[misc]
        def __init__(
            self, model: bytes, options: Any, providers: Sequence[Any], **more: Any
        ) -> None:
            self.is_cuda = providers[0][0] == CUDA
            self.has_graph = self.is_cuda and providers[0][1]["enable_cuda_graph"] == "1"
            if self.is_cuda:
                assert providers[0][1]["use_tf32"] == "0"
                if behaviour.fails_to_load:
                    raise behaviour.fails_to_load
            kept = {} if behaviour.ignores_keywords else more
            super().__init__(model, options, providers=[CPU], **kept)
            if self.is_cuda and behaviour.fails_to_run:
                self._sess: Any = _Failing(self._sess, behaviour.fails_to_run)

        def get_providers(self) -> list[str]:
            return [CUDA, CPU] if self.is_cuda and behaviour.is_there else [CPU]

        def get_provider_graph_assignment_info(self) -> list[Any]:
            return [
                SimpleNamespace(
                    ep_name=CPU if node.op_type in (behaviour.on_cpu or set()) else CUDA,
                    get_nodes=lambda node=node: [node],
                )
                for part in super().get_provider_graph_assignment_info()
                for node in part.get_nodes()
            ]

        def run_with_iobinding(self, binding: Any) -> None:
            if self.has_graph and behaviour.captured_run_fails:
                raise bindings.Fail("CUDA failure 900: operation not permitted")
            super().run_with_iobinding(binding)

    def preload() -> None:
        behaviour.preloaded = os.environ.get("NVIDIA_TF32_OVERRIDE")
        print("Failed to load libcudnn.so.9")

    class OrtValue:
        @staticmethod
        def ortvalue_from_numpy(array: np.ndarray, device: str, number: int) -> Any:
            assert (device, number) == ("cuda", 0)
            return real_value.ortvalue_from_numpy(array)

    real_value = ort.OrtValue
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort, "OrtValue", OrtValue)
    monkeypatch.setattr(ort, "preload_dlls", preload)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    return behaviour


class _Failing:
    """A session of ONNX Runtime's C++ whose runs fail."""

    def __init__(self, session: Any, error: Exception) -> None:
        self._session, self._error = session, error

    def run(self, *arguments: Any) -> None:  # noqa: ARG002
        raise self._error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _graph(bundle: Bundle) -> bytes:
    return (bundle.path / "fp32.onnx").read_bytes()


@pytest.mark.parametrize("ignores_keywords", [False, True])
def test_a_run_that_fails_on_the_gpu_is_not_made_again_on_the_cpu(
    ignores_keywords: bool,
    cuda: Behaviour,
    small_v1_original: Bundle,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cuda.ignores_keywords = ignores_keywords
    cuda.fails_to_run = bindings.EPFail("CUDA error 700")
    spec = small_v1_original.manifest.model
    backend = open_backend("onnxruntime-cuda", _graph(small_v1_original), spec)
    for _ in range(2):  # onnxruntime itself would answer from the second time on
        with pytest.raises(RexdeployError, match="onnxruntime-cuda failed .*CUDA error 700"):
            backend.run(inputs(spec, 1))
    assert capsys.readouterr().out == ""


def test_a_session_that_cannot_be_made_on_the_gpu_is_not_made_on_the_cpu(
    cuda: Behaviour,
    small_v1_original: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda.fails_to_load = RuntimeError("CUDA failure 2: out of memory")
    monkeypatch.setattr(machine, "detect", lambda: None)
    with pytest.raises(BackendUnavailable, match="no usable NVIDIA GPU .*out of memory"):
        load_session(_graph(small_v1_original), cuda=True)
    monkeypatch.setattr(machine, "detect", lambda: FOUND)
    with pytest.raises(RexdeployError, match="cannot run the model on this GPU") as caught:
        load_session(_graph(small_v1_original), cuda=True)
    assert type(caught.value) is RexdeployError
    cuda.fails_to_load, cuda.is_there = None, False
    with pytest.raises(BackendUnavailable, match="found no usable NVIDIA GPU, driver or cuDNN"):
        load_session(_graph(small_v1_original), cuda=True)
    cuda.is_there = True
    with pytest.raises(UsageError, match="not an ONNX model that onnxruntime can load"):
        load_session(b"no model", cuda=True)
    assert capsys.readouterr().out == ""


def test_libraries_are_looked_for_without_a_word_and_without_tf32(
    cuda: Behaviour,
    small_v1_original: Bundle,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    load_session(_graph(small_v1_original), cuda=True)
    assert cuda.preloaded == "0"
    assert capsys.readouterr().out == ""


def _reshaping(arithmetic: bool) -> ModelProto:
    """A product whose rows are flattened by a shape that the graph computes."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Shape", ["y"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Mul", ["rows", "one"], ["same"]),
        helper.make_node("Concat", ["same", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["y", "target"], ["z"]),
    ]
    if arithmetic:
        nodes.append(helper.make_node("Softmax", ["z"], ["out"]))
    weights = {"w": np.ones((3, 3), np.float32), "zero": [0], "one": [1], "rest": [-1]}
    return small_graph(nodes, ["N", 2, 3], weights, "out" if arithmetic else "z")


def test_shapes_may_be_computed_on_the_cpu_and_nothing_else(
    cuda: Behaviour, small_v1_original: Bundle
) -> None:
    cuda.on_cpu = {"Shape", "Gather", "Mul", "Concat"}
    load_session(_reshaping(False).SerializeToString(), cuda=True)
    cuda.on_cpu |= {"Softmax"}
    with pytest.raises(RexdeployError, match="put a part of the model on the CPU: 1 Softmax$"):
        load_session(_reshaping(True).SerializeToString(), cuda=True)
    cuda.on_cpu = {"Mul"}  # without a shape to compute
    with pytest.raises(RexdeployError, match=r"on the CPU: \d+ Mul"):
        load_session(_graph(small_v1_original), cuda=True)
    cuda.on_cpu = {"Conv"}
    result = verify(small_v1_original, samples=6, backend=("onnxruntime-cuda", "onnxruntime"))
    (broken,) = (item for item in result.broken if item.candidate.startswith("fp32.onnx"))
    assert broken.candidate == "fp32.onnx (onnxruntime-cuda)"
    assert "onnxruntime put a part of the model on the CPU" in broken.reason
    assert any(edge.candidate == "fp32.onnx (onnxruntime)" for edge in result.edges)
    assert not result.passed


def test_an_onnxruntime_that_cannot_tell_is_used_as_it_is(
    cuda: Behaviour, small_v1_original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 1.24 a session did not say where its nodes are."""
    name = "get_provider_graph_assignment_info"
    for owner in ort.InferenceSession.__mro__:
        if name in vars(owner):
            monkeypatch.delattr(owner, name)
    session = load_session(_graph(small_v1_original), cuda=True)
    assert not hasattr(session, name)
    assert "CUDAExecutionProvider" in session.get_providers()


def test_every_mode_is_timed_and_compared(cuda: Behaviour, small_v1_original: Bundle) -> None:
    result = time_networks([BundleNetwork(small_v1_original)], BENCH)
    rows = {(row.backend, row.mode, row.batch) for row in result.latencies}
    assert rows == {
        *(
            ("onnxruntime-cuda", mode, batch)
            for mode in ("host", "device", "cuda graph")
            for batch in (1, 2)
        ),
        ("onnxruntime", "host", 1),
        ("onnxruntime", "host", 2),
    }
    assert result.failures == ()


def test_an_exception_at_the_first_captured_run_loses_no_row(
    cuda: Behaviour, small_v1_original: Bundle
) -> None:
    cuda.captured_run_fails = True
    result = time_networks([BundleNetwork(small_v1_original)], replace(BENCH, batches=(1,)))
    assert {(row.backend, row.mode) for row in result.latencies} == {
        ("onnxruntime-cuda", "host"),
        ("onnxruntime-cuda", "device"),
        ("onnxruntime", "host"),
    }
    told = [reason for reason in result.skipped if "cuda graph" in reason]
    assert len(told) == 1
    assert "operation not permitted" in told[0]


class _BFloat16(BundleNetwork):
    """A network whose graph on the GPU is in bfloat16."""

    def file(self, backend: str, fp16: bool) -> ModelFile | None:
        file = super().file(backend, fp16)
        assert file is not None
        if backend != "onnxruntime-cuda":
            return file
        narrow = to_precision(parse(file.data, file.name), "bf16").SerializeToString()
        return replace(file, data=narrow, precision="bf16")


def test_types_without_a_kernel_are_skipped_and_lose_no_row(
    cuda: Behaviour, small_v1_original: Bundle
) -> None:
    """A CPU has no bfloat16 convolution either: the error is ONNX Runtime's own."""
    result = time_networks([_BFloat16(small_v1_original)], BENCH)
    assert [row.backend for row in result.latencies] == ["onnxruntime", "onnxruntime"]
    assert "onnxruntime has no CUDA kernel for it" in result.skipped[0]


def test_pytorch_that_cannot_use_its_gpu_loses_no_row(
    small_v1_original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that there is one, and fails when it is used: PyTorch's own error."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = BenchOptions(("pytorch-cuda", "pytorch-cuda-compile", "onnxruntime"), rounds=1)
    result = time_networks([BundleNetwork(small_v1_original)], options)
    assert [row.backend for row in result.latencies] == ["onnxruntime"]
    assert [reason.partition(" failed")[0] for reason in result.skipped] == [
        f"small_v1 (plain) on {name}: {name}" for name in ("pytorch-cuda", "pytorch-cuda-compile")
    ]


def test_float32_on_a_gpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [item.allow_tf32 for item in flags], torch.backends.cudnn.benchmark
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        flags[1].allow_tf32 = True
        use_cuda(torch)
        assert [item.allow_tf32 for item in flags] == [False, False]
        assert torch.backends.cudnn.benchmark
    finally:
        flags[0].allow_tf32, flags[1].allow_tf32 = before[0]
        torch.backends.cudnn.benchmark = before[1]
