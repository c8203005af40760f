"""The weights that a command is given: a file or the published ones, against its options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rexdeploy.bundle.manifest import WeightsOrigin
from rexdeploy.errors import UsageError
from rexdeploy.files import sha256_of
from rexdeploy.models.checkpoints import (
    Checkpoint,
    StateDict,
    complete,
    known_checkpoint,
    load_checkpoint,
    nearest_width,
    read_state_dict,
)
from rexdeploy.models.detector import (
    COCO_CLASSES,
    Body,
    DetectorConfig,
    build_detector,
    seeded_detector,
)
from rexdeploy.models.rexnet import CONFIGS, Family
from rexdeploy.models.zoo import fetch_pretrained
from rexdeploy.text import printable

_BODY = "backbone.body."
_CLASSES, _MASKS = "roi_heads.box_predictor.cls_score.weight", "roi_heads.mask_predictor."


@dataclass(frozen=True)
class DetectorWeights:
    """A detector's weights, and which of them somebody has trained."""

    config: DetectorConfig
    state_dict: StateDict  # torchvision's names, float32
    body_trained: bool  # the ReXNet below the feature pyramid
    heads_trained: bool  # all that stands above it

    def build(self) -> nn.Module:
        """The detector with these weights, in evaluation mode."""
        model = build_detector(self.config)
        model.load_state_dict(self.state_dict)
        return model


def read_weights(
    lite: bool, width: float | None, num_classes: int | None, weights: Path | str
) -> tuple[Checkpoint, WeightsOrigin]:
    """A checkpoint's file, or the "pretrained" one; raises UsageError where an option contradicts.

    Of several widths that are one network (lite has such) it is the one asked for.
    """
    if weights == "pretrained":
        family: Family = "rexnet_lite" if lite else "rexnet"
        path, source = fetch_pretrained(family, 1.0 if width is None else width)
    else:
        path, source = Path(weights), printable(Path(weights).name)
    checkpoint = load_checkpoint(path)
    _check_agrees(lite, width, num_classes, checkpoint, path)
    if width is not None:  # several widths of lite have one shape: keep the one asked for
        checkpoint = replace(checkpoint, width=width)
    return checkpoint, WeightsOrigin(source, sha256_of(path), trained=True)


def _check_agrees(
    lite: bool,
    width: float | None,
    num_classes: int | None,
    checkpoint: Checkpoint,
    path: Path,
) -> None:
    """Raises UsageError where an option contradicts what the checkpoint's weights say."""
    if lite and checkpoint.family != "rexnet_lite":
        raise UsageError(
            f"--lite contradicts {path}, which holds a {checkpoint.family} "
            f"{checkpoint.width:g}; leave --lite out"
        )
    config = CONFIGS[checkpoint.family]
    if width is not None and config(width, checkpoint.num_classes) != config(
        checkpoint.width, checkpoint.num_classes
    ):
        raise UsageError(
            f"--width {width:g} contradicts {path}, which holds a {checkpoint.family} "
            f"{checkpoint.width:g}; leave --width out"
        )
    if num_classes not in (None, checkpoint.num_classes):
        raise UsageError(
            f"--num-classes {num_classes} contradicts {path}, which has "
            f"{checkpoint.num_classes} classes; leave --num-classes out"
        )


def load_detector(
    source: Path | Mapping[str, Tensor] | None,
    *,
    masks: bool | None = None,
    width: float | None = None,
    num_classes: int | None = None,
    family: Family | None = None,
    seed: int = 0,
) -> DetectorWeights:
    """A detector's weights from a file or a state dict; None: all of them seeded.

    A whole detector in torchvision's names loads strictly, and says its own width, classes and
    masks. A classifier (published or timm's names) gives the body, and the rest is seeded. What is
    given beside it must agree with the weights; where they do not say it, and it is not given, it
    is a Faster R-CNN over rexnet 1.0 with COCO's 91 classes. Raises UsageError for what does not
    fit, BackendUnavailable without torchvision.
    """
    path = source if isinstance(source, Path) else Path("state dict")
    state = read_state_dict(source) if isinstance(source, Path) else dict(source or {})
    if any(name.startswith(("backbone.", "rpn.", "roi_heads.")) for name in state):
        config = _agreed(_detector_of(state, path), path, masks, width, num_classes, family)
        return DetectorWeights(config, _whole(state, config, path), True, True)
    classes = COCO_CLASSES if num_classes is None else num_classes
    kind = family or "rexnet"
    if source is None:
        return _seeded(
            DetectorConfig(1.0 if width is None else width, classes, bool(masks), kind), None, seed
        )
    is_file = isinstance(source, Path)
    classifier = load_checkpoint(path) if is_file else known_checkpoint(state, path)
    config = DetectorConfig(classifier.width, classes, bool(masks), classifier.family)
    config = _agreed(config, path, None, width, None, family)
    return _seeded(config, classifier, seed)


def _seeded(config: DetectorConfig, classifier: Checkpoint | None, seed: int) -> DetectorWeights:
    body = None
    if classifier is not None:
        with torch.device("meta"):
            names = Body(config.backbone).state_dict()
        body = {name: classifier.state_dict[name] for name in names}
    model = seeded_detector(config, body, seed)
    return DetectorWeights(config, model.state_dict(), body is not None, heads_trained=False)


def _detector_of(state: StateDict, path: Path) -> DetectorConfig:
    """What the weights of a detector are of, by their names and shapes."""
    if f"{_BODY}features.0.weight" not in state:
        found = next((name for name in state if name.startswith("backbone.")), "no backbone")
        raise UsageError(
            f"weights {path}: a detector, but not over a ReXNet: got {found}, expected "
            f"{_BODY}features.0.weight (torchvision's names, with the published ones below)"
        )
    classes = state.get(_CLASSES)
    if classes is None or classes.ndim != 2:
        got = "no tensor" if classes is None else f"shape {list(classes.shape)}"
        raise UsageError(f"weights {path}: got {got} as {_CLASSES}, expected [classes, 1024]")
    body = {name.removeprefix(_BODY): t for name, t in state.items() if name.startswith(_BODY)}
    # Squeeze-excitation, which lite has not.
    family: Family = "rexnet" if any(".fc." in name for name in body) else "rexnet_lite"
    has_masks = any(name.startswith(_MASKS) for name in state)
    return DetectorConfig(nearest_width(family, body, path), classes.shape[0], has_masks, family)


def _whole(state: StateDict, config: DetectorConfig, path: Path) -> StateDict:
    with torch.device("meta"):
        expected = build_detector(config).state_dict()
    has_masks = any(name.startswith(_MASKS) for name in state)
    if has_masks and not config.masks:  # those that it has need not be used
        state = {name: t for name, t in state.items() if not name.startswith("roi_heads.mask_")}
    return complete(state, expected, config.title, path)


def _agreed(
    found: DetectorConfig,
    path: Path,
    masks: bool | None,
    width: float | None,
    num_classes: int | None,
    family: Family | None,
) -> DetectorConfig:
    """The configuration that the weights say; raises UsageError where something else is asked for.

    Of several widths that are one network (lite has such) it is the one asked for.
    """
    asked = DetectorConfig(
        found.width if width is None else width,
        found.num_classes if num_classes is None else num_classes,
        found.masks if masks is None else masks,
        family or found.family,
    )
    same = asked.backbone == found.backbone and asked.num_classes == found.num_classes
    # The masks that a detector can give need not be used.
    if not same or (asked.masks and not found.masks):
        raise UsageError(
            f"weights {path}: got a {found.title} with {found.num_classes} classes, asked for a "
            f"{asked.title} with {asked.num_classes}; leave out what contradicts, or give others"
        )
    return replace(found, width=asked.width, masks=asked.masks)
