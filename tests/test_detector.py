"""Detectors over a ReXNet: the network, its weights, and its stages against torchvision's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from onnx import ModelProto
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection.rpn import concat_box_prediction_layers

from rexdeploy.bundle.store import Bundle
from rexdeploy.detection.export import head_graphs
from rexdeploy.detection.reference import rebuilt
from rexdeploy.detection.runtime import INPUTS, OUTPUTS
from rexdeploy.errors import BackendUnavailable, UsageError
from rexdeploy.models.checkpoints import load_checkpoint
from rexdeploy.models.detector import DetectorConfig, build_detector, stage_ends
from rexdeploy.models.detector_stages import BoxStage, FeatureStage, MaskStage
from rexdeploy.models.rexnet import RexNetConfig, lite_config, v1_config
from rexdeploy.models.weights import DetectorWeights, load_detector
from tests.helpers import graph

HEADS = {"boxes": BoxStage, "masks": MaskStage}
COUNTS = [(5, 6, 7, 2), (1, 1, 1, 1)]  # boxes on each level
GAPS = [(3, 0, 0, 2), (0, 0, 0, 0)]


@pytest.fixture(scope="module")
def detector(detector_original: Bundle) -> Any:
    """The bundle's Mask R-CNN for canvases of 128 x 160."""
    weights = detector_original.manifest.find("weights")
    assert weights is not None
    model: Any = rebuilt(detector_original.read(weights), detector_original.manifest.model)
    model.transform.min_size, model.transform.max_size = (128,), 160
    return model


@pytest.fixture(scope="module")
def seeded() -> DetectorWeights:
    return load_detector(None, width=0.3, num_classes=21)


@pytest.fixture(scope="module")
def native(detector_original: Bundle) -> dict[Any, ModelProto]:
    """The bundle's graphs by stage."""
    return {
        item.role: graph(detector_original, item.file)
        for item in detector_original.manifest.artifacts
        if item.role is not None
    }


@pytest.fixture(scope="module")
def sampled(detector: nn.Module) -> dict[Any, ModelProto]:
    return head_graphs(detector, masks=False, grid_sample=True)


def photograph(photos: Path, name: str = "china.png") -> Tensor:
    with Image.open(photos / name) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def relative(expected: Tensor, got: Tensor) -> float:
    """The largest error, in units of the root mean square of what is expected."""
    assert expected.shape == got.shape
    if not expected.numel():
        return 0.0
    return float((expected - got).abs().max() / expected.square().mean().sqrt())


def head_inputs(counts: tuple[int, ...]) -> list[Tensor]:
    """Features of a 128 x 160 canvas, and boxes on it; the first and last are extreme ones."""
    generator = torch.Generator().manual_seed(sum(counts))
    maps = [torch.randn(1, 256, 128 // s, 160 // s, generator=generator) for s in (4, 8, 16, 32)]
    rois = []
    for count in counts:
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([160.0, 128.0])
        extent = torch.rand(count, 2, generator=generator) * 80
        far = torch.minimum(corner + extent, torch.tensor([160.0, 128.0]))
        rois.append(torch.cat([corner, far], dim=1))
        if count > 1:
            rois[-1][0] = torch.tensor([0.0, 0.0, 160.0, 128.0])
            rois[-1][-1] = torch.tensor([159.0, 127.0, 160.0, 128.0])  # one pixel in the corner
    return [*maps, *rois]


def outputs(stage: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        found = stage(*inputs)
    return list(found) if isinstance(found, tuple) else [found]


def assert_graph_is(graph: ModelProto, stage: nn.Module, role: Any, inputs: list[Tensor]) -> None:
    session = onnxruntime.InferenceSession(graph.SerializeToString())
    assert [value.name for value in session.get_outputs()] == list(OUTPUTS[role])
    fed = dict(zip(INPUTS[role], (value.numpy() for value in inputs), strict=True))
    for expected, got in zip(outputs(stage, inputs), session.run(None, fed), strict=True):
        assert relative(expected, torch.from_numpy(got)) < 1e-4


@pytest.mark.parametrize(
    ("config", "channels"),
    [
        (v1_config(0.9), [36, 56, 117, 168]),
        (v1_config(1.0), [38, 61, 128, 185]),
        (v1_config(2.2), [85, 134, 283, 406]),
        (lite_config(1.0), [40, 64, 128, 184]),
        (v1_config(1.0, depth_mult=0.2), [46, 76, 136, 166]),
    ],
)
def test_stages_end_at_the_last_block_of_each_stride(
    config: RexNetConfig, channels: list[int]
) -> None:
    ends = stage_ends(config)
    assert [config.blocks[index].out_channels for index in ends] == channels


def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'rexdeploy\[detect\]'"):
        build_detector(DetectorConfig(0.3))


def test_a_detector_needs_a_class_beside_the_background() -> None:
    with pytest.raises(UsageError, match="number of classes: got 1, expected 2 to"):
        build_detector(DetectorConfig(0.3, num_classes=1))


def test_a_seeded_detector_finds_something_of_several_classes(
    seeded: DetectorWeights, photos: Path
) -> None:
    assert not seeded.body_trained
    assert not seeded.heads_trained
    model: Any = seeded.build()
    model.transform.min_size = (256,)
    for name in ("china.png", "flower.png"):
        with torch.inference_mode():
            (found,) = model([photograph(photos, name)])
        assert len(found["scores"]) >= 10
        assert len(found["labels"].unique()) >= 4
        assert found["scores"].std() > 0.01


def test_seeds_are_kept_apart_from_the_programs_own_random_numbers(
    seeded: DetectorWeights,
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = load_detector(None, width=0.3, num_classes=21).state_dict
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, again[name]) for name, value in seeded.state_dict.items())


def test_a_classifier_gives_the_body(narrow_checkpoint: Path) -> None:
    found = load_detector(narrow_checkpoint, num_classes=5)
    assert (found.config, found.body_trained, found.heads_trained) == (
        DetectorConfig(0.3, 5),
        True,
        False,
    )
    theirs = load_checkpoint(narrow_checkpoint).state_dict
    for name in ("features.0.weight", "features.9.out.5.fc.0.weight", "features.18.out.8.weight"):
        assert torch.equal(found.state_dict[f"backbone.body.{name}"], theirs[name])
    with pytest.raises(UsageError, match=r"with 5 classes|got a Faster .*asked for .*0\.5"):
        load_detector(narrow_checkpoint, width=0.5)


def test_timms_names_give_the_body_too() -> None:
    theirs = timm.models.rexnet.RexNet(width_mult=0.3, num_classes=5).state_dict()
    found = load_detector(theirs, num_classes=5)
    assert (found.config, found.body_trained) == (DetectorConfig(0.3, 5), True)
    stem = found.state_dict["backbone.body.features.0.weight"]
    assert torch.equal(stem, theirs["stem.conv.weight"])


def test_a_whole_detector_says_what_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_detector(DetectorConfig(0.3, 7, masks=True, family="rexnet_lite"))
    # As torchvision's references save it, with frozen batch norms, which count nothing.
    state = {k: v for k, v in model.state_dict().items() if "num_batches_tracked" not in k}
    torch.save({"model": state, "epoch": 3}, tmp_path / "model.pth")
    found = load_detector(tmp_path / "model.pth")
    assert found.body_trained
    assert found.heads_trained
    assert (found.config.num_classes, found.config.masks) == (7, True)
    assert found.config.backbone == lite_config(0.3, 1)
    built = found.build().state_dict()
    assert built.keys() == model.state_dict().keys()
    assert all(torch.equal(built[name], value) for name, value in state.items())
    without = load_detector(tmp_path / "model.pth", masks=False)
    assert not without.config.masks
    assert not any(".mask_" in name for name in without.build().state_dict())
    with pytest.raises(UsageError, match="with 7 classes, asked for .* with 9; leave out"):
        load_detector(tmp_path / "model.pth", num_classes=9)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"masks": True}, "got a Faster R-CNN over rexnet 0.3 .* asked for a Mask"),
        ({"rpn.head.cls_logits.bias": None}, {}, "1 tensors are missing .*rpn.head.cls_logits"),
        ({"rpn.head.cls_logits.bias": torch.zeros(9)}, {}, r"the wrong shape .*\[9\], expected"),
        ({"roi_heads.mask_head.0.0.bias": torch.zeros(256)}, {}, "1 are unknown .*mask_head"),
        ({"roi_heads.box_predictor.cls_score.weight": None}, {}, "got no tensor as roi_heads"),
        ({"backbone.body.features.0.weight": None}, {}, "not over a ReXNet: got backbone"),
        ({"backbone.body.features.0.weight": torch.full((32, 3, 3, 3), np.nan)}, {}, "NaN"),
    ],
)
def test_what_does_not_fit_is_one_line(
    change: dict[str, Tensor | None],
    options: dict[str, Any],
    message: str,
    seeded: DetectorWeights,
) -> None:
    state = {**seeded.state_dict, **change}
    whole = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(UsageError, match=message) as refused:
        load_detector(whole, **options)
    assert "\n" not in str(refused.value)


def test_a_resnet_detector_is_refused() -> None:
    state = {"backbone.body.conv1.weight": torch.zeros(64, 3, 7, 7), "rpn.a": torch.zeros(1)}
    with pytest.raises(UsageError, match=r"not over a ReXNet: got backbone\.body\.conv1\.weight"):
        load_detector(state)


def test_every_stage_is_what_torchvision_computes(detector: Any, photos: Path) -> None:
    seen: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            seen[name] = (inputs, output)

        return hook

    heads = detector.roi_heads
    parts = {"backbone": detector.backbone, "rpn": detector.rpn.head, "box": heads.box_roi_pool}
    parts |= {"classes": heads.box_predictor, "mask": heads.mask_roi_pool}
    parts |= {"masks": heads.mask_predictor}
    hooks = [module.register_forward_hook(keep(name)) for name, module in parts.items()]
    with torch.inference_mode():
        (found,) = detector([photograph(photos)])
    for hook in hooks:
        hook.remove()
    assert len(found["boxes"]) > 0
    canvas = seen["backbone"][0][0]
    assert canvas.shape == (1, 3, 128, 160)
    *maps, objectness, deltas = outputs(FeatureStage(detector), [canvas])
    levels = list(seen["backbone"][1].values())
    assert max(map(relative, levels[:4], maps)) < 1e-6
    flat = concat_box_prediction_layers(*seen["rpn"][1])
    assert relative(flat[0], objectness.reshape(-1, 1)) < 1e-5
    assert relative(flat[1], deltas.reshape(-1, 4)) < 1e-5
    for pool, result, stage in (("box", "classes", BoxStage), ("mask", "masks", MaskStage)):
        (_, (boxes,), _), _ = seen[pool]
        level = parts[pool].map_levels([boxes])
        assert len(level.unique()) > 1 or pool == "mask"  # what it finds may be small
        rois = [boxes[level == number] for number in range(4)]
        expected = seen[result][1]
        expected = expected if isinstance(expected, tuple) else (expected,)
        order = torch.argsort(level, stable=True)
        got = outputs(stage(detector, grid_sample=False), [*levels[:4], *rois])
        for theirs, ours in zip(expected, got, strict=True):
            assert relative(theirs[order], ours) < 1e-5


@pytest.mark.parametrize("role", HEADS)
def test_a_sampled_grid_is_roi_align(detector: nn.Module, role: str) -> None:
    stages: list[Any] = [HEADS[role](detector, grid_sample=grid) for grid in (False, True)]
    native, sampled = (stage.pool for stage in stages)
    for counts in COUNTS:
        inputs = head_inputs(counts)
        exact = [value.double() for value in inputs]
        with torch.inference_mode():
            expected = native(exact[:4], exact[4:])
            # In float64 the same to the last digits; in float32 a place rounds to 1e-5 of a value.
            assert (expected - sampled(exact[:4], exact[4:])).abs().max() < 1e-12
            assert (expected - sampled(inputs[:4], inputs[4:])).abs().max() < 5e-5


@pytest.mark.parametrize("counts", COUNTS + GAPS)
@pytest.mark.parametrize("role", HEADS)
def test_the_heads_graphs_run_as_torch(
    role: str, counts: tuple[int, ...], detector: nn.Module, native: dict[Any, ModelProto]
) -> None:
    stage = HEADS[role](detector, grid_sample=False)
    assert_graph_is(native[role], stage, role, head_inputs(counts))
    assert sum(node.op_type == "RoiAlign" for node in native[role].graph.node) == 4


def test_the_sampled_graph_runs_as_torch(
    detector: nn.Module, sampled: dict[Any, ModelProto]
) -> None:
    kinds = {node.op_type for node in sampled["boxes"].graph.node}
    assert "GridSample" in kinds
    assert not kinds & {"RoiAlign", "NonZero", "NonMaxSuppression", "Loop", "If", "ScatterND"}
    stage = BoxStage(detector, grid_sample=True)
    for counts in COUNTS:
        assert_graph_is(sampled["boxes"], stage, "boxes", head_inputs(counts))


def test_the_features_graph_runs_as_torch_at_any_size(
    detector: nn.Module, native: dict[Any, ModelProto]
) -> None:
    graph = native["features"]
    stage = FeatureStage(detector)
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 3, 128, 160), (2, 3, 96, 32)):
        assert_graph_is(graph, stage, "features", [torch.randn(shape, generator=generator)])


def test_a_detector_without_masks_exports_none(seeded: DetectorWeights) -> None:
    with pytest.raises(UsageError, match="masks: got a detector without a mask head"):
        head_graphs(seeded.build(), masks=True, grid_sample=False)
