"""Images to quantise by, and others to judge the result by; what no range can be taken from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rexdeploy.arrays import UInt8
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import UsageError
from rexdeploy.images.decode import read
from rexdeploy.images.labelled import find_labelled
from rexdeploy.images.sets import find
from rexdeploy.text import one_line, printable

LEAST = 8
FEW = 100  # below them the ranges are worth a warning
FEW_JUDGED = 500  # below them one answer is more than a fifth of a point
CALIBRATED = 128
JUDGED = 2048


@dataclass(frozen=True)
class Pools:
    """Images to take ranges from, and images to judge by, uint8 RGB `[N, H, W, 3]`."""

    calibrated: UInt8
    judged: UInt8
    shown: tuple[int, ...] | None  # the classes that the judged ones show; None: not known
    calibrated_as: str
    judged_as: str
    warnings: tuple[str, ...]


def read_pools(calib: Path, data: Path | None, labels: Sequence[str], spec: Preprocess) -> Pools:
    """CALIBRATED images of `calib` at the most, spread over all of it, and JUDGED to judge by.

    These are labelled ones of `data` (see `find_labelled`), or without it others of `calib`; where
    it has too few, the same ones. Raises UsageError for fewer than LEAST images that can be read,
    and for images of `calib` that hold one colour, or are there twice.
    """
    warnings: list[str] = []
    found = find(calib)
    wanted = min(len(found), CALIBRATED if data else CALIBRATED + JUDGED)
    paths = [found[index * len(found) // wanted] for index in range(wanted)]
    images = _read(paths, spec, "calib", calib, warnings)
    _check_different(images)
    pixels = list(images.values())
    if len(pixels) < FEW:
        warnings.append(f"{len(pixels)} images to take ranges from: {FEW} or more would be better")
    count = min(CALIBRATED, len(pixels))
    chosen = {index * len(pixels) // count for index in range(count)}
    calibrated = [pixels[index] for index in sorted(chosen)]
    judged = [image for index, image in enumerate(pixels) if index not in chosen]
    which, shown = f"others of {printable(str(calib))}", None
    if data is not None:
        labelled = find_labelled(data, labels).sampled(JUDGED, 0)
        classes = dict(zip(labelled.files, labelled.classes.tolist(), strict=True))
        by_path = {Path(labelled.folder) / file: label for file, label in classes.items()}
        known = _read(list(by_path), spec, "data", data, warnings)
        judged, shown = list(known.values()), tuple(by_path[path] for path in known)
        if len(judged) < FEW_JUDGED:
            warnings.append(
                f"{len(judged)} images to judge by: an answer is {100 / len(judged):.1f} points of "
                f"top-1; {FEW_JUDGED} or more would be better"
            )
        which = f"labelled ones of {printable(str(data))}"
    elif len(judged) < count:
        judged, which = calibrated, "the same"
    return Pools(
        np.stack(calibrated),
        np.stack(judged),
        shown,
        f"{len(calibrated)} images of {printable(str(calib))}",
        f"{len(judged)} images ({which})",
        tuple(warnings),
    )


def _read(
    paths: Sequence[Path], spec: Preprocess, name: str, folder: Path, warnings: list[str]
) -> dict[Path, UInt8]:
    """The images that can be read, by path; what cannot is told in `warnings`."""

    def load(path: Path) -> UInt8 | str:
        try:
            return read(path, spec)
        except UsageError as error:
            return one_line(str(error))

    with ThreadPoolExecutor() as threads:
        loaded = dict(zip(paths, threads.map(load, paths), strict=True))
    images = {path: image for path, image in loaded.items() if not isinstance(image, str)}
    unreadable = [image for image in loaded.values() if isinstance(image, str)]
    if len(images) < LEAST:
        first = f"; the first that cannot be read: {unreadable[0]}" if unreadable else ""
        raise UsageError(
            f"{name}: got {len(images)} images in {printable(str(folder))}, expected {LEAST} or "
            f"more, better some hundreds{first}"
        )
    if unreadable:
        count = len(unreadable)
        warnings.append(f"{count} images of {name} cannot be read; the first: {unreadable[0]}")
    return images


def _check_different(images: dict[Path, UInt8]) -> None:
    seen: dict[bytes, Path] = {}
    for path, image in images.items():
        if (image == image[0, 0]).all():
            raise UsageError(
                f"calib: {printable(str(path))} is of one colour, which says nothing of ranges; "
                "take it out"
            )
        other = seen.setdefault(image.tobytes(), path)
        if other is not path:
            raise UsageError(
                f"calib: {printable(str(path))} shows what {printable(str(other))} shows; take one "
                "of them out"
            )
