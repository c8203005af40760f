"""ONNX Runtime on an NVIDIA GPU, and nowhere else: its libraries, and where its nodes went."""

from __future__ import annotations

import contextlib
import io
import os
from collections import Counter
from typing import Any

from rexdeploy import machine
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, first_line

PROVIDER = "CUDAExecutionProvider"
# ONNX Runtime keeps what computes shapes on the CPU, where shapes are needed. These nodes move and
# look up values; the ones after them compute with shapes where there is a node that takes one.
_MOVES = {
    "Cast", "Concat", "Constant", "ConstantOfShape", "Expand", "Flatten", "Gather", "Identity",
    "Range", "Reshape", "Shape", "Size", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_SHAPE_ARITHMETIC = {
    "Add", "Div", "Equal", "Floor", "Max", "Min", "Mod", "Mul", "ReduceProd", "Sub", "Where",
}  # fmt: skip


def open_session(ort: Any, model: bytes, options: Any, cuda_graph: bool) -> Any:
    """A session whose arithmetic is on the GPU, and stays there when a run fails.

    Raises BackendUnavailable where the GPU, its libraries or kernels for the model's types are
    missing, UsageError for what is no model, RexdeployError where a GPU that is there refuses it.
    """
    if PROVIDER not in ort.get_available_providers():
        raise BackendUnavailable(
            "this onnxruntime is the CPU build; with an NVIDIA GPU: "
            "pip uninstall onnxruntime && pip install 'rexdeploy[gpu]'"
        )
    _preload(ort)
    # 'session.disable_cpu_ep_fallback' would refuse the nodes that compute shapes, too. Since 1.24
    # a session tells where its nodes are; of an older one nothing but the profile of a run does.
    tells_places = hasattr(ort.InferenceSession, "get_provider_graph_assignment_info")
    if tells_places:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # TF32 is on by default and rounds float32 products to 10 bits: not parity.
    settings = {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))}
    try:
        # Its Python would otherwise print, and make the session anew on the CPU.
        session = ort.InferenceSession(
            model, options, providers=[(PROVIDER, settings)], enable_fallback=0
        )
    except Exception as error:  # onnxruntime's errors share no public base class
        raise _refusal(error) from None
    session.disable_fallback()
    if PROVIDER not in session.get_providers():
        # Without a usable GPU, its C++ quietly runs on the CPU instead.
        raise BackendUnavailable("onnxruntime found no usable NVIDIA GPU, driver or cuDNN")
    if tells_places:
        check_places(session)
    return session


def check_places(session: Any) -> None:
    """Raises RexdeployError where nodes that compute more than shapes are not on the GPU."""
    elsewhere = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDER
        for node in part.get_nodes()
    )
    allowed = _MOVES
    if elsewhere.keys() & {"Shape", "Size"}:
        allowed = _MOVES | _SHAPE_ARITHMETIC
    computing = {name: count for name, count in elsewhere.items() if name not in allowed}
    if computing:
        listed = ", ".join(f"{count} {name}" for name, count in sorted(computing.items()))
        raise RexdeployError(f"onnxruntime put a part of the model on the CPU: {listed}")


def _preload(ort: Any) -> None:
    """Loads pip's CUDA and cuDNN, as importing torch would: a serving machine has no torch.

    It prints what it does not find, and the session says it again: stdout may be a JSON file.
    """
    # cuDNN's graphs took TF32 whatever 'use_tf32' said (onnxruntime pull request 19470).
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with contextlib.redirect_stdout(io.StringIO()):
            ort.preload_dlls()


def _refusal(error: Exception) -> RexdeployError:
    """What a session that could not be made means."""
    kind, reason = type(error).__name__, first_line(error)
    if kind in ("InvalidProtobuf", "InvalidGraph"):
        return UsageError(f"not an ONNX model that onnxruntime can load ({reason})")
    if kind == "NotImplemented":  # such as bfloat16 convolutions
        return BackendUnavailable(f"onnxruntime has no CUDA kernel for it ({reason})")
    if machine.detect() is None:
        return BackendUnavailable(f"onnxruntime found no usable NVIDIA GPU ({reason})")
    return RexdeployError(f"onnxruntime cannot run the model on this GPU ({reason})")
