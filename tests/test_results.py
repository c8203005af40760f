"""Results files: the rows in each format, and no row lost or repeated by a kill at any byte."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.inference.classifier import Prediction
from rexdeploy.inference.results_file import Header, Results, check_out, partial_of
from rexdeploy.inference.stream import Row
from tests.helpers import assert_refused, run_cli

HEADER = Header(("photos",), "/here", "0" * 64, "onnxruntime", 2)
ROWS = [
    Row("photos/a.jpg", None, (Prediction(7, "cat", 0.1 + 0.2), Prediction(1, 'a "b", c', 1e-9))),
    Row("photos/b\n.jpg", 'cannot be decoded as an image (broken, "so")'),
    Row("photos/ü.jpg", None, (Prediction(0, "x", 0.5), Prediction(36, "y", 0.25))),
]


def _write(out: Path, rows: list[Row] = ROWS, force: bool = False) -> None:
    """A run of the command from its start or where it was, to its end."""
    with Results(out, HEADER, force) as results:
        results.append(row for row in rows if row.file not in results.done)
        results.finish()


def test_every_format_holds_the_same(tmp_path: Path) -> None:
    _write(tmp_path / "r.csv")
    _write(tmp_path / "r.jsonl")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert [row["file"] for row in table] == [row.file for row in ROWS]
    assert [row["error"] for row in table] == ["", ROWS[1].error, ""]
    assert [row["class_2"] for row in table] == ["1", "", "36"]
    assert table[0]["label_2"] == 'a "b", c'
    assert float(table[0]["probability_1"]) == 0.1 + 0.2  # every digit
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [line["error"] for line in lines] == [row.error for row in ROWS]
    assert lines[0]["predictions"][1] == {"index": 1, "label": 'a "b", c', "probability": 1e-9}
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob(".*"))


def test_parquet_has_typed_columns(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    _write(tmp_path / "r.parquet")
    table = parquet.read_table(tmp_path / "r.parquet")
    assert [str(kind) for kind in table.schema.types[:5]] == [
        *("string", "string", "int32", "string", "double")
    ]
    columns = table.to_pydict()
    assert columns["file"] == [row.file for row in ROWS]
    assert columns["error"] == [row.error for row in ROWS]
    assert columns["probability_1"] == [0.1 + 0.2, None, 0.5]


def test_a_run_killed_at_any_byte_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    _write(out)
    expected = out.read_bytes()
    out.unlink()
    with Results(out, HEADER, force=False) as results:
        results.append(ROWS)
    whole = partial_of(out).read_bytes()
    header, *lines = whole.splitlines(keepends=True)
    ends = [len(header) + sum(map(len, lines[:count])) for count in range(len(lines) + 1)]
    for size in range(len(whole) + 1):
        partial_of(out).write_bytes(whole[:size])
        with Results(out, HEADER, force=False) as results:
            assert results.rows == sum(end <= size for end in ends[1:])
            assert results.errors == (size >= ends[2])
            results.append(row for row in ROWS if row.file not in results.done)
            assert partial_of(out).read_bytes() == whole
    _write(out)
    assert out.read_bytes() == expected


def test_blocks_of_zeros_after_a_power_cut_are_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    with Results(out, HEADER, force=False) as results:
        results.append(ROWS[:1])
    with open(partial_of(out), "ab") as file:
        file.write(bytes(4096) + b"\n")
    with Results(out, HEADER, force=False) as results:
        assert results.done == {"photos/a.jpg"}


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    with Results(out, HEADER, force=False) as results:
        with pytest.raises(UsageError, match=r"r.csv.partial is being written by another command"):
            Results(out, HEADER, force=True)
        results.append(ROWS)
        results.finish()
    with pytest.raises(UsageError, match=r"r.csv is there already: --force replaces it"):
        Results(out, HEADER, force=False)
    assert not partial_of(out).exists()


def test_force_replaces_what_is_there_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    _write(out, ROWS[:1])
    with Results(out, HEADER, force=True) as results:  # killed after a row
        results.append(ROWS[1:2])
    assert len(out.read_text().splitlines()) == 1
    with Results(out, HEADER, force=True) as results:
        assert results.done == {ROWS[1].file}
    _write(out)  # and without --force, since it was this command that began
    assert [json.loads(line)["file"] for line in out.read_text().splitlines()] == [
        ROWS[index].file for index in (1, 0, 2)
    ]


def test_another_commands_rows_are_never_mixed_in(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    other = Header(HEADER.images, HEADER.folder, "1" * 64, HEADER.backend, 5)
    with Results(out, other, force=False) as results:
        results.append(ROWS)
    with pytest.raises(UsageError, match=r"other values of model, top: .*; --force begins anew"):
        Results(out, HEADER, force=False)
    partial_of(out).write_text("my notes\n")
    with pytest.raises(UsageError, match="is not what an unfinished run leaves"):
        Results(out, HEADER, force=False)
    assert partial_of(out).read_text() == "my notes\n"
    with Results(out, HEADER, force=True) as results:
        assert results.rows == 0


def test_a_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Results(out, HEADER, force=False) as results:
        results.append(ROWS[:1])
        size = partial_of(out).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with pytest.raises(RexdeployError, match="keeps what is done: make room, and"):
                results.append(ROWS[1:])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with Results(out, HEADER, force=False) as results:
        assert results.done == {ROWS[0].file}


def test_names_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("r.txt", "r", "r.csv.gz"):
        with pytest.raises(UsageError, match="expected a name in .csv, .jsonl, .parquet"):
            check_out(tmp_path / name)
    (tmp_path / "folder.csv").mkdir()
    for path in (tmp_path / "folder.csv", tmp_path / "gone" / "r.csv"):
        with pytest.raises(UsageError, match="cannot write"):
            check_out(path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'rexdeploy\[parquet\]', or write .csv"):
        check_out(tmp_path / "r.parquet")


def _interrupt(how: signal.Signals, folder: Path) -> tuple[int, str]:
    """Runs predict, ends it by a signal when its first rows are written: exit code, last line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rexdeploy", "predict", "many", "--out", "r.csv"],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    partial = folder / "r.csv.partial"
    before = partial.stat().st_size if partial.exists() else 1000
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > before):
        time.sleep(0.005)
    os.kill(process.pid, how)
    assert process.stderr is not None
    return process.wait(), process.stderr.read().splitlines()[-1]


def test_interrupted_and_killed_the_same_command_finishes(small_v1: Bundle, tmp_path: Path) -> None:
    """Each process dies when it has written one batch of many."""
    (tmp_path / "many").mkdir()
    rng = np.random.default_rng(9)
    for index in range(100):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((30, 30)).save(tmp_path / "many" / f"{index:03}.png")
    (tmp_path / "many" / "050.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, line = _interrupt(signal.SIGINT, tmp_path)
    assert (code, line) == (
        130,
        "error: interrupted; r.csv.partial keeps what is done, and the same command goes on",
    )
    assert _interrupt(signal.SIGKILL, tmp_path)[0] == -signal.SIGKILL
    assert not (tmp_path / "r.csv").exists()
    refused = run_cli("predict", "many", "--out", "r.csv", "--top", "3", "--quiet", cwd=tmp_path)
    assert_refused(refused, "r.csv.partial is of an unfinished run with other values of top")
    result = run_cli("predict", "many", "--out", "r.csv", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "100 rows" in result.out
    assert "of them by an earlier run; 1 could not be read" in result.out
    again = run_cli("predict", "many", "--out", "again.csv", "--json", "-", cwd=tmp_path)
    assert json.loads(again.out)["rows"] == 100
    with open(tmp_path / "r.csv", newline="") as first, open(tmp_path / "again.csv") as second:
        interrupted, whole = list(csv.DictReader(first)), list(csv.DictReader(second))
    assert [row["file"] for row in interrupted] == [row["file"] for row in whole]
    assert [row["class_1"] for row in interrupted] == [row["class_1"] for row in whole]
    assert [row["file"] for row in whole if row["error"]] == ["many/050.png"]
    assert_refused(
        run_cli("predict", "many", "--out", "r.csv", "--quiet", cwd=tmp_path),
        "r.csv is there already: --force replaces it",
    )
