"""What a benchmark feeds its networks, and whether what comes out on a GPU is theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from rexdeploy.arrays import Array, Float32, Images, softmax
from rexdeploy.backends import open_backend
from rexdeploy.bundle.manifest import ModelSpec
from rexdeploy.errors import RexdeployError
from rexdeploy.images import decode, sets
from rexdeploy.parity.compare import Compared, comparable
from rexdeploy.parity.limits import CONSTANT_SHARE, LIMITS

if TYPE_CHECKING:
    from torch import nn


_POOL = 8  # different images
ROOM = {"fp32": LIMITS["fp32"].rms, "fp16": LIMITS["fp16"].rms}
ROOM |= {"bf16": CONSTANT_SHARE, "int8": CONSTANT_SHARE}
"""How far a row's outputs may be from the network's own, as a root mean square.

In units of how its outputs vary over images and classes, so that untrained networks, whose logits
hardly vary over images, can be timed too. The limits are those that no difference may exceed in
`verify` (bfloat16 and int8 have none there: half of what outputs of nothing have). This tells a row
that computes something else, or nothing; what a file really owes its network `verify` judges.
"""


def inputs(spec: ModelSpec, batch: int) -> Images:
    """`batch` images as the files of that spec take them: the same eight again and again."""
    pool = decode.model_input(sets.synthetic_pixels(_POOL, spec.preprocess, seed=2), spec)
    return cast(Images, np.ascontiguousarray(pool[np.arange(batch) % _POOL]))


@dataclass(frozen=True)
class ExpectedOutputs:
    """A network's own outputs `[8, classes]`, computed on the CPU in float32."""

    outputs: Array
    compared: Compared

    @classmethod
    def of(cls, outputs: Float32, spec: ModelSpec) -> ExpectedOutputs:
        """From outputs in the form of the spec."""
        compared: Compared = "logits" if spec.output == "logits" else "log-probabilities"
        return cls(comparable(outputs, spec.output, compared), compared)

    def fault(self, outputs: Float32, spec: ModelSpec, precision: str) -> str | None:
        """What is wrong with a row's outputs of `inputs`; None if nothing is.

        `spec` has the outputs' form; a precision without room of its own has float16's.
        """
        wanted = self.outputs[np.arange(len(outputs)) % len(self.outputs)]
        if outputs.shape != wanted.shape:
            return f"its outputs have the shape {outputs.shape}, expected {wanted.shape}"
        got = comparable(outputs, spec.output, self.compared)
        scale = float(self.outputs.std())
        with np.errstate(invalid="ignore", over="ignore"):
            error = float(np.sqrt(np.square(got.astype(np.float64) - wanted).mean())) / scale
        room = ROOM.get(precision, ROOM["fp16"])
        if error <= room:  # NaN is not
            return None
        return f"its outputs are off by {error:.2g} of how the network's vary (limit {room:g})"


def expected_outputs(
    spec: ModelSpec, module: nn.Module | None, graph: Callable[[], bytes | None]
) -> ExpectedOutputs | None:
    """The outputs of a network: its PyTorch code's, or the ones of its float32 graph.

    None where neither can run on this CPU.
    """
    if module is not None:
        from rexdeploy.backends.pytorch import PyTorchBackend

        outputs = PyTorchBackend(module).run(inputs(spec.core, _POOL))
        if spec.output == "probabilities":
            outputs = softmax(outputs).astype(np.float32)
        return ExpectedOutputs.of(outputs, spec)
    try:
        data = graph()
        if data is None:
            return None
        return ExpectedOutputs.of(
            open_backend("onnxruntime", data, spec).run(inputs(spec, _POOL)), spec
        )
    except RexdeployError:  # such as bfloat16, or a fixed batch
        return None
