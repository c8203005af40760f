"""What a search for the best way of serving looks like in a terminal."""

from __future__ import annotations

from rexdeploy.console import print_table, say
from rexdeploy.serving.tuning import Row, Sweep, describe


def show_sweep(title: str, result: Sweep) -> None:
    """Every way of serving at its most within the bound, or at its nearest to it."""
    say(f"{title}, {result.images}: 99 of 100 requests within {result.bound_ms:g} ms")
    print_table(
        ("way of serving", "connections", "images/s", "p50 ms", "p99 ms", ""),
        [_line(row, result) for row in result.rows],
    )
    for row in result.rows:
        if row.fault is not None:
            say(f"{describe(row.settings, result.batch)}: {row.fault}")
    if result.deployment is not None:
        added = result.deployment
        say(
            f"kept in {added.repository} for {added.name}, version {added.version} and later ones",
        )


def _line(row: Row, result: Sweep) -> tuple[str, ...]:
    name = describe(row.settings, result.batch)
    load = row.best(result.bound_ms)
    verdict = "kept" if row.settings == result.kept else "within"
    if load is None:
        load = min(row.loads, key=lambda load: load.p99_ms, default=None)
        verdict = "over" if row.fault is None else "failed"
    if load is None:
        return (name, "-", "-", "-", "-", verdict)
    return (
        name,
        str(load.connections),
        f"{load.per_second:.1f}",
        f"{load.p50_ms:.1f}",
        f"{load.p99_ms:.1f}",
        verdict,
    )
