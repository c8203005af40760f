"""Loads a serialised engine, and tells what another machine could run from what is refused here."""

from __future__ import annotations

from typing import Any

from rexdeploy.backends.tensorrt_api import Flavor, Log, captured_log, load, read_header, start
from rexdeploy.errors import BackendUnavailable, RexdeployError

_REBUILD = "build one for it: rexdeploy build-trt"
# What full TensorRT, which has no preflight, logs of an engine for another version or GPU:
# "Version tag does not match", "is not compatible with this version of TensorRT, expecting ...",
# "is generated on an incompatible device, expecting compute 8.6 got compute 8.9", "Platform
# specific tag mismatch" (releases 8.0 to 10.x).
_OTHER_MACHINE = (
    "version tag does not match",
    "not compatible with this version",
    "incompatible device",
    "platform specific tag mismatch",
)
# The members of TensorRT-RTX's EngineInvalidityDiagnostics.
_ELSEWHERE = {
    "VERSION_MISMATCH": "another version of TensorRT-RTX built it",
    "UNSUPPORTED_CC": "it is not for this GPU's compute capability",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it",
}
_REFUSED = {
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory for it",
    "MALFORMED_ENGINE": "it is damaged or no engine at all",
    "CUDA_ERROR": "CUDA's driver or runtime is not installed correctly",
}
DIAGNOSES = _ELSEWHERE | _REFUSED


def check_version(plan: bytes, trt: Any) -> None:
    """Raises BackendUnavailable for an engine of a TensorRT-RTX version that is not here."""
    header = read_header(plan)
    # Full TensorRT decides by itself: it runs engines of some neighbouring versions.
    if header.flavor == "rtx" and header.version != trt.__version__:
        raise BackendUnavailable(
            f"the engine was built by TensorRT-RTX {header.version} and this machine has "
            f"{trt.__version__}; build it again: rexdeploy build-trt"
        )


def deserialize(trt: Any, runtime: Any, plan: bytes, flavor: Flavor, log: Log) -> Any:
    """The engine, with the GPU there.

    Raises BackendUnavailable where the engine is for another GPU, driver or version, and
    RexdeployError where it is refused although it should run.
    """
    if flavor == "rtx":
        check_validity(trt, runtime, plan, log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = log.first_error()
        if any(phrase in text.lower() for _, text in log.messages for phrase in _OTHER_MACHINE):
            raise BackendUnavailable(f"the engine is for another machine: {reason}; {_REBUILD}")
        raise RexdeployError(f"the engine cannot be loaded: {reason}")
    return engine


def check_validity(trt: Any, runtime: Any, plan: bytes, log: Log) -> str:
    """RTX's own preflight: "valid" or "suboptimal", the word for what the engine is here.

    Raises BackendUnavailable where this GPU, driver or version is not one that it was built for,
    RexdeployError where it is invalid for any other reason.
    """
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != trt.EngineValidity.INVALID:
        return str(validity.name).lower()
    reasons = _in_words(trt, diagnostics)
    words = ", ".join(text for text, _ in reasons) or log.first_error()
    message = f"TensorRT-RTX calls the engine invalid here: {words}"
    if reasons and all(is_elsewhere for _, is_elsewhere in reasons):
        raise BackendUnavailable(f"{message}; {_REBUILD} --target")
    raise RexdeployError(message)


def validity(plan: bytes) -> str:
    """What TensorRT-RTX says of an engine on this machine's GPU; raises like `check_validity`."""
    trt = load("rtx")
    with captured_log(trt) as log:
        return check_validity(trt, start(trt.Runtime, log), plan, log)


def _in_words(trt: Any, diagnostics: int) -> list[tuple[str, bool]]:
    """What each bit of the diagnostics says, and whether another machine could run the engine."""
    said = []
    for name, bit in trt.EngineInvalidityDiagnostics.__members__.items():
        if diagnostics & int(bit.value):
            diagnostics &= ~int(bit.value)
            said.append((DIAGNOSES.get(name, name), name in _ELSEWHERE))
    return [*said, *([(f"diagnostics {diagnostics:#x}", False)] if diagnostics else [])]
