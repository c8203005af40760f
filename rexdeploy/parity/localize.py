"""Names the block, and the node in it, at which a graph leaves the network it was made from.

Every block of the candidate is given what the reference's block was given: what comes out wrong is
then its own doing, however far the errors before it have grown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rexdeploy.arrays import Float32
from rexdeploy.bundle.precision import Precision
from rexdeploy.errors import UsageError
from rexdeploy.parity.block_by_block import (
    GraphWalk,
    Node,
    Tensor,
    Walk,
    fitted,
    own_error,
    signal_error,
)
from rexdeploy.parity.compare import Comparison

OWN_LIMITS: dict[Precision, float] = {"fp32": 1e-5, "fp16": 2e-3}
"""A block's share: the largest `own_error` of a sound one.

Measured on V1 1.0, V1 1.3 and lite 1.0: float32 in ONNX Runtime 2e-7 to 1e-6, honest float16 3e-4
to 1e-3; a weight off by 1 % gives 2e-3 and more at its block's output.
"""
_INSIDE = 2  # times that limit at a node: pooled values and gates round about twice as badly
_LIKENESS = 0.1  # a larger error inside a block says that two tensors are not the same thing
MAX_IMAGES = 4  # enough to judge rounding by; a wide network's tensors take 100 MB an image


@dataclass(frozen=True)
class BlockError:
    """One block of the candidate against the reference's."""

    name: str
    total: float  # at its output in the candidate's own run, in units of the tensor's spread
    own: float  # of its output when it is given the reference's input, relative to its size


@dataclass(frozen=True)
class Culprit:
    """Where a candidate first does something else than its reference."""

    block: str
    node: Node


@dataclass(frozen=True)
class Localization:
    """The candidate's error block by block, and the first block that adds more than its share."""

    reference: str
    candidate: str
    images: int
    limit: float  # on every block's own error
    blocks: tuple[BlockError, ...]
    culprit: Culprit | None  # None: no block stands out

    @property
    def first_nonfinite(self) -> str | None:
        """The first block at whose output the candidate's own run is not finite."""
        return next((block.name for block in self.blocks if not np.isfinite(block.total)), None)

    @property
    def is_finite(self) -> bool:
        return self.first_nonfinite is None

    @property
    def over(self) -> tuple[str, ...]:
        """Every block that adds more than its share."""
        return tuple(block.name for block in self.blocks if not block.own <= self.limit)


def localize(
    reference: Walk,
    candidate: GraphWalk,
    images: Float32,
    *,
    names: tuple[str, str],
    limit: float,
) -> Localization:
    """Walks both networks over the images (float32 `[N, 3, H, W]`), or over the first few.

    `limit` is the share of each block, one of OWN_LIMITS as a rule. Raises UsageError where the two
    have not the same blocks.
    """
    # As many as the candidate takes: its fixed batch, or a few.
    images = images[np.arange(candidate.batch or min(len(images), MAX_IMAGES)) % len(images)]
    expected = reference.outputs(images)
    got = candidate.outputs(images)
    if len(expected) != len(got):
        raise UsageError(
            f"{names[1]} has {len(got) - 3} bottlenecks and {names[0]} {len(expected) - 3}; "
            "expected the same blocks"
        )
    given = [images, *expected[:-1]]
    widths = [images.shape[1], *(output.shape[1] for output in got[:-1])]
    inputs = [fitted(value, width) for value, width in zip(given, widths, strict=True)]
    blocks = tuple(
        BlockError(
            block.name,
            signal_error(expected[index], got[index]),
            own_error(expected[index], candidate.output(index, inputs[index])),
        )
        for index, block in enumerate(candidate.blocks)
    )
    culprit = None
    for index, block in enumerate(blocks):
        if not block.own <= limit:
            tensors = next(candidate.tensors(index, inputs[index]))
            known = [given[index], *reference.inside(index, given[index]), expected[index]]
            node = _first_wrong(tensors, known, _INSIDE * limit, candidate.blocks[index].output)
            culprit = Culprit(block.name, node)
            break
    return Localization(*names, len(images), limit, blocks, culprit)


def _first_wrong(tensors: list[Tensor], known: list[Float32], limit: float, output: str) -> Node:
    """The first node of a block whose result is not the reference's, in the graph's order.

    The two may be written differently (a SiLU is one module or two nodes), so a tensor without its
    like in the reference is no proof; but what leads to a tensor that is right, is right. Every
    value of the reference answers for one tensor only: so a node that passes its input through,
    where it should do something, is found, too.
    """
    right: set[str] = set()
    wrong = {output}  # if only by less than `limit`
    answered: set[int] = set()
    for tensor in tensors:
        errors = {
            index: own_error(value, tensor.value)
            for index, value in enumerate(known)
            if index not in answered
        }
        if tensor.name in wrong or not errors:
            continue
        if tensor.node.op_type == "Cast" and tensor.inputs[0] in right:
            right.add(tensor.name)  # the one node that may pass its input through
            continue
        closest = min(errors.values())
        if closest <= limit:
            right.add(tensor.name)
            # Modules in a row can have equal outputs (a block and its last layer): all are used up,
            # but not those of another shape, which a node that only reshapes has yet to match.
            answered |= {
                index
                for index, error in errors.items()
                if error <= limit and known[index].ndim == tensor.value.ndim
            }
        elif closest <= _LIKENESS:
            wrong.add(tensor.name)
    makers = {tensor.name: tensor for tensor in tensors}
    pending = [name for tensor in tensors if tensor.name in right for name in tensor.inputs]
    while pending:
        name = pending.pop()
        if name in makers and name not in right | wrong:
            right.add(name)
            pending += makers[name].inputs
    return next(tensor.node for tensor in tensors if tensor.name not in right)


def off_blocks(edges: Sequence[Comparison], walked: Sequence[Localization]) -> list[str]:
    """Float32 graphs that pass by their logits, and have a block that is wrong."""
    failures = []
    for walk in walked:
        broken = any(
            edge.failures and edge.candidate.startswith(f"{walk.candidate} (") for edge in edges
        )
        if walk.limit < OWN_LIMITS["fp16"] and walk.over and not broken:
            block = next(block for block in walk.blocks if block.name in walk.over)
            failures.append(
                f"broken edge {walk.reference} -> {walk.candidate}: {block.name} alone is off by "
                f"{block.own:.2g} of its size, over the limit {walk.limit:g}{_culprit(walk)}"
            )
    return failures


def with_culprits(failures: Sequence[str], walked: Sequence[Localization]) -> list[str]:
    """The failures, each with the node that a walk of its file has found."""
    return [
        failure + "".join(_culprit(walk) for walk in walked if f" -> {walk.candidate} (" in failure)
        for failure in failures
    ]


def _culprit(walk: Localization) -> str:
    if walk.culprit is None:
        return ""
    return f"; first at node {walk.culprit.node.name} in {walk.culprit.block}"
