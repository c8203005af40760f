"""Classifying many files: every file has its one row, whatever is in it, in the files' order."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rexdeploy.arrays import Float32, Images
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.inference.classifier import Classifier, load
from rexdeploy.inference.stream import classify_files, expand
from tests.helpers import on_a_terminal, run_cli

RED, NAN = (255, 0, 0), (0, 0, 255)


class _Colours:
    """A backend that names what colour an image has, and that blue ones overflow."""

    name = "colours"

    def run(self, images: Images) -> Float32:
        means = images.mean(axis=(2, 3))  # [N, 3], normalised
        logits = np.tile(means.astype(np.float32), (1, 13))[:, :37]
        logits[means.argmax(axis=1) == 2] = np.nan
        return logits

    def close(self) -> None:
        pass


@pytest.fixture
def colours(small_v1_original: Bundle) -> Iterator[Classifier]:
    graph = small_v1_original.manifest.find("onnx")
    assert graph is not None
    labels = [f"class {index}" for index in range(37)]
    with Classifier(small_v1_original, labels, _Colours(), graph, ()) as classifier:
        yield classifier


def _image(path: Path, colour: tuple[int, int, int] = RED) -> Path:
    Image.new("RGB", (20, 20), colour).save(path)
    return path


def _folder(path: Path, count: int) -> list[Path]:
    """Small images of different textures."""
    path.mkdir()
    rng = np.random.default_rng(8)
    files = [path / f"{index:03}.png" for index in range(count)]
    for file in files:
        cells = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        cells.resize((60, 60)).save(file)
    return files


def test_rows_are_in_the_files_order_and_are_what_classify_says(
    small_v1_original: Bundle, tmp_path: Path
) -> None:
    files = _folder(tmp_path / "folder", 37)
    files[20].write_bytes(b"")
    with load(small_v1_original, "onnxruntime") as classifier:
        rows = [row for batch in classify_files(classifier, map(str, files), 3) for row in batch]
        good = [file for file in files if file != files[20]]
        alone = dict(zip(good, classifier.classify(good, 3), strict=True))
    assert [row.file for row in rows] == list(map(str, files))
    assert (
        rows[20].error == "not an image that is read here; give JPEG, PNG, WebP, GIF, BMP or TIFF"
    )
    for file, row in zip(files, rows, strict=True):
        if row.error is None:
            assert [item.index for item in row.predictions] == [i.index for i in alone[file]]
            got = [item.probability for item in row.predictions]
            assert got == pytest.approx([item.probability for item in alone[file]], rel=1e-3)


def test_files_are_read_only_some_batches_ahead(colours: Classifier, tmp_path: Path) -> None:
    """A million files are not in memory: neither their pixels nor their rows."""
    file, taken = str(_image(tmp_path / "red.png")), 0

    def files() -> Iterator[str]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield file

    batches = classify_files(colours, files(), 1)
    assert len(next(batches)) == 16
    assert taken <= 3 * 16
    batches.close()  # type: ignore[attr-defined]


def test_an_image_that_overflows_does_not_spoil_its_batch(
    colours: Classifier, tmp_path: Path
) -> None:
    files = [_image(tmp_path / "red.png"), _image(tmp_path / "blue.png", NAN), tmp_path / "gone"]
    (rows,) = classify_files(colours, map(str, files), 1)
    assert rows[0].error is None
    assert rows[0].predictions[0].index % 3 == 0
    assert rows[1].error is not None
    assert "NaN or infinite" in rows[1].error
    assert rows[2].error == "no such file"


def test_what_is_no_regular_file_has_its_row_and_hangs_nothing(
    colours: Classifier, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "far.jpg").symlink_to("x" * 300)
    names = ("pipe.jpg", "loop.jpg", "dangling.jpg", "a\0b", "far.jpg", "x" * 300)
    files = [str(tmp_path / name) for name in names]
    assert expand(list(map(Path, files))) == files
    (rows,) = classify_files(colours, files, 1)
    errors = [row.error or "" for row in rows]
    assert errors[0] == "not a file"
    assert "symbolic links" in errors[1]
    assert errors[2] == "no such file"
    assert "null" in errors[3]
    assert "name too long" in errors[4]
    assert "name too long" in errors[5]
    with pytest.raises(UsageError, match="no images in"):
        expand([tmp_path])  # in a folder, such are passed over


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_has_its_row(colours: Classifier, tmp_path: Path) -> None:
    _image(tmp_path / "secret.png").chmod(0)
    (rows,) = classify_files(colours, [str(tmp_path / "secret.png")], 1)
    assert rows[0].error == "cannot be decoded as an image (Permission denied)"


def test_folders_stand_for_their_images_each_once(tmp_path: Path) -> None:
    files = list(map(str, _folder(tmp_path / "folder", 3)))
    (tmp_path / "folder" / "sub.jpg").mkdir()
    deep = str(_image(tmp_path / "folder" / "sub.jpg" / "deep.png"))
    assert expand([tmp_path / "folder"]) == [*files, deep]
    assert expand([Path(files[1]), tmp_path / "folder", Path("gone")]) == [
        files[1],
        files[0],
        files[2],
        deep,
        "gone",
    ]


def test_predict_prints_the_good_ones_and_a_line_for_each_other(
    small_v1: Bundle, tmp_path: Path
) -> None:
    files = _folder(tmp_path / "folder", 3)
    files[1].write_text("no image")
    images = ("folder", "gone.jpg", "two\nlines.jpg")
    result = run_cli("predict", *images, "--top", "1", "--json", "r.json", cwd=tmp_path)
    assert result.code == 2
    lines = result.out.splitlines()
    assert lines[0] == "rexnet 0.3 on onnxruntime" or "tensorrt" in lines[0]
    assert lines[1::2] == ["folder/000.png", "folder/002.png"]
    assert [line for line in result.err.splitlines() if line.startswith("error: ")] == [
        "error: folder/001.png: not an image that is read here; "
        "give JPEG, PNG, WebP, GIF, BMP or TIFF",
        "error: gone.jpg: no such file",
        "error: two lines.jpg: no such file",
    ]
    answer = json.loads((tmp_path / "r.json").read_text())
    assert [bool(row["error"]) for row in answer["images"]] == [False, True, False, True, True]
    assert answer["passed_over"]


def test_names_of_any_bytes_are_written(small_v1: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    names = [b"a,b.png", b'say "x".png', b"two\nlines.png", "grün.png".encode(), b"latin \xfc.png"]
    for name in names:
        _image(folder / "x.png").rename(os.fsdecode(os.fsencode(folder) + b"/" + name))
    written = {"a,b.png", 'say "x".png', "two\nlines.png", "grün.png", "latin \\udcfc.png"}
    for out in ("r.csv", os.fsdecode(b"r\xfc.jsonl")):
        command = ("predict", "folder", "--out", out, "--top", "1", "--json", "r.json")
        result = run_cli(*command, cwd=tmp_path)
        assert result.code == 0, result.err
        result.out.encode()
    assert json.loads((tmp_path / "r.json").read_text())["out"] == "r\\udcfc.jsonl"
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {f"folder/{n}" for n in written}
    printed = run_cli("predict", "folder", "--top", "1", "--json", "-", cwd=tmp_path)
    assert {row["file"] for row in json.loads(printed.out)["images"]} == {
        f"folder/{n}" for n in written
    }


def test_a_terminal_sees_a_bar_with_rate_and_time_left() -> None:
    code = (
        "import time\n"
        "from rexdeploy.cli.console import progress_bar\n"
        "with progress_bar(False, 'classifying', 20, 100) as show:\n"
        "    time.sleep(0.2)\n"
        "    show(60)\n"
        "    time.sleep(0.2)\n"
    )
    shown = on_a_terminal(code, COLUMNS="120")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(r"classifying .* 60/100 .* a second, 0:00:0\d left", plain), plain
