"""Runs labelled images through several models at once: decoded once, answered by each."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from rexdeploy.arrays import Array, Images
from rexdeploy.backends import Backend
from rexdeploy.bundle.manifest import BatchRange, InputForm, ModelSpec, Preprocess
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.images import decode
from rexdeploy.images.labelled import LabelledImages
from rexdeploy.inference.accuracy import Answer, ranked
from rexdeploy.text import one_line

BATCH = 32
_AHEAD = 3  # batches that are decoded or being decoded
_MAX_THREADS = 16

Prepared = dict[InputForm, Images]  # one image, in each form that a model takes


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

    def run(self, images: Images) -> Array:
        """Its outputs `[N, classes]` of N images in its spec's form, in batches that it takes."""
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
    forms = tuple(dict.fromkeys(runner.spec.input for runner in runners))
    for prepared in _decoded(images, preprocess, forms, start):
        shown = images.classes[start : start + len(prepared)].tolist()
        batch = _answer(prepared, shown, runners, failed)
        failed, start = batch.failed, start + len(prepared)
        yield batch


def _decoded(
    images: LabelledImages, preprocess: Preprocess, forms: Sequence[InputForm], start: int
) -> Iterator[list[Prepared | str]]:
    """Batches of prepared images, or of why there are none; threads prepare ahead of the models."""
    folder = Path(images.folder)
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "decode")
    ahead: deque[list[Future[Prepared | str]]] = deque()
    try:
        for first in range(start, len(images.files), BATCH):
            files = images.files[first : first + BATCH]
            ahead.append(
                [pool.submit(_prepare, folder / file, preprocess, forms) for file in files]
            )
            if len(ahead) == _AHEAD:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare(path: Path, preprocess: Preprocess, forms: Sequence[InputForm]) -> Prepared | str:
    """One image in each form that a model takes, or why there is none."""
    try:
        pixels = decode.read(path, preprocess)
    except UsageError as error:
        return one_line(str(error).removeprefix(f"{path}: "))
    return {
        form: pixels if form == "uint8" else decode.normalise(pixels, preprocess) for form in forms
    }


def _answer(
    prepared: Sequence[Prepared | str],
    shown: Sequence[int],
    runners: Sequence[Runner],
    earlier: Mapping[int, str],
) -> Batch:
    pairs = zip(prepared, shown, strict=True)
    good = [(image, label) for image, label in pairs if not isinstance(image, str)]
    classes = [label for _, label in good]
    batches = {
        form: cast("Images", np.stack([image[form] for image, _ in good]))
        for form in {runner.spec.input for runner in runners if good}
    }
    answers: list[list[Answer]] = []
    seconds, failed = [], dict(earlier)
    for index, runner in enumerate(runners):
        rows: list[Answer] = []
        began = time.perf_counter()
        taken = 0.0
        if good and index not in failed:
            try:
                outputs = runner.run(batches[runner.spec.input])
            except RexdeployError as error:
                failed[index] = str(error)
            else:
                taken = time.perf_counter() - began
                rows = ranked(outputs, classes, runner.spec.output)
        seconds.append(taken)
        answers.append(rows)
    unreadable = {place: image for place, image in enumerate(prepared) if isinstance(image, str)}
    return Batch(unreadable, answers, seconds, failed)
