"""Measures what `verify` accepts of honest INT8 graphs and catches of wrong ones: int8.json.

    PYTHONPATH=. python scripts/int8_limits.py artifacts/limits [DEFECTS]

Honest: the four committed test networks (scripts/test_networks.py), for CPUs and for TensorRT, over
images that they were not trained on and over the synthetic ones: each edge's share of its limit.
Defects: DEFECTS (default 12) of every kind at random places in the CPU's graphs. Writes the tables
into README.md beside int8.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

import rexdeploy
from rexdeploy.bundle.manifest import INT8
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.machine import machine
from tests.drawn_images import SIZE, write_digits, write_drawn_images

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("digits_lite", "digits_v1", "drawn_lite", "drawn_v1")
BEGIN, END = "<!-- written by scripts/int8_limits.py -->", "<!-- end of int8 -->"
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def negated(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One channel's weights with the other sign."""
    channel = int(rng.integers(len(codes)))
    codes[channel] = -codes[channel]
    return codes


def swapped(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two channels' weights exchanged."""
    one, other = rng.choice(len(codes), 2, replace=False)
    codes[[one, other]] = codes[[other, one]]
    return codes


def moved(codes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One channel's bias twice as large."""
    channel = int(rng.integers(len(codes)))
    codes[channel] *= 2
    return codes


DEFECTS: dict[str, tuple[int, Change]] = {
    "one channel's weights negated": (TensorProto.INT8, negated),
    "two channels' weights exchanged": (TensorProto.INT8, swapped),
    "one channel's bias doubled": (TensorProto.INT32, moved),
}


def plant(model: ModelProto, kind: int, change: Change, rng: np.random.Generator) -> ModelProto:
    """A copy with one constant of codes changed."""
    edited = ModelProto()
    edited.CopyFrom(model)
    tensors = [
        tensor
        for tensor in edited.graph.initializer
        if tensor.data_type == kind and tensor.dims and tensor.dims[0] > 1
    ]
    tensor = tensors[int(rng.integers(len(tensors)))]
    changed = change(numpy_helper.to_array(tensor).copy(), rng)
    tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    return edited


def honest(bundle: Bundle, images: Path) -> list[dict[str, Any]]:
    """Every INT8 edge over both kinds of images, with its share of the limit."""
    rows = []
    for folder in (images, None):
        result = rexdeploy.verify(bundle, images=folder)
        for edge in result.edges:
            if "int8" in edge.candidate:
                rows.append(
                    {
                        "edge": f"{edge.reference} -> {edge.candidate}",
                        "images": "own" if folder else "synthetic",
                        "rms": edge.rms,
                        "share": edge.share,
                        "fails": bool(edge.failures),
                    }
                )
        rows += [{"edge": skip.candidate, "skipped": skip.reason} for skip in result.skipped]
    return rows


def main(folder: Path, count: int) -> None:
    """Measures all, and writes both files."""
    found: dict[str, Any] = {"machine": machine(), "networks": {}}
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as temporary:
            found["networks"][name] = measured(name, Path(temporary), count)
        print(name, json.dumps(found["networks"][name])[:300])
    (folder / "int8.json").write_text(json.dumps(found, indent=1) + "\n")
    page = folder / "README.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n{tables(found)}{END}{after}")


def measured(name: str, folder: Path, count: int) -> dict[str, Any]:
    """One network's honest edges, and its defects."""
    if name.startswith("digits"):
        train, val = (write_digits(folder / kind, kind == "val") for kind in ("train", "val"))
    else:
        train = write_drawn_images(folder / "train", 1, 480)
        val = write_drawn_images(folder / "val", 2, 1200)
    weights = ROOT / "tests" / "data" / f"{name}.safetensors"
    bundle = rexdeploy.export(weights=weights, image_size=SIZE, name=name, out=folder).bundle
    for target in ("cpu", "trt"):
        bundle = rexdeploy.quantize(bundle, calib=train, data=val, target=target, keep=True).bundle
    rng = np.random.default_rng(0)
    artifact = bundle.manifest.find_file(INT8)
    assert artifact is not None
    model = onnx.load_from_string(bundle.read(artifact))
    caught: dict[str, dict[str, int]] = {}
    for kind, (dtype, change) in DEFECTS.items():
        counts = {"caught": 0, "moves nothing": 0, "missed": 0}
        for _ in range(count):
            data = plant(model, dtype, change, rng).SerializeToString()
            wrong = bundle.update(replace(artifact, sha256=sha256(data)), files={INT8: data})
            edges = [
                edge
                for edge in rexdeploy.verify(wrong, images=val, samples=16).edges
                if "int8.onnx" in edge.candidate
            ]
            written = next(edge for edge in edges if "as written" in edge.candidate)
            if any(edge.failures for edge in edges):
                counts["caught"] += 1
            else:
                counts["missed" if written.error else "moves nothing"] += 1
        caught[kind] = counts
        bundle = bundle.update(artifact, files={INT8: model.SerializeToString()})
    return {"honest": honest(bundle, val), "defects": caught}


def tables(found: dict[str, Any]) -> str:
    """The largest share of a limit by network and images, and what was caught."""
    lines = [
        "",
        f"On {found['machine']['processor']}, {found['machine']['cores']} cores.",
        "",
        "| network | images | edges | largest rms | largest share of a limit | fail | skipped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, network in found["networks"].items():
        for kind in ("own", "synthetic"):
            rows = [row for row in network["honest"] if row.get("images") == kind]
            skipped = sum("skipped" in row for row in network["honest"])
            lines.append(
                f"| {name} | {kind} | {len(rows)} | {max(row['rms'] for row in rows):.2g} | "
                f"{max(row['share'] for row in rows):.2g} | {sum(row['fails'] for row in rows)} | "
                f"{skipped} |"
            )
    lines += ["", "| defect | caught | moves nothing | missed |", "|---|---|---|---|"]
    for defect in DEFECTS:
        counts = [network["defects"][defect] for network in found["networks"].values()]
        totals = (sum(one[key] for one in counts) for key in ("caught", "moves nothing", "missed"))
        lines.append(f"| {defect} | {' | '.join(map(str, totals))} |")
    return "\n".join(lines) + "\n\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 12)
