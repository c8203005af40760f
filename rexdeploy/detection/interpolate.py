"""Bilinear interpolation without antialiasing: torch's `interpolate(align_corners=False)`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rexdeploy.arrays import Float32
from rexdeploy.detection.result import Int64


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
