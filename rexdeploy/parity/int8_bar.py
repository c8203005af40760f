"""Whether an INT8 graph is accurate enough: its answers and logits beside the float32 graph's."""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np

from rexdeploy.arrays import Array, UInt8
from rexdeploy.backends import open_backend, run_batches
from rexdeploy.bundle.manifest import BatchRange, ModelSpec
from rexdeploy.errors import UsageError
from rexdeploy.graphs.quantize import Method
from rexdeploy.images import decode
from rexdeploy.intervals import PairedDifference, paired_difference
from rexdeploy.parity.compare import Limits, Signal, compare
from rexdeploy.parity.limits import LIMITS, ceiling

_BATCH = 32
_NOT_FINITE = 1e30  # of a graph that gives NaN or infinity, which JSON has no number for


@dataclass(frozen=True)
class Trial:
    """One INT8 graph that was made and run."""

    method: Method
    equalized: bool = False
    corrected: bool = False
    float32: tuple[str, ...] = ()  # the blocks that it keeps
    rms: float = _NOT_FINITE  # of the logits, in units of signal
    error: float = _NOT_FINITE
    correlation: float = -1.0
    agreement: float = 0.0  # share of answers that are the float32 graph's
    paired: PairedDifference | None = None  # of top-1, where the images have labels
    over: float = _NOT_FINITE  # how far it is from its bar: 0 or less, it passes

    @property
    def passes(self) -> bool:
        return self.over <= 0

    @property
    def rank(self) -> float:
        """Less is better: how far from the bar, then by the logits."""
        return max(self.over, 0) * 1e3 + self.rms

    @property
    def title(self) -> str:
        """`minmax, equalised, 2 blocks in float32`."""
        parts: list[str] = [self.method]
        parts += ["equalised"] if self.equalized else []
        parts += ["biases corrected"] if self.corrected else []
        if self.float32:
            count = len(self.float32)
            parts.append(f"{count} block{'s' if count > 1 else ''} in float32")
        return ", ".join(parts)


class Bar:
    """The images, the float32 graph's answers to them, and what is asked of an INT8 graph's."""

    def __init__(
        self,
        model: bytes,
        spec: ModelSpec,
        batch: BatchRange | None,
        pixels: UInt8,
        shown: tuple[int, ...] | None,
        agreement: float,
        max_drop: float,
    ) -> None:
        """`model` is the float32 graph: its core, of that `spec` and `batch` (None: any).

        `pixels` are uint8 RGB `[N, H, W, 3]`, `shown` their classes where they are known: then the
        bar is `max_drop` points of top-1, else an `agreement` of answers (a share). Raises
        UsageError where nothing can be judged: all answers are one class, or the logits do not
        vary.
        """
        self._pixels, self._spec, self._size = pixels, spec.core, batch.opt if batch else _BATCH
        self._shown, self._agreement, self._max_drop = shown, agreement, max_drop
        self._reference = self._logits(model)
        answers = self._reference.argmax(axis=1)
        if spec.num_classes > 1 and (answers == answers[0]).all():
            raise UsageError(
                f"the float32 graph answers all {len(answers)} images with class {answers[0]}: "
                "give images of several classes"
            )
        self._signal = Signal.of(self._reference)
        self.limits = LIMITS["int8"].at_most(ceiling(self._signal.constant))

    def __str__(self) -> str:
        if self._shown:
            return f"at most {self._max_drop:g} points of top-1 lost"
        return f"at least {100 * self._agreement:g} % of the answers the float32 graph's"

    @property
    def key(self) -> bytes:
        """Of everything that is judged by."""
        rest = repr((self._shown, self._agreement, self._max_drop, self.limits))
        return hashlib.sha256(self._pixels.tobytes() + rest.encode()).digest()

    def judged(self, trial: Trial, model: bytes) -> Trial:
        """The trial with what its graph's logits come to."""
        got = self._logits(model)
        found = compare(self._reference, got, signal=self._signal, limits=self.limits)
        if found.nonfinite:
            return trial
        paired, over = None, self._agreement - found.top1
        if self._shown:
            rows = (self._reference, got)
            was, now = (row.argmax(axis=1) == np.array(self._shown) for row in rows)
            lost, won = (int(unequal.sum()) for unequal in (was & ~now, now & ~was))
            paired = paired_difference(lost, won, len(self._shown))
            over = -paired.difference.value - self._max_drop / 100
        if not self.limits.hold(found.numbers):
            over = max(over, found.share)
        return replace(
            trial,
            rms=found.rms,
            error=found.error,
            correlation=found.correlation,
            agreement=found.top1,
            paired=paired,
            over=over,
        )

    def refusals(self, trial: Trial) -> list[str]:
        """Why a graph is not accurate enough; empty if it is."""
        if trial.passes:
            return []
        if not self.limits.hold(Limits(trial.error, trial.rms, trial.correlation)):
            return [
                f"its logits are off by {trial.rms:.2g} of the signal (root mean square, limit "
                f"{self.limits.rms:.2g}; error {trial.error:.2g}, limit {self.limits.error:.2g})"
            ]
        if trial.paired is not None:
            lost = -100 * trial.paired.difference.value
            return [f"it loses {lost:.2f} points of top-1, expected at most {self._max_drop:g}"]
        asked = f"{100 * self._agreement:g} % or more"
        return [f"{trial.agreement:.2%} of its answers are the float32 graph's, expected {asked}"]

    def _logits(self, model: bytes) -> Array:
        """What a graph makes of the images, float32 `[N, classes]`."""
        rows = []
        with closing(open_backend("onnxruntime", model, self._spec)) as backend:
            for start in range(0, len(self._pixels), 8 * self._size):
                part = self._pixels[start : start + 8 * self._size]
                images = decode.normalise(part, self._spec.preprocess)
                rows.append(run_batches(backend, images, [self._size]).by_image())
        return np.concatenate(rows)
