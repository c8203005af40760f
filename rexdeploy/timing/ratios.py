"""How many times as fast one configuration is as another, with an interval, from equal rounds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rexdeploy.intervals import left_out


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
    outside = left_out(len(ratios))
    interval = None if outside is None else (ratios[outside], ratios[-1 - outside])
    return Ratio(statistics.median(ratios), interval)
