"""`evaluate`: planted mistakes are counted image by image, and a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

import rexdeploy
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.images.decode import read
from rexdeploy.images.sets import varied_pixels
from rexdeploy.inference.accuracy import accuracy, beside, calibration_error, ranked
from rexdeploy.inference.classifier import load
from rexdeploy.steps.evaluate import JOURNAL, Evaluation, evaluate
from tests.helpers import assert_refused, edit_weights, nodes_of, run_cli

COUNT, WRONG = 70, 7  # more than two batches; images in the folder of another class


@pytest.fixture(scope="module")
def labelled(small_v1_original: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in the folders of the network's own answers, but for WRONG of them."""
    folder = tmp_path_factory.mktemp("labelled") / "val"
    spec = small_v1_original.manifest.model.preprocess
    larger = replace(spec, height=80, width=80)
    pixels = varied_pixels(COUNT, larger, seed=5)
    files = []
    for index, image in enumerate(pixels):
        path = folder / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
        files.append(path)
    with load(small_v1_original, "pytorch") as model:
        answers = model.probabilities(model.prepare(files)).argmax(axis=1).tolist()
    for index, (path, answer) in enumerate(zip(files, answers, strict=True)):
        shown = (answer + 1) % 37 if index < WRONG else answer
        path.parent.joinpath(str(shown)).mkdir(exist_ok=True)
        path.rename(path.parent / str(shown) / path.name)
    return folder


@pytest.fixture(scope="module")
def sound(small_v1_original: Bundle, labelled: Path) -> Evaluation:
    return evaluate(labelled, small_v1_original)


def test_right_answers_are_counted(sound: Evaluation) -> None:
    first = sound.rows[0]
    assert (first.file, first.backend) == ("weights.safetensors", "pytorch")
    assert first.top1.value == (COUNT - WRONG) / COUNT
    assert first.top5 is not None
    assert first.top5.value >= first.top1.value
    assert (sound.images, sound.read_as, sound.failures) == (COUNT, "indices", ())
    assert sound.published is None  # not the published weights
    by_file = {row.file: row for row in sound.rows}
    assert set(by_file) == {
        "weights.safetensors",
        "fp32.onnx",
        "fp32.tensorrt.onnx",
        "fp16.onnx",
    }
    for name in ("fp32.onnx", "fp32.tensorrt.onnx"):
        row = by_file[name]
        assert row.paired is not None
        assert (row.agreement, row.paired.lost, row.paired.won, row.paired.p_value) == (1, 0, 0, 1)
        assert row.changed == ()
        assert not row.emulated
    assert by_file["fp16.onnx"].emulated
    assert by_file["fp16.onnx"].ms_per_image is None  # emulated: its time says nothing
    assert (by_file["fp16.onnx"].agreement or 0) > 0.9
    assert [item.name for item in sound.skipped] == ["fp16.rtx-sm89.engine (tensorrt-rtx)"]


def swapped(bundle: Bundle, first: int, second: int) -> Bundle:
    """The bundle with two classes exchanged in its fp32.onnx, hash and all."""
    artifact = bundle.manifest.find("onnx", "fp32")
    assert artifact is not None
    model = onnx.load_from_string(bundle.read(artifact))
    order = list(range(37))
    order[first], order[second] = second, first
    head = nodes_of(model, "Conv")[-1].input[1:]
    data = edit_weights(model, head, lambda values: values[order]).SerializeToString()
    return bundle.update(replace(artifact, sha256=sha256(data)), files={artifact.file: data})


def test_exchanged_classes_are_lost_and_named(
    small_v1: Bundle, labelled: Path, sound: Evaluation
) -> None:
    counts = {int(folder.name): len(list(folder.iterdir())) for folder in labelled.iterdir()}
    first, second = sorted(counts, key=lambda label: -counts[label])[:2]
    result = evaluate(
        labelled, swapped(small_v1, first, second), backend=["pytorch", "onnxruntime"]
    )
    row = next(row for row in result.rows if row.file == "fp32.onnx")
    assert row.paired is not None
    assert row.paired.lost >= counts[first] + counts[second] - WRONG
    assert row.paired.won <= WRONG
    assert row.paired.difference.value == (row.paired.won - row.paired.lost) / COUNT
    assert row.paired.difference.high < 0
    assert row.paired.p_value < 0.05
    kinds: Counter[tuple[str, str]] = Counter()
    for item in row.changed:
        kinds[item.before, item.after] += item.images
    assert kinds[f"class {first}", f"class {second}"] > 0
    assert kinds[f"class {second}", f"class {first}"] > 0
    assert kinds.total() == round(COUNT * (1 - (row.agreement or 0)))
    assert result.rows[0].top1 == sound.rows[0].top1  # the reference is what it was


def test_unreadable_images_are_left_out_and_listed(
    small_v1_original: Bundle, labelled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "val"
    shutil.copytree(labelled, folder)
    some = sorted(folder.iterdir())[0]
    (some / "broken.png").write_bytes(b"\x89PNG no more")
    result = evaluate(folder, small_v1_original, file="fp32.onnx")
    assert result.images == COUNT
    assert [(item.name, "broken.png" in item.reason) for item in result.unreadable] == [
        (f"{some.name}/broken.png", False)
    ]
    assert len(result.rows) == 1  # nothing but the file that was asked for
    with pytest.raises(UsageError, match=rf"{some.name}/broken.png: "):
        evaluate(folder, small_v1_original, file="fp32.onnx", strict=True)
    for image in folder.rglob("*.png"):
        image.write_bytes(b"")
    with pytest.raises(UsageError, match=f"none of {COUNT + 1} images can be read; the first: "):
        evaluate(folder, small_v1_original, file="fp32.onnx")


class Killed(Exception):
    pass


def stopping(after: int, seen: list[int]):  # type: ignore[no-untyped-def]
    def counted(done: int, total: int) -> None:
        seen.append(done)
        if done >= after:
            raise Killed

    return counted


def same_numbers(one: Evaluation, other: Evaluation) -> bool:
    def numbers(result: Evaluation) -> Sequence[object]:
        rows = [replace(row, ms_per_image=None) for row in result.rows]
        return (rows, result.images, result.unreadable, result.failures)

    return numbers(one) == numbers(other)


def test_a_stopped_run_goes_on_and_comes_to_the_same(small_v1: Bundle, labelled: Path) -> None:
    files = ["weights.safetensors", "fp32.onnx"]
    whole = evaluate(labelled, small_v1, file=files)
    assert not (small_v1.path / JOURNAL).exists()
    with pytest.raises(Killed):
        evaluate(labelled, small_v1, file=files, counted=stopping(32, []))
    with open(small_v1.path / JOURNAL, "ab") as file:
        file.write(b'{"unreadable":{},"answ')  # as a kill in the middle of a write leaves it
    seen: list[int] = []
    result = evaluate(labelled, small_v1, file=files, counted=lambda done, total: seen.append(done))
    assert (result.resumed, seen) == (32, [32, 64, COUNT])
    assert same_numbers(result, whole)
    assert not (small_v1.path / JOURNAL).exists()
    assert Bundle.open(small_v1.path).manifest == small_v1.manifest


@pytest.mark.parametrize("other", ["other files", "other images", "other preprocessing"])
def test_another_run_never_takes_the_answers(
    small_v1: Bundle, labelled: Path, tmp_path: Path, other: str
) -> None:
    folder = tmp_path / "val"
    shutil.copytree(labelled, folder)
    with pytest.raises(Killed):
        evaluate(folder, small_v1, file="fp32.onnx", counted=stopping(32, []))
    seen: list[int] = []
    changes: dict[str, Any] = {}
    if other == "other images":
        sorted(folder.rglob("*.png"))[0].write_bytes(b"changed")
    elif other == "other files":
        changes = {"file": "fp32.tensorrt.onnx"}
    else:
        changes = {"crop_pct": 1.0}
    with pytest.raises(Killed):
        evaluate(folder, small_v1, **{"file": "fp32.onnx"} | changes, counted=stopping(0, seen))
    assert seen == [0]


def test_a_second_run_of_one_bundle_waits(small_v1: Bundle, labelled: Path) -> None:
    def second(done: int, total: int) -> None:
        with pytest.raises(UsageError, match="is being evaluated by another command: wait for it"):
            evaluate(labelled, small_v1, file="fp32.onnx")
        raise Killed

    with pytest.raises(Killed):
        evaluate(labelled, small_v1, file="fp32.onnx", counted=second)


def test_not_a_number_is_wrong_and_a_failure(small_v1: Bundle, labelled: Path) -> None:
    artifact = small_v1.manifest.find("onnx", "fp32")
    assert artifact is not None
    model = onnx.load_from_string(small_v1.read(artifact))
    head = nodes_of(model, "Conv")[-1].input[2]
    data = edit_weights(model, [head], lambda values: values + np.inf).SerializeToString()
    broken = small_v1.update(replace(artifact, sha256=sha256(data)), files={artifact.file: data})
    result = evaluate(labelled, broken, file=["weights.safetensors", "fp32.onnx"])
    row = result.rows[1]
    assert (row.nonfinite, row.top1.value, row.agreement) == (COUNT, 0, 0)
    assert row.changed[0].after == "no answer"
    assert result.failures == (
        f"fp32.onnx (onnxruntime) gave NaN or infinite values for {COUNT} images",
    )


def test_other_preprocessing_is_for_comparison_only(
    small_v1_original: Bundle, labelled: Path, sound: Evaluation
) -> None:
    result = evaluate(
        labelled, small_v1_original, file="fp32.onnx", crop_pct=1.0, interpolation="bilinear"
    )
    assert result.compared_only
    assert not sound.compared_only
    assert (result.preprocess.crop_pct, result.preprocess.interpolation) == (1.0, "bilinear")
    own = next(row for row in sound.rows if row.file == "fp32.onnx")
    assert result.rows[0].top1.value < own.top1.value  # whose answers the folders are
    one = sorted(labelled.rglob("*.png"))[0]
    assert not np.array_equal(read(one, result.preprocess), read(one, sound.preprocess))


def test_samples_and_limits_are_taken(small_v1_original: Bundle, labelled: Path) -> None:
    sampled = evaluate(labelled, small_v1_original, file="fp32.onnx", sample=20, seed=1)
    first = evaluate(labelled, small_v1_original, file="fp32.onnx", limit=5)
    assert (sampled.images, first.images, first.classes) == (20, 5, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx"}, "backend: got 'onnx', expected one of pytorch, onnxruntime"),
        ({"file": "fp32"}, "file: got 'fp32', expected one of .*: .*fp32.onnx"),
        ({"limit": 0}, "limit: got 0, expected 1 or more images"),
        ({"sample": -1}, "sample: got -1, expected 1 or more images"),
        ({"crop_pct": 1.01}, "crop pct: got 1.01, expected 0.1 to 1"),
        ({"interpolation": "area"}, "interpolation: got 'area', expected bicubic or bilinear"),
    ],
)
def test_unusable_options_are_one_line(
    small_v1_original: Bundle, labelled: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate(labelled, small_v1_original, **options)  # type: ignore[arg-type]


def test_nothing_that_runs_is_an_error(small_v1_original: Bundle, labelled: Path) -> None:
    with pytest.raises(BackendUnavailable, match="no file of rexnet 0.3 runs here: fp16.rtx-sm89"):
        evaluate(labelled, small_v1_original, backend="tensorrt-rtx")


def test_the_command_prints_writes_and_draws(
    small_v1: Bundle, labelled: Path, tmp_path: Path
) -> None:
    arguments = ("--bundle", "small_v1", "--backend", "pytorch", "--backend", "onnxruntime")
    out = ("--json", "found.json", "--plot", "found.svg")
    result = run_cli("evaluate", labelled, *arguments, *out, cwd=tmp_path)
    assert result.code == 0, result
    assert f"{COUNT} images of " in result.out
    assert "64 x 64 pixels, the centre 0.875 of the image, bicubic, mean 0.485" in result.out
    assert "90.00 (80.8-95.1)" in result.out  # Wilson's, of 63 of 70
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["rows"][0]["top1"]["value"] == 0.9
    assert "fp32.onnx (onnxruntime)" in (tmp_path / "found.svg").read_text()
    assert f"{COUNT} of {COUNT}" in result.err or "evaluating" in result.err
    again = rexdeploy.evaluate(labelled, small_v1, file="fp32.onnx")
    assert "\n" not in repr(again)
    assert again.to_dict()["images"] == COUNT


def test_faults_of_the_command_are_one_line(
    small_v1: Bundle, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "tabby").mkdir(parents=True)
    shutil.copy(sorted(labelled.rglob("*.png"))[0], tmp_path / "cats" / "tabby")
    for arguments, words in (
        (("empty",), "no images in empty"),
        (("nowhere",), "got nowhere, expected a folder of images"),
        (("cats",), "got 'tabby'; expected 'class 0', 'class 1', 'class 2' and 34 more"),
        (("cats", "--plot", "x.gif"), "plot: got 'x.gif'"),
        (("cats", "--limit", "many"), "--limit"),
    ):
        assert_refused(run_cli("evaluate", *arguments, cwd=tmp_path), words)
    assert {path.name for path in small_v1.path.iterdir()} == {
        "manifest.json",
        *(artifact.file for artifact in small_v1.manifest.artifacts),
    }


def test_ranks_are_a_stable_sorts() -> None:
    outputs = np.array([[1, 3, 3, 2], [0, 0, 0, 0], [1, np.nan, 2, 3]], np.float32)
    found = ranked(outputs, [2, 3, 3], "logits")
    assert [(answer, rank) for answer, rank, _ in found] == [(1, 1), (0, 3), (-1, 4)]
    assert found[1][2] == pytest.approx(0.25)
    (same,) = ranked(np.array([[0.2, 0.5, 0.3]]), [1], "probabilities")
    assert same[:2] == (1, 0)
    assert same[2] == 0.5


def test_top_5_counts_ranks_below_five() -> None:
    answers = [(0, rank, 0.5) for rank in (0, 0, 4, 5, 9)]
    row = accuracy(answers, 10, file="a", backend="b")
    assert row.top5 is not None
    assert (row.top1.value, row.top5.value) == (0.4, 0.6)
    assert accuracy(answers, 5, file="a", backend="b").top5 is None
    other = [(1, 1, 0.5), (0, 0, 0.5), (0, 0, 0.5), (3, 5, 0.5), (0, 9, 0.5)]
    paired = beside(row, answers, other, [0, 0, 1, 2, 3], ["a", "b", "c", "d"]).paired
    assert paired is not None
    assert (paired.lost, paired.won) == (1, 1)


def test_the_calibration_error_is_the_gap_by_bins() -> None:
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 1.0])
    is_right = np.array([1, 1, 1, 0, 1, 0, 1], bool)
    # One bin holds 0.95 and 1: (4 x 0.95 + 1 - 4) / 7; one 0.55: (1.1 - 1) / 7.
    assert calibration_error(confidences, is_right) == pytest.approx((0.8 + 0.1) / 7)
    assert calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
