"""rexdeploy: ReXNet checkpoints to verified ONNX graphs and TensorRT engines."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rexdeploy.inference.classifier import Classifier, Prediction, load

__all__ = ["Classifier", "Prediction", "__version__", "load"]

__version__ = "0.1.0"

# Since 1.32 ONNX Runtime writes an id to disk when it is imported, and some seconds later looks up
# its vendor's server. Nothing but this variable, before the import, stops it: its own call
# `disable_telemetry_events` comes too late for the id. What is started from here (tritonserver and
# its Python) inherits it. Somebody's own setting stands.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Imports the classifier when it is first asked for: `rexdeploy --help` needs no numpy."""
    if name in ("Classifier", "Prediction", "load"):
        from rexdeploy.inference import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module 'rexdeploy' has no attribute '{name}'")
