"""How many times as fast one configuration is as another, with an interval, from equal rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """The median over the rounds of one time divided by another."""

    median: float
    interval: tuple[float, float] | None  # of that median; None where there are too few rounds

    def __str__(self) -> str:
        """`1.33 (1.30-1.36)`."""
        if self.interval is None:
            return f"{self.median:.2f}"
        low, high = self.interval
        return f"{self.median:.2f} ({low:.2f}-{high:.2f})"


def paired_ratio(slower_ms: Sequence[float], faster_ms: Sequence[float]) -> Ratio:
    """The first's times divided by the second's, round by round.

    Within a round both ran one after the other, so that what slows the machine for a while slows
    both, and leaves their ratio. The interval is that of the sign test, between two of the sorted
    ratios: it holds the median with at least 95 % whatever the ratios' distribution, as long as the
    rounds do not depend on each other. It takes 6 rounds. Raises ValueError for unequal lengths.
    """
    ratios = sorted(slower / faster for slower, faster in zip(slower_ms, faster_ms, strict=True))
    outside = _left_out(len(ratios))
    interval = None if outside is None else (ratios[outside], ratios[-1 - outside])
    return Ratio(statistics.median(ratios), interval)


def _left_out(rounds: int) -> int | None:
    """How many of the sorted values may be cut off at each end; None: not even none of them.

    The median is below the value after `k` cut ones only if at most `k` of the rounds came out
    below the median, and each does with a chance of one half.
    """
    outside = None
    chance = 0.0
    for count in range(rounds):
        chance += math.comb(rounds, count) / 2**rounds
        if 2 * chance > 1 - CONFIDENCE:
            break
        outside = count
    return outside
