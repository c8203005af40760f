"""A training step of ours against plain timm's: the same network, images and recipe, in turns.

    python scripts/training_step.py FILE.json

Plain code is a loop as timm's documentation has it: its model, optimiser, schedule and loss.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import timm.optim
import timm.scheduler
import torch

from rexdeploy.machine import machine
from rexdeploy.models.rexnet import RexNet, v1_config
from rexdeploy.training.trainer import RECIPES, Trainer

ROUNDS, WARMUP, BATCH, SIZE, CLASSES = 60, 5, 64, 64, 10


def plain(images: torch.Tensor, labels: torch.Tensor) -> Callable[[], object]:
    """A step of timm's rexnet_100 in plain code."""
    model = timm.create_model("rexnet_100", num_classes=CLASSES, drop_rate=0.2)
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=2e-3, weight_decay=0.05)
    schedule, _ = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=20, step_on_epochs=False, updates_per_epoch=100
    )
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    updates = 0

    def step() -> object:
        nonlocal updates
        schedule.step_update(updates)
        loss = loss_of(model(images.to(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        return loss

    return step


def main() -> None:
    """Times both in turns, writes every sample, and prints the ratio of the medians."""
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % CLASSES
    trainer = Trainer(RexNet(v1_config(1.0, CLASSES)), RECIPES["small"], 2e-3, 20, 100, "cpu")
    steps = {"ours": lambda: trainer.step(images, labels), "timm": plain(images, labels)}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARMUP + ROUNDS):
        for name in sorted(steps, reverse=number % 2 == 1):
            begun = time.perf_counter()
            steps[name]()
            if number >= WARMUP:
                samples[name].append(round(time.perf_counter() - begun, 5))
    ratios = [own / its for own, its in zip(samples["ours"], samples["timm"], strict=True)]
    found = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "network": f"V1 1.0, {BATCH} images of {SIZE} pixels, recipe small",
        "seconds": samples,
        "median_ratio": round(statistics.median(ratios), 4),
    }
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")
    print(f"ours takes {found['median_ratio']} times as long as timm's (median of {ROUNDS} pairs)")


if __name__ == "__main__":
    main()
