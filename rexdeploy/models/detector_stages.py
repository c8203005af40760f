"""A detector in three parts without a decision between them, as they are exported and run.

Features and proposals' raw outputs, the box head, the mask head. What lies between (anchors,
decoding, choosing, and which level a box is pooled from) is the caller's. Each part computes what
torchvision's detector computes there, with its own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

POOLED_STRIDES = (4, 8, 16, 32)  # of the feature maps p2 to p5, which the heads read
SIZE_MULTIPLE = 32  # what the height and width of the features' images must divide by
_OUTSIDE = 3.0  # in units in which the map goes from -1 to 1
_SAMPLES = 2  # torchvision's sampling ratio: points of a pooled value, each way


class FeatureStage(nn.Module):
    """Backbone, feature pyramid and the head of the region proposals.

    Input: float32 `[N, 3, H, W]`, RGB, normalised, H and W multiples of 32. Outputs, float32: the
    feature maps p2 to p5, `[N, 256, H/4, W/4]` to `[N, 256, H/32, W/32]`; objectness logits
    `[N, A]` and box deltas `[N, A, 4]`, whose A anchors run over the levels p2 to p6, rows, columns
    and the anchors of one place, as in torchvision.
    """

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.body = detector.backbone.body
        self.fpn = detector.backbone.fpn
        self.head = detector.rpn.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        p2, p3, p4, p5 = self._pyramid(list(self.body(images).values()))
        # LastLevelMaxPool: every second value.
        p6 = nn.functional.max_pool2d(p5, kernel_size=1, stride=2)
        objectness, deltas = self.head([p2, p3, p4, p5, p6])
        return (
            *(p2, p3, p4, p5),
            torch.cat([_by_anchor(level, 1).flatten(1) for level in objectness], dim=1),
            torch.cat([_by_anchor(level, 4) for level in deltas], dim=1),
        )

    def _pyramid(self, maps: list[Tensor]) -> list[Tensor]:
        """Torchvision's feature pyramid, where each level is exactly half the one before.

        A constant scale is one node of a graph; its own interpolation to a size is seven.
        """
        inner = self.fpn.inner_blocks[-1](maps[-1])
        levels = [self.fpn.layer_blocks[-1](inner)]
        for index in reversed(range(len(maps) - 1)):
            upper = nn.functional.interpolate(inner, scale_factor=2.0, mode="nearest")
            inner = self.fpn.inner_blocks[index](maps[index]) + upper
            levels.insert(0, self.fpn.layer_blocks[index](inner))
        return levels


class BoxStage(nn.Module):
    """RoIAlign over four levels, and the box head.

    Inputs, float32: one image's feature maps p2 to p5, `[1, 256, h, w]`, and the boxes to pool from
    each, `[K_l, 4]`: x1, y1, x2, y2 in pixels of the features' image, and within it. Outputs,
    float32, for the K boxes of all levels in turn: class logits `[K, C]`, the background's first,
    and box deltas `[K, 4C]`.
    """

    def __init__(self, detector: Any, grid_sample: bool) -> None:
        super().__init__()
        self.pool = _RoIAlign(detector.roi_heads.box_roi_pool, grid_sample)
        self.head = detector.roi_heads.box_head
        self.predictor = detector.roi_heads.box_predictor

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        rois2: Tensor,
        rois3: Tensor,
        rois4: Tensor,
        rois5: Tensor,
    ) -> tuple[Tensor, Tensor]:
        pooled = self.pool((p2, p3, p4, p5), (rois2, rois3, rois4, rois5))
        logits, deltas = self.predictor(self.head(pooled))
        return logits, deltas


class MaskStage(nn.Module):
    """RoIAlign over four levels, and the mask head.

    Inputs as of `BoxStage`. Output: float32 mask logits `[K, C, 28, 28]`.
    """

    def __init__(self, detector: Any, grid_sample: bool) -> None:
        super().__init__()
        self.pool = _RoIAlign(detector.roi_heads.mask_roi_pool, grid_sample)
        self.head = detector.roi_heads.mask_head
        self.predictor = detector.roi_heads.mask_predictor

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        rois2: Tensor,
        rois3: Tensor,
        rois4: Tensor,
        rois5: Tensor,
    ) -> Tensor:
        pooled = self.pool((p2, p3, p4, p5), (rois2, rois3, rois4, rois5))
        masks: Tensor = self.predictor(self.head(pooled))
        return masks


class _RoIAlign(nn.Module):
    """Torchvision's MultiScaleRoIAlign on boxes that are split by level already."""

    def __init__(self, pooler: Any, grid_sample: bool) -> None:
        super().__init__()
        assert pooler.sampling_ratio == _SAMPLES
        (self.size,) = set(pooler.output_size)
        self.grid_sample = grid_sample

    def forward(self, maps: tuple[Tensor, ...], rois: tuple[Tensor, ...]) -> Tensor:
        align = _sampled if self.grid_sample else _aligned
        pooled = [
            align(level, boxes, self.size, 1.0 / stride)
            for level, boxes, stride in zip(maps, rois, POOLED_STRIDES, strict=True)
        ]
        return torch.cat(pooled)


def _aligned(level: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """Torchvision's own: `[1, C, h, w]` and `[K, 4]` to `[K, C, size, size]`."""
    from torchvision.ops import roi_align

    rois = torch.cat([torch.zeros_like(boxes[:, :1]), boxes], dim=1)
    pooled: Tensor = roi_align(level, rois, (size, size), scale, _SAMPLES, aligned=False)
    return pooled


def _sampled(level: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """The same as a bilinear grid and an average, for runtimes without RoIAlign.

    One grid holds the points of all boxes below each other, so that the features are read in place
    and not once for each box.
    """
    points = size * _SAMPLES
    units = _points(level, boxes * scale, points)
    x = units[:, None, :, 0].expand(-1, points, -1)
    y = units[:, :, None, 1].expand(-1, -1, points)
    sampled = nn.functional.grid_sample(
        level,
        torch.stack([x, y], dim=-1).reshape(1, -1, points, 2),
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    pooled = nn.functional.avg_pool2d(sampled, _SAMPLES)
    return pooled.reshape(level.shape[1], -1, size, size).transpose(0, 1)


def _points(level: Tensor, boxes: Tensor, points: int) -> Tensor:
    """Where boxes are sampled along x and y, in grid_sample's units: `[K, points, 2]`.

    As RoIAlign does with `aligned=False`: no box is narrower than one value of the map, and points
    are moved to the border values; but those further than one value over the far border count as
    zero. A narrow box at that border has such points, so the padding is "zeros" and not "border".
    """
    start = boxes[:, None, :2]
    extent = (boxes[:, None, 2:] - start).clamp(min=1.0)
    places = (torch.arange(points, dtype=boxes.dtype, device=boxes.device) + 0.5) / points
    at = start + extent * places[:, None]
    sizes = [torch.scalar_tensor(level.shape[axis], dtype=boxes.dtype) for axis in (3, 2)]
    length = torch.stack(sizes).to(boxes.device)
    unit = (2.0 * torch.minimum(at, length - 1.0).clamp(min=0.0) + 1.0) / length - 1.0
    return torch.where(at > length, _OUTSIDE, unit)


def _by_anchor(level: Tensor, values: int) -> Tensor:
    """`[N, anchors * values, h, w]` to `[N, h * w * anchors, values]`."""
    batch, channels, height, width = level.shape
    split = level.reshape(batch, channels // values, values, height, width)
    return split.permute(0, 3, 4, 1, 2).reshape(batch, -1, values)
