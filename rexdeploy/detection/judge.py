"""Proves that a detector's files compute what torchvision's detector computes.

Stage by stage on tensors, each stage given the reference's own inputs, so that no decision between
them hides an error or makes one; and from end to end, by detections matched as sets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import ModelProto

from rexdeploy.arrays import Array, Float32, UInt8
from rexdeploy.bundle.manifest import Artifact, ModelSpec, Role
from rexdeploy.detection import reference
from rexdeploy.detection.masks import from_rle
from rexdeploy.detection.preprocess import prepare
from rexdeploy.detection.runtime import (
    ONNXRUNTIME,
    OUTPUTS,
    PYTORCH,
    ROIS,
    Detections,
    OnnxStage,
    Stages,
    Tensors,
    Trace,
    run_heads,
    trace,
)
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.graphs.emulate import as_typed, twin
from rexdeploy.graphs.products import precision_of
from rexdeploy.parity.compare import Comparison, Limits, Signal, compare
from rexdeploy.parity.limits import GRAPH_MARGIN, float32_limits, rounding_limits

if TYPE_CHECKING:
    from torch import nn


_RATIOS = 3  # anchors of one place
_MASKS = 8  # boxes of a level whose masks are compared
_MOST_ROWS = 1 << 15
_ALIKE = 0.25  # of its own rounding, that a graph may differ from its parent rounded alike


@dataclass(frozen=True)
class Alike:
    """When two detections of the same class are one."""

    overlap: float = 0.95  # of boxes, intersection over union, at the least; of masks, too
    score: float = 0.02  # difference at the most


@dataclass(frozen=True)
class SetComparison:
    """Detections of a candidate matched with the reference's, over the same images."""

    reference: str
    candidate: str
    images: int
    expected: int  # detections of the reference
    found: int  # of the candidate
    unmatched: int  # of both, that have no partner
    limit: int  # from what float32 does to the reference itself, see `set_limit`

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the candidate does not pass; empty if it does."""
        if self.unmatched <= self.limit:
            return ()
        return (
            f"{self.unmatched} of {self.expected + self.found} detections have no partner, limit "
            f"{self.limit}",
        )


def rows(name: str, tensors: Sequence[Array]) -> Array:
    """A tensor of all images as `[N, values]`: what is alike in kind stands in one column.

    Feature maps by channel, objectness and deltas by anchor of a place, the heads' by class. Of
    more than 32,768 rows so many, drawn by a seed: p2 of one image of 1333 pixels has 67,000.
    """
    if name == "objectness":
        parts = [tensor.reshape(-1, _RATIOS) for tensor in tensors]
    elif name == "deltas":
        parts = [tensor.reshape(-1, 4 * _RATIOS) for tensor in tensors]
    elif tensors[0].ndim == 4:
        parts = [np.moveaxis(tensor, 1, 3).reshape(-1, tensor.shape[1]) for tensor in tensors]
    else:
        parts = list(tensors)
    whole: Array = np.concatenate(parts)
    if len(whole) <= _MOST_ROWS:
        return whole
    return whole[np.random.default_rng(0).choice(len(whole), _MOST_ROWS, replace=False)]


class Stage:
    """What the reference's stage gives over the images, and what float32 does to it."""

    def __init__(
        self, role: Role, float32: Sequence[dict[str, Array]], float64: Sequence[dict[str, Array]]
    ) -> None:
        """Raises UsageError where a tensor does not vary, so that agreement would prove nothing."""
        self.role = role
        self.shapes = [{name: one[name].shape for name in OUTPUTS[role]} for one in float32]
        self.expected: dict[str, Array] = {}
        self.signals: dict[str, Signal] = {}
        self.noise: dict[str, Limits] = {}
        for name in OUTPUTS[role]:
            rounded, exact = (
                rows(name, [one[name] for one in all_]) for all_ in (float32, float64)
            )
            self.expected[name] = rounded
            try:
                self.signals[name] = Signal.of(rounded)
            except UsageError as error:
                raise UsageError(f"stage '{role}', tensor {name}: {error}") from None
            # Every column counts: a feature map has no class that hardly varies.
            self.noise[name] = compare(
                exact, rounded, signal=self.signals[name], limits=Limits(1, 1, 0)
            ).numbers

    def compared(
        self, given: Sequence[dict[str, Float32]], limits: dict[str, Limits], names: tuple[str, str]
    ) -> list[Comparison]:
        """One comparison a tensor of what a candidate gives for the reference's own inputs.

        Raises RexdeployError for tensors of other shapes.
        """
        return self._compared(self.expected, given, limits, names)

    def like(
        self,
        twin: Sequence[dict[str, Float32]],
        given: Sequence[dict[str, Float32]],
        rounding: dict[str, Limits],
        names: tuple[str, str],
    ) -> list[Comparison]:
        """The same beside the parent that rounds alike, a quarter of that `rounding` away."""
        expected = {name: rows(name, [one[name] for one in twin]) for name in OUTPUTS[self.role]}
        limits = {
            name: float32_limits(noise).plus(_ALIKE, rounding[name])
            for name, noise in self.noise.items()
        }
        return self._compared(expected, given, limits, names)

    def _compared(
        self,
        expected: dict[str, Array],
        given: Sequence[dict[str, Float32]],
        limits: dict[str, Limits],
        names: tuple[str, str],
    ) -> list[Comparison]:
        for known, own in zip(self.shapes, given, strict=True):
            for name, shape in known.items():
                if own[name].shape != shape:
                    raise RexdeployError(
                        f"its {name} has shape {list(own[name].shape)}, expected {list(shape)}"
                    )
        return [
            compare(
                expected[name],
                rows(name, [one[name] for one in given]),
                signal=self.signals[name],
                limits=limits[name],
                names=(names[0], f"{names[1]}: {name}"),
            )
            for name in OUTPUTS[self.role]
        ]


def unmatched(expected: Detections, found: Detections, alike: Alike | None = None) -> int:
    """How many detections of the two have no partner; partners are taken by overlap, best first."""
    alike = alike or Alike()
    overlaps = _overlaps(expected.boxes, found.boxes)
    same = expected.labels[:, None] == found.labels[None]
    close = np.abs(expected.scores[:, None] - found.scores[None]) <= alike.score
    pairs = np.argwhere(same & close & (overlaps >= alike.overlap))
    by_overlap = pairs[np.argsort(-overlaps[tuple(pairs.T)], kind="stable")]
    left, right = set[int](), set[int]()
    for first, second in by_overlap.tolist():
        if (
            first in left
            or second in right
            or not _same_masks(expected, found, first, second, alike)
        ):
            continue
        left.add(first)
        right.add(second)
    return len(expected) - len(left) + len(found) - len(right)


def set_limit(noise: int, total: int) -> int:
    """How many of `total` detections may be without a partner, where float32 alone leaves `noise`.

    Rounding near a threshold flips some of both: another runtime's rounding is as large, and
    flips others (three standard deviations of the count), so that none is no limit either.
    """
    return min(total // 4, round(noise + 3 * float(np.sqrt(noise + 1))))


def _same_masks(a: Detections, b: Detections, first: int, second: int, alike: Alike) -> bool:
    if a.masks is None or b.masks is None:
        return a.masks is b.masks
    one, other = from_rle(a.masks[first]), from_rle(b.masks[second])
    union = int((one | other).sum())
    return union == 0 or int((one & other).sum()) >= alike.overlap * union


def _overlaps(a: Float32, b: Float32) -> Array:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.prod(np.maximum(high - low, 0), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - inside
    overlaps: Array = np.where(union > 0, inside / np.maximum(union, 1e-12), 1.0)
    return overlaps


@dataclass(frozen=True)
class Skip:
    """A file that was not compared, and why."""

    file: str
    reason: str


class Judge:
    """Runs the reference over images once, and then every file beside it."""

    def __init__(self, detector: nn.Module, spec: ModelSpec, images: Sequence[UInt8]) -> None:
        """`images` are uint8 RGB `[H, W, 3]` of any sizes."""
        self._detector, self._images, self._spec = detector, list(images), spec
        self._has_masks = spec.task == "segment"
        exact = reference.sized(copy.deepcopy(detector).double(), spec)
        own = reference.torch_stages(detector, self._has_masks)
        doubled = reference.torch_stages(exact, self._has_masks, is_double=True)
        traces = [self._trace(own, pixels) for pixels in self._images]
        # The masks of what is proposed, not of what is detected: that may be nothing.
        few = {name: slice(None, _MASKS) for name in ROIS}
        self._inputs: dict[Role, list[Tensors]] = {
            "features": [one.inputs["features"] for one in traces],
            "boxes": [one.inputs["boxes"] for one in traces],
            "masks": [
                {name: value[few.get(name, slice(None))] for name, value in given.items()}
                for given in (one.inputs["boxes"] for one in traces)
            ],
        }
        self._stages: dict[Role, Stage] = {}
        for role in own:
            float32, float64 = (
                [self._run(stages, role, given) for given in self._inputs[role]]
                for stages in (own, doubled)
            )
            self._stages[role] = Stage(role, float32, float64)
        self._wanted = [reference.detect(detector, image) for image in self._images]
        rounded = [reference.detect(exact, image, is_double=True) for image in self._images]
        self._noise = sum(map(unmatched, rounded, self._wanted))

    @property
    def roles(self) -> tuple[Role, ...]:
        """The detector's stages."""
        return tuple(self._stages)

    def compare(
        self, artifact: Artifact, model: ModelProto, parent: ModelProto | None
    ) -> list[Comparison]:
        """A graph's tensors beside the reference's, and a 16-bit one's beside its parent's.

        `parent` is the float32 graph that a 16-bit one was made from, and has passed. Raises
        RexdeployError where it cannot be run.
        """
        assert artifact.role is not None
        stage, role = self._stages[artifact.role], artifact.role
        limits = {name: float32_limits(noise) for name, noise in stage.noise.items()}
        alike, rooms = None, dict[str, Limits]()
        precision = precision_of(model)
        if precision != artifact.precision:
            raise RexdeployError(
                f"its products are {precision or 'of several types'}, and the manifest says "
                f"{artifact.precision}"
            )
        if precision not in (None, "fp32"):
            if parent is None or (rounded := twin(parent, model)) is None:
                raise RexdeployError("it is not its parent's graph in other types")
            alike = self._by_image(rounded.model, role)
            rounding = stage.compared(alike, limits, (PYTORCH, "rounded"))
            for edge, name in zip(rounding, stage.expected, strict=True):
                room = rooms[name] = edge.numbers
                constant = stage.signals[name].constant
                limits[name] = rounding_limits(
                    limits[name], room, GRAPH_MARGIN, precision, constant
                )
            model = as_typed(model)
        given, title = self._by_image(model, role), f"{artifact.file} ({ONNXRUNTIME})"
        found = stage.compared(given, limits, (PYTORCH, title))
        if alike is not None:
            found += stage.like(alike, given, rooms, ("its parent, rounded alike", title))
        return found

    def end_to_end(self, stages: Stages, name: str) -> SetComparison:
        """Detections of our own pipeline over these stages, beside torchvision's own."""
        found: list[Detections] = [self._trace(stages, image).detections for image in self._images]
        expected, count = sum(map(len, self._wanted)), sum(map(len, found))
        return SetComparison(
            reference="torchvision",
            candidate=name,
            images=len(self._images),
            expected=expected,
            found=count,
            unmatched=sum(map(unmatched, self._wanted, found)),
            limit=set_limit(self._noise, expected + count),
        )

    def _trace(self, stages: Stages, pixels: UInt8) -> Trace:
        spec = self._spec.preprocess
        prepared = prepare(pixels, spec.height, spec.width, spec.mean, spec.std)
        return trace(stages, prepared, (pixels.shape[0], pixels.shape[1]))

    def _by_image(self, model: ModelProto, role: Role) -> list[dict[str, Any]]:
        # GridSample and AveragePool, as engines get them, know no empty level.
        is_sampled = any(node.op_type == "GridSample" for node in model.graph.node)
        stage = OnnxStage(model.SerializeToString(), role, least=int(is_sampled))
        with ExitStack() as stack:
            stack.callback(stage.close)
            return [self._run({role: stage}, role, given) for given in self._inputs[role]]

    def _run(self, stages: Stages, role: Role, given: dict[str, Any]) -> dict[str, Any]:
        if role == "features":
            return stages[role].run(given)
        return run_heads(stages[role], role, given)
