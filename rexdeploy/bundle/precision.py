"""The precisions: their names everywhere, and the proof that a file computes in one of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class NumberType:
    """What a precision computes in, by everybody's name of it."""

    title: str  # in sentences, and in ONNX's operator schemas
    rtx: str  # in TensorRT-RTX's layer reports, and in our proofs
    tensorrt: str  # in TensorRT's layer reports
    onnx: int  # TensorProto.DataType; a number, since who reads a bundle may have no onnx
    size_bytes: int
    largest: float  # finite value


PRECISIONS: dict[Precision, NumberType] = {
    "fp32": NumberType("float32", "Float", "FP32", 1, 4, 3.4028234e38),
    "fp16": NumberType("float16", "Half", "FP16", 10, 2, 65504.0),
    "bf16": NumberType("bfloat16", "BFloat16", "BF16", 16, 2, 3.3895314e38),
    "int8": NumberType("int8", "Int8", "INT8", 3, 1, 127.0),
}
TYPE_NAMES: dict[Precision, str] = {name: kind.rtx for name, kind in PRECISIONS.items()}
TYPES = tuple(kind.rtx for kind in sorted(PRECISIONS.values(), key=lambda kind: kind.largest))
"""The types that arithmetic is counted in, by TensorRT-RTX's names, the widest last."""
FLOATING = tuple(kind for kind in TYPES if kind != PRECISIONS["int8"].rtx)
MIN_SHARE = 0.5
"""Least share of layers in the type that was asked for, beside all convolutions and products.

ReXNets' have 1.0 (TensorRT-RTX 1.7); a tiny graph of four layers and a cast of its input has 0.8.
"""


@dataclass(frozen=True)
class PrecisionProof:
    """What a model's layers say of the types it computes in."""

    wanted: str | None  # the type that was asked for; None: each product in its graph's own type
    layers: dict[str, int]  # how many compute in each type
    macs: dict[str, int] = field(default_factory=dict)  # of one image, by type; empty: not known
    differing: tuple[str, ...] = ()  # layers in another type than was asked for
    not_found: tuple[str, ...] = ()  # products of the graph that no layer names

    def __post_init__(self) -> None:
        counts = [*self.layers.items(), *self.macs.items()]
        if any(kind not in TYPES or count < 0 for kind, count in counts):
            raise ValueError(f"impossible proof of precision {self}")

    def share(self, kind: str) -> float:
        """The share of layers that compute in a type, 0 to 1."""
        total = sum(self.layers.values())
        return self.layers.get(kind, 0) / total if total else 0.0

    @property
    def holds(self) -> bool:
        """Whether every product is known to run in the type that was asked for.

        Of an INT8 engine the other layers do not count: TensorRT-RTX 1.7 requantises in kernels of
        their own, in Float, more of them than there are products.
        """
        is_free = self.wanted in (None, PRECISIONS["int8"].rtx)
        in_type = is_free or self.share(self.wanted or "") >= MIN_SHARE
        return not self.differing and not self.not_found and in_type

    @property
    def summary(self) -> str:
        """`129 of 129 layers in Half (100%), 100% of 0.88 GMACs in Half`; the asked type first."""
        parts = []
        for counts, unit in ((self.layers, "layers"), (self.macs, "GMACs")):
            total = sum(counts.values())
            for kind in sorted(counts, key=lambda name: (name != self.wanted, -counts[name])):
                share = _percent(counts[kind], total)
                parts.append(
                    f"{counts[kind]} of {total} layers in {kind} ({share})"
                    if unit == "layers"
                    else f"{share} of {total / 1e9:.3g} GMACs in {kind}"
                )
        return ", ".join(parts) or "no layer computes on numbers"


def _percent(count: int, total: int) -> str:
    """A share that says 0 % and 100 % only where that is so."""
    share = count / total if total else 0.0
    if 0 < count < total:
        return "<1%" if share < 0.01 else ">99%" if share > 0.99 else f"{share:.0%}"
    return f"{share:.0%}"
