"""Trains the test networks in tests/data, with finetune's own small recipe: test_networks.json.

    PYTHONPATH=. python scripts/test_networks.py [NAME...]

digits_v1, digits_lite, drawn_v1 and drawn_lite: two networks on each of two sets of images
(tests/drawn_images.py), which are written to a temporary folder. Lite is stored in float16: its
head alone is too large for a small file in float32. What the JSON says of each is of the file as it
is stored, on images that it was not trained on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import rexdeploy
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.images import decode
from rexdeploy.machine import machine
from rexdeploy.models.checkpoints import load_checkpoint
from rexdeploy.models.notes import save_with_notes
from rexdeploy.training.class_folders import find_class_folders
from tests.drawn_images import SIZE, write_digits, write_drawn_images

DATA = Path(__file__).parents[1] / "tests" / "data"
TRAINING, VALIDATION = 4800, 2400  # drawn images
NETWORKS = {
    "digits_v1": {"width": 0.4, "epochs": 20},
    "digits_lite": {"lite": True, "width": 0.3, "epochs": 25},
    "drawn_v1": {"width": 0.4, "epochs": 12},
    "drawn_lite": {"lite": True, "width": 0.3, "epochs": 20},
}


def main() -> None:
    """Trains those that are named, or all, one after the other."""
    report = DATA / "test_networks.json"
    rows = json.loads(report.read_text())["networks"] if report.exists() else {}
    for name in sys.argv[1:] or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = train(name, Path(folder))
        print(name, rows[name])
        found = {"machine": machine(), "networks": dict(sorted(rows.items()))}
        report.write_text(json.dumps(found, indent=1) + "\n")


def train(name: str, folder: Path) -> dict[str, object]:
    """Makes the images, trains, stores the network and counts what the stored one answers right."""
    if name.startswith("digits"):
        images = write_digits(folder / "train", held_back=False)
        held = write_digits(folder / "val", held_back=True)
    else:
        images = write_drawn_images(folder / "train", 1, TRAINING)
        held = write_drawn_images(folder / "val", 2, VALIDATION)
    out = folder / f"{name}.safetensors"
    begun = time.perf_counter()
    result = rexdeploy.finetune(
        images, val=held, image_size=SIZE, out=out, report=print, **NETWORKS[name]
    )
    seconds = time.perf_counter() - begun
    stored = DATA / out.name
    checkpoint = load_checkpoint(out)
    half = result.family == "rexnet_lite"
    state = {
        key: tensor.half() if half and tensor.is_floating_point() else tensor
        for key, tensor in checkpoint.state_dict.items()
    }
    stored.write_bytes(save_with_notes(state, checkpoint.notes))
    right, total = answered_right(stored, held)
    return {
        "network": f"{result.family} {result.width:g}",
        "stored": "float16" if half else "float32",
        "bytes": stored.stat().st_size,
        "training_images": result.training_images,
        "epochs": len(result.epochs),
        "seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "right": right,
        "of": total,
        "top1": right / total,
    }


@torch.inference_mode()
def answered_right(file: Path, folder: Path) -> tuple[int, int]:
    """How many of a folder's images the checkpoint answers right."""
    model, spec = load_checkpoint(file).build(), Preprocess(height=SIZE, width=SIZE)
    images = find_class_folders(folder)
    pixels = np.stack([decode.read(images.path(index), spec) for index in range(len(images))])
    batches = torch.from_numpy(decode.normalise(pixels, spec)).split(100)
    answers = torch.cat([model(batch).argmax(1) for batch in batches])
    return int((answers == torch.tensor(images.labels)).sum()), len(images)


if __name__ == "__main__":
    main()
