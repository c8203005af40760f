"""OpenVINO on a CPU, in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from rexdeploy.arrays import Float32, Images
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError


class OpenVinoBackend:
    """Runs an ONNX model with one image input and one output."""

    name = "openvino"

    def __init__(self, model: bytes, spec: ModelSpec, threads: int | None = None) -> None:
        try:
            import openvino
        except ImportError:
            raise BackendUnavailable(
                "openvino is not installed: pip install 'rexdeploy[openvino]'"
            ) from None
        # Its CPU plugin would otherwise compute in bfloat16 where the processor has it.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = openvino.Core()
        try:
            read = core.read_model(model)
            self._model: Any = core.compile_model(read, "CPU", settings)
        except Exception as error:  # openvino raises RuntimeError and its children
            raise UsageError(
                f"not an ONNX model that openvino can load ({_last_line(error)})"
            ) from None
        shapes = [port.partial_shape for port in (*read.inputs, *read.outputs)]
        size = spec.input_shape
        wanted = [size, (spec.num_classes,)]
        if len(read.inputs) != 1 or len(shapes) != 2 or not all(map(_fits, shapes, wanted)):
            raise UsageError(
                f"the model has inputs and outputs {', '.join(map(str, shapes))}; expected one "
                f"input [N, {size[0]}, {size[1]}, {size[2]}] and one output "
                f"[N, {spec.num_classes}]"
            )
        self._request: Any = self._model.create_infer_request()

    def run(self, images: Images) -> Float32:
        if self._request is None:
            raise RexdeployError("this model was closed; load it again")
        try:
            answer = self._request.infer({0: images})
        except Exception as error:  # openvino raises RuntimeError and its children
            raise RexdeployError(
                f"openvino failed on a batch of {len(images)} ({_last_line(error)})"
            ) from None
        return np.array(answer[0], dtype=np.float32)  # a copy: the request owns the original

    def close(self) -> None:
        self._request = self._model = None


def _fits(shape: Any, wanted: tuple[int, ...]) -> bool:
    """Whether every fixed dimension after the batch is the wanted one."""
    return len(shape) == len(wanted) + 1 and all(
        dimension.is_dynamic or dimension.get_length() == size
        for dimension, size in zip(list(shape)[1:], wanted, strict=True)
    )


def _last_line(error: Exception) -> str:
    """OpenVINO's messages begin with where in its source they were raised."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
