"""The same network in a shape that hardware likes: batch norms folded, channels zero-padded.

ReXNet's channel counts (27, 38, 50, 61, ...) fit no vector unit: ONNX Runtime blocks channels by 16
(AVX-512) or 8, TensorRT's FP16 tensor cores want multiples of 8. Padding every layer with channels
that are exactly zero leaves the logits as they were: SiLU, ReLU and ReLU6 keep zeros, and the gate
of a squeeze-excitation multiplies them.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from rexdeploy.models.rexnet import LinearBottleneck, RexNet, SqueezeExcite

AUTO_MULTIPLE = 16
"""The multiple to pad channels to, chosen from artifacts/benchmarks/README.md's measurements.

ONNX Runtime blocks channels by 16 where a processor has AVX-512 and by 8 elsewhere; 16 fits both.
"""


class AlignedRexNet(nn.Module):
    """A ReXNet for inference; the same logits, up to rounding, as the network it was made from.

    Input and output are those of `RexNet`: float32 `[N, 3, H, W]` to logits `[N, num_classes]`.
    """

    def __init__(self, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.features = features
        self.output = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(_global_average(self.features(x)))
        return logits.flatten(1)


class AlignedBottleneck(nn.Module):
    """A linear bottleneck on padded channels.

    Where the shortcut reaches only the first of the output channels, the last convolution is cut
    in two, `project` for those and `rest` for the others: ONNX Runtime then adds inside the
    convolution and joins whole blocks of channels, and no tensor is taken apart.
    """

    def __init__(
        self, expand: nn.Sequential, project: nn.Conv2d, rest: nn.Conv2d | None, has_shortcut: bool
    ) -> None:
        super().__init__()
        self.expand = expand
        self.project = project
        self.rest = rest
        self.has_shortcut = has_shortcut

    def forward(self, x: Tensor) -> Tensor:
        expanded = self.expand(x)
        out: Tensor = self.project(expanded)
        if self.has_shortcut:
            # The input's padding is zero, so it may be added to channels that it does not reach.
            out = out + x
        return out if self.rest is None else torch.cat([out, self.rest(expanded)], dim=1)


class AlignedSqueezeExcite(nn.Module):
    """Channel attention with its batch norm folded."""

    def __init__(self, gate: nn.Sequential) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        scale: Tensor = self.gate(_global_average(x))
        return x * scale


@torch.no_grad()
def align(model: RexNet, multiple: int) -> AlignedRexNet:
    """An inference copy of a trained network, its channels padded to a multiple.

    The model itself is not changed. It must be in evaluation mode (ValueError otherwise), whose
    statistics are the ones that are folded.
    """
    if model.training:
        raise ValueError("align() folds the statistics of evaluation mode: call model.eval() first")
    model = copy.deepcopy(model)
    layers = list(model.features)
    width = _round_up(model.config.stem_channels, multiple)
    aligned: list[nn.Module] = [_fold(layers[0], layers[1], 3, width), layers[2]]
    for block in cast(list[LinearBottleneck], layers[3:-3]):
        out_width = _round_up(block.block.out_channels, multiple)
        aligned.append(_aligned_block(block, width, out_width, multiple))
        width = out_width
    head_width = _round_up(model.config.head_channels, multiple)
    aligned += [_fold(layers[-3], layers[-2], width, head_width), layers[-1]]
    head = nn.Sequential(*_aligned_head(model, head_width))
    return AlignedRexNet(nn.Sequential(*aligned), head).eval()


def _aligned_block(
    block: LinearBottleneck, in_width: int, out_width: int, multiple: int
) -> AlignedBottleneck:
    layers = list(block.out)
    expanded = _round_up(block.block.expanded_channels, multiple)
    aligned: list[nn.Module] = []
    if block.block.expansion != 1:
        aligned += [_fold(layers[0], layers[1], in_width, expanded), layers[2]]
        layers = layers[3:]
    else:
        expanded = in_width
    aligned.append(_fold(layers[0], layers[1], expanded, expanded))
    for layer in layers[2:-2]:  # [squeeze-excitation and] ReLU6
        if isinstance(layer, SqueezeExcite):
            layer = _aligned_se(layer, expanded, multiple)
        aligned.append(layer)
    project = _fold(layers[-2], layers[-1], expanded, out_width)
    shared = in_width if block.block.has_shortcut else out_width
    rest = _rows(project, shared, out_width) if shared < out_width else None
    return AlignedBottleneck(
        nn.Sequential(*aligned), _rows(project, 0, shared), rest, block.block.has_shortcut
    )


def _aligned_se(layer: SqueezeExcite, width: int, multiple: int) -> AlignedSqueezeExcite:
    reduce, norm, relu, expand, sigmoid = layer.fc
    squeezed = _round_up(cast(nn.Conv2d, reduce).out_channels, multiple)
    gate = [_fold(reduce, norm, width, squeezed), relu, _pad(expand, squeezed, width), sigmoid]
    return AlignedSqueezeExcite(nn.Sequential(*gate))


def _aligned_head(model: RexNet, width: int) -> list[nn.Module]:
    """The classifier; dropout does nothing in evaluation, and its outputs are never padded."""
    layers = [layer for layer in model.output if not isinstance(layer, nn.Dropout)]
    if not model.config.is_lite:
        (classifier,) = layers
        return [_pad(classifier, width, model.config.num_classes)]
    hidden, norm, activation, classifier = layers
    return [
        _fold(hidden, norm, width, cast(nn.Conv2d, hidden).out_channels),
        activation,
        classifier,
    ]


def _fold(conv: nn.Module, norm: nn.Module, in_width: int, out_width: int) -> nn.Conv2d:
    """Convolution and batch norm as one convolution on padded channels."""
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    # In float64, so that the weights are rounded once.
    return _pad(fuse_conv_bn_eval(conv.double(), norm.double()).float(), in_width, out_width)


def _pad(conv: nn.Module, in_width: int, out_width: int) -> nn.Conv2d:
    """The convolution (which has a bias) with zeros up to the given channel counts."""
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    depthwise = conv.groups > 1
    padded = nn.Conv2d(
        in_width,
        out_width,
        cast(tuple[int, int], conv.kernel_size),
        cast(tuple[int, int], conv.stride),
        cast(tuple[int, int], conv.padding),
        groups=out_width if depthwise else 1,
    )
    bias = cast(Tensor, padded.bias)
    padded.weight.zero_()
    bias.zero_()
    rows, columns = conv.weight.shape[:2]
    padded.weight[:rows, :columns] = conv.weight
    bias[:rows] = conv.bias
    return padded


def _rows(conv: nn.Conv2d, start: int, stop: int) -> nn.Conv2d:
    """The 1x1 convolution that gives some of the output channels."""
    part = nn.Conv2d(conv.in_channels, stop - start, 1)
    part.weight.copy_(conv.weight[start:stop])
    cast(Tensor, part.bias).copy_(cast(Tensor, conv.bias)[start:stop])
    return part


def _global_average(x: Tensor) -> Tensor:
    """`[N, C, H, W]` to `[N, C, 1, 1]`.

    Exported as AveragePool, which ONNX Runtime has in its blocked layout, unlike the ReduceMean
    that AdaptiveAvgPool2d becomes.
    """
    return nn.functional.avg_pool2d(x, (x.shape[2], x.shape[3]))


def _round_up(channels: int, multiple: int) -> int:
    return -(-channels // multiple) * multiple
