"""A detector's stages one after the other: whoever runs them, and what is decided between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rexdeploy.arrays import Float32, Int64
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.manifest import Role
from rexdeploy.detection import boxes as host
from rexdeploy.detection import masks
from rexdeploy.detection.masks import Rle
from rexdeploy.detection.preprocess import Prepared, to_original
from rexdeploy.errors import RexdeployError, UsageError

LEVELS = (2, 3, 4, 5)
MAPS = tuple(f"p{level}" for level in LEVELS)
ROIS = tuple(f"rois{level}" for level in LEVELS)
INPUTS: dict[Role, tuple[str, ...]] = {
    "features": ("images",),
    "boxes": (*MAPS, *ROIS),
    "masks": (*MAPS, *ROIS),
}
OUTPUTS: dict[Role, tuple[str, ...]] = {
    "features": (*MAPS, "objectness", "deltas"),
    "boxes": ("class_logits", "box_deltas"),
    "masks": ("mask_logits",),
}
"""What each stage takes and gives, float32; the shapes are in `models/detector_stages.py`."""
Tensors = dict[str, Float32]
PYTORCH, ONNXRUNTIME = "pytorch", "onnxruntime"
_FILLER = np.array([[0, 0, 32, 32]], np.float32)


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


class Stage(Protocol):
    """One stage in some library."""

    least: int  # boxes that each level has to have at the least

    def run(self, feeds: Mapping[str, Float32]) -> Tensors:
        """The stage's outputs by name; raises RexdeployError where it fails."""

    def close(self) -> None: ...


class OnnxStage:
    """A stage's graph in ONNX Runtime on the CPU; it casts to the graph's own types."""

    def __init__(
        self, model: bytes, role: Role, least: int = 0, threads: int | None = None
    ) -> None:
        """Raises UsageError for a graph with other inputs or outputs than the stage's."""
        self.least, self._outputs = least, OUTPUTS[role]
        self._session = GraphSession(model, threads)
        got = self._session.inputs, self._session.outputs
        if got != (INPUTS[role], OUTPUTS[role]):
            raise UsageError(
                f"a graph from {', '.join(got[0])} to {', '.join(got[1])}; expected stage "
                f"'{role}': {', '.join(INPUTS[role])} to {', '.join(OUTPUTS[role])}"
            )

    def run(self, feeds: Mapping[str, Float32]) -> Tensors:
        return self._session.run(feeds, self._outputs)

    def close(self) -> None:
        del self._session


Stages = Mapping[Role, Stage]
"""All stages of a detector; "masks" only where it has them."""


@dataclass(frozen=True)
class Choice:
    """Which detections are given."""

    score: float = 0.05  # the least
    limit: int = 100  # the most


@dataclass(frozen=True, eq=False)
class Trace:
    """What each stage was given and gave for one image."""

    inputs: dict[Role, Tensors]
    outputs: dict[Role, Tensors]
    detections: Detections


def trace(
    stages: Stages, prepared: Prepared, original: tuple[int, int], choice: Choice | None = None
) -> Trace:
    """Runs all stages over one image, whose height and width were `original`.

    Raises RexdeployError where a stage fails, or gives NaN or infinite values.
    """
    choice = choice or Choice()
    inputs: dict[Role, Tensors] = {"features": {"images": prepared.canvas[None]}}
    outputs: dict[Role, Tensors] = {"features": stages["features"].run(inputs["features"])}
    features = outputs["features"]
    maps = {name: features[name] for name in MAPS}
    height, width = prepared.canvas.shape[1:]
    proposed = host.proposals(
        features["objectness"][0],
        features["deltas"][0],
        host.anchors(height, width),
        host.anchor_counts(height, width),
        prepared.size,
    )
    order, rois = split(proposed)
    inputs["boxes"] = {**maps, **rois}
    outputs["boxes"] = run_heads(stages["boxes"], "boxes", inputs["boxes"])
    found, scores, labels = host.detections(
        outputs["boxes"]["class_logits"],
        outputs["boxes"]["box_deltas"],
        proposed[order],
        prepared.size,
        score_threshold=choice.score,
        limit=choice.limit,
    )
    shown = to_original(found, prepared.size, original)
    pasted = None
    if "masks" in stages:
        order, rois = split(found)
        inputs["masks"] = {**maps, **rois}
        outputs["masks"] = run_heads(stages["masks"], "masks", inputs["masks"])
        own = masks.select(outputs["masks"]["mask_logits"], labels[order])
        own = own[np.argsort(order)]
        pasted = masks.rles(own, shown, *original)
    return Trace(inputs, outputs, Detections(shown, scores, labels, pasted))


def split(boxes: Float32) -> tuple[Int64, Tensors]:
    """Boxes `[K, 4]` by the level that each is pooled from, and the order in which they are then.

    The order is int64 `[K]`: the heads' row i is of box `order[i]`.
    """
    levels = host.levels(boxes)
    order = np.argsort(levels, kind="stable").astype(np.int64)
    return order, {name: boxes[levels == level] for level, name in enumerate(ROIS)}


def run_heads(stage: Stage, role: Role, feeds: Mapping[str, Float32]) -> Tensors:
    """A head's outputs, one row a box; a level that has too few for the stage is filled up."""
    counts = [len(feeds[name]) for name in ROIS]
    filled = dict(feeds)
    for name, count in zip(ROIS, counts, strict=True):
        filler = np.repeat(_FILLER, max(stage.least - count, 0), axis=0)
        filled[name] = np.concatenate([feeds[name], filler])
    given = stage.run(filled)
    sizes = [len(filled[name]) for name in ROIS]
    for name in OUTPUTS[role]:
        if given[name].shape[:1] != (sum(sizes),):
            raise RexdeployError(
                f"{name} of shape {list(given[name].shape)} for {sum(sizes)} boxes, expected a row "
                "for each"
            )
    kept = np.concatenate(
        [np.arange(size) < count for size, count in zip(sizes, counts, strict=True)]
    )
    return {name: given[name][kept] for name in OUTPUTS[role]}
