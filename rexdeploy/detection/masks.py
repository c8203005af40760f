"""Masks: from what the mask head gives, to pixels of the original image, box by box.

Equal to torchvision's `maskrcnn_inference` and `paste_masks_in_image`, a pixel being in the mask
where the interpolated probability is above 0.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from rexdeploy.arrays import Bool, Float32, Int64, check_finite
from rexdeploy.detection.boxes import sigmoid
from rexdeploy.detection.preprocess import Neighbours, along_columns, along_rows, neighbours
from rexdeploy.errors import UsageError

_INSIDE = np.float32(0.5)
_AT_ONCE = 2**20  # pixels that are interpolated together


@dataclass(frozen=True)
class Rle:
    """A mask of `height` x `width` pixels as COCO's uncompressed run lengths.

    `counts` are numbers of pixels, column by column from the left and each from the top: first of
    those outside the mask (0 where the first pixel is inside), then inside and outside in turn.
    """

    height: int
    width: int
    counts: tuple[int, ...]


def select(mask_logits: Float32, labels: Int64) -> Float32:
    """float32 `[K, S, S]`: probabilities of each detection's own class.

    `mask_logits` are `[K, C, S, S]` and `labels` int64 `[K]`. Raises RexdeployError for NaN and
    infinity.
    """
    own = mask_logits[np.arange(len(labels)), labels]
    check_finite("mask logits", own)
    return sigmoid(own)


def paste(probabilities: Float32, boxes: Float32, height: int, width: int) -> Bool:
    """All masks at full size, bool `[K, height, width]`. For many or large ones use `rles`.

    `probabilities` are float32 `[K, S, S]`, `boxes` `[K, 4]` in pixels of the image of
    `height` x `width`.
    """
    pasted = np.zeros((len(boxes), height, width), np.bool_)
    for mask, (top, left, window) in zip(
        pasted, _windows(probabilities, boxes, height, width), strict=True
    ):
        mask[top : top + window.shape[0], left : left + window.shape[1]] = window
    return pasted


def rles(probabilities: Float32, boxes: Float32, height: int, width: int) -> tuple[Rle, ...]:
    """The masks of `paste` as run lengths; no more than one box's pixels stand in memory."""
    return tuple(
        to_rle(window, (top, left), (height, width))
        for top, left, window in _windows(probabilities, boxes, height, width)
    )


def to_rle(mask: Bool, at: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None) -> Rle:
    """Run lengths of a mask, bool `[H, W]`; or of one in an image that has nothing outside it.

    `at` is then the row and the column of its first pixel, `size` the image's height and width.
    """
    height, width = size or mask.shape
    edges = np.diff(np.pad(mask.T, ((0, 0), (1, 1))), axis=1)
    columns, rows = np.nonzero(edges)  # of a run's first pixel, and of the one below its last
    changes, times = np.unique((columns + at[1]) * height + rows + at[0], return_counts=True)
    changes = changes[times == 1]  # a run to the bottom goes on where one begins at the top
    counts = np.diff(changes, prepend=0, append=height * width)
    if counts[-1] == 0:
        counts = counts[:-1]
    return Rle(height=height, width=width, counts=tuple(counts.tolist()))


def from_rle(rle: Rle) -> Bool:
    """The mask, bool `[height, width]`; raises UsageError for runs of more or fewer pixels."""
    counts = np.array(rle.counts, np.int64)
    if (counts < 0).any() or counts.sum() != rle.height * rle.width:
        raise UsageError(
            f"run lengths of {counts.sum()} pixels; expected {rle.height} x {rle.width}, none "
            "negative"
        )
    inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(inside, counts).reshape(rle.width, rle.height).T


def _windows(
    probabilities: Float32, boxes: Float32, height: int, width: int
) -> Iterator[tuple[int, int, Bool]]:
    """For each box the row and column of its first pixel in the image, and bool `[h, w]`."""
    check_finite("coordinates of boxes", boxes)
    side = probabilities.shape[-1]
    half = (boxes[:, 2:] - boxes[:, :2]) * np.float32(0.5)
    centre = (boxes[:, 2:] + boxes[:, :2]) * np.float32(0.5)
    half *= np.float32((side + 2) / side)  # one pixel of zeros is put around a mask
    corners = np.concatenate([centre - half, centre + half], axis=1).astype(np.int64)
    for mask, (x1, y1, x2, y2) in zip(
        np.pad(probabilities, ((0, 0), (1, 1), (1, 1))), corners.tolist(), strict=True
    ):
        left, right = max(x1, 0), max(min(x2 + 1, width), 0)
        top, bottom = max(y1, 0), max(min(y2 + 1, height), 0)
        x = neighbours(side + 2, max(x2 - x1 + 1, 1), left - x1, right - x1)
        y = neighbours(side + 2, max(y2 - y1 + 1, 1), top - y1, bottom - y1)
        yield top, left, _inside(along_columns(mask, x), y)


def _inside(rows: Float32, at: Neighbours) -> Bool:
    """`[h, w]`: where the mask is above 0.5, some rows at once for the memory's sake."""
    inside = np.empty((len(at.low), rows.shape[1]), np.bool_)
    step = max(_AT_ONCE // max(rows.shape[1], 1), 1)
    for start in range(0, len(inside), step):
        part = slice(start, start + step)
        inside[part] = along_rows(rows, at.part(part)) > _INSIDE
    return inside
