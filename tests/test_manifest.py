"""The manifest: batch ranges, strict reading, and hostile file names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.bundle.manifest import (
    FORMAT,
    VERIFICATION,
    Artifact,
    BatchRange,
    Manifest,
    ModelSpec,
    Preprocess,
    WeightsOrigin,
    decode,
    to_json,
)
from rexdeploy.bundle.precision import Precision, PrecisionProof
from rexdeploy.errors import UsageError

SPEC = ModelSpec(
    "rexnet", 1.5, 10, "input", "logits", Preprocess(), WeightsOrigin("a.pth", "0" * 64, True)
)


def _artifact(name: str, own: str, parent: str | None = None) -> Artifact:
    return Artifact("onnx", name, own * 64, parent * 64 if parent else None)


MANIFEST = Manifest(
    FORMAT,
    "m",
    SPEC,
    (
        replace(_artifact("weights.safetensors", "a"), kind="weights"),
        _artifact("fp32.onnx", "b", "a"),
        replace(_artifact("fp16.onnx", "c", "b"), batch=BatchRange(1, 2, 3), precision="fp16"),
        replace(_artifact("x.engine", "d", "c"), kind="engine"),
    ),
)


@given(st.lists(st.integers(1, 4096), min_size=3, max_size=3).map(sorted))
def test_a_batch_range_survives_its_own_spelling(sizes: list[int]) -> None:
    batch = BatchRange(*sizes)
    assert BatchRange.parse(str(batch)) == batch
    samples = batch.samples()
    assert {batch.min, batch.opt, batch.max} <= set(samples)
    assert all(batch.min <= size <= batch.max for size in samples)
    if batch.max - batch.min >= 2:
        assert any(size % 2 for size in samples)


def test_one_number_is_a_fixed_batch() -> None:
    assert BatchRange.parse("8") == BatchRange(8, 8, 8)


@pytest.mark.parametrize(
    "text",
    [
        "8:1:4",
        "0:1:2",
        "1:2",
        "1:2:3:4",
        "",
        "a",
        "1:2:x",
        "-1:1:1",
        "1.5",
        "1::3",
        "9" * 5000,
        "1:1:4097",
    ],
)
def test_impossible_batch_ranges_are_refused(text: str) -> None:
    with pytest.raises(
        UsageError, match="expected min:opt:max with 1 <= min <= opt <= max <= 4096"
    ):
        BatchRange.parse(text)


def test_a_manifest_survives_encoding() -> None:
    assert decode(to_json(MANIFEST), "here") == MANIFEST


def _edited(path: str, value: object) -> bytes:
    """The manifest's JSON with the entry at a dotted path replaced."""
    document = json.loads(to_json(MANIFEST))
    *parents, last = [int(part) if part.isdecimal() else part for part in path.split(".")]
    place = document
    for part in parents:
        place = place[part]
    place[last] = value
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "name",
    ["../weights", "/etc/passwd", "a/b", "..", ".", "", ".hidden", "manifest.json", "a\\b", "a\nb"],
)
def test_a_file_outside_the_folder_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="not a plain name inside the bundle"):
        decode(_edited("artifacts.1.file", name), "here")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model.width", "wide", r"Expected `float \| null`, got `str` - at `\$.model.width`"),
        ("model.family", "resnet", r"Invalid enum value 'resnet'"),
        ("artifacts.1.sha256", "xyz", "not 64 hexadecimal digits"),
        ("artifacts.2.batch.min", 9, "not 1 <= min <= opt <= max"),
        ("artifacts.0.file", "fp32.onnx", "two artifacts have the same file name"),
        ("model.preprocess.std", [0, 1, 1], "unusable preprocessing"),
        ("model.preprocess.crop_pct", 0, "unusable preprocessing"),
        ("model.preprocess.height", 10**9, "unusable preprocessing"),
        ("model.num_classes", 0, "impossible model"),
        ("model.width", None, "impossible model"),
        ("format", 99, "got manifest format 99, this rexdeploy reads 1"),
    ],
)
def test_the_first_wrong_field_is_named(path: str, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        decode(_edited(path, value), "here/manifest.json")
    assert str(refusal.value).startswith("here/manifest.json")


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(UsageError) as refusal:
        decode(data, "here")
    assert "\n" not in str(refusal.value)


def test_a_replaced_file_takes_everything_built_from_it_along() -> None:
    changed = MANIFEST.with_artifacts(_artifact("fp32.onnx", "e", "a"))
    assert [item.file for item in changed.artifacts] == ["weights.safetensors", "fp32.onnx"]
    same = MANIFEST.with_artifacts(MANIFEST.artifacts[1])
    assert {item.file for item in same.artifacts} == {item.file for item in MANIFEST.artifacts}


def test_untrained_weights_are_in_the_title() -> None:
    assert SPEC.title == "rexnet 1.5"
    untrained = replace(SPEC, weights=replace(SPEC.weights, trained=False))
    assert untrained.title == "rexnet 1.5 (untrained weights)"


REPORT = Artifact("report", VERIFICATION, "9" * 64, "b" * 64)
TUNING = Artifact("report", "tune.json", "8" * 64, "b" * 64)


@pytest.mark.parametrize(
    "added",
    [
        (_artifact("fp16.onnx", "e", "b"),),  # changed, and its engine gone
        (replace(_artifact("y.engine", "e", "c"), kind="engine"),),  # added
        (replace(MANIFEST.artifacts[3], sha256="e" * 64),),  # changed
        (replace(MANIFEST.artifacts[2], precision="bf16"),),  # the same bytes, said to be another
    ],
    ids=["graph", "new engine", "changed engine", "claim"],
)
def test_a_verification_goes_with_what_it_judged(added: tuple[Artifact, ...]) -> None:
    judged = MANIFEST.with_artifacts(REPORT, TUNING)
    assert judged.find_file(VERIFICATION) == REPORT
    changed = judged.with_artifacts(*added)
    assert changed.find_file(VERIFICATION) is None
    assert changed.find_file("tune.json") == TUNING


def test_a_verification_stays_while_nothing_it_judged_changes() -> None:
    judged = MANIFEST.with_artifacts(REPORT)
    labels = Artifact("labels", "labels.txt", "7" * 64)
    for added in ((TUNING,), (labels,), (MANIFEST.artifacts[2],)):
        assert judged.with_artifacts(*added).find_file(VERIFICATION) == REPORT
    both = judged.with_artifacts(_artifact("fp16.onnx", "e", "b"), replace(REPORT, sha256="6" * 64))
    assert both.find_file(VERIFICATION) is not None  # it is of the new file


@pytest.mark.parametrize(
    ("precision", "proof", "fault"),
    [
        ("fp16", PrecisionProof("Half", {"Half": 2}), None),
        ("bf16", PrecisionProof("BFloat16", {"BFloat16": 2}), None),
        (None, PrecisionProof(None, {"Half": 1, "Float": 1}), None),
        ("fp16", PrecisionProof("Float", {"Float": 2}), "claims fp16, and its proof is of Float"),
        ("fp16", PrecisionProof(None, {"Float": 2}), "its proof is of a mixed graph's types"),
        (None, PrecisionProof("Half", {"Half": 2}), "claims a mixed graph's types"),
        ("fp16", PrecisionProof("Half", {"Half": 0, "Float": 2}), "its proof does not show fp16"),
        ("fp16", PrecisionProof("Half", {"Half": 2}, {}, ("conv",)), "does not show fp16"),
        ("fp16", None, "the manifest holds no proof that it is in fp16"),
    ],
)
def test_a_proof_is_of_the_precision_that_is_claimed(
    precision: Precision | None, proof: PrecisionProof | None, fault: str | None
) -> None:
    engine = replace(MANIFEST.artifacts[3], precision=precision, proof=proof)
    if fault is None:
        assert engine.proof_fault is None
    else:
        assert fault in (engine.proof_fault or "")
