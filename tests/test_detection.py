"""Detectors from the command line, and defects planted in their files and between the stages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper
from PIL import Image

import rexdeploy
from rexdeploy.bundle.manifest import Artifact, ModelSpec, decode, to_json
from rexdeploy.bundle.store import Bundle, commit, sha256
from rexdeploy.detection import boxes as host
from rexdeploy.detection import masks, runtime
from rexdeploy.detection.detector import load_detector
from rexdeploy.detection.judge import Alike, Judge, rows, set_limit, unmatched
from rexdeploy.detection.masks import from_rle, to_rle
from rexdeploy.detection.reference import rebuilt
from rexdeploy.detection.runtime import Detections, OnnxStage
from rexdeploy.detection.verify import verify_detector
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.graphs.cast import to_precision
from rexdeploy.images.decode import load
from tests.cpp_probe import probe
from tests.helpers import (
    assert_refused,
    copied,
    edit_weights,
    entry,
    graph,
    nodes_of,
    run_cli,
    with_file,
)

ROLES = ("features", "boxes", "masks")


@pytest.fixture(scope="module")
def judge(detector_original: Bundle, photos: Path) -> Judge:
    spec, weights = detector_original.manifest.model, detector_original.manifest.find("weights")
    assert weights is not None
    pixels = [np.asarray(load(file)) for file in sorted(photos.iterdir())]
    return Judge(rebuilt(detector_original.read(weights), spec), spec, pixels)


@pytest.fixture(scope="module")
def models(detector_original: Bundle) -> dict[Any, ModelProto]:
    return {role: graph(detector_original, f"{role}.onnx") for role in ROLES}


def failures(judge: Judge, bundle: Bundle, model: ModelProto, role: str) -> str:
    """Why a stage's graph does not pass; empty if it does."""
    found = judge.compare(entry(bundle, f"{role}.onnx"), model, None)
    return "; ".join(f"{edge.candidate}: {edge.failures[0]}" for edge in found if edge.failures)


# --- defects in a file


def negated_channel(model: ModelProto) -> ModelProto:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[3] = -values[3]
        return values

    return edit_weights(model, [nodes_of(model, "Conv")[8].input[1]], change)


def other_anchor(model: ModelProto) -> ModelProto:
    """The objectness of a place's anchors in another order."""
    own = [node for node in nodes_of(model, "Conv") if _rows(model, node.input[1]) == 3]
    assert own
    return edit_weights(model, [own[0].input[1]], lambda values: values[::-1])


def class_off_by_one(model: ModelProto) -> ModelProto:
    """The classes' rows moved on by one."""
    last = [node for node in nodes_of(model, "Gemm") if _rows(model, node.input[1]) == 21]
    assert last
    return edit_weights(model, [*last[0].input[1:]], lambda values: np.roll(values, 1, axis=0))


def wrong_std(model: ModelProto) -> ModelProto:
    last = [node for node in nodes_of(model, "Gemm") if _rows(model, node.input[1]) == 84]
    return edit_weights(model, [*last[0].input[1:]], lambda values: values * 1.05)


def with_attribute(name: str, value: object) -> Callable[[ModelProto], ModelProto]:
    def change(model: ModelProto) -> ModelProto:
        made = ModelProto()
        made.CopyFrom(model)
        for node in nodes_of(made, "RoiAlign"):
            for item in list(node.attribute):
                if item.name == name:
                    node.attribute.remove(item)
            node.attribute.append(helper.make_attribute(name, value))
        return made

    return change


def swapped_levels(model: ModelProto) -> ModelProto:
    made = ModelProto()
    made.CopyFrom(model)
    first, second = nodes_of(made, "RoiAlign")[:2]
    first.input[0], second.input[0] = second.input[0], first.input[0]
    return made


def other_mask(model: ModelProto) -> ModelProto:
    """The masks of the next class."""
    last = [node for node in nodes_of(model, "Conv") if _rows(model, node.input[1]) == 21]
    assert last
    return edit_weights(model, [*last[0].input[1:]], lambda values: np.roll(values, 1, axis=0))


def _rows(model: ModelProto, name: str) -> int:
    return next((item.dims[0] for item in model.graph.initializer if item.name == name), 0)


DEFECTS: list[tuple[str, Callable[[ModelProto], ModelProto]]] = [
    ("features", negated_channel),
    ("features", other_anchor),
    ("boxes", class_off_by_one),
    ("boxes", wrong_std),
    ("boxes", with_attribute("coordinate_transformation_mode", "half_pixel")),
    ("boxes", with_attribute("sampling_ratio", 1)),
    ("boxes", with_attribute("spatial_scale", 0.2)),
    ("boxes", swapped_levels),
    ("masks", other_mask),
    ("masks", with_attribute("coordinate_transformation_mode", "half_pixel")),
]


@pytest.mark.parametrize(("role", "defect"), DEFECTS)
def test_a_defect_names_its_stage(
    role: str,
    defect: Callable[[ModelProto], ModelProto],
    judge: Judge,
    models: dict[str, ModelProto],
    detector_original: Bundle,
) -> None:
    assert f"{role}.onnx (onnxruntime): " in failures(
        judge, detector_original, defect(models[role]), role
    )


@pytest.mark.parametrize("role", ROLES)
def test_an_honest_stage_passes(
    role: str, judge: Judge, models: dict[str, ModelProto], detector_original: Bundle
) -> None:
    assert failures(judge, detector_original, models[role], role) == ""


@pytest.mark.parametrize("role", ["boxes", "masks"])
def test_half_precision_is_held_to_its_own_rounding(
    role: str, judge: Judge, models: dict[str, ModelProto], detector_original: Bundle
) -> None:
    artifact = replace(entry(detector_original, f"{role}.onnx"), precision="fp16")
    half = to_precision(models[role], "fp16")
    assert not [edge for edge in judge.compare(artifact, half, models[role]) if edge.failures]
    broken = class_off_by_one(half) if role == "boxes" else other_mask(half)
    assert [edge for edge in judge.compare(artifact, broken, models[role]) if edge.failures]
    with pytest.raises(RexdeployError, match="its products are fp32, and the manifest says fp16"):
        judge.compare(artifact, models[role], models[role])


# --- defects between the stages: torchvision's own detector does not share them


@pytest.fixture(scope="module")
def stages(models: dict[Any, ModelProto]) -> dict[Any, OnnxStage]:
    return {role: OnnxStage(model.SerializeToString(), role) for role, model in models.items()}


def test_from_end_to_end_it_is_torchvisions_detector(judge: Judge, stages: Any) -> None:
    found = judge.end_to_end(stages, "ours")
    assert found.expected >= 12  # so that it means something
    assert found.failures == ()


def _half_a_pixel_off(probabilities: Any, boxes: Any, height: int, width: int) -> Any:
    return RLES(probabilities, boxes + np.float32(8), height, width)


RLES, ANCHORS, DETECTIONS, LEVELS = masks.rles, host.anchors, host.detections, host.levels
BETWEEN: dict[str, tuple[Any, str, Any]] = {
    "an anchor's stride": (
        host,
        "anchors",
        lambda height, width: ANCHORS(height, width) * np.float32(1.02),
    ),
    "boxes not clipped": (host, "clip", lambda boxes, size: boxes),
    "the resized image's coordinates": (runtime, "to_original", lambda boxes, *_: boxes),
    "a class off by one": (
        host,
        "detections",
        lambda *given, **named: (
            *(made := DETECTIONS(*given, **named))[:2],
            made[2] % 20 + 1,
        ),
    ),
    "masks beside their boxes": (masks, "rles", _half_a_pixel_off),
    "levels in another order": (host, "levels", lambda boxes: 3 - LEVELS(boxes)),
}


@pytest.mark.parametrize("defect", BETWEEN)
def test_a_defect_between_the_stages_is_found(
    defect: str, judge: Judge, stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, wrong = BETWEEN[defect]
    monkeypatch.setattr(module, name, wrong)
    (failure,) = judge.end_to_end(stages, "ours").failures
    assert "detections have no partner, limit" in failure


# --- sets of detections


def detections(*found: tuple[int, float, tuple[float, ...]]) -> Detections:
    return Detections(
        np.array([box for *_, box in found], np.float32).reshape(-1, 4),
        np.array([score for _, score, _ in found], np.float32),
        np.array([label for label, *_ in found], np.int64),
    )


ONE = (1, 0.9, (0.0, 0.0, 100.0, 100.0))


@pytest.mark.parametrize(
    ("other", "count"),
    [
        (ONE, 0),
        ((1, 0.89, (0.0, 0.0, 100.0, 100.0)), 0),
        ((1, 0.87, (0.0, 0.0, 100.0, 100.0)), 2),
        ((2, 0.9, (0.0, 0.0, 100.0, 100.0)), 2),
        ((1, 0.9, (0.0, 0.0, 96.0, 100.0)), 0),
        ((1, 0.9, (0.0, 0.0, 94.0, 100.0)), 2),
    ],
)
def test_detections_are_one_by_class_score_and_overlap(other: Any, count: int) -> None:
    assert unmatched(detections(ONE), detections(other)) == count
    assert unmatched(detections(), detections(other)) == 1
    assert unmatched(detections(ONE, ONE), detections(other)) == max(count + 1, 1)


def test_masks_count_too() -> None:
    inside = np.zeros((10, 10), np.bool_)
    inside[:5] = True
    above, below = (replace(detections(ONE), masks=(to_rle(mask),)) for mask in (inside, ~inside))
    assert unmatched(above, above) == 0
    assert unmatched(above, below) == 2
    assert unmatched(above, detections(ONE)) == 2
    assert unmatched(above, below, Alike(overlap=0.0)) == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 200), st.integers(0, 2000))
def test_a_limit_grows_with_the_noise_and_is_never_most_of_all(noise: int, total: int) -> None:
    assert set_limit(noise, total) <= total // 4
    assert set_limit(noise, total) <= set_limit(noise + 1, total)
    assert set_limit(0, 1000) == 3
    assert set_limit(8, 1000) == 17


def test_of_a_large_map_the_same_places_are_compared() -> None:
    large = np.random.default_rng(1).normal(size=(1, 3, 200, 200)).astype(np.float32)
    drawn = rows("p2", [large])
    assert drawn.shape == (1 << 15, 3)
    np.testing.assert_array_equal(rows("p2", [2 * large]), 2 * drawn)
    assert len(np.unique(drawn, axis=0)) == 1 << 15
    assert rows("p2", [large[:, :, :100]]).shape == (20_000, 3)
    assert rows("objectness", [large.reshape(1, -1)[:, :300]]).shape == (100, 3)
    assert rows("deltas", [large.reshape(1, -1, 4)[:, :300]]).shape == (100, 12)


# --- the commands


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images in which nothing is detected."""
    folder = tmp_path_factory.mktemp("grey")
    for shade in (90, 120):
        Image.new("RGB", (64, 48), (shade,) * 3).save(folder / f"{shade}.png")
    return folder


def test_verify_passes_stores_and_names_what_is_broken(
    detector_original: Bundle,
    models: dict[str, ModelProto],
    photos: Path,
    grey: Path,
    tmp_path: Path,
) -> None:
    bundle = copied(detector_original, tmp_path / "segment")
    done = run_cli("verify", bundle.path, "--images", photos, "--samples", "1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "9 tensors are within their limits" in done.out
    assert "torchvision -> onnxruntime from end to end, 1 images" in done.out
    stored = json.loads((bundle.path / "verify.json").read_text())
    assert len(stored["edges"]) == 9
    broken = with_file(bundle, "boxes.onnx", class_off_by_one(models["boxes"]).SerializeToString())
    broken = with_file(broken, "masks.onnx", models["boxes"].SerializeToString())
    refused = run_cli("verify", broken.path, "--images", grey, "--quiet", cwd=tmp_path)
    assert refused.code == 3
    assert "the edge pytorch -> boxes.onnx (onnxruntime): class_logits is broken" in refused.err
    assert "expected stage 'masks'" in refused.err
    assert "no float32 graph of stage boxes, masks has passed" in refused.err


def drifted(models: dict[str, ModelProto], factor: float) -> ModelProto:
    model = models["boxes"]
    (last,) = [n for n in nodes_of(model, "Gemm") if _rows(model, n.input[1]) == 84]
    return edit_weights(model, [last.input[1]], lambda values: values * factor)


def test_rounding_makes_no_room_for_a_small_defect(
    judge: Judge, models: dict[str, ModelProto], detector_original: Bundle
) -> None:
    """Less than half precision itself does, and not what the parent rounds to."""
    artifact = replace(entry(detector_original, "boxes.onnx"), precision="fp16")
    half = to_precision(drifted(models, 1.003), "fp16")
    broken = [e for e in judge.compare(artifact, half, models["boxes"]) if e.failures]
    assert "its parent, rounded alike" in [edge.reference for edge in broken]


def test_what_a_manifest_says_is_held_against_the_files(
    detector_original: Bundle, models: dict[str, ModelProto], grey: Path, tmp_path: Path
) -> None:
    bundle = copied(detector_original, tmp_path / "segment")
    boxes = entry(bundle, "boxes.onnx")
    half = to_precision(drifted(models, 1.5), "fp16").SerializeToString()
    (bundle.path / "half.onnx").write_bytes(half)
    other = replace(
        boxes, file="half.onnx", sha256=sha256(half), precision="fp16", parent_sha256=boxes.sha256
    )
    engine = replace(
        boxes, kind="engine", file="boxes.engine", sha256=sha256(b"no engine"), role="boxes"
    )
    (bundle.path / "boxes.engine").write_bytes(b"no engine")
    more = commit(bundle.path, lambda m: (m or bundle.manifest).with_artifacts(other, engine), {})
    failures = "; ".join(verify_detector(more, images=grey).failures)
    assert "boxes.engine: the manifest holds no proof that it is in fp32" in failures
    assert "-> half.onnx (onnxruntime): box_deltas is broken" in failures
    spec = replace(bundle.manifest.model.preprocess, mean=(0.0, 0.0, 0.0))
    wrong = replace(bundle.manifest, model=replace(bundle.manifest.model, preprocess=spec))
    with pytest.raises(UsageError, match="preprocessing is not that of features.onnx"):
        load_detector(commit(bundle.path, lambda _: wrong, {}))


def test_a_graph_of_other_shapes_is_one_line(
    judge: Judge, models: dict[str, ModelProto], detector_original: Bundle
) -> None:
    turned = ModelProto()
    turned.CopyFrom(models["features"])
    for node in turned.graph.node:
        for index, name in enumerate(node.output):
            if name == "p2":
                node.output[index] = "p2/before"
        for index, name in enumerate(node.input):
            if name == "p2":
                node.input[index] = "p2/before"
    turned.graph.node.append(
        helper.make_node("Transpose", ["p2/before"], ["p2"], perm=[0, 1, 3, 2])
    )
    with pytest.raises(RexdeployError, match=r"its p2 has shape .*, expected \[1, 256, "):
        judge.compare(entry(detector_original, "features.onnx"), turned, None)


def test_a_picture_takes_no_images_place(
    detector_original: Bundle, grey: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(grey, tmp_path / "own"))
    before = {file.name: file.read_bytes() for file in own.iterdir()}
    for image, target in ((own, own), (own / "90.png", own / "90.png")):
        with pytest.raises(UsageError, match="is one of the images; give another place"):
            rexdeploy.detect(image, detector_original, draw=target)
    Image.new("RGB", (64, 48)).save(own / "90.jpg")
    with pytest.raises(UsageError, match="two images are called 90"):
        rexdeploy.detect(own, detector_original, draw=tmp_path / "drawn")
    assert {name: (own / name).read_bytes() for name in before} == before


def test_a_graph_without_a_role_is_not_passed_over(
    detector_original: Bundle, grey: Path, tmp_path: Path
) -> None:
    bundle = copied(detector_original, tmp_path / "segment")
    data = (bundle.path / "boxes.onnx").read_bytes() + b""
    more = replace(entry(bundle, "boxes.onnx"), file="more.onnx", role=None, sha256=sha256(data))
    without = replace(bundle.manifest, artifacts=(*bundle.manifest.artifacts, more))
    (bundle.path / "more.onnx").write_bytes(data)
    found = verify_detector(Bundle(bundle.path, without), images=grey)
    assert "more.onnx has no role in a detector" in found.failures


def test_images_without_objects_prove_nothing(detector_original: Bundle, grey: Path) -> None:
    found = verify_detector(detector_original, images=grey)
    assert (found.failures, found.sets) == ((), ())
    (skip,) = found.skipped
    assert (skip.file, skip.reason[:19]) == ("from end to end", "nothing is detected")


def test_predict_detects_draws_and_goes_on_behind_a_broken_image(
    detector_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for file in photos.iterdir():
        (tmp_path / "in" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG")
    Image.new("L", (5, 3)).save(tmp_path / "in" / "tiny.png")
    Image.new("CMYK", (40, 30), (9, 99, 9, 9)).save(tmp_path / "in" / "cmyk.jpg")
    Image.new("RGB", (4000, 1)).save(tmp_path / "in" / "thin.png")
    done = run_cli(
        "predict", "in", "--bundle", detector_original.path, "--score", "0.3", "--max-detections",
        "7", "--draw", "drawn", "--json", "found.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 2
    assert "broken.png" in done.err
    found = json.loads((tmp_path / "found.json").read_text())
    by_name = {Path(row["file"]).name: row for row in found["images"]}
    assert {name for name, row in by_name.items() if row["error"]} == {"broken.png", "thin.png"}
    assert "too thin" in by_name["thin.png"]["error"]
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        f"{Path(name).stem}.png" for name, row in by_name.items() if not row["error"]
    }
    objects = by_name["china.png"]["objects"]
    assert 0 < len(objects) <= 7
    assert all(item["score"] > 0.3 for item in objects)
    with load_detector(detector_original, "pytorch") as reference:
        (expected,) = reference.detect([photos / "china.png"], 0.3, 7)
    np.testing.assert_allclose([item["box"] for item in objects], expected.boxes, atol=1e-2)
    assert [item["index"] for item in objects] == expected.labels.tolist()
    with Image.open(photos / "china.png") as photo, Image.open(tmp_path / "drawn/china.png") as out:
        assert photo.size == out.size
        changed = (np.asarray(photo.convert("RGB")) != np.asarray(out)).any(axis=2)
    assert expected.masks is not None
    assert changed[from_rle(expected.masks[0])].mean() > 0.9


def test_engines_of_all_stages_are_proven(
    detector_original: Bundle, grey: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = copied(detector_original, tmp_path / "segment")
    done = run_cli("build-trt", bundle.path, "--fp16", "--target", "sm89", cwd=tmp_path)
    assert done.code == 0, done.err
    built = Bundle.open(bundle.path)
    engines = [item for item in built.manifest.artifacts if item.kind == "engine"]
    assert [item.role for item in engines] == list(ROLES)
    for engine in engines:
        assert engine.proof_fault is None
        parent = built.manifest.find("onnx", sha256=engine.parent_sha256)
        assert parent is not None
        assert (parent.role, parent.precision) == (engine.role, "fp16")
        assert done.out.count(engine.file) == 1
    found = verify_detector(built, images=grey)
    assert found.failures == ()
    skipped = [skip.file for skip in found.skipped]
    assert skipped == [*(engine.file for engine in engines), "from end to end"]
    judged = {edge.candidate.split(" ")[0] for edge in found.edges}
    assert judged == {item.file for item in built.manifest.artifacts if item.kind == "onnx"}
    # Not a grid of float16: half a pixel would be lost.
    kept = graph(built, "boxes.fp16.onnx")
    types = {item.name: item.data_type for item in kept.graph.initializer}
    assert not any(
        types.get(name) == TensorProto.FLOAT16
        for node in nodes_of(kept, "GridSample")
        for name in node.input
    )
    refused = run_cli("build-trt", bundle.path, "--int8", "--batch", "2", cwd=tmp_path)
    assert_refused(refused, "--int8, --batch: a detector's engines have no such option")
    refused = run_cli("build-trt", bundle.path, "--target", "sm1", cwd=tmp_path)
    assert_refused(refused, "target: got sm1, expected one of sm75")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("--top", "3"), "--top: a detector has no such option; leave it out"),
        (("--score", "1.5"), "score: got 1.5, expected 0 to 1"),
        (("--max-detections", "0"), "max detections: got 0, expected 1 to 1000"),
        (("--draw", "out.txt"), "draw: got out.txt, expected a name that ends in .png"),
        (("--backend", "cuda"), "backend: got 'cuda', expected one of auto, onnxruntime, pytorch"),
    ],
)
def test_options_that_a_detector_cannot_take(
    words: tuple[str, ...], part: str, detector_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    image = photos / "china.png"
    refused = run_cli("predict", image, "--bundle", detector_original.path, *words, cwd=tmp_path)
    assert_refused(refused, part)


def test_commands_of_classifiers_say_so(
    detector_original: Bundle, small_v1_original: Bundle, photos: Path, tmp_path: Path
) -> None:
    for words in (("bench",), ("triton",), ("quantize", "--calib", photos)):
        refused = run_cli(*words, detector_original.path, cwd=tmp_path)
        assert_refused(refused, "holds a network that can segment, expected one that can classify")
    with pytest.raises(UsageError, match="can segment"):
        rexdeploy.load(detector_original)
    with pytest.raises(UsageError, match="can classify, expected one that can detect or segment"):
        load_detector(small_v1_original)
    refused = run_cli(
        "predict", photos, "--bundle", small_v1_original.path, "--score", "0.5", cwd=tmp_path
    )
    assert_refused(refused, "--score: for detectors, and this bundle holds a classifier")
    refused = run_cli("export", "--task", "detect", "--lite", "--batch", "3", cwd=tmp_path)
    assert_refused(refused, "--lite, --batch: a detector has no such option")
    refused = run_cli("export", "--task", "detect", "--name", "a/b", cwd=tmp_path)
    assert_refused(refused, "name: got 'a/b', expected a plain folder name")
    refused = run_cli("export", "--task", "detec", cwd=tmp_path)
    assert_refused(refused, "task: got 'detec', expected classify, detect or segment")


def test_a_detectors_manifest_has_a_format_of_its_own(detector_original: Bundle) -> None:
    manifest = detector_original.manifest
    assert manifest.format == 2
    with pytest.raises(ValueError, match="a segment network in a manifest of format 1"):
        replace(manifest, format=1)
    spec: ModelSpec = replace(manifest.model, task="classify")
    with pytest.raises(ValueError, match="a classify network in a manifest of format 2"):
        replace(manifest, model=spec)
    assert {item.role for item in manifest.artifacts if item.kind == "onnx"} == set(ROLES)


def test_cpp_takes_no_detector_for_a_classifier(detector_original: Bundle, tmp_path: Path) -> None:
    own = to_json(detector_original.manifest)
    forged = own.replace(b'"format": 2', b'"format": 1')
    (tmp_path / "own.json").write_bytes(own)
    (tmp_path / "forged.json").write_bytes(forged)
    lines = probe("manifest", [(tmp_path / "own.json",), (tmp_path / "forged.json",)])
    assert "got manifest format 2, this program reads 1" in lines[0]
    assert "a segment network in a manifest of format 1" in lines[1]
    with pytest.raises(UsageError, match="a segment network in a manifest of format 1"):
        decode(forged, "forged")


def test_a_closed_detector_and_one_image_for_a_list(detector_original: Bundle) -> None:
    detector = load_detector(detector_original)
    with pytest.raises(UsageError, match="got one image"):
        detector.detect("street.jpg")
    with pytest.raises(UsageError, match="image 0: "):
        detector.detect([Image.new("F", (40, 40))])
    detector.close()
    detector.close()
    with pytest.raises(RexdeployError, match="was closed"):
        detector.detect([Image.new("RGB", (40, 40))])


def test_a_missing_stage_is_named(detector_original: Bundle) -> None:
    kept: tuple[Artifact, ...] = tuple(
        item for item in detector_original.manifest.artifacts if item.role != "boxes"
    )
    without = Bundle(detector_original.path, replace(detector_original.manifest, artifacts=kept))
    with pytest.raises(UsageError, match="no float32 graph of stage 'boxes'"):
        load_detector(without)
