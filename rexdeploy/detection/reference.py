"""The reference of a detector's bundle: torchvision's own detector, rebuilt from the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rexdeploy.arrays import UInt8
from rexdeploy.bundle.manifest import ModelSpec, Role
from rexdeploy.detection.masks import to_rle
from rexdeploy.detection.runtime import INPUTS, OUTPUTS, Detections, Stage
from rexdeploy.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from torch import nn


def rebuilt(weights: bytes, spec: ModelSpec) -> nn.Module:
    """The detector in evaluation mode, with the bundle's sizes; raises UsageError for a misfit.

    Raises BackendUnavailable without torch or torchvision.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise BackendUnavailable(
            "the reference needs torch: pip install 'rexdeploy[detect]'"
        ) from None
    from rexdeploy.models.detector import DetectorConfig, build_detector

    if spec.width is None or spec.family == "onnx":
        raise UsageError("this bundle holds somebody's own graph: it has no PyTorch code")
    masks = spec.task == "segment"
    model: Any = build_detector(DetectorConfig(spec.width, spec.num_classes, masks, spec.family))
    try:
        model.load_state_dict(safetensors.torch.load(weights))
    except (RuntimeError, safetensors.SafetensorError) as error:
        raise UsageError(
            f"the bundle's weights do not fit {spec.title} ({str(error).splitlines()[0]}); "
            "run 'rexdeploy export' again"
        ) from None
    return sized(model, spec)


def sized(model: Any, spec: ModelSpec) -> nn.Module:
    """The detector with the bundle's own preprocessing."""
    from torchvision.ops.poolers import initLevelMapper

    from rexdeploy.models.detector_stages import POOLED_STRIDES

    # Torchvision guesses these from the first image, below 46 pixels wrongly.
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        if pool is not None:
            pool.scales = [1 / stride for stride in POOLED_STRIDES]
            pool.map_levels = initLevelMapper(2, 5)
    model.transform.min_size = (spec.preprocess.height,)
    model.transform.max_size = spec.preprocess.width
    model.transform.image_mean = list(spec.preprocess.mean)
    model.transform.image_std = list(spec.preprocess.std)
    detector: nn.Module = model
    return detector


def detect(model: nn.Module, pixels: UInt8, is_double: bool = False) -> Detections:
    """What torchvision's detector itself finds in uint8 RGB `[H, W, 3]`, from end to end.

    With `is_double` the model has to be one of float64.
    """
    import torch

    kind = torch.float64 if is_double else torch.float32
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).to(kind) / 255
    with torch.inference_mode():
        (found,) = model([image])
    masks = None
    if "masks" in found:
        masks = tuple(to_rle((mask[0] > 0.5).numpy()) for mask in found["masks"])
    return Detections(
        boxes=found["boxes"].float().numpy(),
        scores=found["scores"].float().numpy(),
        labels=found["labels"].numpy(),
        masks=masks,
    )


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
