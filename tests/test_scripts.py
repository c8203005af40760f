"""The script that measures on a GPU: commands that exist, and it stops at what is wrong."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main

from rexdeploy.cli.app import app
from rexdeploy.timing.harness import BACKENDS
from tests.helpers import ROOT

# In the place of rexdeploy: writes down how it was called, makes what the script looks for, and
# leaves as it is told.
STUB = """#!/usr/bin/env bash
printf '%q ' "$@" >> "$CALLS"
echo >> "$CALLS"
[ "$1" = build-trt ] && mkdir -p "$2" && touch "$2/fp16.engine"
[ "$1" = "${FAILS:-}" ] && exit 3
exit 0
"""


def _run(folder: Path, fails: str = "") -> tuple[int, list[list[str]]]:
    """The exit code, and the arguments of every call of rexdeploy."""
    program = folder / "rexdeploy"
    program.write_text(STUB)
    program.chmod(0o755)
    calls = folder / "calls"
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    variables = {"PATH": path, "CALLS": str(calls), "FAILS": fails, "OUT": str(folder)}
    environment = {name: value for name, value in os.environ.items() if name != "VENV"}
    done = subprocess.run(
        ["bash", ROOT / "scripts" / "benchmark_gpu.sh"],
        env=environment | variables,
        capture_output=True,
        text=True,
    )
    return done.returncode, [shlex.split(line) for line in calls.read_text().splitlines()]


def test_every_command_of_the_gpu_script_is_one_of_ours(tmp_path: Path) -> None:
    code, calls = _run(tmp_path)
    assert code == 0
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for name, *arguments in calls:
        commands[name].make_context(name, arguments)  # raises for what it does not know
    assert [name for name, *_ in calls] == [
        *["export", "build-trt", "inspect", "verify"] * 4,
        "bench",
    ]
    last = calls[-1]
    timed = {last[index + 1] for index, word in enumerate(last) if word == "--backend"}
    assert timed <= set(BACKENDS)
    assert {"onnxruntime-cuda", "tensorrt", "tensorrt-rtx", "pytorch-cuda"} <= timed
    aligned = [call[call.index("--align") + 1] for call in calls if call[0] == "export"]
    assert aligned == ["auto", "off"] * 2


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_the_gpu_script_times_nothing_that_is_wrong(command: str, tmp_path: Path) -> None:
    code, calls = _run(tmp_path, fails=command)
    assert code == 3
    assert calls[-1][0] == command
