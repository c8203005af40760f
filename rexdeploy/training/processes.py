"""Several processes that train as one: a batch is split over them.

Its batch norms' statistics and its gradients are those of the whole batch, and dropout is drawn for
the whole batch by each.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def device() -> str:
    """Where this process computes."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def place() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextlib.contextmanager
def group() -> Iterator[None]:
    """The processes that torchrun has started, if it has, as one group."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def shared(make: Callable[[], Any]) -> Any:
    """What the first process makes, given to all."""
    made = [make()]
    if place()[1] > 1:
        dist.broadcast_object_list(made)
    return made[0]


def whole_batch_layers(model: nn.Module, on_gpu: bool) -> Any:
    """The network with layers that see the batch of all processes, if there are several."""
    if place()[1] == 1:
        return model
    _swap(model, nn.Dropout, lambda layer: _SharedDropout(layer.p))
    if on_gpu:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    _swap(model, nn.BatchNorm2d, _SummedBatchNorm.of)
    return model


def summed(values: Tensor) -> Tensor:
    """The sum of all processes' values, through which gradients go."""
    found: Tensor = _Sum.apply(values) if place()[1] > 1 else values
    return found


def _swap(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> None:
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is kind:
                setattr(parent, name, make(child))


class _SummedBatchNorm(nn.BatchNorm2d):
    """A batch norm over all processes' images, on a CPU, for which torch has none."""

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> _SummedBatchNorm:
        """The same layer."""
        assert layer.momentum is not None
        new = cls(layer.num_features, layer.eps, layer.momentum)
        new.load_state_dict(layer.state_dict())
        return new.to(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.momentum is not None
        count = x.numel() // x.shape[1] * place()[1]
        mean = summed(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        # From the mean on: the difference of two large sums would lose the variance's digits.
        variance = summed(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)
            if self.num_batches_tracked is not None:
                self.num_batches_tracked += 1
        scale = self.weight * (variance + self.eps).rsqrt()
        normalised: Tensor = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalised


class _Sum(torch.autograd.Function):
    """The sum over all processes; torch's own is deprecated in one version and new in another."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        del context
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        del context
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _SharedDropout(nn.Dropout):
    """Dropout whose mask one process would draw for the whole batch: each takes its own part.

    All processes have to be seeded alike.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        size, own = x.shape[0], place()[0] * x.shape[0]
        kept = x.new_empty((size * place()[1], *x.shape[1:])).bernoulli_(1 - self.p)
        return x * kept.div_(1 - self.p)[own : own + size]
