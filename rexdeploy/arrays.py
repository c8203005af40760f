"""The array types that pass between packages, and softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
Images = Float32 | UInt8
Array = npt.NDArray[np.floating[Any]]


def softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Probabilities over the last axis, in float64."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities
