"""What the backend, `verify` and `bench` make of what a GPU and an engine's runtime may do.

Both are stand-ins (`cuda_standin`, `trt_standin`); nothing of ours is replaced.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rexdeploy
from rexdeploy import machine
from rexdeploy.backends import open_backend, tensorrt_api
from rexdeploy.backends.cuda import Gpu
from rexdeploy.backends.trt import TensorRTBackend
from rexdeploy.backends.trt_load import validity
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, VerificationFailed
from rexdeploy.steps.verify import Verification, verify
from rexdeploy.timing.configurations import BenchOptions
from rexdeploy.timing.harness import Benchmark, time_networks
from rexdeploy.timing.networks import BundleNetwork
from rexdeploy.timing.outputs import inputs
from tests.cuda_standin import CUresult, Driver
from tests.helpers import run_cli
from tests.trt_standin import EngineInvalidityDiagnostics, EngineValidity, Module, plan

ENGINE = "fp16.rtx-sm89.engine"
RTX = BenchOptions(backends=("tensorrt-rtx",), batches=(1, 3), rounds=1)
OUT_OF_MEMORY = CUresult.CUDA_ERROR_OUT_OF_MEMORY


def _install(name: str, monkeypatch: pytest.MonkeyPatch) -> Module:
    driver = Driver()
    bindings = types.ModuleType("cuda.bindings")
    bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    module = Module(name, driver)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tensorrt_api, "_loggers", {})  # the real module's logger is not for it
    return module


@pytest.fixture
def rtx(monkeypatch: pytest.MonkeyPatch) -> Module:
    return _install("tensorrt_rtx", monkeypatch)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Module:
    return _install("tensorrt", monkeypatch)


def _graph(bundle: Bundle, precision: str) -> bytes:
    return (bundle.path / f"{precision}.onnx").read_bytes()


def _with_engine(bundle: Bundle, data: bytes) -> Bundle:
    """The bundle with other bytes for its engine."""
    (engine,) = (item for item in bundle.manifest.artifacts if item.kind == "engine")
    return bundle.update(replace(engine, sha256=sha256(data)), files={engine.file: data})


@pytest.fixture
def bundle(small_v1: Bundle) -> Bundle:
    """64 pixels, 37 classes, and an engine of its own float16 graph for batches 1:2:8."""
    return _with_engine(small_v1, plan(_graph(small_v1, "fp16")))


@pytest.fixture
def spec(small_v1_original: Bundle) -> ModelSpec:
    return small_v1_original.manifest.model


@pytest.fixture
def float32_plan(small_v1_original: Bundle) -> bytes:
    return plan(_graph(small_v1_original, "fp32"))


def _judge(bundle: Bundle, data: bytes, folder: Path) -> Verification:
    """An engine from elsewhere against the bundle's network."""
    path = folder / "other.engine"
    path.write_bytes(data)
    return verify(bundle, samples=6, candidate=path)


def _on_cpu(bundle: Bundle, batch: int) -> np.ndarray:
    spec = bundle.manifest.model
    session = open_backend("onnxruntime", _graph(bundle, "fp32"), spec)
    return session.run(inputs(spec, batch))


def _rows(result: Benchmark) -> set[tuple[str, str, int]]:
    return {(row.backend, row.mode, row.batch) for row in result.latencies}


# The backend


def test_an_engine_gives_its_graphs_logits_and_gives_everything_back(
    rtx: Module, small_v1_original: Bundle, spec: ModelSpec, float32_plan: bytes
) -> None:
    backend = open_backend("tensorrt-rtx", float32_plan, spec)
    for batch in (8, 1, 3):
        got = backend.run(inputs(spec, batch))
        np.testing.assert_allclose(got, _on_cpu(small_v1_original, batch), atol=1e-4)
    first = backend.run(inputs(spec, 1))
    kept = first.copy()
    backend.run(-inputs(spec, 1))
    np.testing.assert_array_equal(first, kept)  # the caller's own
    with pytest.raises(UsageError, match="batches of 1 to 8, got 9; build one with --batch 1:2:9"):
        backend.run(inputs(spec, 9))
    backend.close()
    backend.close()
    assert rtx.driver.leaks() == []
    with pytest.raises(RexdeployError, match="this engine was closed"):
        backend.run(inputs(spec, 1))


def test_images_and_logits_pass_through_page_locked_memory(
    rtx: Module, spec: ModelSpec, float32_plan: bytes
) -> None:
    open_backend("tensorrt-rtx", float32_plan, spec).close()
    assert rtx.driver.calls.count("cuMemHostAlloc") == 2


@pytest.mark.parametrize("call", ["cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemAlloc"])
def test_what_the_driver_refuses_here_is_a_failure_and_leaks_nothing(
    call: str, rtx: Module, spec: ModelSpec, float32_plan: bytes
) -> None:
    rtx.driver.fail[call] = OUT_OF_MEMORY
    with pytest.raises(RexdeployError, match=f"{call} failed: CUDA_ERROR_OUT_OF_MEMORY") as caught:
        open_backend("tensorrt-rtx", float32_plan, spec)
    assert not isinstance(caught.value, BackendUnavailable)
    assert rtx.driver.leaks() == []


def test_no_device_is_missing_here(rtx: Module, spec: ModelSpec, float32_plan: bytes) -> None:
    rtx.driver.devices = 0  # CUDA_VISIBLE_DEVICES=
    with pytest.raises(BackendUnavailable, match="no usable NVIDIA GPU .*CUDA_ERROR_NO_DEVICE"):
        open_backend("tensorrt-rtx", float32_plan, spec)


def test_a_recorded_graph_has_all_of_its_own(
    rtx: Module, small_v1_original: Bundle, spec: ModelSpec, float32_plan: bytes
) -> None:
    """What runs between its launches, at other sizes and on other images, changes nothing of it."""
    backend = TensorRTBackend(float32_plan, spec, "rtx")
    recorded, plain = (backend.resident(inputs(spec, 2), as_graph) for as_graph in (True, False))
    other = backend.resident(-inputs(spec, 3), True)
    assert np.isnan(recorded.outputs()).all()  # nothing but a launch may fill them
    assert np.isnan(plain.outputs()).all()
    expected = _on_cpu(small_v1_original, 2)
    for _ in range(2):
        backend.run(-inputs(spec, 8))
        other.run()
        recorded.run()
        plain.run()
        np.testing.assert_allclose(recorded.outputs(), expected, atol=1e-4)
        np.testing.assert_allclose(plain.outputs(), expected, atol=1e-4)
    backend.close()
    assert rtx.driver.leaks() == []


@pytest.mark.parametrize(
    ("says_capturable", "reason"),
    [
        (False, "cannot be captured as a CUDA graph; build it again"),
        (True, "the engine failed: CUDA error: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
    ],
)
def test_a_capture_that_fails_is_ended_and_the_engine_still_runs(
    says_capturable: bool, reason: str, rtx: Module, small_v1_original: Bundle, spec: ModelSpec
) -> None:
    """An engine that was not built for it allocates while it runs, whatever it says."""
    rtx.says_capturable = says_capturable
    data = plan(_graph(small_v1_original, "fp32"), is_capturable=False)
    backend = TensorRTBackend(data, spec, "rtx")
    with pytest.raises(RexdeployError, match=reason):
        backend.resident(inputs(spec, 1), True)
    got = backend.run(inputs(spec, 2))
    np.testing.assert_allclose(got, _on_cpu(small_v1_original, 2), atol=1e-4)
    backend.close()
    assert rtx.driver.leaks() == []


def test_close_says_nothing_after_an_error_that_sticks(
    rtx: Module, spec: ModelSpec, float32_plan: bytes
) -> None:
    backend = open_backend("tensorrt-rtx", float32_plan, spec)
    rtx.bad_address = True
    with pytest.raises(RexdeployError, match="cuStreamSynchronize.*CUDA_ERROR_ILLEGAL_ADDRESS"):
        backend.run(inputs(spec, 1))
    backend.close()


def test_what_is_recorded_is_freed_where_it_cannot_be_instantiated(rtx: Module) -> None:
    device = Gpu()
    rtx.driver.fail["cuGraphInstantiate"] = OUT_OF_MEMORY
    with pytest.raises(RexdeployError, match="cuGraphInstantiate failed"):
        device.record(lambda: None)
    device.close()
    assert rtx.driver.leaks() == []


def test_an_engine_with_another_output_is_refused_in_words(
    rtx: Module, spec: ModelSpec, float32_plan: bytes
) -> None:
    with pytest.raises(UsageError, match=r"the engine maps .*expected one .* output \[N, 1000\]"):
        open_backend("tensorrt-rtx", float32_plan, replace(spec, num_classes=1000))
    assert rtx.driver.leaks() == []


# What is for another machine, and what is refused here

BITS = EngineInvalidityDiagnostics
ELSEWHERE = {
    BITS.VERSION_MISMATCH: "another version of TensorRT-RTX built it",
    BITS.UNSUPPORTED_CC: "it is not for this GPU's compute capability",
    BITS.OLD_CUDA_DRIVER: "the NVIDIA driver is too old for it",
    BITS.OLD_CUDA_RUNTIME: "the CUDA runtime is too old for it",
    BITS.VERSION_MISMATCH | BITS.UNSUPPORTED_CC: "built it, it is not for this GPU's",
}
REFUSED = {
    BITS.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory for it",
    BITS.MALFORMED_ENGINE: "it is damaged or no engine at all",
    BITS.CUDA_ERROR: "CUDA's driver or runtime is not installed correctly",
    BITS.UNSUPPORTED_CC | BITS.MALFORMED_ENGINE: "compute capability, it is damaged",
    0: "TensorRT gave no reason",
    0x100: "diagnostics 0x100",
}


@pytest.mark.parametrize(("bits", "words"), [*ELSEWHERE.items(), *REFUSED.items()])
def test_every_diagnosis_is_said_in_words_and_tells_missing_from_refused(
    bits: int, words: str, rtx: Module, spec: ModelSpec, float32_plan: bytes
) -> None:
    rtx.validity = (EngineValidity.INVALID, int(bits))
    with pytest.raises(RexdeployError) as caught:
        open_backend("tensorrt-rtx", float32_plan, spec)
    assert words in str(caught.value)
    assert isinstance(caught.value, BackendUnavailable) == (bits in ELSEWHERE)
    assert rtx.driver.leaks() == []


@pytest.mark.parametrize("word", ["valid", "suboptimal"])
def test_what_the_preflight_says_of_an_engine_that_runs(
    word: str, rtx: Module, spec: ModelSpec, float32_plan: bytes
) -> None:
    rtx.validity = (EngineValidity[word.upper()], 0)
    assert validity(float32_plan) == word
    open_backend("tensorrt-rtx", float32_plan, spec).close()


@pytest.mark.parametrize(
    ("said", "is_elsewhere"),
    [
        ("Error Code 1: Serialization (Version tag does not match. Current: 240, got 239)", True),
        ("generated on an incompatible device, expecting compute 8.6 got compute 8.9", True),
        ("The engine plan file is not compatible with this version of TensorRT", True),
        ("Platform specific tag mismatch detected", True),
        ("Cuda failure: out of memory", False),
    ],
)
def test_full_tensorrt_tells_by_its_log(
    said: str, is_elsewhere: bool, full: Module, small_v1_original: Bundle, spec: ModelSpec
) -> None:
    data = plan(_graph(small_v1_original, "fp32"), module="tensorrt")
    backend = open_backend("tensorrt", data, spec)
    expected = _on_cpu(small_v1_original, 2)
    np.testing.assert_allclose(backend.run(inputs(spec, 2)), expected, atol=1e-4)
    backend.close()
    full.refuses_to_load = said
    with pytest.raises(RexdeployError) as caught:
        open_backend("tensorrt", data, spec)
    assert said in str(caught.value)
    assert isinstance(caught.value, BackendUnavailable) == is_elsewhere
    assert full.driver.leaks() == []


def test_predict_passes_over_a_refused_engine_and_says_so(rtx: Module, bundle: Bundle) -> None:
    with rexdeploy.load(bundle) as classifier:
        assert classifier.backend == "tensorrt-rtx"
    assert rtx.strategies == ["LAZY"]
    rtx.refuses_to_load = "out of memory"
    with rexdeploy.load(bundle) as classifier:
        assert classifier.backend == "onnxruntime"
    assert "the engine cannot be loaded: out of memory" in classifier.passed_over[0]


# verify


def test_verify_judges_both_kernels_that_serve(rtx: Module, bundle: Bundle) -> None:
    result = verify(bundle, samples=6, require=("tensorrt-rtx",))
    assert result.passed, result.failures
    edges = {edge.candidate for edge in result.edges}
    assert {f"{ENGINE} (tensorrt-rtx)", f"{ENGINE} (tensorrt-rtx, fallback kernels)"} <= edges
    assert rtx.strategies == ["EAGER", "NONE"]
    assert rtx.driver.leaks() == []


@pytest.mark.parametrize(
    ("kernels", "label"),
    [("specialised", "tensorrt-rtx"), ("fallback", "tensorrt-rtx, fallback kernels")],
)
def test_kernels_that_are_wrong_break_their_own_edge(
    kernels: str, label: str, rtx: Module, bundle: Bundle, float32_plan: bytes, tmp_path: Path
) -> None:
    rtx.wrong_kernels = {kernels}
    result = _judge(bundle, float32_plan, tmp_path)
    assert [(edge.candidate, bool(edge.failures)) for edge in result.edges] == [
        (f"other.engine ({name})", name == label)
        for name in ("tensorrt-rtx", "tensorrt-rtx, fallback kernels")
    ]


def test_an_engine_from_elsewhere_runs_at_its_own_sizes(
    rtx: Module, bundle: Bundle, tmp_path: Path
) -> None:
    data = plan(_graph(bundle, "fp32"), batch=(2, 4, 20))
    result = _judge(bundle, data, tmp_path)
    assert result.passed, result.failures
    assert result.batches == (2, 4, 5, 20)
    assert rtx.driver.leaks() == []


def test_an_error_of_the_gpu_is_a_broken_edge_in_a_whole_table(rtx: Module, bundle: Bundle) -> None:
    rtx.bad_address = True
    result = run_cli("verify", bundle.path, "--samples", "6", cwd=bundle.path)
    assert result.code == 3, result
    assert "fp16.onnx (onnxruntime)" in result.out
    assert f"{ENGINE} (tensorrt-rtx)" in result.out
    assert "Traceback" not in result.err
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in result.err


def test_a_refused_engine_fails_and_one_for_another_gpu_is_skipped(
    rtx: Module, bundle: Bundle, float32_plan: bytes, tmp_path: Path
) -> None:
    """Neither passes; only what is missing here may be passed over, and not where it must run."""
    rtx.refuses_to_load = "cudaError 2"
    refused = _judge(bundle, float32_plan, tmp_path)
    assert refused.skipped == ()
    assert "the engine cannot be loaded: cudaError 2" in refused.failures[0]
    rtx.refuses_to_load = None
    rtx.driver.capability = (12, 0)
    options: dict[str, Any] = {"samples": 6}
    foreign = verify(bundle, **options)
    assert foreign.passed
    assert [item.candidate for item in foreign.skipped] == [f"{ENGINE} (tensorrt-rtx)"]
    assert "compute capability" in foreign.skipped[0].reason
    required = verify(bundle, **options | {"require": ("tensorrt-rtx",)})
    assert required.failures[0].startswith("required backend tensorrt-rtx did not run")


# bench


def test_every_mode_of_an_engine_is_timed(rtx: Module, bundle: Bundle) -> None:
    result = time_networks([BundleNetwork(bundle)], RTX)
    assert _rows(result) == {
        ("tensorrt-rtx", mode, batch)
        for mode in ("host", "device", "cuda graph")
        for batch in (1, 3)
    }
    assert result.failures == ()
    (reason,) = result.skipped
    assert reason.startswith("the roofline on the GPU: PyTorch finds no NVIDIA GPU")
    assert set(rtx.strategies) == {"EAGER"}
    assert rtx.driver.leaks() == []
    assert result.machine["gpu"] == "Stand-in GPU, driver CUDA 13.0"


def test_a_capture_that_fails_is_one_line_and_loses_no_row(rtx: Module, bundle: Bundle) -> None:
    data = plan(_graph(bundle, "fp16"), is_capturable=False)
    options = replace(RTX, backends=("tensorrt-rtx", "onnxruntime"))
    result = time_networks([BundleNetwork(_with_engine(bundle, data))], options)
    assert _rows(result) == {
        *(("tensorrt-rtx", mode, batch) for mode in ("host", "device") for batch in (1, 3)),
        *(("onnxruntime", "host", batch) for batch in (1, 3)),
    }
    told = [reason for reason in result.skipped if "cuda graph" in reason]
    assert [reason.partition(": ")[0] for reason in told] == [
        f"small_v1 (16) on tensorrt-rtx, batch {batch}, cuda graph" for batch in (1, 3)
    ]
    assert rtx.driver.leaks() == []


def test_an_error_in_the_rounds_loses_what_it_breaks_only(
    rtx: Module, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that turns illegal sticks: the GPU's rows are lost, the CPU's are not."""
    launches = 0
    launch = rtx.driver.cuGraphLaunch

    def breaks(executable: int, stream: int) -> tuple[CUresult, ...]:
        nonlocal launches
        launches += 1
        rtx.bad_address = launches > 3
        if rtx.bad_address:
            rtx.driver.sticky = CUresult.CUDA_ERROR_ILLEGAL_ADDRESS
        return launch(executable, stream)

    breaks.__name__ = "cuGraphLaunch"
    monkeypatch.setattr(rtx.driver, "cuGraphLaunch", breaks)
    options = replace(RTX, backends=("tensorrt-rtx", "onnxruntime"), batches=(1,))
    result = time_networks([BundleNetwork(bundle)], options)
    assert _rows(result) == {("onnxruntime", "host", 1)}
    lost = [reason for reason in result.skipped if "CUDA_ERROR_ILLEGAL_ADDRESS" in reason]
    assert len(lost) == 3


def test_a_row_of_wrong_outputs_is_a_failure_and_no_row(
    rtx: Module, bundle: Bundle, tmp_path: Path
) -> None:
    rtx.wrong_kernels = {"specialised"}
    result = run_cli(
        "bench", bundle.path, "--rounds", "1", "--json", "b.json",
        "--backend", "tensorrt-rtx", "--backend", "onnxruntime", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 3, result
    assert "its outputs are off by" in result.err
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["backend"] for row in written["latencies"]] == ["onnxruntime"]
    assert len(written["failures"]) == 3
    with pytest.raises(VerificationFailed, match="its outputs are off by"):
        time_networks([BundleNetwork(bundle)], RTX)


def test_a_graph_that_does_nothing_is_no_row(rtx: Module, bundle: Bundle) -> None:
    """The outputs of the run before it lay in the very memory that it should have written."""
    rtx.driver.launches_do_nothing = True
    result = time_networks([BundleNetwork(bundle)], replace(RTX, batches=(1,)))
    assert {mode for _, mode, _ in _rows(result)} == {"host", "device"}
    assert result.failures == (
        "small_v1 (16) on tensorrt-rtx, batch 1, cuda graph: its outputs are off by nan of how "
        "the network's vary (limit 0.15)",
    )


def test_an_engine_that_is_refused_loses_no_other_row(rtx: Module, bundle: Bundle) -> None:
    rtx.driver.fail["cuMemHostAlloc"] = OUT_OF_MEMORY
    options = replace(RTX, backends=("tensorrt-rtx", "onnxruntime"), batches=(1,))
    result = time_networks([BundleNetwork(bundle)], options)
    assert _rows(result) == {("onnxruntime", "host", 1)}
    assert "cuMemHostAlloc failed: CUDA_ERROR_OUT_OF_MEMORY" in result.skipped[0]


def test_clocks_are_of_the_gpu_that_runs_by_its_uuid(
    rtx: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine.detect()
    assert found is not None
    assert (found.name, found.target) == ("Stand-in GPU", "sm89")
    assert found.uuid == "GPU-00000000-0000-0000-0000-000000000007"
    assert f"--id={found.uuid}" in (machine.clocks(found) or "")


def test_inspect_says_what_the_runtime_says(rtx: Module, bundle: Bundle) -> None:
    for driver_says, expected in (((8, 9), "TensorRT-RTX calls it valid"), ((9, 0), "no: ")):
        rtx.driver.capability = driver_says
        result = run_cli("inspect", bundle.path / ENGINE, cwd=bundle.path)
        assert result.code == 0, result
        assert expected in result.out
