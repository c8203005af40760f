"""Exporting: what is in the bundle, what is refused, and what a failure leaves behind."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import onnxsim
import pytest
import torch
from onnx import ModelProto

from rexdeploy.bundle.manifest import BatchRange
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.graphs.from_torch import export_graph
from rexdeploy.images import decode, sets
from rexdeploy.models.rexnet import RexNet, ReXNetV1, ReXNetV1_lite
from rexdeploy.steps.export import export
from tests.helpers import copied, edit_weights, entry, folder_state, graph, nodes_of

# Small and quick where the network itself does not matter.
TINY: dict[str, Any] = {"width": 0.3, "num_classes": 5, "image_size": 64}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An untrained network."""
    return export(**TINY | {"out": tmp_path_factory.mktemp("tiny")}).bundle


def test_the_graph_has_one_image_input_one_logits_output_and_a_dynamic_batch(tiny: Bundle) -> None:
    model = graph(tiny)
    values = [*model.graph.input, *model.graph.output]
    assert [value.name for value in values] == ["input", "logits"]
    shapes = [
        [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in values
    ]
    assert shapes == [["batch", 3, 64, 64], ["batch", 5]]
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 18}
    assert not nodes_of(model, "ScatterND")
    assert not nodes_of(model, "BatchNormalization")


@pytest.mark.parametrize("model", [ReXNetV1(classes=2), ReXNetV1_lite(classes=2)])
def test_activations_work_in_place_but_while_torch_follows_them(
    model: RexNet, tiny: Bundle
) -> None:
    def in_place() -> list[Any]:
        return [module.inplace for module in model.modules() if hasattr(module, "inplace")]

    class Followed(Exception):
        pass

    def look(*_: object) -> None:
        assert not any(in_place())
        raise Followed

    before = in_place()
    assert before.count(True) > 30
    model.register_forward_pre_hook(look)
    with pytest.raises(Exception) as stopped:  # noqa: PT011 - torch wraps it
        export_graph(model, tiny.manifest.model, None, 18)
    assert isinstance(stopped.value.__cause__ or stopped.value, Followed)
    assert in_place() == before


def test_the_graph_says_what_it_is_and_nothing_of_this_machine(tiny: Bundle) -> None:
    model = graph(tiny)
    told = {entry.key: entry.value for entry in model.metadata_props}
    assert (told["rexdeploy.family"], told["rexdeploy.width"]) == ("rexnet", "0.3")
    assert json.loads(told["rexdeploy.preprocess"])["mean"] == [0.485, 0.456, 0.406]
    assert told["rexdeploy.weights_sha256"] == tiny.manifest.model.weights.sha256
    assert b"site-packages" not in model.SerializeToString()
    assert b".py" not in model.SerializeToString()


def test_an_untrained_bundle_says_so_everywhere(tiny: Bundle) -> None:
    assert tiny.manifest.model.title == "rexnet 0.3 (untrained weights)"
    assert tiny.manifest.model.weights.source == "untrained (seed 0)"


def test_the_manifest_tells_how_to_make_each_file_again(v1_original: Bundle) -> None:
    spec = v1_original.manifest.model
    assert (spec.family, spec.width, spec.num_classes) == ("rexnet", 1.0, 37)
    assert (spec.weights.source, spec.weights.trained) == ("rexnetv1_1.0.pth", True)
    root = entry(v1_original, "fp32.onnx")
    assert root.built_with["torch"] == metadata.version("torch")
    assert root.built_with["opset"] == "18"
    assert root.command.startswith("rexdeploy export")


def test_labels_are_imagenets_for_1000_classes_only(
    v1_original: Bundle, timm_original: Bundle
) -> None:
    assert v1_original.manifest.find("labels") is None
    labels = entry(timm_original, "labels.txt")
    lines = timm_original.read(labels).decode().splitlines()
    assert len(lines) == 1000
    assert (lines[0], lines[281], lines[999]) == ("tench", "tabby", "toilet tissue")


def test_a_fixed_batch_labels_and_plain_graph_on_request(tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\ndog\nélan\n", encoding="utf-8")
    options = {"batch": 3, "labels": labels, "simplify": False, "opset": 20, "lite": True}
    result = export(**TINY | options, name="mine", out=tmp_path)
    model = graph(result.bundle)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 3
    assert model.opset_import[0].version == 20
    assert entry(result.bundle, "fp32.onnx").batch == BatchRange(3, 3, 3)
    assert result.bundle.path == tmp_path / "mine"
    assert len(result.comparisons) == 1
    assert result.bundle.read(entry(result.bundle, "labels.txt")).decode().splitlines()[4] == "élan"


def test_the_same_export_again_keeps_what_was_built_from_it(tiny: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from rexdeploy.steps.build_trt import build_trt

    options = TINY | {"out": tmp_path}
    built = build_trt(copied(tiny, tmp_path / tiny.path.name), fp16=True, flavor="rtx").bundle
    again = export(**options).bundle
    # The export is reproducible, byte for byte.
    assert entry(again, "fp32.onnx") == entry(tiny, "fp32.onnx")
    assert again.manifest.find("engine") is not None
    assert again.manifest.find("engine") == built.manifest.find("engine")
    other = export(**options | {"num_classes": 6, "simplify": False}).bundle
    assert other.manifest.find("engine") is None
    assert {path.name for path in other.path.iterdir()} == {
        "manifest.json",
        "weights.safetensors",
        "fp32.onnx",
    }


def test_a_simplifier_that_changes_the_logits_is_caught_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As onnxslim 0.1.90 to 0.1.98 did; the real onnxsim runs first, then a weight is spoilt."""
    real = onnxsim.simplify

    def spoil(model: ModelProto, **options: object) -> tuple[ModelProto, bool]:
        simplified, ok = real(model, **options)
        name = nodes_of(simplified, "Conv")[4].input[1]
        return edit_weights(simplified, [name], lambda values: values * 1.01), ok

    monkeypatch.setattr(onnxsim, "simplify", spoil)
    with pytest.raises(VerificationFailed, match="edge torch -> simplified is broken") as failure:
        export(**TINY | {"out": tmp_path, "lite": True, "batch": 1})
    assert failure.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_network_does_not_replace_a_trained_one(v1_bundle: Bundle) -> None:
    before = folder_state(v1_bundle.path)
    options = TINY | {"out": v1_bundle.path.parent, "name": v1_bundle.path.name}
    with pytest.raises(UsageError, match=r"holds trained weights \(rexnetv1_1.0.pth\)"):
        export(**options)
    assert folder_state(v1_bundle.path) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1.3}, r"--width 1.3 contradicts .*rexnetv1_1.0.pth, which holds a rexnet 1;"),
        ({"lite": True}, r"--lite contradicts .*which holds a rexnet 1"),
        ({"num_classes": 1000}, r"--num-classes 1000 contradicts .*which has 37 classes"),
    ],
)
def test_options_that_contradict_the_checkpoint_name_both(
    change: dict[str, object], message: str, v1_checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"weights": str(v1_checkpoint), "out": tmp_path}
    with pytest.raises(UsageError, match=message):
        export(**options | change)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 8}, "image size: got 8, expected 32 to 1024"),
        ({"num_classes": 0}, "number of classes: got 0"),
        ({"batch": 0}, "batch: got 0, expected 'dynamic' or 1 to 1024"),
        ({"opset": 17}, "opset: got 17, expected 18 to"),
        ({"opset": 99}, "opset: got 99"),
        ({"name": "../up"}, "name: got '../up', expected a plain folder name"),
        ({"name": ""}, "name: got ''"),
        ({"labels": Path("nowhere.txt")}, "labels nowhere.txt cannot be read"),
        ({"width": float("nan")}, "width multiplier: got nan"),
    ],
)
def test_unusable_options_are_refused_before_the_work(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(**TINY | {"out": tmp_path} | change)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_whose_logits_do_not_vary_is_refused(tmp_path: Path) -> None:
    from rexdeploy.models.rexnet import ReXNetV1_lite

    torch.manual_seed(0)
    torch.save(ReXNetV1_lite(multiplier=0.3, classes=5).state_dict(), tmp_path / "fresh.pth")
    with pytest.raises(UsageError, match="do not vary"):
        export(weights=tmp_path / "fresh.pth", image_size=64, batch=1, out=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", ["v1_original", "timm_original", "lite_original"])
def test_onnx_logits_are_the_checkpoints_on_photographs(
    name: str, photos: Path, request: pytest.FixtureRequest
) -> None:
    """From the file that a person has to the graph that is deployed, by the shortest way."""
    from rexdeploy.models.checkpoints import load_checkpoint

    bundle: Bundle = request.getfixturevalue(name)
    checkpoint = request.getfixturevalue(name.replace("original", "checkpoint"))
    preprocess = bundle.manifest.model.preprocess
    batch = decode.normalise(sets.load_batch(sets.find(photos), preprocess), preprocess)
    with torch.inference_mode():
        expected = load_checkpoint(checkpoint).build()(torch.from_numpy(batch)).numpy()
    session = ort.InferenceSession(graph(bundle).SerializeToString())
    got = session.run(None, {"input": batch})[0]
    assert np.abs(got - expected).max() / expected.std(axis=0).mean() < 1e-3
