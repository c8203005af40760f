"""A training under way: its epochs, what is kept of each, and how it goes on after a kill."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.errors import VerificationFailed
from rexdeploy.models.notes import Notes, save_with_notes
from rexdeploy.models.rexnet import RexNet
from rexdeploy.progress import Report
from rexdeploy.training import unfinished
from rexdeploy.training.class_folders import ClassFolders
from rexdeploy.training.examples import (
    AsServed,
    Batches,
    Examples,
    collate,
    loader,
    readable,
    seed_of,
    training_transform,
)
from rexdeploy.training.processes import device, place
from rexdeploy.training.trainer import Recipe, Trainer, first_not_finite

_CHECK_STEPS = 20  # between two looks at the losses: on a GPU each look waits for it
_TELL_S = 10.0
RANGED = 128  # as many as `quantize` takes ranges from


@dataclass(frozen=True)
class Epoch:
    """One epoch; `val_loss` and `correct` are of the network that would be kept."""

    number: int
    loss: float  # mean over the training steps, as the recipe smooths labels
    val_loss: float
    correct: int  # of the images that it is validated by
    learning_rate: float  # at its end
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How to train: a recipe, and what replaces its own numbers."""

    recipe: Recipe
    epochs: int
    batch: int  # of all processes together
    lr: float
    seed: int
    settings: dict[str, Any]  # what a training that goes on must have in common
    weight_bits: int | None = None  # of the INT8 graph to learn for; None: float32


class Run:
    """A training under way."""

    def __init__(
        self,
        model: RexNet,
        notes: Notes,
        spec: Preprocess,
        plan: Plan,
        training: ClassFolders,
        held: ClassFolders,
        workers: int,
        out: Path,
        settings: dict[str, Any],
        found: list[dict[str, str]],
        report: Report,
    ) -> None:
        self.notes, self.plan, self.out, self.report = notes, plan, out, report
        self.kept = {"settings": settings, "unreadable": found}
        self.history: list[Epoch] = []
        rank, processes = place()
        transform = training_transform(plan.recipe.augmentation, spec)
        self.batches = Batches(len(training), plan.batch, plan.seed, rank, processes)
        examples = Examples(training, transform, plan.seed)
        self.training = loader(examples, self.batches, workers, unfinished.let_go)
        share = [[(0, at)] for at in range(rank, len(held), processes)]
        size = max(1, plan.batch // processes)
        grouped = [
            [key for keys in share[at : at + size] for key in keys]
            for at in range(0, len(share), size)
        ]
        examples = Examples(held, AsServed(spec), None)
        self.validation = loader(examples, grouped, workers, unfinished.let_go)
        self.trainer = Trainer(
            model, plan.recipe, plan.lr, plan.epochs, len(self.batches), device(), plan.weight_bits
        )
        self.ranged: Tensor | None = None  # images that ranges are taken from
        if plan.weight_bits:
            count = min(RANGED, len(training))
            chosen = [(0, at * len(training) // count) for at in range(count)]
            served = Examples(training, AsServed(spec), None)
            self.ranged, _ = readable(collate([served[key] for key in chosen]))

    def restore(self, state: dict[str, Any] | None) -> int:
        """Goes on from a state, if there is one; returns how many epochs were done."""
        if state is not None:
            self.trainer.restore(state["trainer"])
            self.history = [Epoch(**epoch) for epoch in state["history"]]
        return len(self.history)

    def train(self, first: bool) -> list[Epoch]:
        """All epochs that are left; after each the state, and the network if it is the best."""
        for number in range(len(self.history) + 1, self.plan.epochs + 1):
            epoch = self._epoch(number)
            best = max(map(goodness, self.history), default=None)
            self.history.append(epoch)
            if first:
                # In this order: a kill between the two repeats the epoch, to the same weights.
                if best is None or goodness(epoch) > best:
                    unfinished.write(self.out, self.out, self._checkpoint())
                if number < self.plan.epochs:
                    state = {
                        **self.kept,
                        "history": msgspec.to_builtins(self.history),
                        "trainer": self.trainer.state(),
                    }
                    unfinished.write_state(self.out, state)
        if first:
            unfinished.state_of(self.out).unlink(missing_ok=True)
        return self.history

    def _epoch(self, number: int) -> Epoch:
        begun = told = time.monotonic()
        # What came before does not matter: a training that goes on draws what it would have drawn.
        torch.manual_seed(seed_of(self.plan.seed, number))
        self.batches.epoch = number
        if self.ranged is not None:
            self.trainer.take_ranges(self.ranged)
        losses: list[float] = []
        unseen: list[Tensor] = []
        title = f"epoch {number} of {self.plan.epochs}"
        self.report(title + self._so_far())
        steps = len(self.batches)
        for step, found in enumerate(self.training, start=1):
            unseen.append(self.trainer.step(*readable(found)))
            if step % _CHECK_STEPS and step != steps:
                continue
            losses += (self.trainer.summed(torch.stack(unseen)) / place()[1]).tolist()
            unseen.clear()
            wrong = first_not_finite(losses)
            if wrong is not None:
                raise VerificationFailed(
                    f"the loss is {losses[wrong]} in epoch {number}, step {wrong + 1} of {steps}; "
                    f"{self._what_stays()}: give a lower --lr (it is {self.plan.lr:g})"
                )
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                self.report(f"{title}: step {step} of {steps}, loss {losses[-1]:.3f}")
        val_loss, correct, _ = self.trainer.validate(map(readable, self.validation))
        if not math.isfinite(val_loss):
            raise VerificationFailed(
                f"the validation loss is {val_loss} after epoch {number}, step {steps} of {steps}; "
                f"{self._what_stays()}: give a lower --lr (it is {self.plan.lr:g})"
            )
        mean = math.fsum(losses) / len(losses)
        rate, taken = self.trainer.learning_rate, time.monotonic() - begun
        return Epoch(number, mean, val_loss, correct, rate, round(taken, 3))

    def _so_far(self) -> str:
        if not self.history:
            return ""
        last, best = self.history[-1], max(self.history, key=goodness)
        images = len(self.validation.dataset)  # type: ignore[arg-type]
        return (
            f" (loss {last.loss:.3f}, top-1 {last.correct / images:.1%}; best "
            f"{best.correct / images:.1%})"
        )

    def _what_stays(self) -> str:
        if not self.history:
            return "nothing was written"
        return f"{self.out} is the best network of the epochs before"

    def _checkpoint(self) -> bytes:
        """The network in the published format and order of memory."""
        state = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.trainer.result.state_dict().items()
        }
        return save_with_notes(state, self.notes)


def goodness(epoch: Epoch) -> tuple[int, float]:
    """By what the best epoch is chosen."""
    return epoch.correct, -epoch.val_loss
