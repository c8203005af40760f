"""The aligned network: the same logits, and padding that is zero in every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.images import sets
from rexdeploy.models.align import AlignedBottleneck, align
from rexdeploy.models.rexnet import CONFIGS, Family, LinearBottleneck, RexNet, ReXNetV1
from rexdeploy.parity.compare import Signal
from tests.helpers import reacting

SIZE = 96
POOL = torch.from_numpy(sets.synthetic(6, Preprocess(SIZE, SIZE), seed=2))


def _network(family: Family, width: float) -> RexNet:
    torch.manual_seed(0)
    model = RexNet(CONFIGS[family](width, 11))
    reacting(model, size=SIZE)
    return model


def _error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) / Signal.of(b.numpy()).size


@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize(
    ("family", "width"),
    [
        *((family, width) for family in CONFIGS for width in (0.37, 1.0, 1.3)),
        ("rexnet", 0.9),
        ("rexnet", 3.0),
    ],
)
def test_logits_are_the_networks_to_rounding(family: Family, width: float, multiple: int) -> None:
    """In float64 nothing but the float32 weights' rounding is left; in float32, plain rounding."""
    model = _network(family, width)
    aligned = align(model, multiple)
    with torch.inference_mode():
        exact = copy.deepcopy(model).double()(POOL.double())
        plain = _error(model(POOL).double(), exact)
        assert _error(aligned(POOL).double(), exact) <= max(2 * plain, 2e-4)
        assert _error(aligned.double()(POOL.double()), exact) < 2e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_padded_channels_are_zero_through_every_layer(family: Family) -> None:
    model = _network(family, 1.3)
    aligned = align(model, 16)
    blocks = [module for module in aligned.modules() if isinstance(module, AlignedBottleneck)]
    logical = [module for module in model.modules() if isinstance(module, LinearBottleneck)]
    beyond: dict[str, float] = {}

    def check(name: str, channels: int) -> object:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            assert output.shape[1] % 16 == 0
            extra = output[:, channels:]
            beyond[name] = float(extra.abs().max()) if extra.numel() else 0.0

        return hook

    for number, (block, original) in enumerate(zip(blocks, logical, strict=True)):
        padded = [layer for layer in block.expand if isinstance(layer, nn.Conv2d)]
        plain = [layer for layer in original.out if isinstance(layer, nn.Conv2d)]
        assert len(padded) == len(plain) - 1  # and the projection, whose output is the block's
        for index, (ours, theirs) in enumerate(zip(padded, plain, strict=False)):
            ours.register_forward_hook(check(f"block {number} conv {index}", theirs.out_channels))  # type: ignore[arg-type]
        block.register_forward_hook(check(f"block {number}", original.block.out_channels))  # type: ignore[arg-type]
    with torch.inference_mode():
        aligned(POOL)
    assert len(beyond) == 31 + 16
    assert {name: value for name, value in beyond.items() if value} == {}


def test_it_is_made_from_a_trained_network_and_leaves_it_as_it_is() -> None:
    model = _network("rexnet", 1.0).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(POOL).square().mean().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="call model.eval"):
        align(model, 16)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    aligned = align(model, 16)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.inference_mode():
        assert _error(aligned(POOL), model(POOL)) < 1e-3


def test_every_published_constructor_argument_is_followed() -> None:
    torch.manual_seed(0)
    model = ReXNetV1(classes=9, use_se=False, depth_mult=1.4)
    reacting(model, size=SIZE)
    with torch.inference_mode():
        assert _error(align(model, 8)(POOL), model(POOL)) < 1e-3
