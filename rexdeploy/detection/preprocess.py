"""An image as a detector takes it, and boxes back: torchvision's GeneralizedRCNNTransform."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from rexdeploy.arrays import Float32, Int64, UInt8
from rexdeploy.detection.boxes import MULTIPLE
from rexdeploy.errors import UsageError

MEAN = (0.485, 0.456, 0.406)  # torchvision's defaults, of RGB from 0 to 1
STD = (0.229, 0.224, 0.225)
MIN_SIZE, MAX_SIZE = 800, 1333

Colour = tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class Prepared:
    """An image within its canvas.

    `canvas` is float32 `[3, H, W]`, normalised, H and W multiples of 32; the image is at its top
    left, of `size` (height, width), and zeros are right of it and below.
    """

    canvas: Float32
    size: tuple[int, int]


def resized_size(
    height: int, width: int, min_size: int = MIN_SIZE, max_size: int = MAX_SIZE
) -> tuple[int, int, float]:
    """Height and width after the resize, and the scale that they are rounded down from.

    The short side becomes `min_size`, or less where the long one would exceed `max_size`. In
    Python's floats, as torchvision 0.29 outside of traces: 799 instead of 800 can come of it.
    (Its traces and scripts compute in float32, and differ by a pixel in some sizes.) Raises
    UsageError for an image of which a side would be nothing.
    """
    if min(height, width) < 1:
        raise UsageError(f"an image of {width} x {height} pixels; expected one at least")
    scale = min(min_size / min(height, width), max_size / max(height, width))
    resized = math.floor(height * scale), math.floor(width * scale)
    if min(resized) < 1:
        raise UsageError(
            f"an image of {width} x {height} pixels is too thin: resized to at most {max_size} "
            "pixels, no pixel of the short side is left"
        )
    return (*resized, scale)


def prepare(
    pixels: UInt8,
    min_size: int = MIN_SIZE,
    max_size: int = MAX_SIZE,
    mean: Colour = MEAN,
    std: Colour = STD,
) -> Prepared:
    """uint8 RGB `[H, W, 3]`, normalised, resized and padded; raises as `resized_size`.

    Normalised before it is resized, as torchvision does. Only the rows and columns that are
    interpolated between become floats, at most four for each pixel of the result.
    """
    height, width, _ = resized_size(pixels.shape[0], pixels.shape[1], min_size, max_size)
    y, x = neighbours(pixels.shape[0], height), neighbours(pixels.shape[1], width)
    rows, columns = _used(y.low, y.high), _used(x.low, x.high)
    y = y._replace(low=np.searchsorted(rows, y.low), high=np.searchsorted(rows, y.high))
    x = x._replace(low=np.searchsorted(columns, x.low), high=np.searchsorted(columns, x.high))
    used = pixels[rows[:, None], columns]
    canvas = np.zeros((3, canvas_side(height), canvas_side(width)), np.float32)
    for channel, plane in enumerate(canvas):
        scaled = used[:, :, channel].astype(np.float32) / np.float32(255)
        scaled -= np.float32(mean[channel])
        scaled /= np.float32(std[channel])
        plane[:height, :width] = along_rows(along_columns(scaled, x), y)
    return Prepared(canvas=canvas, size=(height, width))


def to_original(boxes: Float32, resized: tuple[int, int], original: tuple[int, int]) -> Float32:
    """Boxes `[K, 4]` in pixels of the resized image, in those of the original one.

    Both sizes are (height, width). torchvision's `resize_boxes`.
    """
    y, x = (np.float32(to) / np.float32(of) for to, of in zip(original, resized, strict=True))
    return boxes * np.array([x, y, x, y], np.float32)


def _used(low: Int64, high: Int64) -> Int64:
    return np.unique(np.concatenate([low, high]))


def canvas_side(side: int) -> int:
    """The least side of a canvas that holds so many pixels."""
    return -(-side // MULTIPLE) * MULTIPLE


class Neighbours(NamedTuple):
    """For each output sample along one axis: its two input samples, and the weight of each."""

    low: Int64
    high: Int64
    low_weight: Float32
    high_weight: Float32

    def part(self, of: slice) -> Neighbours:
        """Those of some output samples."""
        return Neighbours(self.low[of], self.high[of], self.low_weight[of], self.high_weight[of])


def neighbours(inputs: int, outputs: int, start: int = 0, stop: int | None = None) -> Neighbours:
    """For the output samples from `start` to before `stop` (the last, if None) of `outputs`.

    torch's arithmetic on a CPU: the scale in float32, and the position rounded once, which its
    fused multiply-add does; in float32 at each step it would be 0.0002 samples away at 4096.
    """
    scale = np.float64(np.float32(inputs) / np.float32(outputs))
    centres = np.arange(start, outputs if stop is None else stop) + 0.5
    positions = np.maximum((scale * centres - 0.5).astype(np.float32), np.float32(0))
    low = np.minimum(positions.astype(np.int64), inputs - 1)
    weight = np.minimum(positions - low.astype(np.float32), np.float32(1))
    return Neighbours(low, np.minimum(low + 1, inputs - 1), np.float32(1) - weight, weight)


def along_columns(values: Float32, at: Neighbours) -> Float32:
    """float32 `[H, W]` to `[H, n]`."""
    return values[:, at.low] * at.low_weight + values[:, at.high] * at.high_weight


def along_rows(values: Float32, at: Neighbours) -> Float32:
    """float32 `[H, W]` to `[n, W]`."""
    low, high = at.low_weight[:, None], at.high_weight[:, None]
    return values[at.low] * low + values[at.high] * high
