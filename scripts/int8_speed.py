"""INT8 against float32 in ONNX Runtime and OpenVINO: V1 1.0 and lite 1.0 at 224 pixels.

    PYTHONPATH=. python scripts/int8_speed.py FILE.json

The weights are random, with batch norms set so that the logits vary: what INT8 leaves of such a
network's answers says nothing, its time is that of any weights.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

import rexdeploy
from rexdeploy.bundle.manifest import Preprocess
from rexdeploy.images.sets import varied_pixels
from rexdeploy.models.rexnet import ReXNetV1, ReXNetV1_lite
from tests.helpers import reacting

NETWORKS = {
    "v1_1.0": lambda: ReXNetV1(width_mult=1.0),
    "lite_1.0": lambda: ReXNetV1_lite(multiplier=1.0),
}
IMAGES = 64


def main(file: Path) -> None:
    """Makes both networks and their INT8 graphs, times all, and writes what `bench --json` does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "images").mkdir()
        for index, pixels in enumerate(varied_pixels(IMAGES + 8, Preprocess(), seed=3)):
            if len(set(map(tuple, pixels.reshape(-1, 3)[:: 224 * 7 + 3]))) > 1:
                Image.fromarray(pixels).save(folder / "images" / f"{index:03}.png")
        bundles = []
        for name, make in NETWORKS.items():
            torch.manual_seed(0)
            weights = folder / f"{name}.pth"
            torch.save(reacting(make()).state_dict(), weights)
            bundle = rexdeploy.export(weights=weights, name=name, out=folder).bundle
            made = rexdeploy.quantize(bundle, calib=folder / "images", max_blocks=0, keep=True)
            bundles.append(made.bundle)
        timed = rexdeploy.bench(
            bundles,
            backend=["onnxruntime", "openvino"],
            compare="int8",
            batch=1,
            threads=[1, 2],
            rounds=200,
        )
    file.write_text(json.dumps(timed.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
