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

from onnx import ModelProto

from rexdeploy.arrays import UInt8
from rexdeploy.bundle.manifest import Artifact, ModelSpec, Role
from rexdeploy.detection import reference
from rexdeploy.detection.compare import SetComparison, Stage, set_limit, unmatched
from rexdeploy.detection.preprocess import prepare
from rexdeploy.detection.result import Detections
from rexdeploy.detection.runtime import Stages, Trace, run_heads, trace
from rexdeploy.detection.stages import ONNXRUNTIME, PYTORCH, OnnxStage, torch_stages
from rexdeploy.errors import RexdeployError
from rexdeploy.graphs.emulate import as_typed, twin
from rexdeploy.graphs.products import precision_of
from rexdeploy.parity.compare import Comparison, Limits
from rexdeploy.parity.limits import GRAPH_MARGIN, float32_limits, rounding_limits

if TYPE_CHECKING:
    from torch import nn


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
        own = torch_stages(detector, self._has_masks)
        doubled = torch_stages(exact, self._has_masks, is_double=True)
        self._traces = [self._trace(own, pixels) for pixels in self._images]
        self._stages: dict[Role, Stage] = {}
        for role in own:
            given = [one.inputs[role] for one in self._traces if one.outputs.get(role)]
            float64 = [self._run(doubled, role, one) for one in given]
            self._stages[role] = Stage(role, [one.outputs[role] for one in self._traces], float64)
        self._wanted = [reference.detect(detector, image) for image in self._images]
        rounded = [reference.detect(exact, image, is_double=True) for image in self._images]
        self._noise = sum(map(unmatched, rounded, self._wanted))

    @property
    def roles(self) -> tuple[Role, ...]:
        """The detector's stages."""
        return tuple(self._stages)

    def compare(
        self, artifact: Artifact, model: ModelProto, parent: tuple[str, ModelProto] | None
    ) -> list[Comparison]:
        """A graph's tensors beside the reference's; `parent` is what a 16-bit one was made from.

        Raises RexdeployError where it cannot be run.
        """
        assert artifact.role is not None
        stage, role = self._stages[artifact.role], artifact.role
        limits = {name: float32_limits(noise) for name, noise in stage.noise.items()}
        precision = precision_of(model)
        if precision != artifact.precision:
            raise RexdeployError(
                f"its products are {precision or 'of several types'}, and the manifest says "
                f"{artifact.precision}"
            )
        if precision not in (None, "fp32"):
            if parent is None or (rounded := twin(parent[1], model)) is None:
                raise RexdeployError("it is not its parent's graph in other types")
            rounding = stage.compared(
                self._by_image(rounded.model, role), limits, (PYTORCH, "rounded")
            )
            for edge, name in zip(rounding, stage.expected, strict=True):
                room: Limits = edge.numbers
                constant = stage.signals[name].constant
                limits[name] = rounding_limits(
                    limits[name], room, GRAPH_MARGIN, precision, constant
                )
            model = as_typed(model)
        given = self._by_image(model, role)
        return stage.compared(given, limits, (PYTORCH, f"{artifact.file} ({ONNXRUNTIME})"))

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
        stage = OnnxStage(model.SerializeToString(), role)
        with ExitStack() as stack:
            stack.callback(stage.close)
            return [self._run({role: stage}, role, one.inputs[role]) for one in self._traces]

    def _run(self, stages: Stages, role: Role, given: dict[str, Any]) -> dict[str, Any]:
        if role == "features":
            return stages[role].run(given)
        return run_heads(stages[role], role, given)
