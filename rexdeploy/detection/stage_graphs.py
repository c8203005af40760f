"""The ONNX graphs of a detector's stages: what between them is decided is no part of them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from onnx import ModelProto
from torch import nn
from torch.export import Dim

from rexdeploy.errors import UsageError
from rexdeploy.graphs.from_torch import MIN_OPSET, export_module
from rexdeploy.models.detector import FPN_CHANNELS
from rexdeploy.models.detector_stages import (
    POOLED_STRIDES,
    SIZE_MULTIPLE,
    BoxStage,
    FeatureStage,
    MaskStage,
)

Role = Literal["features", "boxes", "masks"]
_LEVELS = (2, 3, 4, 5)
MAPS = tuple(f"p{level}" for level in _LEVELS)
ROIS = tuple(f"rois{level}" for level in _LEVELS)
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
_SAMPLE_SIZE = (128, 160)  # different, and more than one value on every level


def stage_graphs(
    detector: nn.Module, masks: bool, grid_sample: bool, opset: int = MIN_OPSET
) -> dict[Role, ModelProto]:
    """All graphs of torchvision's detector over a ReXNet, float32, as torch exports them.

    Inputs and outputs are those of the stages in `models/detector_stages.py`, by the names in
    `INPUTS` and `OUTPUTS`. Raises UsageError if masks are asked of a detector that has none.
    """
    heads = head_graphs(detector, masks, grid_sample, opset)
    return {"features": feature_graph(detector, opset), **heads}


def feature_graph(detector: nn.Module, opset: int = MIN_OPSET) -> ModelProto:
    """`FeatureStage`: any batch, and any height and width that are multiples of 32."""
    sizes = {
        0: Dim("batch"),
        2: SIZE_MULTIPLE * Dim("rows", min=1),
        3: SIZE_MULTIPLE * Dim("columns", min=1),
    }
    samples = (torch.zeros(2, 3, *_SAMPLE_SIZE),)  # torch.export specialises on a batch of 1
    return _graph(FeatureStage(detector), "features", samples, (sizes,), opset)


def head_graphs(
    detector: nn.Module, masks: bool, grid_sample: bool, opset: int = MIN_OPSET
) -> dict[Role, ModelProto]:
    """`BoxStage`, and `MaskStage` if masks are asked for: one image, any number of boxes.

    With `grid_sample` the pooling is GridSample and AveragePool, for builders without RoiAlign, and
    each level needs at least one box; RoiAlign takes none, too.
    """
    heads: dict[Role, nn.Module] = {"boxes": BoxStage(detector, grid_sample)}
    if masks:
        if getattr(detector.roi_heads, "mask_predictor", None) is None:
            raise UsageError("masks: got a detector without a mask head; export it without masks")
        heads["masks"] = MaskStage(detector, grid_sample)
    height, width = _SAMPLE_SIZE
    samples = (
        *(torch.zeros(1, FPN_CHANNELS, height // s, width // s) for s in POOLED_STRIDES),
        *(torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(level, 1) for level in _LEVELS),
    )
    sizes = (
        *({2: Dim(f"height{level}"), 3: Dim(f"width{level}")} for level in _LEVELS),
        *({0: Dim(f"boxes{level}")} for level in _LEVELS),
    )
    return {role: _graph(stage, role, samples, sizes, opset) for role, stage in heads.items()}


def _graph(
    stage: nn.Module,
    role: Role,
    samples: tuple[torch.Tensor, ...],
    sizes: tuple[dict[int, Any], ...],
    opset: int,
) -> ModelProto:
    graph = export_module(stage.eval(), samples, sizes, INPUTS[role], OUTPUTS[role], opset)
    _name_sizes(graph)
    return graph


def _name_sizes(graph: ModelProto) -> None:
    """Plain names for the open sizes of outputs, which torch.export gives as formulas."""
    for value in graph.graph.output:
        dims = value.type.tensor_type.shape.dim
        counted = "anchors" if value.name in ("objectness", "deltas") else "boxes"
        names = {
            **({0: "batch"} if value.name in OUTPUTS["features"] else {0: counted}),
            1: counted,
            2: f"height{value.name[1:]}",
            3: f"width{value.name[1:]}",
        }
        for place, dim in enumerate(dims):
            if dim.HasField("dim_param"):
                dim.dim_param = names[place]
