"""How a network is trained: recipes, one step of it, averaged weights, and validation."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rexdeploy.errors import BackendUnavailable
from rexdeploy.models.rexnet import RexNet
from rexdeploy.training.fake_quantization import FakeQuantized
from rexdeploy.training.processes import place, summed, whole_batch_layers


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


_AT_ONCE = 32  # images that ranges are taken from

RECIPES = {
    # The published command line (timm's train.py on four GPUs with 128 images each). It states no
    # warm-up and no decay of the average: those are timm's own.
    "published": Recipe("sgd", 0.5, 1e-5, 512, 400, 5, 0.0, 0.9999, "randaugment", False),
    "small": Recipe("adamw", 2e-3, 0.05, 64, 20, 2, 0.1, 0.0, "affine", True),
}


class Trainer:
    """A network in training, with its optimiser, schedule and averaged weights."""

    def __init__(
        self,
        model: RexNet,
        recipe: Recipe,
        lr: float,
        epochs: int,
        steps: int,
        device: str,
        weight_bits: int | None = None,
    ) -> None:
        """`steps` are those of an epoch; raises BackendUnavailable without timm.

        With `weight_bits` the network learns in fake int8; see `take_ranges`.
        """
        timm = import_timm()
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        model = whole_batch_layers(model, on_gpu)
        self.memory_format = (
            torch.channels_last if on_gpu or recipe.channels_last else torch.contiguous_format
        )
        model = model.to(self.device).to(memory_format=self.memory_format)
        self.model = model
        self._rounding = FakeQuantized(model, weight_bits) if weight_bits else None
        self._wrapped: nn.Module = self._rounding or model
        if place()[1] > 1:
            self._wrapped = nn.parallel.DistributedDataParallel(self._wrapped)
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
            (lambda: torch.autocast("cuda", torch.float16))
            if on_gpu and not weight_bits  # torch rounds float32 only
            else contextlib.nullcontext
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

    def take_ranges(self, images: Tensor) -> None:
        """Takes the ranges of fake int8 anew, from images `[N, 3, H, W]`, before a step."""
        if self._rounding is not None:
            moved = images.to(self.device, memory_format=self.memory_format)
            self._rounding.take_ranges(torch.split(moved, _AT_ONCE))

    @torch.inference_mode()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int, int]:
        """Mean loss, correct answers and images; of all processes together, each with its share.

        In float32 on every device (or in fake int8), and without label smoothing: what the network
        will answer.
        """
        model: nn.Module = self.result
        if self._rounding is not None:
            model = self._rounding.around(self.result)
        model.eval()
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
        return summed(values.to(self.device)).cpu()


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


def first_not_finite(losses: Iterable[float]) -> int | None:
    """The position of the first loss that is NaN or infinite."""
    return next((at for at, loss in enumerate(losses) if not math.isfinite(loss)), None)
