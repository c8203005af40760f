"""Runs a network at several batch sizes, every row another image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rexdeploy.arrays import Array, Images
from rexdeploy.backends import Backend
from rexdeploy.errors import RexdeployError


@dataclass(frozen=True)
class Rows:
    """Logits by row, with the image that each row comes from."""

    images: npt.NDArray[np.int64]
    logits: Array  # [rows, classes]
    last: int  # how many of the rows, at the end, the largest batch size gave

    def by_image(self) -> Array:
        """`[images, classes]`: each image's first row, which the smallest batch gave."""
        _, first = np.unique(self.images, return_index=True)
        logits: Array = self.logits[first]
        return logits


def run_batches(
    backend: Backend, images: Images, sizes: Sequence[int], most: int | None = None
) -> Rows:
    """Runs the images in batches of each size, so that every row's neighbours differ.

    The largest size runs all images, the others the first `most` of them (None: all). No batch has
    a period: where it is larger than the images are many, they are drawn in random order, so that
    no row can stand for another. Raises RexdeployError where the backend fails, or gives anything
    but one row an image.
    """
    indices, logits = [], []
    last = 0
    for size in sorted(set(sizes)):
        count = len(images) if size == max(sizes) or most is None else min(most, len(images))
        order = _without_period(count, -(-count // size) * size)
        last = len(order)
        for start in range(0, last, size):
            index = order[start : start + size]
            answer = backend.run(images[index])
            if answer.ndim != 2 or len(answer) != size:
                raise RexdeployError(
                    f"gave logits of shape {list(answer.shape)} for a batch of {size}"
                )
            indices.append(index)
            logits.append(answer)
    return Rows(np.concatenate(indices), np.concatenate(logits), last)


def _without_period(count: int, rows: int) -> npt.NDArray[np.int64]:
    """All of `count` images once, in order, and then any of them, until there are `rows`."""
    more = np.random.default_rng(0).integers(0, count, max(0, rows - count))
    return np.concatenate([np.arange(count), more])
