"""What the machine itself does, timed in the same rounds as the networks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from rexdeploy.bundle.precision import Precision
from rexdeploy.errors import RexdeployError
from rexdeploy.interleaved import Task

if TYPE_CHECKING:
    from rexdeploy.timing.roofline import Rates


Place = tuple[int | None, Precision]
"""Threads of a CPU, or None for the GPU, and the precision that is computed in."""


@dataclass(frozen=True)
class Probe:
    """A large matrix product, or a large copy."""

    what: Literal["matrix product", "copy"]
    work: float  # operations, or bytes read and written
    threads: int | None  # None: on the GPU
    precision: Precision | None  # of the product; None for a copy
    samples_ms: tuple[float, ...] = ()

    @property
    def rate(self) -> float:
        """Operations or bytes per second, of the median sample."""
        return 1e3 * self.work / float(np.median(self.samples_ms))


def computes_in(threads: int | None, precision: str) -> Precision:
    """The type of a row's arithmetic, for its limits: of a mixed one on a GPU the faster type.

    On a CPU only PyTorch computes in float16, and nothing here in bfloat16.
    """
    if threads is None:
        return "fp32" if precision == "fp32" else "bf16" if precision == "bf16" else "fp16"
    return "fp16" if precision == "fp16" else "fp32"


def make(places: Iterable[Place], skipped: list[str]) -> list[tuple[Probe, Task]]:
    """Probes for every place in the race; for those that cannot be probed a reason in `skipped`."""
    try:
        from rexdeploy.timing import roofline
    except ImportError:
        skipped.append("the roofline: counting and measuring it needs torch")
        return []
    made: list[tuple[Probe, Task]] = []
    by_threads: dict[int | None, set[Precision]] = {}
    for threads, precision in places:
        by_threads.setdefault(threads, set()).add(precision)
    for threads, precisions in sorted(by_threads.items(), key=lambda item: item[0] or 0):
        try:
            products = [
                (Probe("matrix product", work, threads, precision), task)
                for precision in sorted(precisions)
                for work, task in [roofline.product(threads, precision)]
            ]
            work, task = roofline.copy(threads)
            made += [*products, (Probe("copy", work, threads, None), task)]
        except RexdeployError as error:
            skipped.append(f"the roofline on {_where(threads)}: {error}")
    return made


def rates(probes: Sequence[Probe]) -> dict[Place, Rates]:
    """Both rates of every place where both were measured."""
    if not probes:
        return {}
    from rexdeploy.timing.roofline import Rates

    copies = {probe.threads: probe.rate for probe in probes if probe.precision is None}
    return {
        (probe.threads, probe.precision): Rates(probe.rate, copies[probe.threads])
        for probe in probes
        if probe.precision is not None and probe.threads in copies
    }


def _where(threads: int | None) -> str:
    return "the GPU" if threads is None else f"{threads} threads"
