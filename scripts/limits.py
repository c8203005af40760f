"""Measures what honest float32, float16 and bfloat16 graphs do to the logits: limits.json.

    python scripts/limits.py artifacts/limits/limits.json [SEEDS]

Untrained networks with recalibrated batch norms, channels padded as `export` pads them, over
`verify`'s own synthetic images, in ONNX Runtime on a CPU (every tensor of a 16-bit graph rounded).
Each network is exported once; other seeds swap its weights. With the first seed and small widths,
beside each honest error stand those of defects that are larger than rounding, in the same graph:
every limit must lie between.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx import ModelProto, numpy_helper

from rexdeploy import images
from rexdeploy.blocks import literal
from rexdeploy.compare import Signal, compare
from rexdeploy.graph import MIN_OPSET, export_graph, simplify
from rexdeploy.manifest import ModelSpec, Preprocess, WeightsOrigin
from rexdeploy.models.align import align
from rexdeploy.models.rexnet import CONFIGS, RexNet, recalibrate_batch_norms
from rexdeploy.precision import emulate_bf16, to_bf16, to_fp16

FAMILIES = ("rexnet", "rexnet_lite")
WIDTHS = (1.0, 1.5, 2.0, 3.0)
DEFECT_WIDTHS = (1.0, 1.5)
IMAGES = 16
CALIBRATION_IMAGES = 16
PREPROCESS = Preprocess()
PRECISIONS = {
    "fp32": lambda model: model,
    "fp16": lambda model: literal(to_fp16(model)),
    "bf16": lambda model: emulate_bf16(to_bf16(model)),
}


def main() -> None:
    """Writes the file after every network, goes on where a run was stopped, prints the table."""
    out, seeds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    rows = json.loads(out.read_text())["networks"] if out.exists() else []
    graphs: dict[tuple[str, float], ModelProto] = {}
    done = {(row["family"], row["width"], row["seed"]) for row in rows}
    for seed, width, family in itertools.product(range(seeds), WIDTHS, FAMILIES):
        if (family, width, seed) in done:
            continue
        model, key = network(family, width, seed), (family, width)
        padded = align(model, 16)
        graphs[key] = swap(graphs[key], padded) if key in graphs else export(padded, *key)
        with_defects = seed == 0 and width in DEFECT_WIDTHS
        measured = measure(model, graphs[key], with_defects)
        rows.append({"family": family, "width": width, "seed": seed} | measured)
        print(json.dumps(rows[-1]), flush=True)
        document = {"machine": machine(), "images": IMAGES, "networks": rows}
        out.write_text(json.dumps(document, indent=1) + "\n")
    for row in rows:
        cells = [
            row["family"],
            f"{row['width']:.1f}",
            str(row["seed"]),
            f"{row['fp32']['error']:.1e}",
        ]
        for precision in ("fp16", "bf16"):
            cells += [f"{row[precision]['error']:.2f}", f"{row[precision]['top1']:.0%}"]
        print("|", " | ".join(cells), "|")


def network(family: str, width: float, seed: int) -> RexNet:
    """As `export` makes an untrained one, from another seed."""
    torch.manual_seed(seed)
    model = RexNet(CONFIGS[family](width, 1000))
    calibration = images.synthetic(CALIBRATION_IMAGES, PREPROCESS, seed=seed)
    recalibrate_batch_norms(model, torch.from_numpy(calibration))
    return model.eval()


def export(padded: torch.nn.Module, family: str, width: float) -> ModelProto:
    """The simplified graph, as in a bundle."""
    origin = WeightsOrigin("untrained", "", trained=False)
    spec = ModelSpec(family, width, 1000, "input", "logits", PREPROCESS, origin)
    return simplify(export_graph(padded, spec, None, MIN_OPSET))


def swap(graph: ModelProto, padded: torch.nn.Module) -> ModelProto:
    """The same graph with another network's weights, which have the same names."""
    swapped = ModelProto()
    swapped.CopyFrom(graph)
    state = dict(padded.state_dict())
    for tensor in swapped.graph.initializer:
        if tensor.name in state:
            value = state.pop(tensor.name).numpy()
            assert list(value.shape) == list(tensor.dims), tensor.name
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    assert not state, f"not in the graph: {sorted(state)}"
    return swapped


def load(model: ModelProto) -> ort.InferenceSession:
    """One thread: the same numbers, and no fight for cores."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options)


def measure(model: RexNet, graph: ModelProto, with_defects: bool) -> dict[str, object]:
    """Errors in units of signal by precision, honest and (in 16 bits) with defects."""
    pool = images.synthetic(IMAGES, PREPROCESS, seed=1)
    with torch.inference_mode():
        reference = model(torch.from_numpy(pool)).numpy()
    signal = Signal.of(reference)
    row: dict[str, object] = {"signal": signal.size}
    mean = np.array(PREPROCESS.mean, np.float32).reshape(1, 3, 1, 1)
    std = np.array(PREPROCESS.std, np.float32).reshape(1, 3, 1, 1)

    def error(logits: images.Float32) -> float:
        return compare(reference, logits, names=("", ""), signal=signal, limit=1).error

    for precision, convert in PRECISIONS.items():
        session = load(convert(graph))
        logits = session.run(None, {"input": pool})[0]
        answer = compare(reference, logits, names=("", ""), signal=signal, limit=1)
        row[precision] = answers = {
            "error": answer.error,
            "cosine": answer.cosine,
            "kl": answer.kl,
            "top1": answer.top1,
        }
        if not with_defects or precision == "fp32":
            continue
        answers |= {
            "channels swapped": error(session.run(None, {"input": pool[:, ::-1].copy()})[0]),
            "not normalised": error(session.run(None, {"input": pool * std + mean})[0]),
            "rows shifted": error(np.roll(logits, 1, axis=0)),
            "output constant": error(np.repeat(logits[:1], len(logits), axis=0)),
        }
        session = load(convert(one_percent_off(graph)))
        answers["weights 1 % off"] = error(session.run(None, {"input": pool})[0])
        if not model.config.is_lite:
            session = load(convert(without_gate(graph)))
            answers["SE dropped"] = error(session.run(None, {"input": pool})[0])
    return row


def one_percent_off(graph: ModelProto) -> ModelProto:
    """One weight tensor, the third convolution's, is a hundredth too large."""
    edited = ModelProto()
    edited.CopyFrom(graph)
    name = [node for node in graph.graph.node if node.op_type == "Conv"][2].input[1]
    tensor = next(tensor for tensor in edited.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor) * np.float32(1.01)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return edited


def without_gate(graph: ModelProto) -> ModelProto:
    """The first squeeze-excitation lets its features through: its gate is 1."""
    edited = ModelProto()
    edited.CopyFrom(graph)
    by_name = {tensor.name: tensor for tensor in edited.graph.initializer}
    weight = next(name for name in by_name if name.endswith(".gate.2.weight"))
    for name, value in ((weight, 0), (weight.replace("weight", "bias"), 100)):
        values = np.full(by_name[name].dims, value, np.float32)
        by_name[name].CopyFrom(numpy_helper.from_array(values, name))
    return edited


def machine() -> dict[str, str]:
    """What the numbers come from."""
    packages = ("rexdeploy", "torch", "onnx", "onnxruntime")
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{package: metadata.version(package) for package in packages},
    }


if __name__ == "__main__":
    main()
