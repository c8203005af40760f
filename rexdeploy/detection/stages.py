"""A detector's stages in PyTorch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rexdeploy.arrays import Float32
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.manifest import Role
from rexdeploy.detection.runtime import INPUTS, OUTPUTS, Stage, Tensors
from rexdeploy.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

PYTORCH, ONNXRUNTIME = "pytorch", "onnxruntime"


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


class TorchStage:
    """A stage of the reference in PyTorch, in float32 or (to measure its rounding) float64."""

    least = 0

    def __init__(self, module: nn.Module, role: Role, is_double: bool = False) -> None:
        self._inputs, self._outputs = INPUTS[role], OUTPUTS[role]
        self._module, self._is_double = module.double() if is_double else module, is_double

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        kind = np.float64 if self._is_double else np.float32
        with torch.inference_mode():
            given = self._module(
                *(torch.from_numpy(feeds[name].astype(kind)) for name in self._inputs)
            )
        tensors = given if isinstance(given, tuple) else (given,)
        return {name: tensor.numpy() for name, tensor in zip(self._outputs, tensors, strict=True)}

    def close(self) -> None: ...


def torch_stages(detector: nn.Module, masks: bool, is_double: bool = False) -> dict[Role, Stage]:
    """The reference's stages: torchvision's own modules."""
    from rexdeploy.models.detector_stages import BoxStage, FeatureStage, MaskStage

    modules: dict[Role, nn.Module] = {
        "features": FeatureStage(detector),
        "boxes": BoxStage(detector, grid_sample=False),
    }
    if masks:
        modules["masks"] = MaskStage(detector, grid_sample=False)
    return {role: TorchStage(module.eval(), role, is_double) for role, module in modules.items()}
