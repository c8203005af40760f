"""How often a classifier is right over labelled images, and what another one changes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rexdeploy.arrays import Array, softmax
from rexdeploy.bundle.manifest import OutputForm
from rexdeploy.intervals import Interval, PairedDifference, median, paired_difference, wilson

BINS = 15  # of the calibration error, as Guo et al. (2017)
NO_ANSWER = -1  # of an image whose outputs are not finite
_CHANGES = 100  # kinds of changed answers that are kept
_TOP = 5

Answer = tuple[int, int, float]
"""The most probable class, the rank of the class that is shown (0: it is the answer), and the
probability of the answer."""


@dataclass(frozen=True)
class Change:
    """Images whose answer is another than the baseline's."""

    label: str  # what they show
    before: str  # the baseline's answer
    after: str
    images: int


@dataclass(frozen=True)
class Accuracy:
    """One file on one backend over all images; shares are 0 to 1."""

    file: str
    backend: str
    emulated: bool  # a 16-bit graph whose rounding is emulated, which takes longer
    top1: Interval
    top5: Interval | None  # None for a network of five classes or fewer
    calibration_error: float  # expected, over 15 bins of confidence
    ms_per_image: Interval | None  # in batches, beside the decoding; None where it says nothing
    nonfinite: int  # images with NaN or infinite outputs: they count as wrong
    agreement: float | None = None  # share of answers that are the baseline's
    paired: PairedDifference | None = None  # of top-1 against the baseline's, image by image
    changed: tuple[Change, ...] = ()  # the most frequent ones


def ranked(outputs: Array, shown: Sequence[int], form: OutputForm) -> list[Answer]:
    """The answers in a network's outputs `[N, classes]`, logits or probabilities by `form`.

    `shown` are the indices of the classes that the N images show.
    """
    rows: list[Answer] = []
    for values, label in zip(outputs, shown, strict=True):
        if not np.isfinite(values).all():
            rows.append((NO_ANSWER, len(values), 0.0))
            continue
        # As in a stable sort: of equal values the first class goes before.
        better = (values > values[label]).sum() + (values[:label] == values[label]).sum()
        probabilities = softmax(values) if form == "logits" else values
        answer = int(values.argmax())
        rows.append((answer, int(better), float(probabilities[answer])))
    return rows


def accuracy(
    answers: Sequence[Answer],
    num_classes: int,
    ms_per_image: Sequence[float] = (),
    *,
    file: str,
    backend: str,
    emulated: bool = False,
) -> Accuracy:
    """What the answers to N > 0 images come to; `ms_per_image` are independent measurements."""
    ranks = np.array([rank for _, rank, _ in answers])
    confidences = np.array([confidence for _, _, confidence in answers])
    is_right, count = ranks == 0, len(answers)
    return Accuracy(
        file,
        backend,
        emulated,
        top1=wilson(int(is_right.sum()), count),
        top5=wilson(int((ranks < _TOP).sum()), count) if num_classes > _TOP else None,
        calibration_error=calibration_error(confidences, is_right),
        ms_per_image=None if emulated else median(ms_per_image),
        nonfinite=sum(answer == NO_ANSWER for answer, _, _ in answers),
    )


def beside(
    row: Accuracy,
    baseline: Sequence[Answer],
    answers: Sequence[Answer],
    shown: Sequence[int],
    labels: Sequence[str],
) -> Accuracy:
    """A row with what its answers change of a baseline's to the same images."""
    lost = sum(was[1] == 0 != now[1] for was, now in zip(baseline, answers, strict=True))
    won = sum(now[1] == 0 != was[1] for was, now in zip(baseline, answers, strict=True))
    names = [*labels, "no answer"]  # the last one: NO_ANSWER
    changes = Counter(
        (names[label], names[was[0]], names[now[0]])
        for label, was, now in zip(shown, baseline, answers, strict=True)
        if was[0] != now[0]
    )
    return replace(
        row,
        agreement=1 - sum(changes.values()) / len(shown),
        paired=paired_difference(lost, won, len(shown)),
        changed=tuple(Change(*kind, count) for kind, count in changes.most_common(_CHANGES)),
    )


def calibration_error(confidences: Array, is_right: Array) -> float:
    """The expected calibration error: how far confidence is from accuracy, over 15 equal bins.

    `confidences` are float `[N]`, 0 to 1, `is_right` bool `[N]` (Guo et al., 2017).
    """
    bins = np.minimum((confidences * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidences - is_right, BINS)
    return float(np.abs(gaps).sum()) / len(confidences)
