"""Localizing: the block and node of every planted defect, and none in a sound graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx import ModelProto, helper
from torch import Tensor

from rexdeploy.arrays import Float32
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.bundle.precision import Precision
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import UsageError
from rexdeploy.graphs.blocks import find_blocks
from rexdeploy.images import sets
from rexdeploy.models.rexnet import LinearBottleneck, ReXNetV1
from rexdeploy.parity.block_by_block import GraphWalk, TorchWalk, Walk
from rexdeploy.parity.localize import OWN_LIMITS, Localization, localize
from rexdeploy.steps.verify import verify
from tests import planted
from tests.helpers import (
    assert_refused,
    edit_weights,
    entry,
    graph,
    nodes_of,
    reacting,
    run_cli,
    small_graph,
)


@dataclass(frozen=True)
class Case:
    """A network in torch and as two graphs, and images to run it on."""

    torch: Walk
    fp32: ModelProto
    fp16: ModelProto
    pool: Float32

    def walk(self, candidate: ModelProto, precision: Precision) -> Localization:
        """Against what the candidate was made from."""
        reference = self.torch if precision == "fp32" else GraphWalk(self.fp32)
        return localize(
            reference,
            GraphWalk(candidate),
            self.pool,
            names=("reference", "candidate"),
            limit=OWN_LIMITS[precision],
        )


def _case(bundle: Bundle) -> Case:
    spec = bundle.manifest.model
    return Case(
        TorchWalk(bundle.read(entry(bundle, "weights.safetensors")), spec),
        graph(bundle),
        graph(bundle, "fp16.onnx"),
        sets.synthetic(2, spec.preprocess, seed=1),
    )


@pytest.fixture(scope="module")
def v1(small_v1_original: Bundle) -> Case:
    return _case(small_v1_original)


@pytest.fixture(scope="module")
def lite(small_lite_original: Bundle) -> Case:
    return _case(small_lite_original)


def _culprit(result: Localization) -> tuple[str, str]:
    assert result.culprit is not None, result
    return result.culprit.block, result.culprit.node.name


def test_no_block_of_a_sound_graph_stands_out(v1: Case, lite: Case) -> None:
    for case in (v1, lite):
        for precision, model in (("fp32", case.fp32), ("fp16", case.fp16)):
            before = model.SerializeToString(deterministic=True)
            result = case.walk(model, precision)  # type: ignore[arg-type]
            assert result.culprit is None
            assert result.over == ()
            largest = max(block.own for block in result.blocks)
            assert result.limit / 50 < largest < result.limit / 1.5
            assert result.blocks[-1].total > result.blocks[0].total
            assert model.SerializeToString(deterministic=True) == before
    assert [block.name for block in result.blocks] == [
        "stem",
        *(f"block {number}" for number in range(1, 17)),
        "head",
        "classifier",
    ]


@pytest.mark.parametrize(
    ("precision", "conv", "block"),
    [
        ("fp32", 0, "stem"),
        ("fp32", 49, "block 11"),  # `rest`, the second part of a projection
        ("fp32", 42, "block 10"),
        ("fp32", 72, "block 16"),  # in a squeeze-excitation
        ("fp32", 77, "classifier"),
        ("fp16", 0, "stem"),
        ("fp16", 35, "block 9"),
        ("fp16", 70, "block 16"),
        ("fp16", 74, "head"),
    ],
)
def test_a_weight_tensor_off_by_one_percent_is_named(
    v1: Case, precision: Precision, conv: int, block: str
) -> None:
    model = v1.fp32 if precision == "fp32" else v1.fp16
    node = nodes_of(model, "Conv")[conv]
    wrong = edit_weights(model, [node.input[1]], lambda values: values * np.float32(1.01))
    result = v1.walk(wrong, precision)
    assert _culprit(result) == (block, node.name)
    assert result.over == (block,)  # what comes after it is right, given the right input
    assert result.culprit is not None
    assert result.culprit.node.weight == node.input[1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("defect", "block", "op_type"),
    [
        (planted.swapped_channels, "stem", "Conv"),
        (planted.dropped_se, "block 4", "Identity"),
        (planted.shifted_rows, "classifier", "Slice"),
        (planted.constant_output, "classifier", "Mul"),
    ],
)
def test_a_structural_defect_is_named(
    v1: Case,
    precision: Precision,
    defect: Callable[[ModelProto], ModelProto],
    block: str,
    op_type: str,
) -> None:
    result = v1.walk(defect(v1.fp32 if precision == "fp32" else v1.fp16), precision)
    assert result.culprit is not None
    assert (result.culprit.block, result.culprit.node.op_type) == (block, op_type)


def test_forgotten_normalisation_is_found_before_the_stem(v1: Case) -> None:
    result = v1.walk(planted.forgotten_normalisation(v1.fp32), "fp32")
    assert result.culprit is not None
    assert result.culprit.block == "stem"
    assert result.culprit.node.weight == "own_std"


def test_an_overflow_in_float16_is_named(lite: Case) -> None:
    node = nodes_of(lite.fp16, "Conv")[30]
    wrong = edit_weights(lite.fp16, [node.input[1]], lambda values: np.full_like(values, 6e4))
    result = lite.walk(wrong, "fp16")
    assert result.culprit is not None
    assert result.culprit.node.name == node.name


def test_the_first_of_two_defects_is_named_and_both_are_marked(lite: Case) -> None:
    convs = nodes_of(lite.fp32, "Conv")
    wrong = edit_weights(
        lite.fp32, [convs[40].input[1], convs[10].input[1]], lambda values: values * 2
    )
    result = lite.walk(wrong, "fp32")
    assert _culprit(result)[1] == convs[10].name
    assert len(result.over) == 2


def _in_place(block: LinearBottleneck, x: Tensor) -> Tensor:
    """The shortcut as published, which exports as ScatterND between transposes."""
    out: Tensor = block.out(x)
    if block.block.has_shortcut:
        out[:, : block.block.in_channels] += x
    return out


def test_somebody_elses_graph_of_the_same_blocks(
    monkeypatch: pytest.MonkeyPatch, small_v1_original: Bundle
) -> None:
    """Unoptimised, batch norms apart, shapes and constants computed, other names and sizes."""
    torch.manual_seed(5)
    model = reacting(ReXNetV1(width_mult=0.5, classes=7), size=64)
    activations: list[Any] = [item for item in model.modules() if hasattr(item, "inplace")]
    for activation in activations:
        activation.inplace = False  # the same nodes, in two thirds of the time
    spec = replace(small_v1_original.manifest.model, width=0.5, num_classes=7)
    expected = TorchWalk(safetensors.torch.save(dict(model.state_dict())), spec)
    with monkeypatch.context() as patched:
        patched.setattr(LinearBottleneck, "forward", _in_place)
        exported = _exported(model)
    assert len(nodes_of(exported, "ScatterND")) > 5
    assert len(nodes_of(exported, "BatchNormalization")) > 50
    pool = sets.synthetic(2, Preprocess(64, 64), seed=1)
    case = Case(expected, exported, exported, pool)
    assert case.walk(exported, "fp32").culprit is None
    norm = nodes_of(exported, "BatchNormalization")[20]
    wrong = edit_weights(exported, [norm.input[1]], lambda values: values * 1.01)
    result = case.walk(wrong, "fp32")
    assert result.culprit is not None
    assert result.culprit.node.weight == norm.input[1]
    with pytest.raises(UsageError, match="has 16 bottlenecks and reference 15; expected the same"):
        localize(
            _Shorter(exported),
            GraphWalk(exported),
            pool,
            names=("reference", "candidate"),
            limit=OWN_LIMITS["fp32"],
        )


class _Shorter(GraphWalk):
    def outputs(self, images: Float32) -> list[Float32]:
        return super().outputs(images)[1:]


def _exported(model: torch.nn.Module) -> ModelProto:
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, 64, 64),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    exported: ModelProto = program.model_proto
    return exported


def test_a_convolution_that_leaves_its_kernel_shape_to_its_weight_is_known(v1: Case) -> None:
    # torch 2.9's exporter leaves it out, and the stem was taken for an expansion.
    model = ModelProto()
    model.CopyFrom(v1.fp32)
    for node in nodes_of(model, "Conv"):
        kept = [attribute for attribute in node.attribute if attribute.name != "kernel_shape"]
        assert len(kept) == len(node.attribute) - 1
        del node.attribute[:]
        node.attribute.extend(kept)
    assert find_blocks(model) == find_blocks(v1.fp32)


def test_a_graph_that_is_no_rexnet_is_refused(v1: Case) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    plain = small_graph([conv], [1, 3, 8, 8], {"w": np.ones((4, 3, 1, 1), np.float32)})
    with pytest.raises(UsageError, match="got 0 depthwise convolutions and 0 average pools"):
        find_blocks(plain)
    bypassed = ModelProto()
    bypassed.CopyFrom(v1.fp32)
    # A second shortcut, from before the block to behind it; both ends have 32 channels.
    chain = find_blocks(v1.fp32)
    nodes_of(bypassed, "Concat")[0].input[0] = chain[2].input
    with pytest.raises(UsageError, match="bypasses .*, so the graph is no chain"):
        find_blocks(bypassed)


def test_the_command_names_block_and_node_and_draws_them(
    small_lite: Bundle, tmp_path: Path
) -> None:
    planted.plant(small_lite, "fp32.onnx", planted.weight_off_by_one_percent)
    result = run_cli(
        "verify", "--samples", "2", "--localize", "--plot", "walk.png", "--json", "out.json",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 3
    assert "fp32.onnx: leaves torch in block 1, first at node node_conv2d_2 (Conv, " in result.out
    assert (tmp_path / "walk.png").read_bytes().startswith(b"\x89PNG")
    assert '"localizations": [' in (tmp_path / "out.json").read_text()


def test_an_engine_is_not_walked_and_says_so(small_v1_original: Bundle) -> None:
    engine = small_v1_original.path / "fp16.rtx-sm89.engine"
    result = verify(small_v1_original, samples=2, candidate=engine, localize=True)
    assert result.localizations == ()
    assert "an engine does not show its inner tensors" in result.not_localized[0]


def test_a_picture_that_cannot_be_drawn_is_refused_first(
    small_lite: Bundle, tmp_path: Path
) -> None:
    for arguments, message in (
        (("--localize", "--plot", "walk.txt"), "expected a file that ends in .png, .svg, .pdf"),
        (("--localize", "--plot", "no/walk.png"), "expected a file in a folder"),
        (("--plot", "walk.png"), "--plot draws what --localize finds: give both"),
    ):
        assert_refused(run_cli("verify", *arguments, cwd=tmp_path), message)
    assert small_lite.manifest.find("report") is None
