"""Detects objects in image files and folders of them, and draws what was found."""

from __future__ import annotations

import colorsys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rexdeploy.bundle.store import Bundle
from rexdeploy.detection.detector import Detector, chosen, load_detector
from rexdeploy.detection.masks import Rle, from_rle
from rexdeploy.detection.runtime import Choice, Detections
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import replacing
from rexdeploy.images import decode
from rexdeploy.inference.stream import expand
from rexdeploy.progress import Result, several
from rexdeploy.text import one_line, printable

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}


@dataclass(frozen=True)
class Found:
    """One object in one image."""

    index: int
    label: str
    score: float  # 0 to 1
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    mask: Rle | None  # COCO's uncompressed run lengths


@dataclass(frozen=True)
class DetectionRow:
    """What one image shows, the highest score first; or why that is not known."""

    file: str
    error: str | None
    objects: tuple[Found, ...]


@dataclass(frozen=True, repr=False)
class DetectionRun(Result):
    """What became of some images."""

    model: str
    backend: str
    images: tuple[DetectionRow, ...]

    @property
    def errors(self) -> int:
        """How many images could not be read."""
        return sum(row.error is not None for row in self.images)

    def __repr__(self) -> str:
        return (
            f"<Detections of {self.model} on {self.backend}: {len(self.images)} images, "
            f"{sum(len(row.objects) for row in self.images)} objects, {self.errors} errors>"
        )


def detect(
    image: Path | str | Sequence[Path | str],
    bundle: Bundle | Path | str | None = None,
    *,
    score: float = Choice.score,
    max_detections: int = Choice.limit,
    draw: Path | str | None = None,
    backend: str = "auto",
    require_signature: Path | str | None = None,
    began: Callable[[Detector], None] | None = None,
    each: Callable[[DetectionRow], None] | None = None,
) -> DetectionRun:
    """Detects objects in image files, and those in folders.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. Objects have
    a score of `score` or more, at most `max_detections` an image. `draw` is a picture to write
    (.png, .jpg) for one image, or for several a folder, which is made. `began` is told what runs,
    and `each` takes every row as it comes.

    An image that cannot be read is a row with its error. Raises UsageError, BackendUnavailable
    where nothing can run, and RexdeployError where the network fails.

    Example: `rexdeploy.detect("street.jpg", "rexnet_1.0_detect", draw="out.png").images[0].objects`
    """
    chosen(score, max_detections)
    files = [Path(file) for file in expand([Path(one) for one in several(image)])]
    target = None if draw is None else _target(Path(draw), files)
    rows = []
    with load_detector(bundle, backend, require_signature=require_signature) as detector:
        if began is not None:
            began(detector)
        for file in files:
            row = _row(detector, file, score, max_detections, target)
            rows.append(row)
            if each is not None:
                each(row)
    return DetectionRun(detector.title, detector.backend, tuple(rows))


def _target(draw: Path, files: Sequence[Path]) -> Callable[[Path], Path]:
    """Where each file's picture goes; raises UsageError."""
    if len(files) == 1:
        if draw.suffix.lower() not in FORMATS:
            raise UsageError(f"draw: got {draw}, expected a name that ends in {', '.join(FORMATS)}")
        _check_apart(draw, files)
        return lambda _: draw
    names = [file.stem for file in files]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"draw: two images are called {twice}; draw them apart")
    if draw.exists() and not draw.is_dir():
        raise UsageError(f"draw: got {draw}, expected a folder for the pictures of several images")
    try:
        draw.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"draw: cannot make the folder {draw} ({error.strerror})") from None
    for name in names:
        _check_apart(draw / f"{name}.png", files)
    return lambda file: draw / f"{file.stem}.png"


def _check_apart(picture: Path, files: Sequence[Path]) -> None:
    """Raises UsageError where a picture would take the place of an image."""
    if picture.exists() and any(file.exists() and picture.samefile(file) for file in files):
        raise UsageError(f"draw: {picture} is one of the images; give another place")


def _row(
    detector: Detector,
    file: Path,
    score: float,
    limit: int,
    target: Callable[[Path], Path] | None,
) -> DetectionRow:
    try:
        image = decode.load(file)
        (found,) = detector.detect([image], score, limit)
    except UsageError as error:  # it cannot be read, or is too thin to resize
        return DetectionRow(printable(str(file)), one_line(str(error)), ())
    if target is not None:
        _write(drawn(image, found, detector.labels), target(file))
    return DetectionRow(printable(str(file)), None, tuple(_objects(found, detector.labels)))


def _write(picture: Image.Image, path: Path) -> None:
    try:
        with replacing(path) as out:
            picture.save(out, FORMATS[path.suffix.lower()])
    except OSError as error:
        raise RexdeployError(f"cannot write {path} ({error.strerror or error})") from None


def _objects(found: Detections, labels: Sequence[str]) -> list[Found]:
    masks = found.masks or [None] * len(found)
    return [
        Found(int(label), labels[label], float(score), (box[0], box[1], box[2], box[3]), mask)
        for label, score, box, mask in zip(
            found.labels, found.scores, found.boxes.tolist(), masks, strict=True
        )
    ]


def drawn(image: Image.Image, found: Detections, labels: Sequence[str]) -> Image.Image:
    """A copy of an RGB image with boxes, labels and masks, one colour a class."""
    made: Any = np.array(image)
    for label, mask in zip(found.labels.tolist(), found.masks or (), strict=False):
        inside = from_rle(mask)
        made[inside] = (made[inside].astype(np.float32) + _colour(label)) / 2
    picture = Image.fromarray(made)
    pen = ImageDraw.Draw(picture)
    width = max(1, round(max(image.size) / 400))
    for label, score, box in zip(
        found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True
    ):
        pen.rectangle(box, outline=_colour(label), width=width)
        text = f"{one_line(labels[label], 40)} {score:.0%}"
        frame = pen.textbbox((box[0], box[1]), text)
        pen.rectangle(frame, fill=_colour(label))
        pen.text((box[0], box[1]), text, fill=(0, 0, 0))
    return picture


def _colour(label: int) -> tuple[int, int, int]:
    """A bright colour; neighbours in the list of classes differ (the golden angle)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.7, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
