"""Interleaved rounds: every task once in each, its time kept, and one that fails left out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rexdeploy.errors import RexdeployError
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
