"""The detections of one image, and a mask as runs of pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rexdeploy.arrays import Array, Float32
from rexdeploy.errors import RexdeployError

Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Rle:
    """A mask of `height` x `width` pixels as COCO's uncompressed run lengths.

    `counts` are numbers of pixels, column by column from the left and each from the top: first of
    those outside the mask (0 where the first pixel is inside), then inside and outside in turn.
    """

    height: int
    width: int
    counts: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Detections:
    """What was found in one image, the highest score first.

    `boxes` are float32 `[K, 4]`: x1, y1, x2, y2 in pixels of the original image; `scores` float32
    `[K]` from 0 to 1; `labels` int64 `[K]`, 0 (the background) never among them. `masks` has one
    mask of the original image's size for each, or is None where the network gives none.
    Raises ValueError for other shapes and types.
    """

    boxes: Float32
    scores: Float32
    labels: Int64
    masks: tuple[Rle, ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.scores)
        got = [(a.dtype.name, a.shape) for a in (self.boxes, self.scores, self.labels)]
        if got != [("float32", (count, 4)), ("float32", (count,)), ("int64", (count,))]:
            raise ValueError(f"boxes, scores and labels are {got}")
        if self.masks is not None and len(self.masks) != count:
            raise ValueError(f"{len(self.masks)} masks of {count} detections")

    def __len__(self) -> int:
        return len(self.scores)


def check_finite(name: str, values: Array) -> None:
    """Raises RexdeployError where a graph gave NaN or infinity: no decision can be made on it."""
    wrong = values.size - int(np.isfinite(values).sum())
    if wrong:
        raise RexdeployError(
            f"{wrong} of {values.size} {name} are NaN or infinite; expected finite numbers: run "
            "`rexdeploy verify` to find the file that computes them"
        )
