"""The network: golden logits of the published code, timm's logits, shapes, and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from rexdeploy.errors import UsageError
from rexdeploy.models.checkpoints import load_checkpoint
from rexdeploy.models.rexnet import (
    CONFIGS,
    LinearBottleneck,
    RexNet,
    ReXNetV1,
    ReXNetV1_lite,
    check_width,
    v1_config,
)
from rexdeploy.parity.compare import Signal
from tests.helpers import DATA, golden_input, golden_state, reacting

GOLDEN = dict(np.load(DATA / "published_logits.npz"))


def _network(case: str) -> tuple[RexNet, Tensor]:
    """The network and input of a golden case such as `v1:1.0:160:37`."""
    family, width, *rest = case.split(":")
    size, classes = int(rest[0]) if rest else 224, int(rest[1]) if rest[1:] else 1000
    model: RexNet
    if family == "v1":
        model = ReXNetV1(width_mult=float(width), classes=classes)
    else:
        model = ReXNetV1_lite(multiplier=float(width), classes=classes)
    model.load_state_dict(golden_state(model.state_dict()))
    return model.eval(), golden_input(size)


@pytest.mark.parametrize("case", GOLDEN)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 5e-4)])
def test_logits_are_those_of_the_published_code(
    case: str, dtype: torch.dtype, limit: float
) -> None:
    model, images = _network(case)
    with torch.inference_mode():
        logits = model.to(dtype)(images.to(dtype)).numpy()
    signal = GOLDEN[case].std(axis=0).mean()
    assert np.abs(logits - GOLDEN[case]).max() / signal <= limit


@pytest.mark.parametrize("width", [0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0])
def test_logits_are_timms_for_the_same_weights(width: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = reacting(timm.models.rexnet.RexNet(width_mult=width, num_classes=20), size=96)
    file = tmp_path / "timm.pth"
    torch.save(theirs.state_dict(), file)
    ours = load_checkpoint(file).build()
    images = torch.randn(4, 3, 96, 96, dtype=torch.float64)
    with torch.inference_mode():
        expected = theirs.double()(images).numpy()
        got = ours.double()(images).numpy()
    assert np.abs(got - expected).max() / Signal.of(expected).size < 1e-9


@pytest.mark.parametrize(
    ("width", "classes"), [(0.9, 1000), (1.0, 1000), (2.0, 5), (2.2, 5), (3.0, 5)]
)
def test_v1_keeps_the_published_parameter_names(width: float, classes: int) -> None:
    with torch.device("meta"):
        state = ReXNetV1(width_mult=width, classes=classes).state_dict()
    assert len(state) == 413
    assert state["features.0.weight"].shape == (32 if width < 1 else round(32 * width), 3, 3, 3)
    expanded = state["features.6.out.0.weight"].shape[0]
    assert state["features.6.out.5.fc.0.weight"].shape == (expanded // 12, expanded, 1, 1)
    assert state["output.1.weight"].shape == (classes, int(1280 * width), 1, 1)


@pytest.mark.parametrize("multiplier", [1.0, 1.3, 1.5, 2.0])
def test_lite_rounds_its_channels_and_has_its_own_head(multiplier: float) -> None:
    with torch.device("meta"):
        state = ReXNetV1_lite(multiplier=multiplier, classes=7).state_dict()
    block_widths = [
        tensor.shape[0] for name, tensor in state.items() if ".out." in name and tensor.ndim == 4
    ]
    assert all(channels % 8 == 0 for channels in block_widths)
    assert state["output.0.weight"].shape == (1024, int(1280 * multiplier), 1, 1)
    assert state["output.4.weight"].shape == (7, 1024, 1, 1)
    assert not any(".fc." in name for name in state)


def test_shortcut_is_bit_equal_to_the_published_in_place_form() -> None:
    model = ReXNetV1(classes=3).eval()
    blocks = [module for module in model.modules() if isinstance(module, LinearBottleneck)]
    block = next(block for block in blocks if block.block.has_shortcut)
    x = torch.randn(2, block.block.in_channels, 14, 14)
    with torch.no_grad():
        expected = block.out(x).clone()
        expected[:, : x.shape[1]] += x
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("model", [ReXNetV1(classes=4), ReXNetV1_lite(classes=4)])
def test_extract_features_is_what_the_head_pools(model: RexNet) -> None:
    model.eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        features = model.extract_features(images)
        assert features.shape == (2, 1280, 2, 3)
        torch.testing.assert_close(
            model.output(features.mean(dim=(2, 3), keepdim=True)).flatten(1), model(images)
        )


@pytest.mark.parametrize("factory", [ReXNetV1, ReXNetV1_lite])
def test_it_trains(factory: type[RexNet]) -> None:
    """The loss falls on two separable classes, and every parameter gets a gradient."""
    torch.manual_seed(0)
    model = factory(classes=2, dropout_ratio=0.0).train()  # type: ignore[call-arg]
    labels = torch.tensor([0, 1] * 4)
    images = torch.randn(8, 3, 64, 64) + labels[:, None, None, None]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients = {name: value.grad for name, value in model.named_parameters()}
        optimizer.step()
    silent = [
        name
        for name, gradient in gradients.items()
        if gradient is None or not gradient.isfinite().all()
    ]
    assert silent == []
    assert min(losses[-3:]) < 0.5 * losses[0]


def test_constructor_arguments_of_the_published_code_reach_the_network() -> None:
    plain = ReXNetV1(use_se=False, depth_mult=2.0, dropout_ratio=0.5)
    assert not any(".fc." in name for name in plain.state_dict())
    assert len(plain.config.blocks) == 32
    assert any(isinstance(m, nn.Dropout) and m.p == 0.5 for m in plain.modules())
    lite = ReXNetV1_lite(kernel_conf="353535", divisible_value=16, bn_eps=1e-3, multiplier=1.3)
    assert {block.kernel_size for block in lite.config.blocks} == {3, 5}
    assert all(block.out_channels % 16 == 0 for block in lite.config.blocks)
    assert all(m.eps == 1e-3 for m in lite.modules() if isinstance(m, nn.BatchNorm2d))
    assert ReXNetV1_lite(fix_head_stem=True, multiplier=2.0).config.head_channels == 1280


@pytest.mark.parametrize("width", [0.0, -1.0, float("nan"), float("inf"), 1e9, 0.05])
def test_impossible_widths_are_refused(width: float) -> None:
    with pytest.raises(UsageError, match="expected a number from 0.1 to 10"):
        v1_config(width)
    with pytest.raises(UsageError, match="width multiplier: got"):
        check_width(width)


@pytest.mark.parametrize("family", CONFIGS)
def test_recalibration_makes_the_logits_react(family: str) -> None:
    """The trap of this network: freshly initialised, its logits hardly depend on its input."""
    torch.manual_seed(0)
    model = RexNet(CONFIGS[family](1.0, 50)).eval()  # type: ignore[index]
    images = torch.rand(8, 3, 96, 96) * torch.linspace(0.1, 3, 8)[:, None, None, None]
    with torch.inference_mode():
        fresh = model(images).numpy()
    with pytest.raises(UsageError, match="do not vary"):
        Signal.of(fresh)
    reacting(model, size=96)
    with torch.inference_mode():
        logits = model(images).numpy()
    assert Signal.of(logits).size > 0.05
    assert not model.training
    assert all(m.momentum == 0.1 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
