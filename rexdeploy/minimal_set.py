"""Searches for a small set of blocks that are enough: doubling, bisecting, leaving one out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar


class Judged(Protocol):
    """What came of a graph that keeps blocks in float32."""

    @property
    def float32(self) -> tuple[str, ...]:
        """The blocks."""

    @property
    def passes(self) -> bool: ...

    @property
    def rank(self) -> float:
        """Less is better."""


_Judged = TypeVar("_Judged", bound=Judged)


def minimal(judge: Callable[[Iterable[str]], _Judged], ranked: Sequence[str], most: int) -> _Judged:
    """A small set of blocks with which a graph passes, or else the best one that was tried.

    `ranked` has the worst block first; `most` may be kept.
    """
    low, high = 0, 1
    trial = judge(ranked[:1])
    tried = [trial]
    most = min(most, len(ranked))
    while not trial.passes and high < most:
        low, high = high, min(2 * high, most)
        trial = judge(ranked[:high])
        tried.append(trial)
    if not trial.passes:
        return min(tried, key=lambda item: item.rank)
    while high - low > 1:
        middle = (low + high) // 2
        found = judge(ranked[:middle])
        if found.passes:
            high, trial = middle, found
        else:
            low = middle
    for name in reversed(ranked[: high - 1]):  # without its last one, the set was found to fail
        without = judge(kept for kept in trial.float32 if kept != name)
        if without.passes:
            trial = without
    return trial
