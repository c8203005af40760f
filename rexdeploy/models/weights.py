"""The weights that a command is given: a file or the published ones, against its options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rexdeploy.bundle.manifest import WeightsOrigin
from rexdeploy.errors import UsageError
from rexdeploy.files import sha256_of
from rexdeploy.models.checkpoints import Checkpoint, load_checkpoint
from rexdeploy.models.rexnet import CONFIGS, Family
from rexdeploy.models.zoo import fetch_pretrained
from rexdeploy.text import printable


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
