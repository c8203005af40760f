"""How fast this machine could run a network: its matrix rate, its bandwidth, and each layer's work.

The roofline of a network is the sum over its layers of whichever takes longer, its arithmetic at
the machine's measured matrix rate or its weights, inputs and outputs at the measured bandwidth
(Williams et al., "Roofline", 2009). Both rates are timed in the same rounds as the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rexdeploy.models.layers import Layer

if TYPE_CHECKING:
    import torch

MATRIX_SIZE = 1024
MATRIX_FLOPS = 2 * MATRIX_SIZE**3
COPY_BYTES = 2 * 64 * 2**20  # 64 MiB read and as much written: beyond most last-level caches


@dataclass(frozen=True)
class Rates:
    """What the machine itself does in float32 (on a GPU in the networks' precision)."""

    flops_per_s: float  # of a large matrix product; a multiply-accumulate is two operations
    bytes_per_s: float  # of a large copy, read and written bytes together


def matrix_ms(layers: Sequence[Layer], batch: int, rates: Rates) -> float:
    """Milliseconds for the arithmetic alone."""
    return 1e3 * sum(2 * layer.macs * batch for layer in layers) / rates.flops_per_s


def roofline_ms(layers: Sequence[Layer], batch: int, rates: Rates, value_bytes: int = 4) -> float:
    """Milliseconds where every layer is limited by its arithmetic or by its memory traffic.

    It supposes that every layer's tensors come from memory and go there; what stays in a cache
    can beat it.
    """
    seconds = 0.0
    for layer in layers:
        moved = value_bytes * (layer.weights + batch * layer.activations)
        arithmetic = 2 * layer.macs * batch / rates.flops_per_s
        seconds += max(arithmetic, moved / rates.bytes_per_s)
    return 1e3 * seconds


def probes(
    threads: int | None, cuda: bool, half: bool
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Tasks of MATRIX_FLOPS operations, and of COPY_BYTES bytes, on a CPU's threads or the GPU."""
    import torch

    device = "cuda" if cuda else "cpu"
    kind = torch.float16 if half else torch.float32
    left, right, product = (
        torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(device, kind) for _ in range(3)
    )
    source = torch.zeros(COPY_BYTES // 8, device=device)
    target = torch.empty_like(source)

    def timed(work: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            if threads is not None:
                torch.set_num_threads(threads)
            work()
            if cuda:
                torch.cuda.synchronize()

        return run

    return timed(lambda: torch.mm(left, right, out=product)), timed(lambda: target.copy_(source))
