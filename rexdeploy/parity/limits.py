"""How far logits may be apart, from what rounding does in the network over these images."""

from __future__ import annotations

from rexdeploy.arrays import Array
from rexdeploy.bundle.precision import Precision
from rexdeploy.parity.compare import Compared, Limits, Signal, comparable, compare

LIMITS: dict[Precision, Limits] = {
    "fp32": Limits(error=5e-3, rms=5e-4, correlation=1 - 1e-5),
    "fp16": Limits(error=1.5, rms=0.15, correlation=0.9),
    "bf16": Limits(error=float("inf"), rms=float("inf"), correlation=-1.0),
    "int8": Limits(error=float("inf"), rms=float("inf"), correlation=-1.0),
}
"""What no difference may exceed, in units of signal, whatever its own rounding comes to.

For bfloat16 and int8 there is no such: an honest one may take all the room that `ceiling` leaves.

artifacts/limits/README.md has what honest graphs and defects measure. The limits of one run are
`float32_limits` and `rounding_limits`, which follow what rounding does in that very network over
these very images, and are mostly far stricter.
"""
NOISE_MARGIN = 16
"""Times what float32 in PyTorch does (against float64) that another float32 runtime may do.

ONNX Runtime's SiLU and its blocked sums measure 0.7 to 3.7 times (artifacts/limits/README.md).
"""
GRAPH_MARGIN = 2
"""Times what rounding to its types does to a graph's parent that the graph itself may do.

A graph that rounds as its parent rounded does exactly 1.
"""
ENGINE_MARGIN = 3
"""The same for an engine, and for a 16-bit graph of somebody else's making.

It rounds elsewhere than the graph in ONNX Runtime: two independent errors of one size differ by the
square root of 2.
"""
CONSTANT_SHARE = 0.5
"""The share of an answer that ignores its image (`Signal.constant`) that no limit may exceed."""
_FLOOR = Limits(error=1e-4, rms=1e-5, correlation=1 - 1e-8)
_TYPICAL_NOISE = 1e-5
"""The rms of what float32 does to a network: 1e-6 to 1e-5 of the signal (artifacts/limits)."""
NO_DIFFERENCE = Limits(0.0, 0.0, 1.0)


def float32_noise(float32: Array, float64: Array, signal: Signal, compared: Compared) -> Limits:
    """What computing in float32 does to the reference's logits `[N, classes]`, by those of float64.

    The numbers of a comparison, in units of `signal`.
    """
    exact, rounded = (comparable(logits, "logits", compared) for logits in (float64, float32))
    return compare(exact, rounded, signal=signal, limits=LIMITS["fp32"]).numbers


def walk_room(noise: Limits) -> float:
    """How many times a block's share is, in a network that float32 itself rounds more than others.

    At the most ten times, which is a tenth of what 1 % off in one channel does to its block.
    """
    return min(10.0, max(1.0, noise.rms / _TYPICAL_NOISE))


def float32_limits(noise: Limits | None) -> Limits:
    """The limits of a graph that computes in float32.

    `noise` is what float32 does to the reference itself over these images; None: not measured.
    """
    if noise is None:
        return LIMITS["fp32"]
    return _FLOOR.plus(NOISE_MARGIN, noise).at_most(LIMITS["fp32"])


def rounding_limits(
    float32: Limits, rounding: Limits, margin: float, precision: Precision, constant: Limits
) -> Limits:
    """The limits of what computes in 16 bits, wholly or in parts.

    `rounding` is what rounding to its own types does over these images (nothing of it: the limits
    are float32's), `precision` the narrowest of its types, `constant` the numbers of an answer
    that ignores its image.
    """
    return float32.plus(margin, rounding).at_most(LIMITS[precision]).at_most(ceiling(constant))


def ceiling(constant: Limits) -> Limits:
    """The limits from which on an answer that ignores its image would be too near to passing."""
    share = CONSTANT_SHARE
    return Limits(share * constant.error, share * constant.rms, 1 - share)
