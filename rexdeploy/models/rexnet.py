"""ReXNet and ReXNet-lite: one PyTorch network, described by one configuration.

The networks are those of Han et al., "Rethinking Channel Dimensions for Efficient Model Design"
(CVPR 2021, arXiv 2007.00992; published under MIT by NAVER Corp.). Lite swaps SiLU for ReLU6, drops
squeeze-excitation, rounds its channels and has a head of its own. Parameter names are the published
ones, so published checkpoints load strictly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rexdeploy.errors import UsageError

Family = Literal["rexnet", "rexnet_lite"]

MIN_WIDTH, MAX_WIDTH = 0.1, 10.0  # above 10 the float32 weights pass ONNX's 2 GiB protobuf limit

_STAGE_DEPTHS = (1, 2, 2, 3, 3, 5)
_STAGE_STRIDES = (1, 2, 2, 2, 1, 2)
_STAGE_USES_SE = (False, False, True, True, True, True)
_EXPANSION = 6  # of every block but the first stage's, which has none
_LITE_HIDDEN_CHANNELS = 1024


@dataclass(frozen=True)
class BlockConfig:
    """One linear bottleneck: channels in and out, and what stands between them."""

    in_channels: int
    out_channels: int
    expansion: int
    kernel_size: int
    stride: int
    se_channels: int  # of the squeezed vector; 0 means no squeeze-excitation

    @property
    def expanded_channels(self) -> int:
        return self.in_channels * self.expansion

    @property
    def has_shortcut(self) -> bool:
        """Whether the input is added to the first `in_channels` of the output."""
        return self.stride == 1 and self.in_channels <= self.out_channels


@dataclass(frozen=True)
class RexNetConfig:
    """Everything that decides a ReXNet's shapes and arithmetic."""

    family: Family
    stem_channels: int
    blocks: tuple[BlockConfig, ...]
    head_channels: int
    num_classes: int
    dropout: float = 0.2
    bn_momentum: float = 0.1
    bn_eps: float = 1e-5

    @property
    def is_lite(self) -> bool:
        return self.family == "rexnet_lite"

    def activation(self) -> nn.Module:
        """A fresh activation module: SiLU, or ReLU6 in lite."""
        return nn.ReLU6(inplace=True) if self.is_lite else nn.SiLU(inplace=True)


def check_width(width: float) -> float:
    """Returns `width`, or raises UsageError if no network can be built with it."""
    if not (math.isfinite(width) and MIN_WIDTH <= width <= MAX_WIDTH):
        raise UsageError(
            f"width multiplier: got {width:g}, expected a number from {MIN_WIDTH:g} to "
            f"{MAX_WIDTH:g} (published: 0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0)"
        )
    return width


def v1_config(
    width: float = 1.0,
    num_classes: int = 1000,
    *,
    input_ch: float = 16,
    final_ch: float = 180,
    depth_mult: float = 1.0,
    use_se: bool = True,
    se_ratio: int = 12,
    dropout: float = 0.2,
) -> RexNetConfig:
    """ReXNet V1: channels grow by the same amount in every block, then `round(value * width)`."""
    check_width(width)
    depths = [math.ceil(depth * depth_mult) for depth in _STAGE_DEPTHS]
    stem = 32 / width if width < 1 else 32
    base = input_ch / width if width < 1 else input_ch
    outputs = [round(value * width) for value in _grow(base, final_ch / sum(depths), sum(depths))]
    return RexNetConfig(
        family="rexnet",
        stem_channels=round(stem * width),
        blocks=_blocks(
            depths,
            [round(stem * width), *outputs],
            kernels=[3] * len(depths),
            se_ratios=[se_ratio if use_se and se else 0 for se in _STAGE_USES_SE],
        ),
        head_channels=int(1280 * width),
        num_classes=num_classes,
        dropout=dropout,
    )


def lite_config(
    width: float = 1.0,
    num_classes: int = 1000,
    *,
    fix_head_stem: bool = False,
    divisor: int = 8,
    input_ch: float = 16,
    final_ch: float = 164,
    kernels: str = "333333",
    dropout: float = 0.2,
    bn_momentum: float = 0.1,
    bn_eps: float = 1e-5,
) -> RexNetConfig:
    """ReXNet-lite: no squeeze-excitation, channels rounded to a multiple of `divisor`."""
    check_width(width)
    stem = 32 / width if width < 1 or fix_head_stem else 32
    base = input_ch / width if width < 1 else input_ch
    count = sum(_STAGE_DEPTHS)
    outputs = [
        _round_to_multiple(round(value * width), divisor)
        for value in _grow(base, final_ch / (count - 1), count)
    ]
    stem_channels = _round_to_multiple(round(stem * width), divisor)
    return RexNetConfig(
        family="rexnet_lite",
        stem_channels=stem_channels,
        blocks=_blocks(
            list(_STAGE_DEPTHS),
            [stem_channels, *outputs],
            kernels=[int(digit) for digit in kernels],
            se_ratios=[0] * len(_STAGE_DEPTHS),
        ),
        head_channels=int(1280 * width) if width > 1 and not fix_head_stem else 1280,
        num_classes=num_classes,
        dropout=dropout,
        bn_momentum=bn_momentum,
        bn_eps=bn_eps,
    )


CONFIGS: dict[Family, Callable[[float, int], RexNetConfig]] = {
    "rexnet": v1_config,
    "rexnet_lite": lite_config,
}


class RexNet(nn.Module):
    """A ReXNet classifier.

    Input: float32 `[N, 3, H, W]`, RGB, normalised. Output: float32 logits `[N, num_classes]`.
    """

    def __init__(self, config: RexNetConfig) -> None:
        super().__init__()
        self.config = config
        last_channels = config.blocks[-1].out_channels
        self.features = nn.Sequential(
            *_conv_bn(config, 3, config.stem_channels, kernel_size=3, stride=2),
            config.activation(),
            *(LinearBottleneck(config, block) for block in config.blocks),
            *_conv_bn(config, last_channels, config.head_channels),
            config.activation(),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.output = nn.Sequential(*_head(config))

    def extract_features(self, x: Tensor) -> Tensor:
        """The feature map before pooling: `[N, head_channels, H/32, W/32]`, rounded up."""
        features: Tensor = self.features(x)
        return features

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.pool(self.features(x)))
        return logits.flatten(1)


class ReXNetV1(RexNet):
    """ReXNet V1 behind the published constructor."""

    def __init__(
        self,
        input_ch: float = 16,
        final_ch: float = 180,
        width_mult: float = 1.0,
        depth_mult: float = 1.0,
        classes: int = 1000,
        use_se: bool = True,
        se_ratio: int = 12,
        dropout_ratio: float = 0.2,
        bn_momentum: float = 0.9,
    ) -> None:
        # The published V1 takes `bn_momentum` and never reads it: its batch norms train at torch's
        # default 0.1. Reading it here would change how every published recipe trains.
        del bn_momentum
        super().__init__(
            v1_config(
                width_mult,
                classes,
                input_ch=input_ch,
                final_ch=final_ch,
                depth_mult=depth_mult,
                use_se=use_se,
                se_ratio=se_ratio,
                dropout=dropout_ratio,
            )
        )


class ReXNetV1_lite(RexNet):  # noqa: N801 - the published name
    """ReXNet-lite behind the published constructor."""

    def __init__(
        self,
        fix_head_stem: bool = False,
        divisible_value: int = 8,
        input_ch: float = 16,
        final_ch: float = 164,
        multiplier: float = 1.0,
        classes: int = 1000,
        dropout_ratio: float = 0.2,
        bn_momentum: float = 0.1,
        bn_eps: float = 1e-5,
        kernel_conf: str = "333333",
    ) -> None:
        super().__init__(
            lite_config(
                multiplier,
                classes,
                fix_head_stem=fix_head_stem,
                divisor=divisible_value,
                input_ch=input_ch,
                final_ch=final_ch,
                kernels=kernel_conf,
                dropout=dropout_ratio,
                bn_momentum=bn_momentum,
                bn_eps=bn_eps,
            )
        )


class LinearBottleneck(nn.Module):
    """Expand, depthwise convolution, squeeze-excitation, project; with the partial shortcut."""

    def __init__(self, config: RexNetConfig, block: BlockConfig) -> None:
        super().__init__()
        self.block = block
        expanded = block.expanded_channels
        layers: list[nn.Module] = []
        if block.expansion != 1:
            layers += [*_conv_bn(config, block.in_channels, expanded), config.activation()]
        layers += _conv_bn(
            config, expanded, expanded, block.kernel_size, block.stride, groups=expanded
        )
        if block.se_channels:
            layers.append(SqueezeExcite(expanded, block.se_channels))
        layers += [nn.ReLU6(inplace=True), *_conv_bn(config, expanded, block.out_channels)]
        self.out = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(x)
        if not self.block.has_shortcut:
            return out
        shared = self.block.in_channels
        if shared == self.block.out_channels:
            return out + x
        # Bit-equal to the published `out[:, :shared] += x`, which exports as ScatterND with
        # transposes that no simplifier removes (22 and 66 of them in V1 1.0).
        return torch.cat([out[:, :shared] + x, out[:, shared:]], dim=1)


class SqueezeExcite(nn.Module):
    """Channel attention with a batch norm in it, as published."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, squeezed, 1),
            nn.BatchNorm2d(squeezed),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.fc(self.pool(x))
        return x * scale


@torch.no_grad()
def recalibrate_batch_norms(model: nn.Module, images: Tensor) -> None:
    """Sets every batch norm's running statistics to those of `images` (float32 `[N, 3, H, W]`).

    A freshly initialised ReXNet hardly reacts to its input: any broken export of it agrees with
    it. After this its logits vary like a trained network's, and a comparison means something.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches seen
    model.train()
    for dropout in dropouts:
        dropout.eval()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _grow(start: float, step: float, count: int) -> list[float]:
    """`start`, `start + step`, ...: summed up as published, since a rounding tie hangs on it."""
    return list(itertools.accumulate([start] + [step] * (count - 1)))


def _blocks(
    depths: list[int], channels: list[int], kernels: list[int], se_ratios: list[int]
) -> tuple[BlockConfig, ...]:
    """Block configurations from per-stage settings; `channels` has one entry more than blocks."""
    blocks: list[BlockConfig] = []
    for stage, depth in enumerate(depths):
        for position in range(depth):
            in_channels, out_channels = channels[len(blocks) : len(blocks) + 2]
            expansion = 1 if stage == 0 else _EXPANSION
            ratio = se_ratios[stage]
            blocks.append(
                BlockConfig(
                    in_channels=in_channels,
                    out_channels=out_channels,
                    expansion=expansion,
                    kernel_size=kernels[stage],
                    stride=_STAGE_STRIDES[stage] if position == 0 else 1,
                    se_channels=in_channels * expansion // ratio if ratio else 0,
                )
            )
    return tuple(blocks)


def _conv_bn(
    config: RexNetConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 1,
    stride: int = 1,
    groups: int = 1,
) -> list[nn.Module]:
    padding = kernel_size // 2
    return [
        nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        ),
        _bn(config, out_channels),
    ]


def _bn(config: RexNetConfig, channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=config.bn_eps, momentum=config.bn_momentum)


def _head(config: RexNetConfig) -> list[nn.Module]:
    if not config.is_lite:
        return [
            nn.Dropout(config.dropout),
            nn.Conv2d(config.head_channels, config.num_classes, 1),
        ]
    return [
        nn.Conv2d(config.head_channels, _LITE_HIDDEN_CHANNELS, 1),
        _bn(config, _LITE_HIDDEN_CHANNELS),
        config.activation(),
        nn.Dropout(config.dropout),
        nn.Conv2d(_LITE_HIDDEN_CHANNELS, config.num_classes, 1),
    ]


def _round_to_multiple(channels: int, divisor: int) -> int:
    """The MobileNet rule: to the nearest multiple, never more than 10 % below `channels`."""
    rounded = max(divisor, (channels + divisor // 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded
