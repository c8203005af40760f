"""Faster and Mask R-CNN over a ReXNet: torchvision's own detectors, described by one configuration.

The features are those of the last block of each stride from 4 to 32, without the 1x1 head. Pyramid,
region proposals and heads are torchvision's defaults, and all parameter counts are then those that
the authors publish (their README, "Finetuning results"). Parameter names are torchvision's
(`backbone.fpn...`, `rpn...`, `roi_heads...`), with the classifier's own below `backbone.body.`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.models.rexnet import (
    CONFIGS,
    Family,
    RexNet,
    RexNetConfig,
    check_width,
    recalibrate_batch_norms,
)

COCO_CLASSES = 91  # category ids up to 90, and 0 for the background
FPN_CHANNELS = 256
MAX_DETECTOR_CLASSES = 10_000
_BLOCKS_BEGIN = 3  # in `features`: after the stem's convolution, batch norm and activation
_HEAD_LAYERS = 3  # at their end: the 1x1 convolution, batch norm and activation

# Chosen so that photographs give tens of detections, at widths 0.3 to 1.0 and 5 to 91 classes.
_SEED_SIZE, _SEED_CONTRASTS, _SEED_SMOOTHNESS = 256, (0.7, 1.0, 1.4, 2.0), 1.2
_SEED_BOXES, _SEED_MASKS = 64, 8  # of each image
_SPREAD = 2.0  # of a seeded network's objectness and class logits
_FOUND, _FOUND_SHARE = 0.05, 0.04  # torchvision's score threshold, and the share of boxes over it


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that decides a detector's shapes and arithmetic."""

    width: float
    num_classes: int = COCO_CLASSES  # with the background, which is class 0
    masks: bool = False  # Mask R-CNN; else Faster R-CNN
    family: Family = "rexnet"

    @property
    def backbone(self) -> RexNetConfig:
        """The classifier whose features are used; its own classes are not."""
        return CONFIGS[self.family](self.width, 1)

    @property
    def title(self) -> str:
        """`Mask R-CNN over rexnet 1.0`."""
        kind = "Mask" if self.masks else "Faster"
        return f"{kind} R-CNN over {self.family} {self.width:g}"


def stage_ends(config: RexNetConfig) -> tuple[int, ...]:
    """The blocks, counted from 0, whose outputs are the last at strides 4, 8, 16 and 32."""
    last = len(config.blocks) - 1
    ends = [
        index
        for index in range(len(config.blocks))
        if index == last or config.blocks[index + 1].stride == 2
    ]
    return tuple(ends[1:])  # the first is at stride 2


class Body(nn.Module):
    """A ReXNet up to its last block.

    Input: float32 `[N, 3, H, W]`, RGB, normalised. Output: the last feature maps at strides 4, 8,
    16 and 32, float32 `[N, C, H/stride, W/stride]`, rounded up, named "0" to "3".
    """

    def __init__(self, config: RexNetConfig) -> None:
        super().__init__()
        self.features = RexNet(config).features[:-_HEAD_LAYERS]
        self.ends = tuple(_BLOCKS_BEGIN + index for index in stage_ends(config))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self.ends:
                found[str(len(found))] = x
        return found


class Backbone(nn.Module):
    """A ReXNet and a feature pyramid: five float32 maps `[N, 256, ...]` at strides 4 to 64."""

    out_channels = FPN_CHANNELS

    def __init__(self, config: RexNetConfig) -> None:
        super().__init__()
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

        channels = [config.blocks[index].out_channels for index in stage_ends(config)]
        self.body = Body(config)
        self.fpn = FeaturePyramidNetwork(channels, FPN_CHANNELS, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(self.body(x))
        return maps


def build_detector(config: DetectorConfig) -> nn.Module:
    """Torchvision's `FasterRCNN` or `MaskRCNN` over the configured ReXNet, in evaluation mode.

    Its weights are torch's random ones, and nothing is downloaded. It takes a list of float32
    images `[3, H, W]` from 0 to 1, and gives a dictionary of boxes, labels, scores (and masks) for
    each. Raises UsageError for what no detector can have, BackendUnavailable without torchvision.
    """
    check_width(config.width)
    if not 2 <= config.num_classes <= MAX_DETECTOR_CLASSES:
        raise UsageError(
            f"number of classes: got {config.num_classes}, expected 2 to {MAX_DETECTOR_CLASSES}, "
            "the background among them"
        )
    detection = import_detection()
    make = detection.MaskRCNN if config.masks else detection.FasterRCNN
    model: nn.Module = make(Backbone(config.backbone), config.num_classes)
    return model.eval()


def import_detection() -> Any:
    """`torchvision.models.detection`; raises BackendUnavailable where there is none."""
    try:
        from torchvision.models import detection
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        what = "" if isinstance(error, ModuleNotFoundError) else f" (found one: {error})"
        raise BackendUnavailable(
            f"detection needs torchvision{what}: pip install 'rexdeploy[detect]'"
        ) from None
    return detection


@torch.no_grad()
def seeded_detector(config: DetectorConfig, body: dict[str, Tensor] | None, seed: int) -> nn.Module:
    """A detector whose weights are random, but for the body's where those are given.

    Torch's own random ones give every anchor the same objectness and every class the same score:
    any broken export agrees with them. Here the body's batch norms are those of drawn images, and
    each output layer is scaled by what it gives for them: objectness, class scores, offsets and
    masks then vary as a trained network's do, and the background wins nearly everywhere.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = build_detector(config)
        images = _images()
        if body is None:
            recalibrate_batch_norms(model.backbone.body, images)
        else:
            model.backbone.body.load_state_dict(body)
        maps = model.backbone(images)
        _seed_proposals(model.rpn.head, maps.values())
        boxes = _some_proposals(model, images, maps)
        heads, sizes = model.roi_heads, [(_SEED_SIZE, _SEED_SIZE)] * len(images)
        pooled = heads.box_roi_pool(maps, boxes, sizes)
        _seed_boxes(heads, pooled, [len(found) for found in boxes])
        if heads.mask_predictor is not None:
            few = [found[:_SEED_MASKS] for found in boxes]
            pooled = heads.mask_roi_pool(maps, few, sizes)
            hidden = heads.mask_head(pooled)
            hidden = heads.mask_predictor.relu(heads.mask_predictor.conv5_mask(hidden))
            _standardise(heads.mask_predictor.mask_fcn_logits, [hidden], _SPREAD)
    return model  # type: ignore[no-any-return]


def _images() -> Tensor:
    """Normalised images, weak to strong, with edges at every scale, mostly grey: `[N, 3, h, w]`."""
    count = len(_SEED_CONTRASTS)
    images = torch.zeros(count, 3, _SEED_SIZE, _SEED_SIZE)
    for octave in range(int(math.log2(_SEED_SIZE)) + 1):
        side = _SEED_SIZE >> octave
        noise = 2 * torch.randn(count, 1, side, side) + torch.randn(count, 3, side, side)
        scaled = nn.functional.interpolate(noise, (_SEED_SIZE, _SEED_SIZE), mode="nearest")
        images += scaled * _SEED_SMOOTHNESS**octave
    return images / images.std() * torch.tensor(_SEED_CONTRASTS).view(-1, 1, 1, 1)


def _seed_proposals(head: Any, maps: Iterable[Tensor]) -> None:
    convolution = head.conv[0][0]
    nn.init.kaiming_normal_(convolution.weight)
    nn.init.zeros_(convolution.bias)
    hidden = [head.conv(level) for level in maps]
    _standardise(head.cls_logits, hidden, _SPREAD)
    _standardise(head.bbox_pred, hidden, 0.3)  # of an anchor's size


def _some_proposals(model: Any, images: Tensor, maps: dict[str, Tensor]) -> list[Tensor]:
    """Boxes of each image, `[n, 4]`, as the seeded network itself proposes them."""
    from torchvision.models.detection.image_list import ImageList

    sizes = [(_SEED_SIZE, _SEED_SIZE)] * len(images)
    proposals, _ = model.rpn(ImageList(images, sizes), maps)
    return [boxes[torch.randperm(len(boxes))[:_SEED_BOXES]] for boxes in proposals]


def _seed_boxes(heads: Any, pooled: Tensor, counts: list[int]) -> None:
    for layer in (heads.box_head.fc6, heads.box_head.fc7):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    hidden, predictor = heads.box_head(pooled), heads.box_predictor
    _standardise(predictor.cls_score, [hidden], _SPREAD)
    _standardise(predictor.bbox_pred, [hidden], 1.0)  # a tenth of a box's size, see BoxCoder
    # How much the background may gain before a box has no class over the threshold.
    logits = predictor.cls_score(hidden).double()
    best, others = logits[:, 1:].max(1).values, logits[:, 1:].exp().sum(1)
    room = (best.exp() / _FOUND - others).clamp(min=1e-9).log() - logits[:, 0]
    of_images = torch.stack([part.quantile(1 - _FOUND_SHARE) for part in room.split(counts)])
    predictor.cls_score.bias[0] += of_images.quantile(2 / 3).float()


def _standardise(layer: Any, inputs: Iterable[Tensor], std: float) -> None:
    """Scales a layer so that each of its outputs has mean 0 and the given standard deviation."""
    nn.init.normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    outputs = torch.cat([layer(x).movedim(1, -1).flatten(0, -2) for x in inputs])
    scale = std / outputs.std(0)
    layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.copy_(-scale * outputs.mean(0))
