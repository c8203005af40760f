"""Anchors, decoding and suppression of boxes, equal to torchvision's detectors on a CPU.

Each function does what torchvision 0.29's Faster R-CNN with FPN does by default, in float32 and in
the same order of operations. Boxes are `x1, y1, x2, y2` in pixels of the resized image.
"""

from __future__ import annotations

import math

import numpy as np

from rexdeploy.arrays import Bool, Float32, Int64, check_finite, softmax
from rexdeploy.errors import RexdeployError

MULTIPLE = 32  # of a canvas's sides
_POOLED = (4, 8, 16, 32)  # strides of the FPN's maps p2 to p5
_ANCHOR_SIZES = (32, 64, 128, 256, 512)  # of p2 to p6
_RATIOS = (0.5, 1.0, 2.0)  # of an anchor's height to its width
_RPN_WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_LARGEST = np.float32(math.log(1000 / 16))  # of a delta of width or height, before the exponential
_PER_LEVEL, _PROPOSALS, _RPN_OVERLAP, _RPN_SMALLEST = 1000, 1000, 0.7, 1e-3
_SMALLEST = 1e-2  # side of a detection
_OFFSET_UP_TO = 1000  # boxes; torchvision/ops/boxes.py: 4000 numbers, on a CPU
_BLOCK = 128  # boxes that are compared at once: their overlaps stay in the processor's cache

Weights = tuple[float, float, float, float]
Size = tuple[int, int]  # height, width


def map_sizes(height: int, width: int) -> tuple[Size, ...]:
    """Heights and widths of p2 to p6 over a canvas, whose sides are multiples of 32.

    p6 is p5 without every second row and column, torchvision's LastLevelMaxPool. Raises
    RexdeployError for another canvas.
    """
    if min(height, width) < MULTIPLE or height % MULTIPLE or width % MULTIPLE:
        raise RexdeployError(
            f"a canvas of {height} x {width} pixels; expected multiples of {MULTIPLE}"
        )
    sizes = [(height // stride, width // stride) for stride in _POOLED]
    return (*sizes, ((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))


def anchor_counts(height: int, width: int) -> tuple[int, ...]:
    """How many anchors each of p2 to p6 has over a canvas; raises like `map_sizes`."""
    return tuple(rows * columns * len(_RATIOS) for rows, columns in map_sizes(height, width))


def anchors(height: int, width: int) -> Float32:
    """float32 `[A, 4]`: the anchors of a canvas, by level, y, x and ratio; raises as `map_sizes`.

    torchvision's AnchorGenerator, in the order of its concat_box_prediction_layers: a level's
    stride is the canvas's side divided by the map's, rounded down (p6: 61 at 800, not 64).
    """
    tall = np.sqrt(np.array(_RATIOS, np.float32))
    wide = np.float32(1) / tall
    levels = []
    for side, (rows, columns) in zip(_ANCHOR_SIZES, map_sizes(height, width), strict=True):
        half = np.stack([-wide, -tall, wide, tall], axis=1) * np.float32(side) / np.float32(2)
        half = half.round()
        own = np.empty((rows, columns, len(_RATIOS), 4), np.float32)
        y = np.arange(rows, dtype=np.float32) * np.float32(height // rows)
        x = np.arange(columns, dtype=np.float32) * np.float32(width // columns)
        own[..., 0::2] = x[:, None, None] + half[:, 0::2]
        own[..., 1::2] = y[:, None, None, None] + half[:, 1::2]
        levels.append(own.reshape(-1, 4))
    return np.concatenate(levels)


def decode(deltas: Float32, boxes: Float32, weights: Weights) -> Float32:
    """Boxes moved by deltas, float32 `[..., 4]` (the two broadcast): torchvision's BoxCoder.

    `weights` divide dx, dy, dw and dh. dw and dh are cut at log(1000 / 16).
    """
    size = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + np.float32(0.5) * size
    scaled = deltas / np.array(weights, np.float32)
    # Rounded once from float64: torch's and numpy's own exponentials differ in float32.
    grown = np.exp(np.minimum(scaled[..., 2:], _LARGEST).astype(np.float64)).astype(np.float32)
    with np.errstate(over="ignore"):  # an infinite centre is cut at the image's border
        centre = scaled[..., :2] * size + centre
    half = np.float32(0.5) * (grown * size)
    decoded: Float32 = np.concatenate([centre - half, centre + half], axis=-1)
    return decoded


def clip(boxes: Float32, size: Size) -> Float32:
    """Boxes `[..., 4]` cut at the borders of an image of `size` (height, width)."""
    height, width = size
    clipped: Float32 = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    return clipped


def large_enough(boxes: Float32, side: float) -> Bool:
    """`[K]`: whether both sides of a box are `side` pixels or longer."""
    sides = boxes[:, 2:] - boxes[:, :2]
    large: Bool = np.all(sides >= np.float32(side), axis=1)
    return large


def nms(boxes: Float32, scores: Float32, threshold: float, limit: int | None = None) -> Int64:
    """Indices of the boxes that overlap none of a higher score by more than `threshold`.

    Greedy, the highest score first, of equal scores the lower index; `limit` ends it early. The
    overlap is intersection over union in float32, compared in float64, as torchvision's kernel.
    Boxes are float32 `[K, 4]`, scores `[K]`; the indices int64, in the order they were kept.
    """
    order = np.argsort(-scores, kind="stable")
    x1, y1, x2, y2 = boxes[order].T
    ranked = np.stack([x1, y1, x2, y2, (x2 - x1) * (y2 - y1)])
    kept = np.empty(0, np.int64)
    for start in range(0, len(order), _BLOCK):  # against all kept before, then among themselves
        block = ranked[:, start : start + _BLOCK]
        alive: Bool = ~np.asarray(_overlap(ranked[:, kept], block, threshold).any(axis=0))
        among = np.triu(_overlap(block, block, threshold), 1)
        for row in np.flatnonzero(np.any(among, axis=1)).tolist():
            if alive[row]:
                alive &= ~among[row]
        kept = np.concatenate([kept, start + np.flatnonzero(alive)])
        if limit is not None and len(kept) >= limit:
            break
    return order[kept[:limit]].astype(np.int64)


def batched_nms(
    boxes: Float32, scores: Float32, groups: Int64, threshold: float, limit: int
) -> Int64:
    """`nms` within each group (class or level), at most `limit` indices by falling score.

    Like torchvision on a CPU: up to 1000 boxes are moved apart by group and judged at once, where
    a large group's coordinates are rounded; more are judged group by group. Boxes are not
    negative, and so lie apart. Of equal scores the lower index comes first, also where torch's
    sort leaves that open (above 1000 boxes).
    """
    if len(boxes) == 0:
        return np.empty(0, np.int64)
    if len(boxes) <= _OFFSET_UP_TO:
        offsets = groups.astype(np.float32) * (boxes.max() + np.float32(1))
        return nms(boxes + offsets[:, None], scores, threshold, limit)
    kept = []
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        kept.append(members[nms(boxes[members], scores[members], threshold, limit)])
    indices = np.sort(np.concatenate(kept))
    return indices[np.argsort(-scores[indices], kind="stable")][:limit]


def proposals(
    objectness: Float32, deltas: Float32, anchors: Float32, counts: tuple[int, ...], size: Size
) -> Float32:
    """float32 `[K, 4]`: what the RPN proposes, K at most 1000, the likeliest first.

    `objectness` are logits `[A]` and `deltas` `[A, 4]` in the order of `anchors` `[A, 4]`, of
    which `counts` are the numbers by level; `size` is the height and width of the resized image
    within the canvas. torchvision's `filter_proposals`: 1000 a level, cut at the image, no side
    below 0.001 pixels, overlap at most 0.7 within a level. Of equal logits the lower index is
    taken, where torch's topk leaves that open. Raises RexdeployError for NaN, infinity, and lengths
    that differ.
    """
    if not objectness.shape == deltas.shape[:1] == anchors.shape[:1] == (sum(counts),):
        raise RexdeployError(
            f"{len(objectness)} objectness values and {len(deltas)} deltas of "
            f"{len(anchors)} anchors, of which the levels have {sum(counts)}"
        )
    check_finite("objectness values", objectness)
    check_finite("deltas of anchors", deltas)
    ends = np.cumsum(counts)
    best = [
        _top(objectness[end - n : end], _PER_LEVEL) for end, n in zip(ends, counts, strict=True)
    ]
    chosen = np.concatenate([own + end - n for own, end, n in zip(best, ends, counts, strict=True)])
    levels = np.repeat(np.arange(len(counts)), [len(own) for own in best])
    boxes = clip(decode(deltas[chosen], anchors[chosen], _RPN_WEIGHTS), size)
    large = large_enough(boxes, _RPN_SMALLEST)
    boxes, levels, scores = boxes[large], levels[large], sigmoid(objectness[chosen[large]])
    return boxes[batched_nms(boxes, scores, levels, _RPN_OVERLAP, _PROPOSALS)]


def levels(boxes: Float32) -> Int64:
    """int64 `[K]`: the map that each box is pooled from, 0 for p2 to 3 for p5.

    torchvision's LevelMapper as its pooler makes it of p2 to p5: a box of 224 x 224 goes to p4.
    The pooler itself guesses the maps' strides from the resized image's height, wrongly where that
    is below 46 pixels (`_infer_scale` there); here they are always 4 to 32.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    with np.errstate(divide="ignore"):  # a box without area goes to p2
        octave = np.log2(np.sqrt(sides[:, 0] * sides[:, 1]) / np.float32(224))
    level = np.floor(np.float32(4) + octave + np.float32(1e-6))
    mapped: Int64 = np.clip(level, 2, 5).astype(np.int64) - 2
    return mapped


def detections(
    class_logits: Float32,
    box_deltas: Float32,
    proposals: Float32,
    size: Size,
    score_threshold: float = 0.05,
    nms_threshold: float = 0.5,
    limit: int = 100,
) -> tuple[Float32, Float32, Int64]:
    """Boxes float32 `[N, 4]`, scores float32 `[N]` and labels int64 `[N]`, highest score first.

    `class_logits` are `[K, C]`, class 0 being the background, `box_deltas` `[K, 4 * C]` by class,
    `proposals` `[K, 4]`, and `size` the height and width of the resized image. torchvision's
    `postprocess_detections`: a score is above the threshold, no side below 0.01 pixels, overlap
    at most `nms_threshold` within a class. Raises RexdeployError for NaN, infinity, and shapes
    that do not go together.
    """
    count, classes = class_logits.shape
    if box_deltas.shape != (count, 4 * classes) or proposals.shape != (count, 4):
        raise RexdeployError(
            f"deltas of shape {list(box_deltas.shape)} for {len(proposals)} proposals and logits "
            f"of shape {list(class_logits.shape)}; expected {[count, 4 * classes]} for {count}"
        )
    check_finite("class logits", class_logits)
    check_finite("deltas of proposals", box_deltas)
    probabilities = (
        softmax(class_logits)[:, 1:].astype(np.float32) if count else class_logits[:, 1:]
    )
    rows, columns = np.nonzero(probabilities > np.float32(score_threshold))
    deltas = box_deltas.reshape(count, classes, 4)[rows, columns + 1]
    boxes = clip(decode(deltas, proposals[rows], _BOX_WEIGHTS), size)
    large = large_enough(boxes, _SMALLEST)
    boxes, rows, columns = boxes[large], rows[large], columns[large]
    scores, labels = probabilities[rows, columns], columns.astype(np.int64) + 1
    kept = batched_nms(boxes, scores, labels, nms_threshold, limit)
    return boxes[kept], scores[kept], labels[kept]


def sigmoid(logits: Float32) -> Float32:
    """float32, rounded at each step as torch's, so that the same logits become equal."""
    with np.errstate(over="ignore"):  # exp(1000) is infinite, and 1 / infinity 0
        powers = np.exp(-logits.astype(np.float64)).astype(np.float32)
    return np.float32(1) / (np.float32(1) + powers)


def _top(values: Float32, count: int) -> Int64:
    """Indices of the `count` largest values, largest first, of equal ones the lower index."""
    candidates = np.arange(len(values))
    if len(values) > count:
        candidates = np.flatnonzero(values >= np.partition(values, -count)[-count])
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def _overlap(first: Float32, second: Float32, threshold: float) -> Bool:
    """`[N, M]`: which overlap by more, of `[5, N]` and `[5, M]`: x1, y1, x2, y2 and the area."""
    limit = np.float32(threshold)
    if float(limit) > threshold:  # the kernel compares a float32 ratio with the limit in float64
        limit = np.nextafter(limit, np.float32(-np.inf))
    a, b = first[:, :, None], second[:, None]
    inside = _common(a[0], a[2], b[0], b[2])
    inside *= _common(a[1], a[3], b[1], b[3])
    union = a[4] + b[4]
    union -= inside
    with np.errstate(invalid="ignore"):  # 0 / 0 of two boxes without area is no overlap
        inside /= union
    over: Bool = inside > limit
    return over


def _common(low: Float32, high: Float32, other_low: Float32, other_high: Float32) -> Float32:
    """The length that two intervals have in common."""
    common = np.minimum(high, other_high)
    common -= np.maximum(low, other_low)
    return np.maximum(common, np.float32(0), out=common)
