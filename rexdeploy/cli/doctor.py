"""rexdeploy doctor: its words."""

from __future__ import annotations

from pathlib import Path

from rexdeploy.cli.console import check_json, emit, print_table
from rexdeploy.cli.shared import Json
from rexdeploy.errors import RexdeployError


def doctor(json: Json = None) -> None:
    """Show what is installed, and how to get the rest.

    \b
    Example:
    rexdeploy doctor
    """
    check_json(json)
    from rexdeploy.backends.doctor import doctor as run

    findings = run()
    emit(json, findings)
    if json == Path("-"):
        return
    lines = [(finding.item, finding.status, finding.detail, finding.fix) for finding in findings]
    print_table(("", "status", "found", "to get it"), lines, wrap=True)
    conflicts = [finding for finding in findings if finding.status == "conflict"]
    if conflicts:
        raise RexdeployError(f"{conflicts[0].item}: {conflicts[0].detail}; {conflicts[0].fix}")
