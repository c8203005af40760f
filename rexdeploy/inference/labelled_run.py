"""Runs labelled images through several models at once: decoded once, answered by each."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rexdeploy.arrays import Array, UInt8
from rexdeploy.backends import Backend
from rexdeploy.bundle.manifest import BatchRange, ModelSpec, Preprocess
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode
from rexdeploy.images.labelled import LabelledImages
from rexdeploy.inference.accuracy import Answer, ranked
from rexdeploy.text import one_line

BATCH = 32
_AHEAD = 3  # batches that are decoded or being decoded
_MAX_THREADS = 16


@dataclass(frozen=True)
class Batch:
    """What became of one batch of images, as the journal keeps it."""

    unreadable: dict[int, str]  # why, by the image's place in the batch
    answers: list[list[Answer]]  # by runner and image
    seconds: list[float]  # by runner
    failed: dict[int, str]  # why a runner failed, in this batch or before


@dataclass(frozen=True)
class Runner:
    """A file on a backend."""

    file: str
    backend: Backend
    spec: ModelSpec
    batch: BatchRange | None
    emulated: bool = False

    def run(self, pixels: UInt8) -> Array:
        """Its outputs `[N, classes]` of N images, in batches that it takes."""
        images = decode.model_input(pixels, self.spec)
        least, most = (self.batch.min, self.batch.max) if self.batch else (1, len(images))
        parts = []
        for start in range(0, len(images), most):
            part = images[start : start + most]
            padded = part[np.arange(max(len(part), least)) % len(part)]
            parts.append(self.backend.run(padded)[: len(part)])
        return np.concatenate(parts)


def run_labelled(
    images: LabelledImages,
    preprocess: Preprocess,
    runners: Sequence[Runner],
    start: int,
    failed: Mapping[int, str],
) -> Iterator[Batch]:
    """Yields the answers to one batch after the other, from image `start` (a multiple of BATCH).

    A runner that fails is not run again; `failed` are those of an earlier run.
    """
    for pixels in _decoded(images, preprocess, start):
        shown = images.classes[start : start + len(pixels)].tolist()
        batch = _answer(pixels, shown, runners, failed)
        failed, start = batch.failed, start + len(pixels)
        yield batch


def _decoded(
    images: LabelledImages, preprocess: Preprocess, start: int
) -> Iterator[list[UInt8 | str]]:
    """Batches of pixels, or of why there are none; threads decode ahead of the models."""
    folder = Path(images.folder)
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "decode")
    ahead: deque[list[Future[UInt8 | str]]] = deque()
    try:
        for first in range(start, len(images.files), BATCH):
            files = images.files[first : first + BATCH]
            ahead.append([pool.submit(_read, folder, file, preprocess) for file in files])
            if len(ahead) == _AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _read(folder: Path, file: str, preprocess: Preprocess) -> UInt8 | str:
    path = folder / file
    try:
        return decode.read(path, preprocess)
    except UsageError as error:
        return one_line(str(error).removeprefix(f"{path}: "))


def _answer(
    pixels: Sequence[UInt8 | str],
    shown: Sequence[int],
    runners: Sequence[Runner],
    earlier: Mapping[int, str],
) -> Batch:
    good = [image for image in pixels if not isinstance(image, str)]
    classes = [
        label for label, image in zip(shown, pixels, strict=True) if not isinstance(image, str)
    ]
    answers: list[list[Answer]] = []
    seconds, failed = [], dict(earlier)
    for index, runner in enumerate(runners):
        rows: list[Answer] = []
        taken = 0.0
        if good and index not in failed:
            began = time.perf_counter()
            try:
                outputs = runner.run(np.stack(good))
            except RexdeployError as error:
                failed[index] = str(error)
            else:
                taken = time.perf_counter() - began
                rows = ranked(outputs, classes, runner.spec.output)
        seconds.append(taken)
        answers.append(rows)
    unreadable = {place: image for place, image in enumerate(pixels) if isinstance(image, str)}
    return Batch(unreadable, answers, seconds, failed)
