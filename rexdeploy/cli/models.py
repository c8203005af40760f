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
    """The published tables beside the computed costs, and whether they agree."""
    from rexdeploy.models.zoo import Published

    costs = ("GMACs", "computed", "params M", "computed", "")
    lines = [
        (
            f"{row.family} {row.width:.1f}",
            *(f"{value:.1f}" if value else "-" for value in (row.top1, row.top5)),
            *_costs(model),
        )
        for model in rows
        if isinstance(row := model.published, Published)
    ]
    print_table(("network", "top-1", "top-5", *costs), lines)
    say(
        "Published: ImageNet-1k, 224 x 224; their FLOPs are multiply-accumulates. 'agrees': to one "
        "unit of the last printed digit.",
        "One published slip: the comparison table gives ReXNet 2.0 as 1.8B / 19M, which is width "
        "2.2; the model",
        "table's 1.5B / 16M is right. No accuracy is published for 2.2.",
    )
    lines = [
        (
            f"{row.detector} {row.family} {row.width:.1f}",
            *(f"{value:.1f}" if value else "-" for value in (row.box_ap, row.mask_ap)),
            *_costs(model),
        )
        for model in rows
        if not isinstance(row := model.published, Published)
    ]
    print_table(("detector", "box AP", "mask AP", *costs), lines)
    say(
        "Published: COCO val2017; batch norms are frozen and count no parameters; multiply-"
        "accumulates with 1000 proposals and without the mask head.",
        "Another published slip: their '1200x800' is 1280 x 800, at which the costs are these.",
    )


def _costs(model: Model) -> tuple[str, ...]:
    row, cost = model.published, model.computed
    return (
        f"{row.gmacs:.{row.decimals[0]}f}",
        f"{cost.macs / 1e9:.3f}",
        f"{row.params_m:.{row.decimals[1]}f}",
        f"{cost.parameters / 1e6:.3f}",
        "agrees" if model.agrees else "DIFFERS",
    )
