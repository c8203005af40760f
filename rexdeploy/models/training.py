"""How a network is trained: recipes, one step of it, averaged weights, and validation.

Several processes train as one would: a batch is split over them, its batch norms' statistics and
its gradients are those of the whole batch, and dropout is drawn for the whole batch by each.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rexdeploy.errors import BackendUnavailable
from rexdeploy.models.rexnet import RexNet


@dataclass(frozen=True)
class Recipe:
    """How to train; `lr` is for `batch`, and goes with it."""

    optimizer: str  # timm's name
    lr: float
    weight_decay: float  # not of biases and batch norms
    batch: int
    epochs: int
    warmup_epochs: int
    label_smoothing: float
    ema_decay: float  # 0: the weights are not averaged
    augmentation: Literal["randaugment", "affine"]
    channels_last: bool  # on a CPU too; on a GPU it always is


RECIPES = {
    # The published command line (timm's train.py on four GPUs with 128 images each). It states no
    # warm-up and no decay of the average: those are timm's own.
    "published": Recipe("sgd", 0.5, 1e-5, 512, 400, 5, 0.0, 0.9999, "randaugment", False),
    "small": Recipe("adamw", 2e-3, 0.05, 64, 20, 2, 0.1, 0.0, "affine", True),
}


class Trainer:
    """A network in training, with its optimiser, schedule and averaged weights."""

    def __init__(
        self, model: RexNet, recipe: Recipe, lr: float, epochs: int, steps: int, device: str
    ) -> None:
        """`steps` are those of an epoch; raises BackendUnavailable without timm."""
        timm = import_timm()
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        if place()[1] > 1:
            _swap(model, nn.Dropout, lambda layer: _SharedDropout(layer.p))
            if on_gpu:
                model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
            else:
                _swap(model, nn.BatchNorm2d, _SummedBatchNorm.of)
        self.memory_format = (
            torch.channels_last if on_gpu or recipe.channels_last else torch.contiguous_format
        )
        model = model.to(self.device).to(memory_format=self.memory_format)
        self.model = model
        self._wrapped: nn.Module = model
        if place()[1] > 1:
            self._wrapped = nn.parallel.DistributedDataParallel(model)
        self._optimizer = timm.optim.create_optimizer_v2(
            model, recipe.optimizer, lr=lr, weight_decay=recipe.weight_decay, momentum=0.9
        )
        # A short training still has most of its steps at full rate.
        warmup = min(recipe.warmup_epochs, epochs // 4)
        self._schedule, _ = timm.scheduler.create_scheduler_v2(
            self._optimizer,
            "cosine",
            num_epochs=epochs,
            warmup_epochs=warmup,
            warmup_lr=lr / 100,
            step_on_epochs=False,
            updates_per_epoch=steps,
        )
        self._ema = (
            timm.utils.ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)
            if recipe.ema_decay
            else None
        )
        self._loss = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=on_gpu)
        self._autocast = (
            (lambda: torch.autocast("cuda", torch.float16)) if on_gpu else contextlib.nullcontext
        )
        self._updates = 0

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """Trains on this process's share of a batch; returns its loss, which nobody waits for."""
        self._wrapped.train()
        self._schedule.step_update(self._updates)
        images = images.to(self.device, memory_format=self.memory_format, non_blocking=True)
        with self._autocast():
            loss: Tensor = self._loss(
                self._wrapped(images), labels.to(self.device, non_blocking=True)
            )
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad()
        self._updates += 1
        if self._ema is not None:
            self._ema.update(self.model, self._updates)
        return loss.detach()

    @property
    def learning_rate(self) -> float:
        """Of the last step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def result(self) -> RexNet:
        """The network to validate and keep: of averaged weights where they are averaged."""
        return self.model if self._ema is None else cast(RexNet, self._ema.module)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "updates": self._updates,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "ema": None if self._ema is None else self._ema.module.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        self._updates = state["updates"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        if self._ema is not None:
            self._ema.module.load_state_dict(state["ema"])

    @torch.inference_mode()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int, int]:
        """Mean loss, correct answers and images; of all processes together, each with its share.

        In float32 on every device, and without label smoothing: what the network will answer.
        """
        model = self.result.eval()
        sums = torch.zeros(3, dtype=torch.float64)
        for images, labels in batches:
            images = images.to(self.device, memory_format=self.memory_format)
            logits = model(images).cpu()
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.tensor([loss.item(), correct.item(), len(labels)], dtype=torch.float64)
        loss_sum, correct_sum, count = self.summed(sums).tolist()
        return loss_sum / max(count, 1), int(correct_sum), int(count)

    def summed(self, values: Tensor) -> Tensor:
        """The sum of all processes' values, on the CPU."""
        if place()[1] > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()


def replace_classifier(model: RexNet, num_classes: int, seed: int) -> RexNet:
    """A network of so many classes with the same weights, but for a classifier of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = RexNet(replace(model.config, num_classes=num_classes))
    last = f"output.{len(fresh.output) - 1}."
    kept = {name: value for name, value in model.state_dict().items() if not name.startswith(last)}
    fresh.load_state_dict(kept, strict=False)
    return fresh


def import_timm() -> Any:
    """timm, with what it has for training; raises BackendUnavailable."""
    try:
        import timm.data
        import timm.optim
        import timm.scheduler
        import timm.utils
        import torchvision  # noqa: F401
    except ImportError as error:
        missing = (error.name or "timm").partition(".")[0]
        raise BackendUnavailable(
            f"finetune needs {missing}: pip install 'rexdeploy[train]'"
        ) from None
    return timm


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
        mean = _summed(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        # From the mean on: the difference of two large sums would lose the variance's digits.
        variance = _summed(centred.square().sum((0, 2, 3))) / count
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


def _summed(values: Tensor) -> Tensor:
    found: Tensor = _Sum.apply(values)
    return found


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


def first_not_finite(losses: Iterable[float]) -> int | None:
    """The position of the first loss that is NaN or infinite."""
    return next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), None)
