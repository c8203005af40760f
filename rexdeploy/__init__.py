"""rexdeploy: ReXNet checkpoints to verified ONNX graphs and TensorRT engines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rexdeploy.classify import Classifier, Prediction, load

__all__ = ["Classifier", "Prediction", "__version__", "load"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the classifier when it is first asked for: `rexdeploy --help` needs no numpy."""
    if name in ("Classifier", "Prediction", "load"):
        from rexdeploy import classify

        return getattr(classify, name)
    raise AttributeError(f"module 'rexdeploy' has no attribute '{name}'")
