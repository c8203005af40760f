"""Runs a backend over images at several batch sizes, and holds the limits on its logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rexdeploy.backends import Backend
from rexdeploy.compare import Array
from rexdeploy.errors import RexdeployError
from rexdeploy.images import Images
from rexdeploy.manifest import Precision

Float32 = npt.NDArray[np.float32]

LIMITS: dict[Precision, float] = {"fp32": 1e-3, "fp16": 0.7, "bf16": 3.0}
"""Largest allowed error in units of signal.

Chosen between what honest graphs measure over families, widths and seeds, and the least that a
defect larger than rounding does: artifacts/limits/README.md has the table. The widest honest error
is lite's in every precision. Trained weights are not measured yet.
"""


@dataclass(frozen=True)
class Rows:
    """Logits by row, with the image that each row comes from."""

    images: npt.NDArray[np.int64]
    logits: Array  # [rows, classes]

    def by_image(self) -> Array:
        """`[images, classes]`: each image's first row, which the smallest batch gave."""
        _, first = np.unique(self.images, return_index=True)
        logits: Array = self.logits[first]
        return logits


def run_batches(backend: Backend, images: Images, sizes: Sequence[int]) -> Rows:
    """Runs all of `images` in batches of each size, so that every row's neighbours differ.

    The images are repeated cyclically to fill the last batch. Raises RexdeployError where the
    backend fails, or gives anything but one row an image.
    """
    indices, logits = [], []
    for size in sizes:
        for start in range(0, len(images), size):
            index = np.arange(start, start + size) % len(images)
            indices.append(index)
            answer = backend.run(images[index])
            if answer.ndim != 2 or len(answer) != size:
                raise RexdeployError(
                    f"gave logits of shape {list(answer.shape)} for a batch of {size}"
                )
            logits.append(answer)
    return Rows(np.concatenate(indices), np.concatenate(logits))
