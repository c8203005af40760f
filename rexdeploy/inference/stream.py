"""Classifies files as a stream: threads decode ahead of the model, a broken file is a row too."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import cast

import numpy as np

from rexdeploy.arrays import Images
from rexdeploy.errors import UsageError
from rexdeploy.images import sets
from rexdeploy.inference.classifier import Classifier, NonFiniteOutput, Prediction
from rexdeploy.text import printable

_MAX_BATCH = 64  # of what an engine may take more of: rows should come, and memory stay, small
_AHEAD = 3  # batches that are decoded or being decoded
_MAX_THREADS = 16


@dataclass(frozen=True)
class Row:
    """What became of one image file: its most probable classes, or the error."""

    file: str  # as given; bytes that are not UTF-8 are written \udcNN
    error: str | None
    predictions: tuple[Prediction, ...] = ()  # most probable first


def expand(inputs: Sequence[Path]) -> list[str]:
    """The files to classify, each once: a folder stands for its images, by name.

    Strings, since a million paths would take half a gigabyte. Raises UsageError for a folder
    without images.
    """
    files: dict[str, None] = {}
    for path in inputs:
        # Not Path.is_dir, which raises for a name too long: that is one image's error.
        found = sets.walk(path) if os.path.isdir(path) else [path]  # noqa: PTH112
        files.update(dict.fromkeys(map(str, found)))
    return list(files)


def classify_files(
    classifier: Classifier, files: Iterable[str], top: int
) -> Iterator[tuple[Row, ...]]:
    """Yields the rows of one batch after the other, in the files' order.

    Memory does not grow with the number of files. Raises RexdeployError where the model fails.
    """
    size = min(classifier.chunk, _MAX_BATCH)
    remaining = iter(files)
    ahead: deque[list[tuple[str, Future[Images | str]]]] = deque()
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS), "decode")
    try:
        while True:
            while len(ahead) < _AHEAD and (batch := list(islice(remaining, size))):
                ahead.append([(file, pool.submit(_decode, classifier, file)) for file in batch])
            if not ahead:
                return
            decoded = [(file, future.result()) for file, future in ahead.popleft()]
            yield _classify(classifier, decoded, top)
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(classifier: Classifier, file: str) -> Images | str:
    """One image as the model takes it, `[1, ...]`, or why there is none."""
    try:
        return classifier.prepare([file])
    except UsageError as error:
        reason = str(error).removeprefix(f"{Path(file)}: ")  # the row has a column for the file
        return printable(" ".join(reason.split()))


def _classify(
    classifier: Classifier, decoded: Sequence[tuple[str, Images | str]], top: int
) -> tuple[Row, ...]:
    """The rows of one batch; an image whose logits are not finite does not spoil the others."""
    good = [image for _, image in decoded if not isinstance(image, str)]
    try:
        batch = cast("Images", np.concatenate(good)) if good else None
        results = iter(() if batch is None else classifier.probabilities(batch))
    except NonFiniteOutput as error:
        if len(decoded) > 1:
            return tuple(row for one in decoded for row in _classify(classifier, [one], top))
        return (Row(printable(decoded[0][0]), str(error)),)
    return tuple(
        Row(printable(file), image)
        if isinstance(image, str)
        else Row(printable(file), None, tuple(classifier.best(next(results), top)))
        for file, image in decoded
    )
