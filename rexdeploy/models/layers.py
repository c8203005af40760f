"""What each convolution and matrix product of a network computes and moves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """One arithmetic layer, counted for one image."""

    macs: int  # multiply-accumulates
    weights: int  # values of its kernel and bias
    activations: int  # values that it reads and writes


def layers(model: nn.Module, size: int | tuple[int, int]) -> list[Layer]:
    """The arithmetic layers of a module at height and width `size`, in the order they run.

    The module runs once, on its own device, on one image of zeros; on "meta" nothing is computed.
    Activations, batch norms and sums are not counted: they can be fused into these layers.
    """
    counted: list[Layer] = []

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        outputs = output[0].numel()
        # Each output is one product with a row of the weights.
        macs = outputs * next(module.parameters())[0].numel()
        weights = sum(parameter.numel() for parameter in module.parameters())
        counted.append(Layer(macs, weights, inputs[0][0].numel() + outputs))

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    height, width = (size, size) if isinstance(size, int) else size
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, height, width, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return counted
