"""How large a network's values become, block by block, against what float16 can hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rexdeploy.arrays import Float32, Images
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.precision import PRECISIONS
from rexdeploy.graphs.emulate import Twin, with_peaks
from rexdeploy.parity.block_by_block import GraphWalk, Node

FP16_MAX, BF16_MAX = PRECISIONS["fp16"].largest, PRECISIONS["bf16"].largest
NEAR = 0.25
"""Share of float16's limit from which on other images may well pass it."""


@dataclass(frozen=True)
class BlockRange:
    """The largest absolute values of one block, in float32."""

    name: str
    output: float
    inside: float  # of any tensor of the block
    node: Node  # that makes the largest one
    over: tuple[str, ...] = ()  # names of the nodes whose results float16 cannot hold

    @property
    def verdict(self) -> str:
        """What becomes of it in float16."""
        if not self.inside <= FP16_MAX:
            return "OVERFLOWS"
        return "near" if self.inside > NEAR * FP16_MAX else "ok"


@dataclass(frozen=True)
class Ranges:
    """Every block's largest values over the images."""

    images: int
    blocks: tuple[BlockRange, ...]
    fp16_max: float = FP16_MAX
    bf16_max: float = BF16_MAX


def measure_ranges(walk: GraphWalk, images: Float32) -> Ranges:
    """Runs a float32 graph block by block over all images (float32 `[N, 3, H, W]`)."""
    size = walk.batch or 1  # one image at a time: all of a block's tensors are kept
    batches = [
        images[np.arange(start, start + size) % len(images)]
        for start in range(0, len(images), size)
    ]
    found = []
    for index, block in enumerate(walk.blocks):
        outputs: list[Float32] = []
        peaks: dict[Node, float] = {}
        for tensors in walk.tensors(index, *batches):
            outputs += [tensor.value for tensor in tensors if tensor.name == block.output]
            for tensor in tensors:
                peaks[tensor.node] = max(_peak(tensor.value), peaks.get(tensor.node, 0.0))
        top = max(peaks, key=peaks.__getitem__)
        over = tuple(node.name for node, peak in peaks.items() if peak > FP16_MAX)
        found.append(BlockRange(block.name, max(map(_peak, outputs)), peaks[top], top, over))
        batches = outputs
    return Ranges(len(images), tuple(found))


def _peak(value: Float32) -> float:
    """The largest absolute value; infinite if any is not a number."""
    peak = float(np.abs(value).max(initial=0))
    return peak if np.isfinite(peak) else float("inf")


_PEAK_IMAGES = 16  # synthetic ones are of every kind by then
_PEAK_BATCH = 8
HEADROOM = 8.0
"""Times that float16's range must hold a graph's largest value, or `verify` warns.

Photographs peaked up to 8 times as high as smooth synthetic images (issue 10), and none higher than
those of `images.sets`: what is left is for images that are like none of these.
"""


@dataclass(frozen=True)
class Headroom:
    """How far a graph's largest float16 value is from what float16 holds."""

    file: str
    node: str  # that makes the value
    peak: float  # the largest absolute value over sixteen images, before it is rounded

    @property
    def factor(self) -> float:
        """Times that the range holds it."""
        return FP16_MAX / self.peak if self.peak else float("inf")

    @property
    def is_low(self) -> bool:
        return not self.factor >= HEADROOM


def _headroom(found: Twin, images: Images, size: int) -> Headroom | None:
    """The largest value before it is rounded to float16; None where nothing is."""
    if not found.rounded:
        return None
    model, outputs = with_peaks(found.model, found.rounded)
    session = GraphSession(model.SerializeToString())
    fixed = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    peaks = dict.fromkeys(outputs, 0.0)
    for start in range(0, len(images), fixed or size):
        batch = images[np.arange(start, start + (fixed or size)) % len(images)]
        values = session.run({model.graph.input[0].name: batch}, list(outputs.values()))
        for tensor, output in outputs.items():
            peaks[tensor] = max(peaks[tensor], float(np.nan_to_num(values[output], nan=np.inf)))
    top = max(peaks, key=peaks.__getitem__)
    return Headroom("", found.rounded[top], peaks[top])
