"""rexdeploy models: its words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rexdeploy.cli.console import check_json, emit, print_table, say
from rexdeploy.cli.shared import Json

if TYPE_CHECKING:
    from rexdeploy.models.zoo import Model


def models(json: Json = None) -> None:
    """Print the published networks and what they cost.

    \b
    Example:
    rexdeploy models
    """
    check_json(json)
    from rexdeploy.models.zoo import published_models as run

    rows = run()
    emit(json, rows)
    if json != Path("-"):
        show_models(rows)


def show_models(rows: Sequence[Model]) -> None:
    """The published table beside the computed costs, and whether they agree."""
    columns = ("network", "top-1", "top-5", "GMACs", "computed", "params M", "computed", "")
    lines = [
        (
            f"{row.family} {row.width:.1f}",
            *(f"{value:.1f}" if value else "-" for value in (row.top1, row.top5)),
            f"{row.gmacs:.{row.decimals[0]}f}",
            f"{cost.macs / 1e9:.3f}",
            f"{row.params_m:.{row.decimals[1]}f}",
            f"{cost.parameters / 1e6:.3f}",
            "agrees" if model.agrees else "DIFFERS",
        )
        for model in rows
        for row, cost in [(model.published, model.computed)]
    ]
    print_table(columns, lines)
    say(
        "Published: ImageNet-1k, 224 x 224; their FLOPs are multiply-accumulates. 'agrees': to one "
        "unit of the last printed digit.",
        "One published slip: the comparison table gives ReXNet 2.0 as 1.8B / 19M, which is width "
        "2.2; the model",
        "table's 1.5B / 16M is right. No accuracy is published for 2.2.",
    )
