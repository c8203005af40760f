"""Measures what `verify` accepts of honest graphs and catches of wrong ones: limits.json.

    python scripts/limits.py artifacts/limits [DEFECTS]

Honest: every published network and few classes, untrained with recalibrated batch norms, over the
images that `verify` judges by and over photographs: each number as a share of its limit. Defects:
DEFECTS (default 16) of every kind at random places in the float32, float16 and bfloat16 graphs,
over sixteen of these images at 128 pixels: how many are caught, and by which number. Goes on where
it was stopped, and writes the tables into README.md beside limits.json.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from onnx import ModelProto, numpy_helper
from PIL import Image
from sklearn.datasets import load_sample_images

from rexdeploy import arrays
from rexdeploy.backends import open_backend
from rexdeploy.bundle.manifest import BatchRange, ModelSpec, Preprocess, WeightsOrigin
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.engine_graph import to_plain_adds
from rexdeploy.graphs.from_torch import MIN_OPSET, export_graph, simplify
from rexdeploy.images import decode, sets
from rexdeploy.machine import machine
from rexdeploy.models.align import AUTO_MULTIPLE, align
from rexdeploy.models.rexnet import CONFIGS, RexNet, recalibrate_batch_norms
from rexdeploy.models.zoo import published
from rexdeploy.parity.block_by_block import GraphWalk, TorchWalk
from rexdeploy.parity.candidates import Candidate
from rexdeploy.parity.compare import Comparison, Limits, Signal
from rexdeploy.parity.judge import Judge
from rexdeploy.parity.limits import float32_noise, walk_room
from rexdeploy.parity.localize import OWN_LIMITS, localize

PREPROCESS = Preprocess()
SMALL = Preprocess(128, 128)  # of the defects: a third of the arithmetic, the same graphs
MOST = 16
FEW = BatchRange(8, 8, 8)  # of the defects: two batches of the sixteen images
HONEST_RANGE = BatchRange(1, 8, 64)
FEW_RANGE = BatchRange(1, 8, 16)  # of all but V1 and lite 1.0: 64 images take minutes
DEFECT_NETWORKS = (
    ("rexnet", 1.0, 1000), ("rexnet", 1.0, 100), ("rexnet", 1.0, 10), ("rexnet", 1.0, 2),
    ("rexnet_lite", 1.0, 1000), ("rexnet_lite", 1.0, 2),
)  # fmt: skip
HONEST_NETWORKS = (
    *((row.family, row.width, 1000) for row in published()),
    *((family, 1.0, classes) for family in ("rexnet", "rexnet_lite") for classes in (100, 10, 2)),
)
BEGIN, END = "<!-- written by scripts/limits.py -->", "<!-- end -->"
Plant = partial[tuple[ModelProto, str]]  # of a graph and a generator: the wrong graph, and where
Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


class Network:
    """An untrained network, its graphs, and what the judge needs of it."""

    def __init__(
        self, family: str, width: float, classes: int, preprocess: Preprocess = PREPROCESS
    ) -> None:
        self.preprocess = preprocess
        self.name = f"{family} {width:.1f}, {classes} classes"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = RexNet(CONFIGS[family](width, classes))
        calibration = sets.varied(MOST, preprocess, seed=0)  # as `export` makes one
        recalibrate_batch_norms(self.model, torch.from_numpy(calibration))
        self.model.eval()
        origin = WeightsOrigin("untrained", "", trained=False)
        self.spec = ModelSpec(family, width, classes, "input", "logits", preprocess, origin)
        padded = align(self.model, AUTO_MULTIPLE)
        first = simplify(export_graph(padded, self.spec, None, MIN_OPSET))
        tensorrt = to_plain_adds(first)
        self.graphs = {
            "fp32.onnx": (first, "torch"),
            "fp32.tensorrt.onnx": (tensorrt, "fp32.onnx"),
            "fp16.onnx": (to_precision(tensorrt, "fp16"), "fp32.tensorrt.onnx"),
            "bf16.onnx": (to_precision(tensorrt, "bf16"), "fp32.tensorrt.onnx"),
        }
        self.walk = TorchWalk(safetensors.torch.save(dict(self.model.state_dict())), self.spec)

    def over(self, pixels: arrays.UInt8, most: int, sizes: BatchRange) -> Judged:
        """A judge of its graphs over these images."""
        return Judged(self, pixels, most, sizes)

    def candidate(self, file: str, model: ModelProto | None = None) -> Candidate:
        graph, parent = self.graphs[file]
        data = (model or graph).SerializeToString()
        return Candidate(file, data, "onnx", None, parent, ("onnxruntime",), self.spec)


class Judged:
    """Reference logits over a set of images, for any number of candidates."""

    def __init__(
        self, network: Network, pixels: arrays.UInt8, most: int, sizes: BatchRange
    ) -> None:
        self.network, self.most, self.sizes = network, most, sizes
        self.pool = decode.normalise(pixels, network.preprocess)
        with torch.inference_mode():
            chunks = torch.from_numpy(self.pool).split(16)
            self.logits = torch.cat([network.model(chunk) for chunk in chunks]).numpy()
            double = RexNet(network.model.config).double().eval()
            double.load_state_dict(network.model.state_dict())
            exact = double(torch.from_numpy(self.pool[:most]).double()).numpy()
        self.signal = Signal.of(self.logits)
        self.noise = float32_noise(self.logits[:most], exact, self.signal, "logits")
        self.pixels = pixels

    def effect(self, file: str, model: ModelProto) -> float:
        """The largest difference of any logit to the sound graph's, in units of signal."""
        runs = []
        for graph in (self.network.graphs[file][0], model):
            data = graph.SerializeToString()
            backend = open_backend("onnxruntime", data, self.network.spec, threads=1)
            runs.append(backend.run(self.pool[: self.most]))
            backend.close()
        return float(np.abs(runs[0] - runs[1]).max()) / self.signal.size

    def judge(self) -> Judge:
        files = [self.network.candidate(file) for file in self.network.graphs]
        return Judge(
            {"uint8": self.pixels, "float32": self.pool},
            "logits",
            ("torch", self.logits),
            self.signal,
            self.noise,
            files,
            self.sizes,
            self.most,
        )


def main() -> None:
    """Measures what is not in the file yet."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16
    file = folder / "limits.json"
    document = json.loads(file.read_text()) if file.exists() else {}
    document = {"machine": machine(), "honest": [], "defects": []} | document
    wanted = dict.fromkeys((*DEFECT_NETWORKS, *HONEST_NETWORKS))
    for key in wanted:
        name = f"{key[0]} {key[1]:.1f}, {key[2]} classes"
        has_honest = any(row["network"] == name for row in document["honest"])
        has_defects = any(row["network"] == name for row in document["defects"])
        if has_honest and (has_defects or key not in DEFECT_NETWORKS):
            continue
        started = time.perf_counter()
        if key in DEFECT_NETWORKS and not has_defects:
            document["defects"] += defects(Network(*key, SMALL), count)
        if not has_honest:
            document["honest"] += honest(Network(*key))
        file.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    readme = folder / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    readme.write_text(before + BEGIN + "\n" + tables(document) + END + rest.split(END)[1])


def honest(network: Network) -> list[dict[str, Any]]:
    """Every edge of the sound graphs over both kinds of images."""
    rows = []
    photos = np.stack(
        [
            decode.take(Image.fromarray(pixels), "photo", PREPROCESS)
            for pixels in load_sample_images().images
        ]
    )
    is_first = (network.spec.width, network.spec.num_classes) == (1.0, 1000)
    sizes = HONEST_RANGE if is_first else FEW_RANGE
    copies = list(sets.copies(photos))[: sizes.max - len(photos)]
    synthetic, _ = sets.pool(None, MOST, PREPROCESS, sizes.max)
    for kind, pixels in (
        ("synthetic", synthetic),
        ("photographs", np.concatenate([photos, np.stack(copies)])),
    ):
        judged = network.over(pixels, MOST, sizes)
        judge = judged.judge()
        for file in network.graphs:
            judge.run(network.candidate(file), "onnxruntime")
        assert not judge.broken, judge.broken
        rows += [
            {
                "network": network.name,
                "images": kind,
                "count": len(pixels),
                "constant": asdict(judged.signal.constant),
            }
            | _numbers(edge)
            for edge in judge.edges
        ]
        rows += [
            {"network": network.name, "images": kind, "refused": skip.candidate, "why": skip.reason}
            for skip in judge.skipped
        ]
        rows += [
            {"network": network.name, "images": kind, "headroom": room.factor, "file": room.file}
            for room in judge.headroom
        ]
        walks = [network.walk, GraphWalk(network.graphs["fp32.onnx"][0])]
        walks.append(GraphWalk(network.graphs["fp32.tensorrt.onnx"][0]))
        for index, file in ((1, "fp32.onnx"), (2, "fp32.tensorrt.onnx")):
            limit = OWN_LIMITS["fp32"] * walk_room(judged.noise)
            found = localize(
                walks[index - 1], walks[index], judged.pool, names=("", file), limit=limit
            )
            worst = max(block.own for block in found.blocks)
            rows.append(
                {"network": network.name, "images": kind, "walked": file, "own": worst}
                | {"limit": found.limit}
            )
    return rows


def _numbers(edge: Comparison) -> dict[str, Any]:
    return {
        "edge": f"{edge.reference} -> {edge.candidate}",
        "numbers": asdict(edge.numbers),
        "limits": asdict(edge.limits),
        "top1": edge.top1,
        "passed": not edge.failures,
    }


def defects(network: Network, count: int) -> list[dict[str, Any]]:
    """How many defects of every kind each number catches, in each precision."""
    pixels, _ = sets.pool(None, MOST, network.preprocess)
    judged = network.over(pixels, MOST, FEW)
    rows = []
    for file in ("fp32.onnx", "fp16.onnx", "bf16.onnx"):
        graph, parent = network.graphs[file]
        rng = np.random.default_rng(zlib.crc32(f"{network.name} {file}".encode()))
        judge = judged.judge()  # knows the sound graph's parent, and what rounding does to it
        for sound in dict.fromkeys(("fp32.onnx", "fp32.tensorrt.onnx", file)):
            judge.run(network.candidate(sound), "onnxruntime")
            if sound == file or parent == "torch":
                break
        for title, (plant, places) in _kinds(judged.signal.size, count).items():
            tried: list[dict[str, Any]] = []
            while len(tried) < places:
                model, place = plant(graph, rng)
                if plant.func is _edit and place in [hit["place"] for hit in tried]:
                    continue
                tried.append({"place": place} | _caught(network, judged, judge, file, model))
            rows.append(
                {"network": network.name, "file": file, "defect": title, "tried": len(tried)}
                | {"caught": sum(bool(hit["by"]) for hit in tried), "by": _by(tried)}
                | {"no_effect": sum(hit["is_same"] for hit in tried)}
                | {"least": min((hit["times"] for hit in tried if hit["by"]), default=None)}
                | {"missed": [hit for hit in tried if not hit["by"] and not hit["is_same"]]}
            )
            print(json.dumps({k: v for k, v in rows[-1].items() if k != "missed"}), flush=True)
    return rows


def _caught(
    network: Network, judged: Judged, judge: Judge, file: str, model: ModelProto
) -> dict[str, Any]:
    """Which numbers are over their limits, and how far the edge's own ones are.

    `times`: how many times its limit the number is that exceeds it most (of `r`, what it lacks of
    1). `is_same`: there is nothing to catch, since no logit differs from the sound graph's (a small
    change that 16 bits round away), or by less than float32 itself rounds in PyTorch.
    """
    before = len(judge.edges)
    judge.run(network.candidate(file, model), "onnxruntime")
    by = []
    times = 0.0
    is_same = False
    for edge in judge.edges[before:]:
        kind = "twin: " if ", rounded" in edge.reference else ""
        is_same |= bool(kind) and edge.error == 0
        if edge.nonfinite:
            by.append(kind + "not finite")
            continue
        times = max(times, *_shares(edge))
        numbers, limits = edge.numbers, edge.limits
        by += [kind + "error"] * (not numbers.error <= limits.error)
        by += [kind + "rms"] * (not numbers.rms <= limits.rms)
        by += [kind + "correlation"] * (not numbers.correlation >= limits.correlation)
    if file == "fp32.onnx":
        limit = OWN_LIMITS["fp32"] * walk_room(judged.noise)
        found = localize(network.walk, GraphWalk(model), judged.pool, names=("", file), limit=limit)
        by += ["block"] * bool(found.over)
        times = max(times, max(block.own for block in found.blocks) / found.limit)
        if not by:
            is_same = judged.effect(file, model) < judged.noise.error
    numbers = asdict(judge.edges[before].numbers)
    return {"by": by, "numbers": numbers, "times": times, "is_same": is_same and not by}


def _shares(edge: Comparison) -> tuple[float, float, float]:
    """Error, root mean square, and what the correlation lacks of 1, each by its limit."""
    numbers, limits = edge.numbers, edge.limits
    return (
        numbers.error / limits.error,
        numbers.rms / limits.rms,
        (1 - numbers.correlation) / (1 - limits.correlation),
    )


def _by(tried: list[dict[str, Any]]) -> dict[str, int]:
    kinds = dict.fromkeys(kind for hit in tried for kind in hit["by"])
    return {kind: sum(kind in hit["by"] for hit in tried) for kind in kinds}


def _kinds(signal: float, count: int) -> dict[str, tuple[Plant, int]]:
    """Every kind of defect: makes one and says where; and at how many places it is tried."""
    few = max(1, count // 4)  # of those that have few places to be at
    same: Change = lambda values, _: values  # noqa: E731
    return {
        "a weight tensor 1 % off": (partial(_edit, 1, lambda values, _: values * 1.01), count),
        "a channel's weights 1 % off": (partial(_edit, 1, _one_channel), count),
        "a tensor of biases 5 % off": (partial(_edit, 2, lambda values, _: values * 1.05), count),
        "two classes swapped": (partial(_last, _swap_two, None), few),
        "a third of the classes rotated": (partial(_last, _rotate_third, None), few),
        "all logits up by half a signal": (
            partial(_last, same, lambda values, _: values + 0.5 * signal),
            few,
        ),
        "one class up by half a signal": (
            partial(_last, same, partial(_one_up, 0.5 * signal)),
            few,
        ),
    }


def _edit(
    operand: int, change: Change, graph: ModelProto, rng: np.random.Generator
) -> tuple[ModelProto, str]:
    """A change to one convolution's weights (operand 1) or biases (2) that change anything."""
    names = {tensor.name: index for index, tensor in enumerate(graph.graph.initializer)}
    operands = [
        node.input[operand]
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm") and len(node.input) > operand
    ]
    places = [name for name in operands if name in names]
    while True:
        name = places[rng.integers(len(places))]
        edited = ModelProto()
        edited.CopyFrom(graph)
        if _change(edited, names[name], change, rng):
            return edited, name


def _change(model: ModelProto, index: int, change: Change, rng: np.random.Generator) -> bool:
    tensor = model.graph.initializer[index]
    old = numpy_helper.to_array(tensor)
    new = change(old.astype(np.float32).copy(), rng).astype(old.dtype)
    tensor.CopyFrom(numpy_helper.from_array(new, tensor.name))
    return bool((new != old).any())


def _one_channel(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    used = [index for index in range(len(values)) if np.abs(values[index]).max() > 0]
    values[rng.choice(used)] *= 1.01
    return values


def _last(
    weights: Change,
    biases: Change | None,
    graph: ModelProto,
    rng: np.random.Generator,
) -> tuple[ModelProto, str]:
    """A change to the classifier's weights, and to its biases (None: the same one)."""
    node = [item for item in graph.graph.node if item.op_type in ("Conv", "Gemm")][-1]
    edited = ModelProto()
    edited.CopyFrom(graph)
    names = {tensor.name: index for index, tensor in enumerate(graph.graph.initializer)}
    state = rng.bit_generator.state
    _change(edited, names[node.input[1]], weights, rng)
    if biases is None:
        rng.bit_generator.state = state  # the same rows of both
    _change(edited, names[node.input[2]], biases or weights, rng)
    return edited, node.input[1]


def _swap_two(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    a, b = rng.choice(len(values), 2, replace=False)
    values[[a, b]] = values[[b, a]]
    return values


def _rotate_third(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    chosen = rng.choice(len(values), max(2, len(values) // 3), replace=False)
    values[chosen] = values[np.roll(chosen, 1)]
    return values


def _one_up(size: float, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    values[rng.integers(len(values))] += size
    return values


def tables(document: dict[str, Any]) -> str:
    """README's tables, from the measurement."""
    rows = [
        "| network | images | graph | error / limit | rms / limit | 1 - r / limit | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in document["honest"]:
        if (
            "edge" in row
            and "rounded" not in row["edge"]
            and "fp32.tensorrt.onnx (" not in row["edge"]
        ):
            numbers, limits = Limits(**row["numbers"]), Limits(**row["limits"])
            cells = [
                row["network"],
                row["images"],
                row["edge"].split(" -> ")[1].split(".")[0],
                f"{numbers.error:.1e} / {limits.error:.1e}",
                f"{numbers.rms:.1e} / {limits.rms:.1e}",
                f"{1 - numbers.correlation:.0e} / {1 - limits.correlation:.0e}",
                f"{row['top1']:.0%}",
            ]
            rows.append("| " + " | ".join(cells) + " |")
        elif "refused" in row:
            cells = [row["network"], row["images"], row["refused"].split(".")[0], "refused"]
            rows.append("| " + " | ".join([*cells, *"---"]) + " |")
    rows += [
        "",
        "| defect | graph | " + " | ".join(_networks(document)) + " |",
        "|---|---|" + "---|" * len(_networks(document)),
    ]
    for title in dict.fromkeys(row["defect"] for row in document["defects"]):
        for file in ("fp32.onnx", "fp16.onnx", "bf16.onnx"):
            cells = []
            for name in _networks(document):
                for row in document["defects"]:
                    if (row["network"], row["file"], row["defect"]) == (name, file, title):
                        least = f" ({row['least']:.2g})" if row["least"] else ""
                        cells.append(f"{row['caught']} of {row['tried'] - row['no_effect']}{least}")
            rows.append(f"| {title} | {file.split('.')[0]} | " + " | ".join(cells) + " |")
    return "\n".join(["", *rows, "", ""])


def _networks(document: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["network"] for row in document["defects"]))


if __name__ == "__main__":
    main()
