"""rexdeploy tune-serving: its words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rexdeploy.cli.console import check_json, emit, print_table, progress, say
from rexdeploy.cli.shared import BundleArgument, Json, Quiet, only_warned_of, taken_back_on_ctrl_c

if TYPE_CHECKING:
    from rexdeploy.serving.tuning import Row, Sweep


def tune_serving(
    p99: Annotated[
        float,
        typer.Option("--p99", metavar="MS", help="Milliseconds within which 99 of 100 answer."),
    ],
    bundle: BundleArgument = None,
    repository: Annotated[
        Path, typer.Option(metavar="DIR", help="Model repository to keep it in.")
    ] = Path("artifacts/triton"),
    images: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Image files to send [default: synthetic photographs]."),
    ] = None,
    tritonserver: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The server [default: as in serve].", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the result: .png, .svg or .pdf.")
    ] = None,
    quiet: Quiet = False,
    json: Json = None,
) -> None:
    """Find how to batch requests: the most images a second within a latency.

    Starts servers of its own, one for each way to put requests together (none, batches of two
    sizes, with and without waiting for more, one copy of the network and several), and sends image
    files from more and more connections. The best way goes into the repository with the bundle, as
    'rexdeploy triton' adds it, and later versions keep it. The machine should have nothing else to
    do. Exit code 3: none is within the latency, and nothing was changed.

    \b
    Example:
    rexdeploy tune-serving rexnet_1.5 --p99 50
    """
    check_json(json)
    if plot is not None:
        from rexdeploy.cli.plot import check_plot, plot_sweep

        check_plot(plot)
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.errors import VerificationFailed
    from rexdeploy.serving.tuning import tune_serving as run

    opened = Bundle.find(bundle)
    with taken_back_on_ctrl_c(), progress(quiet) as report:
        result = run(
            opened,
            p99=p99,
            repository=repository,
            images=images,
            tritonserver=tritonserver,
            report=report,
        )
    if not quiet and json != Path("-"):
        show_sweep(opened.manifest.model.title, result)
    with only_warned_of(result.kept is None):
        emit(json, result)
        if plot is not None:
            plot_sweep(result, plot)
    if result.kept is None:
        nearest = min(load.p99_ms for row in result.rows for load in row.loads)
        raise VerificationFailed(
            f"no way of serving answers 99 of 100 requests within {p99:g} ms; the nearest took "
            f"{nearest:.3g} ms; nothing was changed: give a larger --p99, or take a smaller network"
        )


def show_sweep(title: str, result: Sweep) -> None:
    """Every way of serving at its most within the bound, or at its nearest to it."""
    from rexdeploy.serving.tuning import describe

    def line(row: Row) -> tuple[str, ...]:
        load = row.best(result.bound_ms)
        verdict = "kept" if row.settings == result.kept else "within"
        if load is None:
            load = min(row.loads, key=lambda load: load.p99_ms, default=None)
            verdict = "over" if row.fault is None else "failed"
        numbers: tuple[str, ...] = ("-",) * 4
        if load is not None:
            times = (f"{number:.1f}" for number in (load.per_second, load.p50_ms, load.p99_ms))
            numbers = (str(load.connections), *times)
        return (describe(row.settings, result.batch), *numbers, verdict)

    say(f"{title}, {result.images}: 99 of 100 requests within {result.bound_ms:g} ms")
    columns = ("way of serving", "connections", "images/s", "p50 ms", "p99 ms", "")
    print_table(columns, map(line, result.rows))
    for row in result.rows:
        if row.fault is not None:
            say(f"{describe(row.settings, result.batch)}: {row.fault}")
    if result.deployment is not None:
        added = result.deployment
        say(f"kept in {added.repository} for {added.name}, version {added.version} and later ones")
