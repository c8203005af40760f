"""Walks a network block by block: what comes out of each, and what each does to a given input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
from onnx import ModelProto
from onnx.utils import Extractor

from rexdeploy.arrays import Float32, Float64
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.backends.pytorch import reference
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.errors import UsageError
from rexdeploy.graphs.blocks import FLOATING, find_blocks
from rexdeploy.graphs.emulate import as_typed
from rexdeploy.graphs.read import element_types, node_name
from rexdeploy.graphs.wrapper import unwrap

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rexdeploy.models.rexnet import RexNet


@dataclass(frozen=True)
class Node:
    """A node of an ONNX graph, as a person finds it again."""

    name: str
    op_type: str
    weight: str | None  # the name of the tensor that it multiplies by or adds, if it has one


@dataclass(frozen=True)
class Tensor:
    """One node's output."""

    name: str
    node: Node
    inputs: tuple[str, ...]
    value: Float32


class Walk(Protocol):
    """A network that a candidate is compared with, block by block."""

    def outputs(self, images: Float32) -> list[Float32]:
        """Every block's output, in order: the network's own run over the images."""

    def inside(self, index: int, x: Float32) -> list[Float32]:
        """The values inside one block that is given `x`; its output is among them."""


class GraphWalk:
    """An ONNX graph in ONNX Runtime, cut into its blocks; the graph itself stays.

    Raises UsageError for a graph without ReXNet's blocks, BackendUnavailable without onnxruntime.
    """

    def __init__(self, model: ModelProto) -> None:
        model = unwrap(model)  # so that both walks begin with the same images
        self.blocks = find_blocks(model)
        typed = as_typed(model)
        self._nodes = model.graph.node
        self.node_names = {
            block.name: {node_name(self._nodes[position]) for position in block.nodes}
            for block in self.blocks
        }
        self._types = element_types(typed.graph)
        self._weights = {tensor.name for tensor in model.graph.initializer}
        self._parts = Extractor(typed)
        dims = model.graph.input[0].type.tensor_type.shape.dim
        self.batch: int = dims[0].dim_value if dims else 0  # 0: any

    def outputs(self, images: Float32) -> list[Float32]:
        names = [block.output for block in self.blocks]
        run = self._runner([self.blocks[0].input], names)
        return list(run(images).values())

    def inside(self, index: int, x: Float32) -> list[Float32]:
        return [tensor.value for tensor in next(self.tensors(index, x))]

    def output(self, index: int, x: Float32) -> Float32:
        """What one block makes of `x`."""
        block = self.blocks[index]
        return self._runner([block.input, *block.extra_inputs], [block.output])(x)[block.output]

    def tensors(self, index: int, *batches: Float32) -> Iterator[list[Tensor]]:
        """Every floating-point tensor that one block makes of each batch, in the graph's order."""
        block = self.blocks[index]
        makers = {
            name: node
            for node in (self._nodes[position] for position in block.nodes)
            for name in node.output
            if self._types.get(name) in FLOATING
        }
        nodes = {
            name: Node(
                node_name(node),
                node.op_type,
                next((given for given in node.input if given in self._weights), None),
            )
            for name, node in makers.items()
        }
        run = self._runner([block.input, *block.extra_inputs], list(makers))
        for x in batches:
            values = run(x)
            yield [
                Tensor(name, nodes[name], tuple(node.input), values[name])
                for name, node in makers.items()
            ]

    def _runner(
        self, inputs: list[str], outputs: list[str]
    ) -> Callable[[Float32], dict[str, Float32]]:
        """Loads what lies between these tensors: returns how to run it on the first input."""
        try:
            part = self._parts.extract_model(inputs, outputs)
        except ValueError as error:  # a tensor of unknown type, sparse weights
            raise UsageError(f"the graph cannot be cut into its blocks ({error})") from None
        del part.graph.value_info[:]
        # Of the other inputs only the batch size is read, so the first stands in for them.
        for value in part.graph.input[1:]:
            value.type.tensor_type.ClearField("shape")
        session = GraphSession(part.SerializeToString())
        return lambda x: session.run(dict.fromkeys(inputs, x), outputs)


class TorchWalk:
    """Our PyTorch network, rebuilt from a bundle's weights."""

    def __init__(self, weights: bytes, spec: ModelSpec) -> None:
        model = cast("RexNet", reference(weights, spec))
        from torch import nn

        layers = list(model.features)
        self._blocks: list[nn.Module] = [
            nn.Sequential(*layers[:3]),
            *layers[3:-3],
            nn.Sequential(*layers[-3:]),
            nn.Sequential(model.pool, *model.output, nn.Flatten()),
        ]

    def outputs(self, images: Float32) -> list[Float32]:
        import torch

        outputs = []
        x = torch.from_numpy(images)
        with torch.inference_mode():
            for block in self._blocks:
                x = block(x)
                outputs.append(x.numpy())
        return outputs

    def inside(self, index: int, x: Float32) -> list[Float32]:
        import torch

        seen: list[Float32] = []

        def keep(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            del module, inputs
            seen.append(output.numpy().copy())  # activations work in place

        block = self._blocks[index]
        hooks = [module.register_forward_hook(keep) for module in block.modules()]
        try:
            with torch.inference_mode():
                block(torch.from_numpy(x.copy()))
        finally:
            for hook in hooks:
                hook.remove()
        return seen


def fitted(value: Float32, channels: int) -> Float32:
    """A tensor `[N, C, ...]` with channels of zeros appended, or those beyond `channels` left out.

    Aligned graphs carry such channels at the end.
    """
    missing = channels - value.shape[1]
    if missing <= 0:
        return np.ascontiguousarray(value[:, :channels])
    padding = np.zeros((len(value), missing, *value.shape[2:]), dtype=np.float32)
    return np.concatenate([value, padding], axis=1)


def own_error(reference: Float32, candidate: Float32) -> float:
    """The root mean square of the difference, in units of the reference's root mean square.

    For what one block or node does to a given input: rounding is in proportion to the values, and
    not to how much they vary. Over the channels that both have; infinite where the candidate has
    NaN or infinite values, or another shape.
    """
    return _error(reference, candidate, lambda exact: float(np.sqrt(np.square(exact).mean())))


def signal_error(reference: Float32, candidate: Float32) -> float:
    """The root mean square of the difference, in units of the reference's spread.

    The spread is the standard deviation over images and positions, as a root mean square over
    channels: what the tensor carries. Otherwise like `own_error`.
    """
    return _error(reference, candidate, lambda exact: float(np.sqrt(exact.var(axis=(0, 2)).mean())))


def _error(reference: Float32, candidate: Float32, unit: Callable[[Float64], float]) -> float:
    if min(reference.ndim, candidate.ndim) < 2 or len(reference) != len(candidate):
        return float("inf")
    channels = min(reference.shape[1], candidate.shape[1])
    expected, got = (
        value[:, :channels].reshape(len(value), channels, math.prod(value.shape[2:]))
        for value in (reference, candidate)
    )
    if expected.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    exact = expected.astype(np.float64)
    # A tensor of zeros, or (as to the spread) one that does not vary, is measured in plain units.
    return float(np.sqrt(np.square(got - exact).mean())) / (unit(exact) or 1.0)
