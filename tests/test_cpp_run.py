"""rexdeploy-run takes the folders that `rexdeploy predict` takes, and writes the same JSON."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rexdeploy.bundle.manifest import INT8
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import UsageError
from rexdeploy.graphs.quantize import calibrate, quantized
from rexdeploy.graphs.wrapper import change_core, unwrap
from rexdeploy.images import sets
from rexdeploy.images.sets import varied
from rexdeploy.inference.stream import expand
from rexdeploy.text import printable
from tests.helpers import entry, graph, run_cli, run_program, with_notes
from tests.test_cpp import Programs, built, release, sanitized

__all__ = ["built", "release", "sanitized"]  # fixtures

pytestmark = pytest.mark.slow

CPU = ("--backend", "onnxruntime")


def _both(
    programs: Programs, bundle: Bundle, *arguments: str | Path, cwd: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The documents of C++ and of Python, of calls with the same exit code and nothing else."""
    common = (*arguments, *CPU, "--json", "-")
    answer = programs.run("run", bundle.path, *common)
    expected = run_cli("predict", *common, "--bundle", bundle.path, cwd=cwd)
    assert answer.code == expected.code, answer.err
    assert len(answer.err.splitlines()) == len(expected.error_lines)
    return json.loads(answer.out), json.loads(expected.out)


def test_json_is_pythons(
    release: Programs, small_pixels_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    """All of it, digit by digit: probabilities that the graph computes leave nothing to round."""
    files = (tmp_path / "gone.png", photos, photos / "." / sets.find(photos)[0].name)
    got, expected = _both(release, small_pixels_original, *files, "--top", "37", cwd=tmp_path)
    assert got == expected
    assert [row["error"] for row in got["images"]] == ["no such file", None, None]
    assert list(got) == list(expected)
    assert list(map(list, got["images"])) == list(map(list, expected["images"]))


def test_probabilities_have_all_their_digits(
    release: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    """Of logits: the softmax's last digits differ between C's exp and numpy's."""
    got, expected = _both(release, small_v1_original, photos, cwd=tmp_path)
    assert len(got["images"]) == 2
    for row, wanted in zip(got["images"], expected["images"], strict=True):
        probabilities = [item.pop("probability") for item in row["predictions"]]
        exact = [item.pop("probability") for item in wanted["predictions"]]
        assert probabilities == pytest.approx(exact, rel=1e-12, abs=0)
    assert got == expected


def test_an_accepted_int8_graph_answers_in_both(
    release: Programs, small_pixels: Bundle, photos: Path, tmp_path: Path
) -> None:
    """And one that is not accepted in neither."""
    model = graph(small_pixels)
    core = unwrap(model)
    ranges = calibrate(core, varied(8, small_pixels.manifest.model.preprocess, seed=4), "minmax")
    data = change_core(model, lambda _: quantized(core, ranges, "cpu")).SerializeToString()
    root = entry(small_pixels, "fp32.onnx")
    notes = {"weight_bits": "8"}
    made = replace(root, file=INT8, sha256=sha256(data), parent_sha256=root.sha256)
    made = replace(made, precision="int8", built_with=notes)
    before = _both(release, small_pixels, photos, cwd=tmp_path)
    bundle = small_pixels.update(made, files={INT8: data})
    got, expected = _both(release, bundle, photos, cwd=tmp_path)
    assert got == expected
    assert got["images"] != before[0]["images"]
    refused = with_notes(bundle, INT8, built_with=notes | {"refused": "it loses 3 points"})
    assert _both(release, refused, photos, cwd=tmp_path) == before


def _tree(folder: Path) -> None:
    """Names in an order that bytes, letters' cases and paths as a whole would not give."""
    names = [
        "b.png", "B.png", "a.png", "a/z.PNG", "a/b/y.jpeg", "a-1.png", "a b.png", "A/x.tiff",
        "é.png", "\ue000.png", "\U0001f600.png", "\ud7ff.png", "犬.WebP", "notes.txt", "no-suffix",
        ".hidden.png", ".jpg", ".folder/shown.gif", "folder.png/inner.bmp", "two.dots.tif",
        "x.png.", "png", "link-target.png",
    ]  # fmt: skip
    raw = [b"\xff.png", b"\x80.png", b"e\xcc\x81.png", b"\xed\xa0\x80.png", b"\xf0\x90\x80.png"]
    for name in [*names, *map(os.fsdecode, raw)]:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "link.png").symlink_to("link-target.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "elsewhere").symlink_to(folder / "a", target_is_directory=True)
    (folder / "circle.png").symlink_to("circle.png")
    os.mkfifo(folder / "pipe.png")


def test_folders_give_pythons_files_in_pythons_order(
    sanitized: Programs, small_v1_original: Bundle, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    _tree(tree)
    # A link that is given is followed, one inside a folder is not.
    arguments = [tree / "b.png", tree, tree / "elsewhere", tmp_path / "gone", tree / "a"]
    got, expected = _both(sanitized, small_v1_original, *arguments, cwd=tmp_path)
    files = [row["file"] for row in got["images"]]
    assert files == [row["file"] for row in expected["images"]]
    assert files == [printable(file) for file in expand(arguments)]
    assert files[0] == str(tree / "b.png")
    assert str(tree / r"\udcff.png") in files
    assert str(tree / "link.png") in files
    assert str(tree / "elsewhere" / "z.PNG") in files
    names = [Path(file).name for file in files]
    assert names.count("shown.gif") == 1
    assert not {".hidden.png", ".jpg", "pipe.png", "dangling.png", "notes.txt"} & set(names)
    assert all(row["error"] for row in got["images"])
    assert not any(str(tmp_path) in row["error"] for row in got["images"])


def test_folders_without_images_are_refused(
    sanitized: Programs, small_v1_original: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError) as refusal:
        expand([tmp_path])
    line = sanitized.refused(small_v1_original.path, tmp_path, "--json", "-")
    assert line == f"error: {refusal.value}"


def test_what_steers_a_terminal_is_escaped(
    sanitized: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    """The JSON document has the names as they are."""
    bundle, folder = small_v1_original.path, tmp_path / "named\x1b[31m\u202e\x9b\n"
    folder.mkdir()
    (folder / "a.png").symlink_to(sets.find(photos)[0])
    (folder / "b.png").touch()
    answer = sanitized.run("run", bundle, folder, *CPU)
    assert answer.code == 2
    shown = rf"{tmp_path}/named\x1b[31m\u202e\x9b\n"
    assert answer.out.splitlines()[1] == f"{shown}/a.png"
    assert answer.err.startswith(f"error: {shown}/b.png: not an image")
    assert answer.err.count("\n") == 1
    answer = sanitized.run("run", bundle, folder, *CPU, "--json", "-")
    assert answer.out.isascii()
    files = [row["file"] for row in json.loads(answer.out)["images"]]
    assert files == [f"{folder}/a.png", f"{folder}/b.png"]


def test_json_files_are_whole_or_the_old_ones(
    sanitized: Programs, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    bundle, photo = small_v1_original.path, sets.find(photos)[0]
    file, link = tmp_path / "result.json", tmp_path / "link.json"
    file.write_text("old")
    link.symlink_to(file)

    def limited() -> None:  # as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    done = run_program(
        *(sanitized.folder / "rexdeploy-run", bundle, photo, *CPU, "--quiet", "--json", file),
        env=sanitized.env,
        preexec_fn=limited,
        restore_signals=False,  # Python ignores SIGXFSZ, which would end the program
    )
    assert done.returncode == 2
    assert done.stderr == f"error: cannot write {file} (File too large)\n"
    assert file.read_text() == "old"

    answer = sanitized.run("run", bundle, photo, *CPU, "--json", link)
    assert answer.code == 0
    assert answer.out.startswith("rexnet 0.3 on onnxruntime\n")  # and the document is in the file
    assert link.is_symlink()
    assert json.loads(file.read_text())["images"][0]["file"] == str(photo)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.json", "result.json"]

    full = sanitized.run("run", bundle, photo, *CPU, "--quiet", "--json", "/dev/full")
    assert (full.code, full.err) == (2, "error: cannot write /dev/full (No space left on device)\n")
    for place in (tmp_path, tmp_path / "nowhere" / "a.json", ""):
        line = sanitized.refused(bundle, photo, "--json", place)
        assert f"cannot write {place}: expected a file in a folder" in line
