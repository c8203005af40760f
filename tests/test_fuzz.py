"""Damaged files of every kind that is read: refused in one line, or read; never anything else.

The same seeds each time; `scripts/fuzz.sh MINUTES` goes on from others, for hours.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from rexdeploy.errors import UsageError
from rexdeploy.images import decode
from tests.cpp_probe import probe
from tests.fuzz_targets import TARGETS, damaged, run, run_cpp
from tests.helpers import DATA, ROOT, run_program
from tests.mutations import mutated_image

PNG, JPEG = b"\x89PNG", b"\xff\xd8\xff"

FOUND = sorted((DATA / "fuzz").iterdir())
"""What fell once: the target's name, and a part of the input's hash."""
COUNTS = {"manifest": 4000, "graph": 2000, "engine": 4000, "labels": 1000, "weights": 600}


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_in_one_line(name: str) -> None:
    rng = random.Random(name)
    count = COUNTS.get(name, 1500)
    refused = sum(bool(run(TARGETS[name], damaged(TARGETS[name], rng))) for _ in range(count))
    assert 0 < refused < count  # neither all of it was harmless, nor none


@pytest.mark.parametrize("name", TARGETS)
def test_the_files_that_are_damaged_are_good(name: str) -> None:
    refused = [run(TARGETS[name], data) for data in TARGETS[name].seeds()]
    assert refused.count("") > len(refused) // 2


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.name)
def test_what_fell_once_does_not_again(file: Path) -> None:
    name = file.name.split("-")[0]
    said = run(TARGETS[name], file.read_bytes())  # raises what is no refusal
    assert len(said.splitlines()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpp-image", "cpp-manifest"])
def test_damage_does_no_harm_in_cpp(name: str, tmp_path: Path) -> None:
    assert 0 < run_cpp(name, 600, random.Random(name), tmp_path) < 600


@pytest.mark.slow
def test_damaged_images_that_both_languages_read_are_the_same(tmp_path: Path) -> None:
    """But for what cpp/README.md says of JPEG: a scan that is missing is smoothed over."""
    seeds = [data for data in TARGETS["image"].seeds() if data.startswith((PNG, JPEG))]
    rng = random.Random(0)
    calls = [(tmp_path / f"{index}.rgb", tmp_path / str(index)) for index in range(1000)]
    for _, file in calls:
        file.write_bytes(mutated_image(rng.choice(seeds), rng))
    both = 0
    for (raw, file), line in zip(calls, probe("decode", calls), strict=True):
        try:
            wanted = np.asarray(decode.load(file))
        except UsageError:
            continue
        if line.startswith("error: "):
            continue
        both += 1
        assert line == f"{wanted.shape[1]} {wanted.shape[0]}", file
        got = np.fromfile(raw, np.uint8).reshape(wanted.shape)
        most = 0 if file.read_bytes().startswith(PNG) else 8
        assert np.abs(got.astype(int) - wanted).max() <= most, file
    assert both > 200


def test_the_script_runs_every_target() -> None:
    """It is not run here: it takes minutes."""
    script = (ROOT / "scripts" / "fuzz.sh").read_text()
    (line,) = [line for line in script.splitlines() if line.startswith("targets=")]
    assert line == f'targets="{" ".join(TARGETS)} cpp-manifest cpp-image"'
    refused = run_program(ROOT / "scripts" / "fuzz.sh", "soon")
    assert refused.returncode == 2
    assert refused.stderr == "usage: scripts/fuzz.sh MINUTES [FOLDER]\n"
