"""A network that rounds as its INT8 graph will, and learns with it (fake quantisation).

Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (CVPR 2018). Rounding stands where `graphs/quantize.py` puts it for a CPU: weights by
output channel about zero, activations in 8 bits of their range. A batch norm may stay outside: it
is folded into its convolution's channels, each of which has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from rexdeploy.models.align import AUTO_MULTIPLE
from rexdeploy.models.rexnet import LinearBottleneck, RexNet, SqueezeExcite

_FOLDED = (_BatchNorm, nn.ReLU, nn.ReLU6)  # become part of the layer before them


class FakeQuantized(nn.Module):
    """A network in fake int8: float32 images `[N, 3, H, W]` to logits, gradients pass through.

    The network's batch norms keep their statistics, in training too: they are what is folded.
    """

    def __init__(self, network: RexNet, weight_bits: int = 8) -> None:
        super().__init__()
        self.network = network
        self.ranges: dict[str, tuple[float, float]] = {}
        self._limit = 2 ** (weight_bits - 1) - 1
        self._is_taking = False

    def around(self, network: RexNet) -> FakeQuantized:
        """The same rounding around another network, such as that of averaged weights."""
        other = FakeQuantized(network)
        other.ranges, other._limit = self.ranges, self._limit
        return other

    @torch.no_grad()
    def take_ranges(self, batches: Sequence[Tensor]) -> None:
        """Takes the range of every activation, from least to largest over these images."""
        self.ranges.clear()
        was_training = self.training
        self.eval()
        self._is_taking = True
        for images in batches:
            self(images)
        self._is_taking = False
        self.train(was_training)

    def train(self, mode: bool = True) -> FakeQuantized:
        super().train(mode)
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        network = self.network
        x = self._sequence("features", network.features, self._rounded("images", images))
        x = self._rounded("features", x)
        x = self._rounded("features", network.pool(x))
        x = self._sequence("output", network.output, x)
        return self._rounded("output", x).flatten(1)

    def _sequence(self, name: str, layers: nn.Sequential, x: Tensor) -> Tensor:
        """Runs layers, and rounds what each gives but the last one."""
        before = ""
        named = list(layers.named_children())
        for (own, layer), (_, following) in pairwise(named):
            x = self._layer(f"{name}.{own}", layer, x, before)
            if not isinstance(following, _FOLDED) and not isinstance(layer, nn.Dropout):
                before = f"{name}.{own}"
                x = self._rounded(before, x)
        own, last = named[-1]
        return self._layer(f"{name}.{own}", last, x, before)

    def _layer(self, name: str, layer: nn.Module, x: Tensor, before: str) -> Tensor:
        if isinstance(layer, nn.Conv2d) and not self._is_taking:
            weight = self._rounded_weight(layer.weight)
            made: Tensor = functional_call(layer, {"weight": weight}, (x,))
            return made
        if isinstance(layer, nn.SiLU):
            return x * self._rounded(f"{name}.sigmoid", torch.sigmoid(x))
        if isinstance(layer, SqueezeExcite):
            # A mean keeps the range of what it is the mean of, in ONNX Runtime.
            gate = self._sequence(f"{name}.fc", layer.fc, self._rounded(before, layer.pool(x)))
            return x * self._rounded(f"{name}.fc", gate)
        if isinstance(layer, LinearBottleneck):
            return self._block(name, layer, x)
        given: Tensor = layer(x)
        return given

    def _block(self, name: str, layer: LinearBottleneck, x: Tensor) -> Tensor:
        out = self._sequence(f"{name}.out", layer.out, x)
        if not layer.block.has_shortcut:
            return out
        # The graph's last convolution is two where the shortcut ends early (models/align.py): two
        # ranges, and the first reaches to a multiple of channels.
        shared, given = layer.block.in_channels, layer.block.out_channels
        cut = min(-(-shared // AUTO_MULTIPLE) * AUTO_MULTIPLE, given)
        total = self._rounded(f"{name}.out", out[:, :cut]) + nn.functional.pad(
            x, (0, 0, 0, 0, 0, cut - shared)
        )
        if cut == given:
            return total
        rest = self._rounded(f"{name}.rest", out[:, cut:])
        return torch.cat([self._rounded(f"{name}.sum", total), rest], dim=1)

    def _rounded(self, name: str, x: Tensor) -> Tensor:
        if self._is_taking:
            low, high = self.ranges.get(name, (0.0, 0.0))
            self.ranges[name] = min(low, float(x.min())), max(high, float(x.max()))
            return x
        low, high = self.ranges[name]
        scale = (high - low) / 255 or 1.0
        return torch.fake_quantize_per_tensor_affine(x, scale, round(-low / scale), 0, 255)

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        scale = weight.detach().abs().amax((1, 2, 3)).clamp(min=1e-30) / self._limit
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            weight, scale, zero, 0, -self._limit, self._limit
        )
