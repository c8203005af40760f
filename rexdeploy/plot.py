"""Pictures of results, with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rexdeploy.errors import BackendUnavailable, UsageError

if TYPE_CHECKING:
    from rexdeploy.localize import Localization

_FORMATS = (".png", ".svg")


def check_plot(file: Path) -> None:
    """Raises UsageError or BackendUnavailable if no picture can be drawn; call it first."""
    if file.suffix.lower() not in _FORMATS:
        raise UsageError(f"plot: got {file}, expected a file name that ends in .png or .svg")
    if file.is_dir() or not file.parent.is_dir():
        raise UsageError(f"cannot write {file}: expected a file in a folder that can be written")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise BackendUnavailable(
            "matplotlib is not installed: pip install 'rexdeploy[plot]', or leave --plot out"
        ) from None


def plot_localizations(results: Sequence[Localization], file: Path) -> None:
    """Draws every walk's error block by block: so far, and each block's own with its limit.

    Infinite errors stand as triangles at the top. Raises UsageError where it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4 * max(1, len(results))), layout="constrained")
    for row, result in enumerate(results, start=1):
        axes = figure.add_subplot(len(results), 1, row)
        names = [block.name for block in result.blocks]
        series = {
            "error so far, of the tensor's spread": [block.total for block in result.blocks],
            "its own, of the tensor's size": [block.own for block in result.blocks],
        }
        errors = np.array(list(series.values()))
        top = 10 * float(errors[np.isfinite(errors)].max(initial=result.limit))
        for label, values in series.items():
            points = np.array(values)
            (line,) = axes.plot(
                names, np.where(np.isfinite(points), points, top), ".-", label=label
            )
            infinite = [index for index, value in enumerate(points) if not np.isfinite(value)]
            axes.plot(infinite, [top] * len(infinite), "^", color=line.get_color())
        axes.axhline(result.limit, color="gray", linestyle="--", label="limit on a block's own")
        axes.set_yscale("log")
        axes.set_title(f"{result.reference} -> {result.candidate}")
        axes.tick_params(axis="x", rotation=60)
        axes.grid(alpha=0.3)
        if result.culprit is not None:
            index = names.index(result.culprit.block)
            axes.axvline(index, color="red", alpha=0.4)
            axes.annotate(
                f"{result.culprit.node.name} ({result.culprit.node.op_type})",
                (index, result.limit),
                color="red",
            )
        axes.legend(fontsize="small")
    try:
        figure.savefig(file, dpi=120)
    except OSError as error:
        raise UsageError(f"cannot write {file} ({error.strerror})") from None
