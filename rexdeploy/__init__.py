"""rexdeploy: ReXNet checkpoints to verified ONNX graphs and TensorRT engines."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rexdeploy.backends.doctor import doctor
    from rexdeploy.bundle.signing import sign
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.detection.detector import Detector, load_detector
    from rexdeploy.detection.engines import build_detector
    from rexdeploy.detection.export import export_detector
    from rexdeploy.detection.verify import verify_detector
    from rexdeploy.errors import (
        BackendUnavailable,
        RexdeployError,
        UsageError,
        VerificationFailed,
    )
    from rexdeploy.inference.classifier import Classifier, Prediction, load
    from rexdeploy.inference.detections import detect
    from rexdeploy.inference.predict import predict
    from rexdeploy.models.zoo import published_models
    from rexdeploy.serving.deploy import triton
    from rexdeploy.serving.server import serve
    from rexdeploy.serving.tuning import tune_serving
    from rexdeploy.steps.build_trt import build_trt
    from rexdeploy.steps.evaluate import evaluate
    from rexdeploy.steps.export import export
    from rexdeploy.steps.finetune import finetune
    from rexdeploy.steps.import_onnx import import_onnx
    from rexdeploy.steps.inspect import inspect
    from rexdeploy.steps.quantize import quantize
    from rexdeploy.steps.tune_precision import tune_precision
    from rexdeploy.steps.verify import Verification, verify
    from rexdeploy.timing.harness import bench

__all__ = [
    "BackendUnavailable",
    "Bundle",
    "Classifier",
    "Detector",
    "Prediction",
    "RexdeployError",
    "UsageError",
    "Verification",
    "VerificationFailed",
    "__version__",
    "bench",
    "build_detector",
    "build_trt",
    "detect",
    "doctor",
    "evaluate",
    "export",
    "export_detector",
    "finetune",
    "import_onnx",
    "inspect",
    "load",
    "load_detector",
    "predict",
    "published_models",
    "quantize",
    "serve",
    "sign",
    "triton",
    "tune_precision",
    "tune_serving",
    "verify",
    "verify_detector",
]

__version__ = "0.1.0"

# Since 1.32 ONNX Runtime writes an id to disk when it is imported, and some seconds later looks up
# its vendor's server. Nothing but this variable, before the import, stops it: its own call
# `disable_telemetry_events` comes too late for the id. What is started from here (tritonserver and
# its Python) inherits it. Somebody's own setting stands.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


# `models` is a package: that command has a name of its own here.
_PLACES = {
    "bench": "timing.harness",
    "Bundle": "bundle.store",
    "sign": "bundle.signing",
    **dict.fromkeys(
        ("BackendUnavailable", "RexdeployError", "UsageError", "VerificationFailed"), "errors"
    ),
    **dict.fromkeys(("Classifier", "Prediction", "load"), "inference.classifier"),
    "detect": "inference.detections",
    "predict": "inference.predict",
    **dict.fromkeys(("Detector", "load_detector"), "detection.detector"),
    "build_detector": "detection.engines",
    "export_detector": "detection.export",
    "verify_detector": "detection.verify",
    "published_models": "models.zoo",
    "triton": "serving.deploy",
    "serve": "serving.server",
    "tune_serving": "serving.tuning",
    "build_trt": "steps.build_trt",
    "doctor": "backends.doctor",
    "evaluate": "steps.evaluate",
    "export": "steps.export",
    "finetune": "steps.finetune",
    "import_onnx": "steps.import_onnx",
    "inspect": "steps.inspect",
    "quantize": "steps.quantize",
    "tune_precision": "steps.tune_precision",
    **dict.fromkeys(("Verification", "verify"), "steps.verify"),
}


def __getattr__(name: str) -> Any:
    """Imports a part when it is first asked for: `rexdeploy --help` needs no numpy."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"rexdeploy.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'rexdeploy' has no attribute '{name}'")
