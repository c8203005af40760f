"""Detectors from end to end on a CPU: ours in ONNX Runtime, and ResNet50-FPN, beside PyTorch eager.

    PYTHONPATH=. python scripts/detector_speed.py FILE.json

Faster R-CNN over ReXNet 1.0 and torchvision's over ResNet50, both with random heads whose scores
spread, one photograph-like image of 1216 x 800 pixels, two threads. ResNet50's stages are exported
by the same code. Host: what is computed between the stages, by our runtime.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from rexdeploy.bundle.manifest import Preprocess, Role
from rexdeploy.detection import boxes as host
from rexdeploy.detection import reference
from rexdeploy.detection.export import stage_graphs
from rexdeploy.detection.preprocess import prepare
from rexdeploy.detection.runtime import OnnxStage, Stages, trace
from rexdeploy.images.sets import varied_pixels
from rexdeploy.interleaved import Task, paired_ratio, time_rounds
from rexdeploy.machine import machine
from rexdeploy.models.detector import DetectorConfig, seeded_detector

ROUNDS, THREADS = 8, 2
HEIGHT, WIDTH = 800, 1216


class Timed:
    """A stage that notes how long it ran."""

    def __init__(self, stage: OnnxStage, taken: list[float]) -> None:
        self.least, self._stage, self._taken = stage.least, stage, taken

    def run(self, feeds: Any) -> Any:
        begun = time.perf_counter()
        found = self._stage.run(feeds)
        self._taken.append(1e3 * (time.perf_counter() - begun))
        return found

    def close(self) -> None:
        self._stage.close()


def main(file: Path) -> None:
    """Times all in interleaved rounds, and writes every sample."""
    torch.set_num_threads(THREADS)
    pixels = varied_pixels(1, Preprocess(height=HEIGHT, width=WIDTH), seed=3)[0]
    ours: Any = seeded_detector(DetectorConfig(1.0), None, seed=0)
    resnet = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    in_inner: list[float] = []

    def stages_of(detector: Any) -> Stages:
        graphs = stage_graphs(detector, masks=False, grid_sample=False)
        found: dict[Role, Any] = {}
        for role, graph in graphs.items():
            found[role] = Timed(
                OnnxStage(graph.SerializeToString(), role, threads=THREADS), in_inner
            )
        return found

    def run(stages: Stages) -> None:
        prepared = prepare(pixels)
        trace(stages, prepared, (HEIGHT, WIDTH))

    tasks = {
        "rexnet_1.0 pytorch": functools.partial(reference.detect, ours, pixels),
        "rexnet_1.0 onnxruntime": functools.partial(run, stages_of(ours)),
        "resnet50 pytorch": functools.partial(reference.detect, resnet, pixels),
        "resnet50 onnxruntime": functools.partial(run, stages_of(resnet)),
    }
    rounds = time_rounds([Task(task) for task in tasks.values()], ROUNDS, print)
    samples = dict(zip(tasks, rounds.samples_ms, strict=True))
    shares = []
    for _ in range(ROUNDS):
        in_inner.clear()
        begun = time.perf_counter()
        tasks["rexnet_1.0 onnxruntime"]()
        whole = 1e3 * (time.perf_counter() - begun)
        prepared = time.perf_counter()
        prepare(pixels)
        preparing = 1e3 * (time.perf_counter() - prepared)
        shares.append(max(0.0, whole - sum(in_inner) - preparing) / whole)
    found = {
        "machine": machine(),
        "threads": THREADS,
        "image": [WIDTH, HEIGHT],
        "anchors": len(host.anchors(HEIGHT, WIDTH)),
        "samples_ms": samples,
        "host_share": float(np.median(shares)),
        "ratios": {
            "pytorch to onnxruntime": str(
                paired_ratio(samples["rexnet_1.0 pytorch"], samples["rexnet_1.0 onnxruntime"])
            ),
            "resnet50 to rexnet_1.0 in onnxruntime": str(
                paired_ratio(samples["resnet50 onnxruntime"], samples["rexnet_1.0 onnxruntime"])
            ),
        },
    }
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: found[key] for key in ("ratios", "host_share")}, indent=1))
    for name, taken in samples.items():
        print(f"{name}: {np.median(taken):.0f} ms")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
