"""What a detector does on the host in numpy, against torchvision's own functions."""

from __future__ import annotations

import itertools
import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import (
    GeneralizedRCNNTransform,
    _resize_image_and_masks,
    resize_boxes,
)
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import LevelMapper

from rexdeploy.arrays import Bool, Float32, Int64
from rexdeploy.detection import boxes, masks, preprocess
from rexdeploy.detection.masks import Rle
from rexdeploy.detection.runtime import Detections
from rexdeploy.errors import RexdeployError, UsageError

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
GENERATOR = AnchorGenerator(tuple((2**n,) for n in range(5, 10)), ((0.5, 1.0, 2.0),) * 5)
CANVASES = [(32, 32), (64, 96), (800, 608), (1344, 96)]


def _random_boxes(rng: np.random.Generator, count: int, size: boxes.Size) -> Float32:
    """Boxes within an image, in clusters: many overlap."""
    centres = rng.uniform(0, 1, (max(count // 8, 1), 2))[rng.integers(0, max(count // 8, 1), count)]
    half = rng.uniform(0.02, 0.2, (count, 2))
    moved = centres + rng.normal(0, 0.02, (count, 2))
    corners = np.concatenate([moved - half, moved + half], axis=1) * ([size[1], size[0]] * 2)
    return boxes.clip(corners.astype(np.float32), size)


def _distinct(rng: np.random.Generator, low: float, high: float, count: int) -> Float32:
    """Shuffled, and so far apart that the sigmoid of no two is equal in one library alone."""
    return rng.permutation(np.linspace(low, high, count)).astype(np.float32)


# Anchors


def _maps(height: int, width: int) -> list[torch.Tensor]:
    maps = [torch.zeros(1, 1, height // stride, width // stride) for stride in (4, 8, 16, 32)]
    return LastLevelMaxPool()(maps, [], [])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("height", "width"), CANVASES)
def test_anchors_are_torchvisions(height: int, width: int) -> None:
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    maps = _maps(height, width)
    found = boxes.anchors(height, width)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, GENERATOR(images, maps)[0].numpy())
    sizes = tuple(tuple(each.shape[2:]) for each in maps)
    assert boxes.map_sizes(height, width) == sizes
    assert boxes.anchor_counts(height, width) == tuple(h * w * 3 for h, w in sizes)
    off_by_one = [
        [torch.tensor(height // h), torch.tensor(width // w + (index == 4))]
        for index, (h, w) in enumerate(sizes)
    ]
    planted = torch.cat(GENERATOR.grid_anchors(sizes, off_by_one)).numpy()
    assert np.array_equal(found, planted) == (sizes[4][1] == 1)  # one column has no stride


@pytest.mark.parametrize(("height", "width"), [(0, 32), (32, 0), (-32, 32), (40, 64), (64, 40)])
def test_a_canvas_that_is_no_multiple_of_32_is_refused(height: int, width: int) -> None:
    with pytest.raises(RexdeployError, match=f"^a canvas of {height} x {width} .* multiples of 32"):
        boxes.anchors(height, width)


# Boxes


@pytest.mark.parametrize("weights", [BOX_WEIGHTS, (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0)])
def test_decoding_is_torchvisions(weights: boxes.Weights) -> None:
    rng = np.random.default_rng(0)
    given_boxes = _random_boxes(rng, 200, (800, 1216))
    deltas = rng.normal(0, 2, (200, 7, 4)).astype(np.float32)
    deltas[:50, :, 2:] *= 20  # beyond log(1000 / 16), on both sides
    expected = BoxCoder(weights).decode(
        torch.from_numpy(deltas.reshape(200, 28)), [torch.from_numpy(given_boxes)]
    )
    found = boxes.decode(deltas, given_boxes[:, None], weights)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-7, atol=1e-4)
    x, y, w, h = weights
    for wrong in ((x + 1, y, w, h), (x, y + 1, w, h), (x, y, w + 1, h), (x, y, w, h + 1)):
        planted = boxes.decode(deltas, given_boxes[:, None], wrong)
        assert not np.allclose(planted, expected.numpy(), rtol=1e-3, atol=0.1)


def test_deltas_beyond_float32_end_at_the_border_without_a_warning() -> None:
    box = np.array([[10, 10, 50, 50]], np.float32)
    deltas = np.array([[3e38, -3e38, 3e38, -3e38]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = boxes.clip(boxes.decode(deltas, box, (1.0, 1.0, 1.0, 1.0)), (100, 200))
    np.testing.assert_array_equal(found, [[200, 0, 200, 0]])


def test_clipping_and_small_boxes_are_torchvisions() -> None:
    rng = np.random.default_rng(1)
    far = rng.uniform(-50, 300, (500, 4)).astype(np.float32)
    clipped = boxes.clip(far, (100, 200))
    expected = ops.clip_boxes_to_image(torch.from_numpy(far), (100, 200))
    np.testing.assert_array_equal(clipped, expected.numpy())
    assert clipped.dtype == np.float32
    side = np.float32(0.01)
    edge = np.array(
        [[0, 0, side, side], [0, 0, np.nextafter(side, np.float32(0)), 1], [0, 0, 1, 0]], np.float32
    )
    for given_boxes in (clipped, edge):
        kept = ops.remove_small_boxes(torch.from_numpy(given_boxes), 0.01).numpy()
        large = boxes.large_enough(given_boxes, 0.01)
        np.testing.assert_array_equal(np.flatnonzero(large), kept)


# Suppression

_LATTICE = st.lists(st.tuples(*[st.integers(0, 6)] * 5, st.integers(0, 2)), max_size=30)


def _on_a_lattice(rows: list[tuple[int, ...]]) -> tuple[Float32, Float32, Int64]:
    """Boxes, scores and groups: of equal scores, equal boxes, touching ones, some without area."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    corners = np.concatenate(
        [np.minimum(table[:, :2], table[:, 2:4]), np.maximum(table[:, :2], table[:, 2:4])], axis=1
    )
    return corners, table[:, 4], table[:, 5].astype(np.int64)


@given(_LATTICE, st.sampled_from([0.0, 0.25, 1 / 3, 0.5, 0.7, 1.0]), st.integers(0, 31))
@settings(deadline=None)
def test_suppression_is_torchvisions_with_ties(
    rows: list[tuple[int, ...]], threshold: float, limit: int
) -> None:
    corners, scores, groups = _on_a_lattice(rows)
    tensors = torch.from_numpy(corners), torch.from_numpy(scores)
    kept = boxes.nms(corners, scores, threshold)
    assert kept.dtype == np.int64
    np.testing.assert_array_equal(kept, ops.nms(*tensors, threshold).numpy())
    np.testing.assert_array_equal(boxes.nms(corners, scores, threshold, limit), kept[:limit])
    by_group = boxes.batched_nms(corners, scores, groups, threshold, limit)
    assert by_group.dtype == np.int64
    expected = ops.batched_nms(*tensors, torch.from_numpy(groups), threshold)[:limit]
    np.testing.assert_array_equal(by_group, expected.numpy())


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("count", [127, 128, 129, 1500])
def test_suppression_of_many_boxes_is_torchvisions(count: int, threshold: float) -> None:
    rng = np.random.default_rng(count)
    corners = _random_boxes(rng, count, (800, 1216))
    scores = rng.integers(0, 200, count).astype(np.float32)
    kept = boxes.nms(corners, scores, threshold)
    expected = ops.nms(torch.from_numpy(corners), torch.from_numpy(scores), threshold)
    np.testing.assert_array_equal(kept, expected.numpy())
    assert 0 < len(kept) < count
    for limit in (1, 100, 128, count):
        np.testing.assert_array_equal(boxes.nms(corners, scores, threshold, limit), kept[:limit])


@pytest.mark.parametrize("count", [1000, 1002])
def test_groups_are_judged_as_torchvision_does_for_their_number(count: int) -> None:
    """Each second box is half of the one before: rounding decides whether that is more than 0.5.

    Where up to 1000 boxes are moved apart, it decides otherwise.
    """
    rng = np.random.default_rng(0)
    corners = np.repeat(_random_boxes(rng, count // 2, (800, 1216)), 2, axis=0)
    corners[1::2, 3] = corners[1::2, 1] + (corners[1::2, 3] - corners[1::2, 1]) * np.float32(0.5)
    scores, groups = _distinct(rng, 0, 1, count), np.repeat(rng.integers(1, 91, count // 2), 2)
    tensors = (torch.from_numpy(corners), torch.from_numpy(scores), torch.from_numpy(groups))
    kept = boxes.batched_nms(corners, scores, groups, 0.5, count)
    np.testing.assert_array_equal(kept, ops.batched_nms(*tensors, 0.5).numpy())
    other = [box_ops._batched_nms_vanilla, box_ops._batched_nms_coordinate_trick][count > 1000]
    assert not np.array_equal(kept, other(*tensors, 0.5).numpy())
    np.testing.assert_array_equal(
        boxes.batched_nms(corners, scores, groups, 0.5, limit=100), kept[:100]
    )


# Proposals

_TOP = {"training": 0, "testing": 1000}
_RPN = RegionProposalNetwork(GENERATOR, RPNHead(4, 3), 0.7, 0.3, 256, 0.5, _TOP, _TOP, 0.7).eval()


def _expected_proposals(
    objectness: Float32, deltas: Float32, canvas: boxes.Size, size: boxes.Size
) -> Float32:
    decoded = _RPN.box_coder.decode(
        torch.from_numpy(deltas), [torch.from_numpy(boxes.anchors(*canvas))]
    )
    counts = list(boxes.anchor_counts(*canvas))
    found, _ = _RPN.filter_proposals(
        decoded.view(1, -1, 4), torch.from_numpy(objectness)[None], [size], counts
    )
    expected: Float32 = found[0].numpy()
    return expected


@pytest.mark.parametrize(
    ("canvas", "size"),
    [
        *[((32, 32), (20, 24)), ((32, 32), (1, 1)), ((64, 96), (64, 95))],  # below an anchor
        *[((128, 192), (120, 180)), ((416, 608), (400, 600)), ((1344, 96), (1333, 66))],
    ],
)
@pytest.mark.parametrize("spread", [0.05, 1.0])
def test_proposals_are_torchvisions(canvas: boxes.Size, size: boxes.Size, spread: float) -> None:
    rng = np.random.default_rng(canvas)
    anchors, counts = boxes.anchors(*canvas), boxes.anchor_counts(*canvas)
    objectness = _distinct(rng, -4, 4, len(anchors))
    deltas = rng.normal(0, spread, anchors.shape).astype(np.float32)
    found = boxes.proposals(objectness, deltas, anchors, counts, size)
    expected = _expected_proposals(objectness, deltas, canvas, size)
    assert found.shape == expected.shape
    assert len(found) > 0
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("canvas", "in_order"), [((32, 64), True), ((96, 96), False)])
def test_proposals_whose_scores_are_all_one_are_torchvisions(
    canvas: boxes.Size, in_order: bool
) -> None:
    """By level and then by logit: the sigmoid of 30 is 1 in float32.

    Above 1000 boxes torchvision's last sort leaves the order of equal scores open.
    """
    rng = np.random.default_rng(0)
    anchors, counts = boxes.anchors(*canvas), boxes.anchor_counts(*canvas)
    objectness = _distinct(rng, 30, 90, len(anchors))
    deltas = rng.normal(0, 0.3, anchors.shape).astype(np.float32)
    found = boxes.proposals(objectness, deltas, anchors, counts, canvas)
    expected = _expected_proposals(objectness, deltas, canvas, canvas)
    assert len(found) < 1000
    if not in_order:
        found, expected = (each[np.lexsort(each.round(2).T)] for each in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_of_equal_logits_the_lower_index_is_proposed() -> None:
    anchors, counts = boxes.anchors(128, 192), boxes.anchor_counts(128, 192)
    deltas = np.zeros((len(anchors), 4), np.float32)
    objectness = np.zeros(len(anchors), np.float32)
    objectness[2000:] = 1
    chosen = boxes._top(objectness[: counts[0]], 1000)
    np.testing.assert_array_equal(chosen, np.arange(2000, 3000))
    np.testing.assert_array_equal(boxes._top(objectness[:7], 1000), np.arange(7))
    found = boxes.proposals(objectness, deltas, anchors, counts, (128, 192))
    np.testing.assert_array_equal(found[0], boxes.clip(anchors[2000], (128, 192)))


def test_levels_are_torchvisions() -> None:
    sides = np.array([0.0, 1e-3, 1, 32, 111.9, 112, 224, 448, 1333], np.float32)
    for direction in (-np.inf, np.inf):
        near = sides
        for _ in range(6):
            near = np.nextafter(near, np.float32(direction))
            sides = np.concatenate([sides, near])
    widths, heights = (
        each.ravel() for each in np.meshgrid(np.maximum(sides, 0), [56, 224, *sides])
    )
    zero = np.zeros_like(widths)
    regular = np.stack([zero, zero, widths, np.maximum(heights, 0)], axis=1).astype(np.float32)
    for given_boxes in (
        *(regular, _random_boxes(np.random.default_rng(0), 2000, (800, 1216))),
        np.empty((0, 4), np.float32),
    ):
        found = boxes.levels(given_boxes)
        expected = LevelMapper(2, 5)([torch.from_numpy(given_boxes)]).numpy()
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, expected)
    assert set(boxes.levels(regular).tolist()) == {0, 1, 2, 3}


# Detections


def _expected_detections(
    logits: Float32, deltas: Float32, proposals: Float32, size: boxes.Size, *limits: Any
) -> tuple[Float32, ...]:
    heads = roi_heads.RoIHeads(
        *(None, None, None, 0.5, 0.5, 512, 0.25, BOX_WEIGHTS), *(limits or (0.05, 0.5, 100))
    )
    tensors = (torch.from_numpy(each) for each in (logits, deltas))
    found = heads.postprocess_detections(*tensors, [torch.from_numpy(proposals)], [size])
    return tuple(each[0].numpy() for each in found)


def _box_head(
    rng: np.random.Generator, count: int, classes: int, spread: float
) -> tuple[Float32, Float32, Float32]:
    """Class logits, deltas and proposals."""
    logits = rng.normal(0, spread, (count, classes)).astype(np.float32)
    deltas = rng.normal(0, 1, (count, 4 * classes)).astype(np.float32)
    return logits, deltas, _random_boxes(rng, count, (800, 1200))


def _same_detections(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert [(each.dtype, each.shape) for each in found] == [
        (each.dtype, each.shape) for each in expected
    ]
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-4)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found[2], expected[2])


@pytest.mark.parametrize(
    ("count", "classes", "spread", "limits"),
    [
        *[(1000, 31, 2.0, ()), (300, 91, 5.0, ()), (150, 91, 3.0, ()), (64, 2, 2.0, ())],
        *[(1, 3, 1.0, ()), (100, 91, 0.1, ()), (0, 91, 1.0, ())],  # the last two find nothing
        *[(600, 91, 4.0, (0.05, 0.5, 1000)), (500, 21, 2.0, (0.3, 0.2, 17))],
    ],
)
def test_detections_are_torchvisions(
    count: int, classes: int, spread: float, limits: tuple[Any, ...]
) -> None:
    head = _box_head(np.random.default_rng((count, classes)), count, classes, spread)
    found = boxes.detections(*head, (800, 1200), *limits)
    _same_detections(found, _expected_detections(*head, (800, 1200), *limits))
    if 1000 in limits:
        assert len(found[1]) == 1000
    if count == 0 or spread < 1:
        assert [each.shape for each in found] == [(0, 4), (0,), (0,)]
    else:
        assert len(found[1]) > 0


def test_detections_of_equal_scores_keep_torchvisions_order() -> None:
    """Rows that are equal in all but their boxes, and boxes that are equal."""
    logits, deltas, proposals = _box_head(np.random.default_rng(0), 40, 5, 3.0)
    logits, deltas = np.repeat(logits[:5], 8, axis=0), np.zeros_like(deltas)
    proposals[::3] = proposals[0]
    found = boxes.detections(logits, deltas, proposals, (800, 1200))
    _same_detections(found, _expected_detections(logits, deltas, proposals, (800, 1200)))
    assert len(np.unique(found[1])) < len(found[1])


def test_small_detections_are_removed_as_torchvision_does() -> None:
    logits, deltas, proposals = _box_head(np.random.default_rng(0), 200, 3, 3.0)
    proposals[:100, 2:] = proposals[:100, :2] + np.float32(0.01)
    deltas *= np.float32(0.1)
    found = boxes.detections(logits, deltas, proposals, (800, 1200))
    _same_detections(found, _expected_detections(logits, deltas, proposals, (800, 1200)))
    assert (found[0][:, 2:] - found[0][:, :2]).min() < 0.02


@pytest.mark.parametrize(("threshold", "count"), [(0.5, 0), (0.4999, 1)])
def test_a_score_at_the_threshold_is_none_as_in_torchvision(threshold: float, count: int) -> None:
    """Equal logits of two classes are 0.5 each, exactly."""
    head = (np.zeros((1, 2), np.float32), np.zeros((1, 8), np.float32))
    box = np.array([[1, 2, 30, 40]], np.float32)
    found = boxes.detections(*head, box, (800, 1200), threshold)
    _same_detections(found, _expected_detections(*head, box, (800, 1200), threshold, 0.5, 100))
    assert len(found[1]) == count


def test_wrong_weights_of_the_deltas_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = _box_head(np.random.default_rng(0), 100, 5, 3.0)
    expected = _expected_detections(*head, (800, 1200))
    monkeypatch.setattr(boxes, "_BOX_WEIGHTS", (1.0, 1.0, 1.0, 1.0))
    with pytest.raises(AssertionError):
        _same_detections(boxes.detections(*head, (800, 1200)), expected)


# What no decision can be made on


def _refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(RexdeployError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(value: float) -> None:
    rng = np.random.default_rng(0)
    anchors, counts = boxes.anchors(32, 32), boxes.anchor_counts(32, 32)
    for index, name in enumerate(("objectness values", "deltas of anchors")):
        rpn = [np.zeros(len(anchors), np.float32), np.zeros((len(anchors), 4), np.float32)]
        rpn[index].flat[7] = value
        message = f"^1 of {rpn[index].size} {name} are NaN or infinite; .*rexdeploy verify"
        objectness, deltas = rpn
        _refused(
            lambda: boxes.proposals(objectness, deltas, anchors, counts, (32, 32)),  # noqa: B023
            message,
        )
    for index, name in enumerate(("class logits", "deltas of proposals")):
        head = _box_head(rng, 10, 4, 1.0)
        head[index].flat[7] = value
        _refused(lambda: boxes.detections(*head, (32, 32)), f"1 of .* {name}")  # noqa: B023
    logits = np.zeros((2, 3, 28, 28), np.float32)
    logits[1, 2, 0, 0] = value
    _refused(lambda: masks.select(logits, np.array([1, 2])), "1 of 1568 mask logits")
    box = np.array([[0, 0, value, 5]], np.float32)
    _refused(lambda: masks.rles(np.zeros((1, 28, 28), np.float32), box, 9, 9), "coordinates")


def test_lengths_that_do_not_go_together_are_refused() -> None:
    anchors, counts = boxes.anchors(32, 32), boxes.anchor_counts(32, 32)
    count = len(anchors)
    zeros = np.zeros((count + 1, 4), np.float32)
    for objectness, deltas, levels in (
        *((zeros[:, 0], zeros[:-1], counts), (zeros[:-1, 0], zeros, counts)),
        (zeros[:-1, 0], zeros[:-1], counts[:-1]),
    ):
        arguments = (objectness, deltas, anchors, levels, (32, 32))
        _refused(lambda: boxes.proposals(*arguments), f"of {count} anchors")  # noqa: B023
    logits, deltas, proposals = _box_head(np.random.default_rng(0), 10, 4, 1.0)
    _refused(lambda: boxes.detections(logits, deltas[:, 4:], proposals, (9, 9)), r"\[10, 12\]")
    _refused(lambda: boxes.detections(logits, deltas, proposals[1:], (9, 9)), "for 9 proposals")


# Masks


def test_the_mask_of_a_detections_class_is_torchvisions() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 30, (9, 5, 28, 28)).astype(np.float32)
    logits[0] = -1000  # no warning of an overflow
    labels = rng.integers(1, 5, 9)
    found = masks.select(logits, labels)
    (expected,) = roi_heads.maskrcnn_inference(torch.from_numpy(logits), [torch.from_numpy(labels)])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:, 0].numpy(), rtol=0, atol=1e-6)


def _pasted(probabilities: Float32, given_boxes: Float32, size: boxes.Size) -> tuple[Bool, Bool]:
    """The masks of torchvision, and which of their pixels are so near 0.5 that rounding decides."""
    values = roi_heads.paste_masks_in_image(
        torch.from_numpy(probabilities)[:, None], torch.from_numpy(given_boxes), size
    )[:, 0].numpy()
    return values > 0.5, abs(values - 0.5) < 1e-5


def _boxes_to_paste(rng: np.random.Generator, size: boxes.Size) -> Float32:
    height, width = size
    special = [
        *((0, 0, width, height), (3, 4, 4, 5), (3.5, 4.5, 3.6, 4.6), (5, 5, 5, 5)),
        *((-3, -4, 6, 5), (width - 5, height - 4, width + 2, height + 3.3)),
        *((0, 0, 1, height), (0, 2, width, 3), (width - 1, height - 1, width, height)),
        *((-40, -40, -20, -20), (0.3, 0.3, 12.7, 12.7)),
    ]
    return np.concatenate([np.array(special, np.float32), _random_boxes(rng, 20, size)])


@pytest.mark.parametrize("size", [(57, 83), (200, 40), (1, 1), (9, 9)])
def test_pasted_masks_are_torchvisions(size: boxes.Size) -> None:
    rng = np.random.default_rng(size)
    given_boxes = _boxes_to_paste(rng, size)
    given_boxes = given_boxes[given_boxes[:, 2] > 0] if size == (1, 1) else given_boxes
    inside = (given_boxes[:, :2] < [size[1], size[0]]).all(axis=1) & (given_boxes[:, 2] > 0)
    given_boxes = given_boxes[inside]  # torchvision fails on what is outside of the image
    probabilities = rng.uniform(0, 1, (len(given_boxes), 28, 28)).astype(np.float32)
    probabilities[::4] = 1
    found = masks.paste(probabilities, given_boxes, *size)
    expected, undecided = _pasted(probabilities, given_boxes, size)
    assert (found.dtype, found.shape) == (np.dtype(bool), expected.shape)
    np.testing.assert_array_equal(found[~undecided], expected[~undecided])
    assert undecided.mean() < 1e-3
    runs = masks.rles(probabilities, given_boxes, *size)
    assert runs == tuple(masks.to_rle(each) for each in found)
    np.testing.assert_array_equal(np.stack([masks.from_rle(each) for each in runs]), found)


def test_a_mask_half_a_pixel_off_is_noticed() -> None:
    rng = np.random.default_rng(0)
    given_boxes = _random_boxes(rng, 20, (90, 70))
    probabilities = rng.uniform(0, 1, (20, 28, 28)).astype(np.float32)
    expected, undecided = _pasted(probabilities, given_boxes, (90, 70))
    shifted = masks.paste(probabilities, given_boxes + np.float32(0.5), 90, 70)
    assert (shifted != expected)[~undecided].mean() > 0.001


def test_a_probability_of_a_half_is_not_in_the_mask() -> None:
    half = np.full((1, 28, 28), 0.5, np.float32)
    box = np.array([[0, 0, 27, 27]], np.float32)
    assert not masks.paste(half, box, 30, 30).any()


def test_a_box_outside_of_the_image_has_an_empty_mask() -> None:
    outside = np.array([[-40, -40, -20, -20], [90, 2, 99, 8], [2, 90, 8, 99]], np.float32)
    probabilities = np.ones((3, 28, 28), np.float32)
    assert masks.paste(probabilities, outside, 30, 50).sum() == 0
    assert masks.rles(probabilities, outside, 30, 50) == (Rle(30, 50, (1500,)),) * 3


def test_no_masks_have_their_shapes() -> None:
    none = masks.select(np.empty((0, 91, 28, 28), np.float32), np.empty(0, np.int64))
    assert (none.dtype, none.shape) == (np.dtype(np.float32), (0, 28, 28))
    no_boxes = np.empty((0, 4), np.float32)
    assert masks.paste(none, no_boxes, 30, 50).shape == (0, 30, 50)
    assert masks.rles(none, no_boxes, 30, 50) == ()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0))
def test_run_lengths_are_cocos(height: int, width: int, bits: int) -> None:
    flat = [bool(bits >> place & 1) for place in range(height * width)]
    counts = [len(list(run)) for _, run in itertools.groupby(flat)]
    expected = Rle(height, width, tuple([0] * flat[0] + counts))  # from the outside, by column
    mask = np.array(flat).reshape(width, height).T
    assert masks.to_rle(mask) == expected
    np.testing.assert_array_equal(masks.from_rle(expected), mask)
    frame = np.zeros((height + 3, width + 2), bool)
    frame[1 : height + 1, 2:] = mask
    assert masks.to_rle(mask, (1, 2), frame.shape) == masks.to_rle(frame)


@pytest.mark.parametrize("counts", [(1, 4), (1, 6), (7, -1), ()])
def test_run_lengths_of_another_size_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected 2 x 3"):
        masks.from_rle(Rle(2, 3, counts))


def test_large_masks_do_not_stand_in_memory_together() -> None:
    height, width, count = 1500, 2000, 12
    whole = np.tile(np.array([0, 0, width, height], np.float32), (count, 1))
    probabilities = np.random.default_rng(0).uniform(0, 1, (count, 28, 28)).astype(np.float32)
    peak, runs = _peak(lambda: masks.rles(probabilities, whole, height, width))
    assert len(runs) == count
    assert peak < count * height * width


# Preprocessing


def _peak(call: Callable[[], Any]) -> tuple[int, Any]:
    tracemalloc.start()
    try:
        result = call()
        return tracemalloc.get_traced_memory()[1], result
    finally:
        tracemalloc.stop()


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(deadline=None)
def test_sizes_are_torchvisions(height: int, width: int) -> None:
    try:
        expected = _resize_image_and_masks(torch.empty(1, height, width), 800, 1333)[0].shape[1:]
    except RuntimeError:  # no pixel is left
        with pytest.raises(UsageError, match=f"^an image of {width} x {height} .* too thin"):
            preprocess.resized_size(height, width)
        return
    found = preprocess.resized_size(height, width)
    assert found[:2] == tuple(expected)
    assert found[2] == min(800 / min(height, width), 1333 / max(height, width))


def test_the_thinnest_images() -> None:
    assert preprocess.resized_size(1333, 1)[:2] == (1333, 1)
    with pytest.raises(UsageError, match="^an image of 1 x 1334 pixels is too thin: .* 1333"):
        preprocess.resized_size(1334, 1)
    for height, width in ((0, 5), (5, 0)):
        with pytest.raises(UsageError, match=f"^an image of {width} x {height} pixels; expected"):
            preprocess.resized_size(height, width)


@pytest.mark.parametrize(
    ("height", "width", "sizes"),
    [
        *[(480, 640, (800, 1333)), (1, 1, (64, 96)), (7, 5, (64, 96)), (300, 413, (64, 96))],
        *[(128, 96, (96, 128)), (301, 40, (64, 96)), (90, 1200, (64, 333)), (5, 200, (64, 100))],
    ],
)
def test_an_image_is_prepared_as_by_torchvision(
    height: int, width: int, sizes: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.3, 0.5)
    transform = GeneralizedRCNNTransform(*sizes, mean, std)
    image = torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255
    expected = transform([image])[0]
    found = preprocess.prepare(pixels, *sizes, mean, std)
    assert found.size == expected.image_sizes[0]
    assert found.canvas.dtype == np.float32
    assert found.canvas.flags.c_contiguous
    np.testing.assert_allclose(found.canvas, expected.tensors[0].numpy(), rtol=0, atol=3e-6)
    beside = found.canvas.copy()
    beside[:, : found.size[0], : found.size[1]] = 0
    assert not beside.any()


def test_torchvisions_defaults_are_ours() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    defaults = preprocess.prepare(pixels)
    named = preprocess.prepare(pixels, 800, 1333, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    np.testing.assert_array_equal(defaults.canvas, named.canvas)


def test_twenty_megapixels_are_never_floats_all_at_once() -> None:
    pixels = np.zeros((4000, 5000, 3), np.uint8)
    peak, prepared = _peak(lambda: preprocess.prepare(pixels))
    assert prepared.size == (800, 1000)
    assert peak < 4 * pixels.size / 2


def test_boxes_return_to_the_original_image() -> None:
    rng = np.random.default_rng(0)
    given_boxes = _random_boxes(rng, 50, (800, 1066))
    for original in ((480, 640), (3000, 4001), (7, 9)):
        found = preprocess.to_original(given_boxes, (800, 1066), original)
        expected = resize_boxes(torch.from_numpy(given_boxes), (800, 1066), original)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected.numpy())
    none = preprocess.to_original(np.empty((0, 4), np.float32), (800, 1066), (9, 9))
    assert (none.dtype, none.shape) == (np.dtype(np.float32), (0, 4))


# Results


def test_no_detections_have_their_types_all_the_way() -> None:
    """An RPN without proposals, a box head and a mask head of nothing."""
    no_boxes = np.empty((0, 4), np.float32)
    assert boxes.levels(no_boxes).shape == (0,)
    logits, deltas = np.empty((0, 91), np.float32), np.empty((0, 364), np.float32)
    found, scores, labels = boxes.detections(logits, deltas, no_boxes, (800, 1200))
    found = preprocess.to_original(found, (800, 1200), (400, 600))
    own = masks.select(np.empty((0, 91, 28, 28), np.float32), labels)
    result = Detections(found, scores, labels, masks.rles(own, found, 400, 600))
    assert len(result) == 0
    assert result.masks == ()
    assert Detections(found, scores, labels).masks is None


def test_proposals_may_be_none() -> None:
    """Every box of an image without height is too small."""
    anchors, counts = boxes.anchors(32, 32), boxes.anchor_counts(32, 32)
    deltas = np.zeros((len(anchors), 4), np.float32)
    found = boxes.proposals(deltas[:, 0], deltas, anchors, counts, (0, 32))
    assert (found.dtype, found.shape) == (np.dtype(np.float32), (0, 4))


def test_detections_of_other_types_are_refused() -> None:
    two = {
        "boxes": np.zeros((2, 4), np.float32),
        "scores": np.zeros(2, np.float32),
        "labels": np.zeros(2, np.int64),
        "masks": (Rle(1, 1, (1,)),) * 2,
    }
    make: Callable[..., Detections] = Detections
    assert len(make(**two)) == 2
    for wrong in (
        *({"boxes": np.zeros((3, 4), np.float32)}, {"boxes": np.zeros((2, 4))}),
        *({"scores": np.zeros(2)}, {"labels": np.zeros(2, np.int32)}),
    ):
        with pytest.raises(ValueError, match="^boxes, scores and labels are"):
            make(**{**two, **wrong})
    with pytest.raises(ValueError, match="^1 masks of 2 detections"):
        make(**{**two, "masks": (Rle(1, 1, (1,)),)})
