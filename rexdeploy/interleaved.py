"""Interleaved rounds: every task once in each, its time kept; and the ratio of two tasks' times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rexdeploy.errors import RexdeployError
from rexdeploy.intervals import left_out
from rexdeploy.progress import Report

WARMUP_ROUNDS = 3


@dataclass(frozen=True)
class Task:
    """What is timed. It waits until it is done."""

    run: Callable[[], object]
    own_ms: Callable[[], float] | None = None  # of the last run, by a GPU's events; None: our clock


@dataclass(frozen=True)
class Rounds:
    """What the complete rounds took, by the tasks' places."""

    count: int
    samples_ms: tuple[tuple[float, ...], ...]  # of each task; none of one that failed
    faults: dict[int, str]  # why it failed
    interrupted: bool  # by Ctrl-C: the rounds so far are kept


def time_rounds(tasks: Sequence[Task], rounds: int, report: Report) -> Rounds:
    """Times every task in every round, after warming up.

    A task that raises RexdeployError is not run again, and loses nobody else's samples.
    """
    samples: list[list[float]] = [[] for _ in tasks]
    faults: dict[int, str] = {}
    interrupted = False
    count = 0
    try:
        for number in range(WARMUP_ROUNDS + rounds):
            if number in (0, WARMUP_ROUNDS):
                report(f"timing {rounds} rounds" if number else "warming up")
            times: dict[int, float] = {}
            for place, task in enumerate(tasks):
                if place in faults:
                    continue
                try:
                    times[place] = _once(task)
                except RexdeployError as error:
                    faults[place] = str(error)
            if number >= WARMUP_ROUNDS:
                count += 1
                for place, milliseconds in times.items():
                    samples[place].append(milliseconds)
    except KeyboardInterrupt:
        if not count:
            raise
        interrupted = True
    kept = tuple(() if place in faults else tuple(taken) for place, taken in enumerate(samples))
    return Rounds(count, kept, faults, interrupted)


def _once(task: Task) -> float:
    task.run()  # the one before it has left its own weights in the caches
    started = time.perf_counter()
    task.run()
    milliseconds = 1e3 * (time.perf_counter() - started)
    return milliseconds if task.own_ms is None else task.own_ms()


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
