"""Verification names the edge of every planted defect, however small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto
from PIL import Image

from rexdeploy.backends import open_backend
from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.store import Bundle
from rexdeploy.images import sets
from rexdeploy.images.decode import normalise
from rexdeploy.models.rexnet import ReXNetV1_lite
from rexdeploy.steps.build_trt import build_trt
from rexdeploy.steps.export import export
from rexdeploy.steps.verify import verify
from tests import planted
from tests.helpers import copied, entry, graph, nodes_of, reacting, saved
from tests.planted import Defect, plant

FAST: dict[str, Any] = {"samples": 6}
ENGINE: dict[str, Any] = {"flavor": "rtx", "target": ("sm89",)}

TO_FP32 = "broken edge torch -> fp32.onnx (onnxruntime): "
TO_FP16 = "broken edge fp32.tensorrt.onnx -> fp16.onnx (onnxruntime)"


@pytest.mark.parametrize(
    ("file", "defect"),
    [
        *(
            ("fp32.onnx", defect)
            for defect in (
                planted.weight_off_by_one_percent,
                planted.swapped_channels,
                planted.dropped_se,
                planted.shifted_rows,
                planted.constant_output,
                planted.forgotten_normalisation,
            )
        ),
        ("fp16.onnx", planted.swapped_channels),
        ("fp16.onnx", planted.dropped_se),
    ],
)
def test_a_defect_breaks_the_edge_of_its_graph_alone(
    small_v1: Bundle, file: str, defect: Defect
) -> None:
    (failure,) = verify(plant(small_v1, file, defect), **FAST).failures
    assert failure.startswith(f"{TO_FP32}error " if file == "fp32.onnx" else TO_FP16)


def test_a_defect_in_lite_is_found_too(small_lite: Bundle) -> None:
    bundle = plant(small_lite, "fp32.onnx", planted.weight_off_by_one_percent)
    assert verify(bundle, **FAST).failures[0].startswith("broken edge torch -> fp32.onnx")


def test_infinite_logits_fail_and_are_counted(small_v1: Bundle) -> None:
    result = verify(plant(small_v1, "fp16.onnx", planted.overflowing_head), **FAST)
    assert len([edge for edge in result.edges if edge.nonfinite]) == 1
    assert "logits are NaN or infinite" in result.failures[0]


@pytest.mark.parametrize("rows", [1, 2])
def test_a_graph_that_fails_at_some_batch_size_is_a_broken_edge(
    small_v1: Bundle, tmp_path: Path, rows: int
) -> None:
    path = saved(planted.fixed_reshape(graph(small_v1), rows), tmp_path / "fixed.onnx")
    result = verify(small_v1, **FAST | {"candidate": path})
    assert result.failures[0].startswith("broken edge torch -> fixed.onnx (onnxruntime): ")
    assert "failed on a batch of" in result.failures[0]


# Rows of a batch


@pytest.mark.parametrize("computed", [16, 32, 63])
def test_a_graph_that_copies_rows_of_a_large_batch_is_found(
    small_lite_original: Bundle, tmp_path: Path, computed: int
) -> None:
    """Issue 10: the 64 rows were the same 16 images four times over, and hid these."""
    model = planted.copied_rows(graph(small_lite_original), computed)
    path = saved(model, tmp_path / "copied.onnx")
    result = verify(small_lite_original, samples=4, candidate=path)
    assert result.batches == (1, 5, 8, 64)
    assert result.failures[0].startswith("broken edge torch -> copied.onnx (onnxruntime): error ")


def test_two_exchanged_rows_of_64_are_found_and_a_sound_graph_passes(
    small_lite_original: Bundle, tmp_path: Path, photos: Path
) -> None:
    model = graph(small_lite_original)
    sound = saved(model, tmp_path / "sound.onnx")
    wrong = saved(planted.exchanged_rows(model), tmp_path / "exchanged.onnx")
    for folder in (None, photos):
        options: dict[str, Any] = {"samples": 2, "images": folder}
        good = verify(small_lite_original, **options | {"candidate": sound})
        assert good.passed, good.failures
        assert 64 in good.batches
        assert not verify(small_lite_original, **options | {"candidate": wrong}).passed


def test_every_graph_of_a_bundle_is_run_at_batch_64(small_lite: Bundle) -> None:
    """The engine's range is what its clients may send; the 16-bit graph's rows count as well."""
    options = ENGINE | {"fp16": True, "batch": BatchRange(1, 8, 64), "force": True}
    bundle = build_trt(small_lite, **options).bundle
    good = verify(bundle, samples=2)
    assert good.passed, good.failures
    assert good.batches == (1, 5, 8, 64)
    bad = verify(plant(bundle, "fp16.onnx", planted.exchanged_rows), samples=2)
    assert bad.failures
    assert all("-> fp16.onnx (onnxruntime): " in failure for failure in bad.failures)


def test_rows_of_grey_images_cannot_stand_for_each_other(
    small_lite_original: Bundle, tmp_path: Path
) -> None:
    """Grey in any order of colours is the same grey."""
    folder = tmp_path / "grey"
    folder.mkdir()
    spec = small_lite_original.manifest.model.preprocess
    for index, pixels in enumerate(sets.varied_pixels(4, spec, seed=3)):
        Image.fromarray(pixels).convert("L").convert("RGB").save(folder / f"{index}.png")
    pool, _ = sets.pool(folder, 4, spec, 64)
    assert len({image.tobytes() for image in pool}) == len(pool) == 64
    path = saved(planted.copied_rows(graph(small_lite_original), 32), tmp_path / "copied.onnx")
    result = verify(small_lite_original, samples=4, images=folder, candidate=path)
    assert result.failures[0].startswith("broken edge torch -> copied.onnx (onnxruntime): error")


# Smaller than rounding


@pytest.mark.parametrize(
    "defect",
    [
        planted.two_classes_swapped,
        planted.a_third_of_the_classes_rotated,
        planted.up_by_half_a_signal,
        planted.one_channel_off_by_one_percent,
        planted.weight_off_by_one_percent,
    ],
)
def test_a_defect_smaller_than_rounding_in_the_16_bit_graph_is_found(
    small_v1: Bundle, defect: Defect
) -> None:
    """Issue 10: all of these hid below the float16 limit of 0.7."""
    result = verify(plant(small_v1, "fp16.onnx", defect), **FAST)
    assert len(result.failures) == 1
    assert "-> fp16.onnx (onnxruntime): " in result.failures[0]
    twin = next(edge for edge in result.edges if ", rounded" in edge.reference)
    assert twin.reference == "fp32.tensorrt.onnx, rounded"
    assert twin.failures


@pytest.mark.parametrize(
    ("defect", "index"),
    [(planted.one_channel_off_by_one_percent, 8), (planted.two_classes_swapped, -1)],
)
def test_a_small_defect_in_the_float32_graph_is_found_and_its_node_named(
    small_v1: Bundle, defect: Defect, index: int
) -> None:
    bundle = plant(small_v1, "fp32.onnx", defect)
    (failure,) = verify(bundle, **FAST).failures
    assert f"; first at node {nodes_of(graph(bundle), 'Conv')[index].name} in " in failure


def test_a_16_bit_graph_of_ours_must_be_that_of_its_parent(small_v1: Bundle) -> None:
    """Renamed, it has no twin, and its weights could be off by all that rounding hides."""

    def other_graph(model: ModelProto) -> ModelProto:
        return planted.one_channel_off_by_one_percent(planted.renamed(model))

    result = verify(plant(small_v1, "fp16.onnx", other_graph), **FAST)
    assert result.failures[0].startswith(f"{TO_FP16}: it is not the float32 graph")


@pytest.mark.parametrize(
    "defect", [None, planted.swapped_channels, planted.a_third_of_the_classes_rotated]
)
def test_a_runtime_that_rounds_elsewhere_gets_the_room_that_it_needs(
    small_v1: Bundle, monkeypatch: pytest.MonkeyPatch, defect: Defect | None
) -> None:
    """Without `as_typed`, onnxruntime as it is keeps float32 where the graph has float16."""
    monkeypatch.setattr("rexdeploy.parity.judge.as_typed", lambda model: model)
    result = verify(plant(small_v1, "fp16.onnx", defect) if defect else small_v1, **FAST)
    twin = next(edge for edge in result.edges if ", rounded" in edge.reference)
    assert twin.error > 1e-2  # not to the bit
    assert result.passed == (defect is None), result.failures


@pytest.mark.parametrize("defect", [None, planted.one_channel_off_by_one_percent])
def test_a_graph_that_rounds_where_no_conversion_does_gets_no_room_for_it(
    small_v1: Bundle, defect: Defect | None
) -> None:
    """Its rounding was taken for a runtime's, and one channel 1 % off hid in the room for that."""
    parent = graph(small_v1, "fp32.tensorrt.onnx")
    wrong = planted.rounded_gates(defect(parent) if defect else parent)
    result = verify(plant(small_v1, "fp16.onnx", lambda model: wrong), **FAST)
    twin = next(edge for edge in result.edges if ", rounded" in edge.reference)
    assert bool(twin.failures) == (defect is not None)
    assert twin.limits.error < 5e-3
    assert any("broken edge" in failure for failure in result.failures) == (defect is not None)


def test_a_float16_convolution_of_zeros_loosens_no_limit(small_v1: Bundle, tmp_path: Path) -> None:
    """Issue 10: a graph of mixed types was given the loosest limit of all."""
    sound, wrong = (
        saved(planted.half_convolution_of_zeros(model), tmp_path / name)
        for model, name in (
            (graph(small_v1), "sound.onnx"),
            (planted.weight_off_by_one_percent(graph(small_v1)), "wrong.onnx"),
        )
    )
    good = verify(small_v1, **FAST | {"candidate": sound})
    assert good.passed, good.failures
    assert good.edges[0].limits.error < 5e-3
    bad = verify(small_v1, **FAST | {"candidate": wrong})
    assert bad.failures[0].startswith("broken edge torch -> wrong.onnx (onnxruntime): error ")


# Types


@pytest.mark.parametrize(
    ("file", "defect", "words"),
    [
        # Its products are float32, its limits would be those of 16 bits.
        *(
            (
                "fp32.onnx",
                lambda model, kind=kind: planted.rounded_inside(
                    model, TensorProto.DataType.Value(kind)
                ),
                f"fp32.onnx is not in the precision that the manifest says: it rounds to {kind}",
            )
            for kind in ("BFLOAT16", "FLOAT16")
        ),
        ("fp16.onnx", planted.bfloat16_before_output, "it rounds to BFLOAT16 inside"),
        ("fp32.onnx", planted.double_output, "it gives DOUBLE, expected FLOAT"),
    ],
    ids=["BFLOAT16 inside", "FLOAT16 inside", "BFLOAT16 end", "DOUBLE end"],
)
def test_a_graph_in_another_type_than_its_manifest_says_fails(
    small_v1: Bundle, file: str, defect: Defect, words: str
) -> None:
    result = verify(plant(small_v1, file, defect), **FAST)
    assert any(words in line for line in result.failures)


def test_one_convolution_in_float32_is_not_float16_whatever_its_logits(small_v1: Bundle) -> None:
    (failure,) = verify(plant(small_v1, "fp16.onnx", planted.stem_in_float32), **FAST).failures
    assert "fp16.onnx is not in the precision that the manifest says: 75 of" in failure


@pytest.mark.parametrize("defect", [planted.halved, planted.only_exponents])
def test_probabilities_that_do_not_sum_to_one_are_found(
    small_pixels: Bundle, defect: Defect
) -> None:
    """Their logarithms, less their mean, are those of the right ones."""
    result = verify(plant(small_pixels, "fp16.onnx", defect), **FAST)
    assert result.failures[0].startswith(f"{TO_FP16}: gave probabilities that sum to ")
    assert result.failures[0].endswith(", expected 1")


# Few classes, and logits far from zero


@pytest.fixture(scope="module")
def two_classes(session_dir: Path) -> Bundle:
    """An untrained lite network of two classes and 64 pixels, with a bfloat16 engine."""
    options = {"lite": True, "width": 0.3, "num_classes": 2, "image_size": 64, "name": "two"}
    made = export(**options, out=session_dir / "two_classes")  # type: ignore[arg-type]
    return build_trt(made.bundle, bf16=True, **ENGINE).bundle


def test_few_classes_pass_and_a_constant_answer_does_not(
    two_classes: Bundle, tmp_path: Path
) -> None:
    """Issue 10: the bfloat16 limit of 3 lay above what a constant has with two classes."""
    sound = verify(two_classes)
    assert sound.passed, sound.failures
    limits = [edge.limits for edge in sound.edges if "bf16.onnx" in edge.candidate]

    def mean_answer(model: ModelProto) -> ModelProto:
        model = planted.constant_output(model)
        (constant,) = (item for item in model.graph.initializer if item.name == "always")
        spec = two_classes.manifest.model
        pool, _ = sets.pool(None, 16, spec.preprocess, 64)
        weights = two_classes.read(entry(two_classes, "weights.safetensors"))
        logits = open_backend("pytorch", weights, spec).run(normalise(pool, spec.preprocess))
        mean = logits.mean(axis=0)
        model.graph.initializer.remove(constant)
        assert max(limit.error for limit in limits) <= (
            np.abs(logits - mean).max() / logits.std(axis=0).mean() / 2
        )
        return planted.add_constants(model, always=mean)

    result = verify(plant(copied(two_classes, tmp_path / "two"), "bf16.onnx", mean_answer))
    assert result.failures[0].startswith("broken edge fp32.tensorrt.onnx -> bf16.onnx")


@pytest.fixture(scope="module")
def far_from_zero(session_dir: Path) -> Bundle:
    """Logits of 262 that vary by 0.4: float16's steps there are a quarter, bfloat16's two."""
    torch.manual_seed(5)
    model = reacting(ReXNetV1_lite(multiplier=1.0, classes=2), 64)
    with torch.no_grad():
        model.get_parameter("output.4.weight").mul_(0.85)
        model.get_parameter("output.4.bias").add_(262)
    folder = session_dir / "far"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "far.pth")
    made = export(weights=str(folder / "far.pth"), image_size=64, name="far", out=folder)
    return made.bundle


def test_rounding_that_leaves_nothing_to_judge_by_is_no_verdict(
    far_from_zero: Bundle, tmp_path: Path
) -> None:
    built = build_trt(copied(far_from_zero, tmp_path / "far"), bf16=True, **ENGINE).bundle
    result = verify(built)
    skipped, _ = result.skipped
    assert skipped.candidate == "bf16.onnx (onnxruntime, bfloat16 emulated)"
    assert "rounding to bf16 alone makes an error of" in skipped.reason
    assert "too near to judge" in skipped.reason
    assert "float16" in skipped.reason
    # Yet that it rounds as it should, and no more, can be told.
    assert result.edges[-1].reference == "fp32.tensorrt.onnx, rounded"
    assert result.passed, result.failures
    required = verify(built, require=("onnxruntime",))
    assert required.failures[0].startswith("required backend onnxruntime did not run bf16.onnx")


def test_float16_that_rounds_too_much_fails(far_from_zero: Bundle, tmp_path: Path) -> None:
    built = build_trt(copied(far_from_zero, tmp_path / "far"), fp16=True, **ENGINE).bundle
    result = verify(built)
    assert result.failures[0].startswith("broken edge fp32.tensorrt.onnx -> fp16.onnx")
    assert "root mean square error" in result.failures[0]
    assert "is over the limit 0.15" in result.failures[0]
