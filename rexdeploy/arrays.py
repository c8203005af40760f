"""The array types that pass between packages, softmax, and a check of what a graph gave."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from rexdeploy.errors import RexdeployError

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]
Images = Float32 | UInt8
Array = npt.NDArray[np.floating[Any]]


def softmax(logits: Array) -> npt.NDArray[np.float64]:
    """Probabilities over the last axis, in float64."""
    exponents = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    probabilities: npt.NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return probabilities


def check_finite(name: str, values: Array) -> None:
    """Raises RexdeployError where a graph gave NaN or infinity: no decision can be made on it."""
    wrong = values.size - int(np.isfinite(values).sum())
    if wrong:
        raise RexdeployError(
            f"{wrong} of {values.size} {name} are NaN or infinite; expected finite numbers: run "
            "`rexdeploy verify` to find the file that computes them"
        )
