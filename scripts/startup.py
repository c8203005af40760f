"""Measures what loading a bundle takes beyond importing onnxruntime: startup-cpu.json.

    python scripts/startup.py artifacts/benchmarks/startup-cpu.json BUNDLE...

Each run is a fresh process in which torch and onnx cannot be imported, as on a serving machine: it
imports onnxruntime, imports rexdeploy and loads the bundle for ONNX Runtime on the CPU, classifies
one image. Bundles take turns, and their files are in the page cache.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

from rexdeploy.bundle.store import Bundle
from rexdeploy.machine import machine

RUNS = 15
STEPS = ("import_onnxruntime_ms", "load_ms", "first_image_ms")
PROCESS = """
import json, sys, time
for name in ("torch", "onnx", "safetensors", "typer", "rich"):
    sys.modules[name] = None
times = [time.perf_counter()]
import onnxruntime
times.append(time.perf_counter())
import rexdeploy
classifier = rexdeploy.load(sys.argv[1], "onnxruntime")
times.append(time.perf_counter())
from PIL import Image
classifier.classify([Image.new("RGB", (640, 480))])
times.append(time.perf_counter())
print(json.dumps([round(1e3 * (end - start), 1) for start, end in zip(times, times[1:])]))
"""


def main() -> None:
    """Runs, writes every sample and prints the medians."""
    out, bundles = Path(sys.argv[1]), [Bundle.open(Path(path)) for path in sys.argv[2:]]
    runs: dict[Path, list[list[float]]] = {bundle.path: [] for bundle in bundles}
    for _ in range(RUNS):
        for path in runs:
            answer = subprocess.run(
                [sys.executable, "-c", PROCESS, path], capture_output=True, check=True
            )
            runs[path].append(json.loads(answer.stdout))
    rows = []
    for bundle in bundles:
        graph = bundle.manifest.find("onnx")
        size = (bundle.path / graph.file).stat().st_size if graph else 0
        samples = dict(zip(STEPS, zip(*runs[bundle.path], strict=True), strict=True))
        rows.append({"network": bundle.manifest.model.title, "bytes": size, **samples})
        medians = [f"{step} {statistics.median(samples[step]):.0f}" for step in STEPS]
        print(bundle.manifest.model.title, f"{size / 2**20:.0f} MiB", *medians)
    out.write_text(json.dumps({"machine": machine(), "networks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
