"""How fast this machine could run a network: its matrix rate, its bandwidth, and each layer's work.

The roofline of a network is the sum over its layers of whichever takes longer, its arithmetic at
the machine's measured matrix rate or its weights, inputs and outputs at the measured bandwidth
(Williams et al., "Roofline", 2009). Both rates are timed in the same rounds as the networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rexdeploy.bundle.precision import PRECISIONS, Precision
from rexdeploy.errors import RexdeployError, first_line
from rexdeploy.interleaved import Task
from rexdeploy.models.layers import Layer

MATRIX_SIZE = 1024
GPU_MATRIX_SIZE = 8192
"""A GPU's full rate needs a product of many of its blocks; 1024 is some tens of microseconds."""
COPY_BYTES = 2 * 64 * 2**20  # 64 MiB read and as much written: beyond most last-level caches
GPU_COPY_BYTES = 2 * 512 * 2**20  # beyond an H100's 50 MiB of L2, and long against a launch


@dataclass(frozen=True)
class Rates:
    """What the machine itself does in one precision."""

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


def product(threads: int | None, precision: Precision) -> tuple[float, Task]:
    """The operations of a large matrix product, and how to do it on a CPU's threads or the GPU.

    Raises RexdeployError where PyTorch cannot use the GPU.
    """
    import torch

    size = GPU_MATRIX_SIZE if threads is None else MATRIX_SIZE
    kind = getattr(torch, PRECISIONS[precision].title)
    with _on(threads) as device:
        left, right, result = (torch.randn(size, size, dtype=kind, device=device) for _ in range(3))
    return 2 * size**3, _task(threads, lambda: torch.mm(left, right, out=result))


def copy(threads: int | None) -> tuple[float, Task]:
    """The bytes that a large copy reads and writes, and how to do it; raises like `product`."""
    import torch

    work = GPU_COPY_BYTES if threads is None else COPY_BYTES
    with _on(threads) as device:
        source = torch.zeros(work // 8, device=device)
        target = torch.empty_like(source)
    return work, _task(threads, lambda: target.copy_(source))


@contextmanager
def _on(threads: int | None) -> Iterator[str]:
    """The device, ready for use; RexdeployError for what PyTorch says of a GPU."""
    import torch

    from rexdeploy.backends.pytorch import use_cuda

    if threads is not None:
        torch.set_num_threads(threads)
        yield "cpu"
        return
    use_cuda(torch)
    try:
        yield "cuda"
    except (RuntimeError, AssertionError) as error:
        raise RexdeployError(f"PyTorch failed on the GPU ({first_line(error)})") from None


def _task(threads: int | None, work: Callable[[], object]) -> Task:
    import torch

    if threads is not None:

        def on_cpu() -> None:
            with _on(threads):
                work()

        return Task(on_cpu)
    with _on(None):
        # Its own events: what a launch and a wait cost on the host is not the GPU's rate.
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def on_gpu() -> None:
        with _on(None):
            first.record()
            work()
            last.record()
            last.synchronize()

    return Task(on_gpu, lambda: float(first.elapsed_time(last)))
