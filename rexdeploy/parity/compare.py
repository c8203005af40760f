"""Two arrays of logits and a limit, to a verdict: numbers first, the verdict derived from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from rexdeploy.arrays import Array, softmax
from rexdeploy.bundle.manifest import OutputForm
from rexdeploy.errors import RexdeployError, UsageError

Compared = Literal["logits", "log-probabilities"]
"""What is compared: where a file ends in the softmax, what of the logits a softmax leaves."""
_SUM_ROOM = 1e-4  # float32's rounding of up to a million probabilities that sum to 1
_FLOOR = float(np.finfo(np.float32).tiny)
MIN_VARIATION = 1e-3
"""Least signal, as a share of the logits' root mean square, that a comparison may rest on.

Measured: freshly initialised networks have 2e-7 (V1) and 2e-6 (lite), recalibrated untrained ones
0.7, the golden networks 0.05 to 0.09. Below the share, rounding alone would decide.
"""
MIN_CLASS_VARIATION = 0.25
"""Least standard deviation of a class, as a share of the signal, for its correlation to count.

The logits of a class that hardly varies are mostly rounding, whose correlation says nothing.
"""
MIN_ROUNDED_CORRELATION = 0.9
"""Least correlation of a class with itself rounded to 16 bits for it to count in those 16 bits.

bfloat16 leaves some of 1000 classes 0.5 over sixteen images (V1 0.9 and 1.3, artifacts/limits):
no limit has room for that and still tells two classes apart.
"""


@dataclass(frozen=True)
class Limits:
    """What a comparison's numbers may be at the most; `correlation` at the least."""

    error: float  # in units of signal
    rms: float  # in units of signal
    correlation: float  # -1 to 1

    def at_most(self, other: Limits) -> Limits:
        """The stricter of the two, number by number; where these are NaN, the other's."""
        return Limits(
            min(other.error, self.error),
            min(other.rms, self.rms),
            max(other.correlation, self.correlation),
        )

    def plus(self, times: float, other: Limits) -> Limits:
        """These with room for `times` another difference.

        What correlation lacks of 1 grows with the square of a difference.
        """
        return Limits(
            self.error + times * other.error,
            self.rms + times * other.rms,
            self.correlation - times**2 * (1 - other.correlation),
        )

    def hold(self, numbers: Limits) -> bool:
        """Whether the numbers are within these; NaN never is."""
        return (
            numbers.error <= self.error
            and numbers.rms <= self.rms
            and numbers.correlation >= self.correlation
        )


@dataclass(frozen=True)
class Comparison:
    """How far a candidate's logits are from a reference's, over the same images."""

    reference: str
    candidate: str
    images: int  # rows: an image counts once for every batch that it was in
    signal: float  # mean over classes of the standard deviation over images, in logits
    error: float  # largest absolute difference, in units of signal
    rms: float  # root mean square of all differences, in units of signal
    correlation: float  # least over classes that vary, of the logits over the images
    least_class: int  # the class of that correlation
    cosine: float  # least over images, of logits centred on the reference's mean image
    kl: float  # mean over images of KL(softmax reference || softmax candidate), in nats
    top1: float  # share of images with the same top class, 0 to 1
    top5: float  # mean share of the reference's top five that the candidate also has, 0 to 1
    nonfinite: int  # logits that are NaN or infinite
    limits: Limits

    @property
    def numbers(self) -> Limits:
        """Those of its numbers that have a limit."""
        return Limits(self.error, self.rms, self.correlation)

    @property
    def share(self) -> float:
        """How much of its limit the worst of its numbers takes; over 1 it fails."""
        limits = self.limits
        return max(
            self.error / limits.error,
            self.rms / limits.rms,
            (1 - self.correlation) / (1 - limits.correlation),
        )

    @property
    def failures(self) -> tuple[str, ...]:
        """Why the candidate does not pass; empty if it does."""
        if self.nonfinite:
            return (f"{self.nonfinite} logits are NaN or infinite",)
        reasons = []
        if not self.error <= self.limits.error:
            reasons.append(
                f"error {self.error:.2g} of the signal is over the limit {self.limits.error:.2g}"
            )
        if not self.rms <= self.limits.rms:
            reasons.append(
                f"root mean square error {self.rms:.2g} of the signal is over the limit "
                f"{self.limits.rms:.2g}"
            )
        if not self.correlation >= self.limits.correlation:
            reasons.append(
                f"class {self.least_class} correlates by {correlation_text(self.correlation)} "
                f"with its reference over the images, below the limit "
                f"{correlation_text(self.limits.correlation)}"
            )
        return tuple(reasons)


@dataclass(frozen=True)
class Signal:
    """What the reference's logits carry over a set of images; the unit of every comparison."""

    size: float  # mean over classes of the standard deviation over images, in logits
    mean: Array  # the mean image's logits, `[classes]`
    varying: npt.NDArray[np.bool_]  # the classes whose correlation counts, `[classes]`
    constant: Limits  # numbers of an answer that ignores its image: always the mean image's logits

    @classmethod
    def of(cls, logits: Array) -> Signal:
        """Measures `[N, classes]` reference logits of different images.

        Raises UsageError where there is too little to judge by: fewer than two images, or logits
        that do not vary over them.
        """
        if len(logits) < 2:
            raise UsageError(f"a comparison needs at least 2 different images, got {len(logits)}")
        if not np.isfinite(logits).all():
            raise UsageError(
                "the reference's own logits are NaN or infinite on these images; check the weights"
            )
        exact = logits.astype(np.float64)
        spread = exact.std(axis=0)
        size = float(spread.mean())
        if size <= MIN_VARIATION * float(np.sqrt(np.square(exact).mean())):
            raise UsageError(
                f"the reference's logits do not vary over the {len(logits)} images (signal "
                f"{size:.1g}), so agreement would prove nothing; use trained weights, or more "
                "varied images with --images"
            )
        mean = exact.mean(axis=0)
        away = np.abs(exact - mean)
        constant = Limits(
            float(away.max()) / size, float(np.sqrt(np.square(away).mean())) / size, 0.0
        )
        return cls(size, mean, spread >= MIN_CLASS_VARIATION * size, constant)

    def under(self, exact: Array, rounded: Array) -> Signal:
        """The same without the classes of which rounding alone leaves no likeness.

        Takes `[N, classes]` logits. At least half of the classes that vary stay: where they cannot,
        all do.
        """
        alike = _correlations(exact, rounded) >= MIN_ROUNDED_CORRELATION
        kept = self.varying & alike
        return replace(self, varying=kept) if 2 * kept.sum() >= self.varying.sum() else self


def compare(
    reference: Array,
    candidate: Array,
    *,
    signal: Signal,
    limits: Limits,
    names: tuple[str, str] = ("", ""),
) -> Comparison:
    """Compares two `[N, classes]` arrays row by row.

    `signal` comes from the reference network over all its images, so that every edge of a chain is
    judged in the same unit. Raises UsageError if the shapes differ.
    """
    if reference.shape != candidate.shape:
        raise UsageError(
            f"{names[1]}: got logits of shape {list(candidate.shape)}, "
            f"expected {list(reference.shape)}; is it a model of other classes?"
        )
    expected = reference.astype(np.float64)
    got = candidate.astype(np.float64)
    finite = np.isfinite(got)
    nan, inf = float("nan"), float("inf")
    result = Comparison(
        *names,
        images=len(expected),
        signal=signal.size,
        error=inf,
        rms=inf,
        correlation=nan,
        least_class=int(np.argmin(finite.all(axis=0))),
        cosine=nan,
        kl=nan,
        top1=0.0,
        top5=0.0,
        nonfinite=int(got.size - finite.sum()),
        limits=limits,
    )
    if result.nonfinite:
        return result
    difference = got - expected
    correlations = np.where(signal.varying, _correlations(expected, got), inf)
    return replace(
        result,
        error=float(np.abs(difference).max()) / signal.size,
        rms=float(np.sqrt(np.square(difference).mean())) / signal.size,
        correlation=float(correlations.min()),
        least_class=int(correlations.argmin()),
        cosine=_least_cosine(expected - signal.mean, got - signal.mean),
        kl=_mean_kl(expected, got),
        top1=float((expected.argmax(axis=1) == got.argmax(axis=1)).mean()),
        top5=_top_overlap(expected, got, min(5, expected.shape[1])),
    )


def correlation_text(value: float) -> str:
    """`0.31`, `0.9986`, `1-4e-09`: as many digits as tell it from 1."""
    missing = 1 - value
    if not missing < 1e-2:
        return f"{value:.2f}"
    return f"{value:.4f}" if missing >= 1e-4 else f"1-{missing:.0e}" if missing > 0 else "1"


def comparable(outputs: Array, form: OutputForm, compared: Compared) -> Array:
    """Outputs `[N, classes]` of either form as what is compared.

    Log-probabilities are logits up to what a softmax takes from them: less their mean over the
    classes. All outputs take the same way there, through the float32 of a softmax and its smallest
    normal number. Raises UsageError where logits are asked of probabilities.
    """
    if compared == "logits":
        if form != compared:
            raise UsageError("got probabilities, expected logits: a softmax cannot be undone")
        return outputs
    probabilities = softmax(outputs).astype(np.float32) if form == "logits" else outputs
    with np.errstate(invalid="ignore"):  # what is not a number stays so, and is counted later
        logs = np.log(np.maximum(probabilities.astype(np.float64), _FLOOR))
        centred: Array = logs - logs.mean(axis=-1, keepdims=True)
    return centred


def _correlations(expected: Array, got: Array) -> Array:
    """Pearson's correlation over the rows, of each class; 0 where one of the two is constant."""
    with np.errstate(invalid="ignore"):  # what is not finite has a correlation of NaN
        a, b = (x.astype(np.float64) - x.mean(axis=0, dtype=np.float64) for x in (expected, got))
        norms = np.sqrt(np.square(a).sum(axis=0) * np.square(b).sum(axis=0))
        dots = (a * b).sum(axis=0)
        values: Array = np.divide(dots, norms, out=np.zeros_like(dots), where=norms != 0)
    return values


def _least_cosine(a: Array, b: Array) -> float:
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("nc,nc->n", a, b)
    return float(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0).min())


def _mean_kl(expected: Array, got: Array) -> float:
    p, q = softmax(expected), softmax(got)
    tiny = np.finfo(np.float64).tiny
    return float((p * (np.log(p + tiny) - np.log(q + tiny))).sum(axis=1).mean())


def _top_overlap(expected: Array, got: Array, k: int) -> float:
    top_expected = np.argsort(-expected, axis=1, kind="stable")[:, :k]
    top_got = np.argsort(-got, axis=1, kind="stable")[:, :k]
    return float((top_expected[:, :, None] == top_got[:, None, :]).any(axis=2).mean())


def check_sums(probabilities: Array, exact: bool) -> None:
    """Raises RexdeployError for rows that are no probabilities: their comparison is blind to it.

    What is compared of a row are its logarithms less their mean. `exact`: from a float32 softmax;
    another one rounds each probability to as little as bfloat16's eight bits.
    """
    sums = probabilities.astype(np.float64).sum(axis=1)
    away = np.abs(sums - 1)
    away = away[np.isfinite(away)]  # what is not finite is counted and told elsewhere
    if away.size and away.max() > (_SUM_ROOM if exact else 50 * _SUM_ROOM):
        worst = sums[np.isfinite(sums)][int(away.argmax())]
        raise RexdeployError(f"gave probabilities that sum to {worst:.6g}, expected 1")
