"""Writes a detector's bundle: its weights, and a checked graph of each stage."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import safetensors.torch
import torch
from onnx import ModelProto
from torch import nn
from torch.export import Dim

from rexdeploy.bundle.labels import labels_for
from rexdeploy.bundle.manifest import (
    DETECTOR_FORMAT,
    DETECTORS,
    MANIFEST,
    Artifact,
    Manifest,
    ModelSpec,
    Preprocess,
    Role,
    WeightsOrigin,
)
from rexdeploy.bundle.store import (
    DEFAULT_ROOT,
    Bundle,
    check_name,
    check_writable,
    commit,
    sha256,
)
from rexdeploy.detection.judge import Judge, SetComparison
from rexdeploy.detection.preprocess import MAX_SIZE, MIN_SIZE
from rexdeploy.detection.reference import sized
from rexdeploy.detection.runtime import INPUTS, LEVELS, ONNXRUNTIME, OUTPUTS, OnnxStage
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.files import sha256_of
from rexdeploy.graphs.from_torch import MIN_OPSET, export_module, simplify
from rexdeploy.images.sets import varied_pixels
from rexdeploy.models.detector import COCO_CLASSES, FPN_CHANNELS, import_detection
from rexdeploy.models.detector_stages import (
    POOLED_STRIDES,
    SIZE_MULTIPLE,
    BoxStage,
    FeatureStage,
    MaskStage,
)
from rexdeploy.models.weights import load_detector
from rexdeploy.models.zoo import fetch_pretrained
from rexdeploy.parity.compare import Comparison
from rexdeploy.progress import Report, Result, silent
from rexdeploy.text import printable

SEED = 0
_CHECK_SEED = 2  # of the images that the graphs are checked over
_CHECK_IMAGES = 2
_MIN_SIZE, _LARGEST = 64, 2048
_SAMPLE_SIZE = (128, 160)  # different, and more than one value on every level
IMAGES, DETECTIONS = "images", "detections"


@dataclass(frozen=True, repr=False)
class DetectorExport(Result):
    """A new bundle, and how far its graphs are from the network."""

    bundle: Bundle
    heads_trained: bool
    nodes: dict[Role, int]
    comparisons: tuple[Comparison, ...]
    whole: SetComparison

    def __repr__(self) -> str:
        worst = max(comparison.share for comparison in self.comparisons)
        return (
            f"<DetectorExport {self.bundle.path}: {self.bundle.manifest.model.title}, "
            f"{len(self.nodes)} stages; {worst:.0%} of the limit: ok>"
        )

    def _document(self) -> dict[str, Any]:
        return {
            "bundle": printable(str(self.bundle.path)),
            "manifest": self.bundle.manifest,
            "heads_trained": self.heads_trained,
            "comparisons": self.comparisons,
            "whole": self.whole,
        }


def export_detector(
    *,
    task: str = "detect",
    width: float | None = None,
    weights: Path | str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    labels: Path | str | None = None,
    name: str | None = None,
    out: Path | str = DEFAULT_ROOT,
    command: str = "rexdeploy export",
    report: Report = silent,
) -> DetectorExport:
    """Writes a bundle of a Faster ("detect") or Mask R-CNN ("segment") over a ReXNet.

    `weights` is the file of a detector (torchvision's names) or of a classifier (or "pretrained",
    timm's published one), whose heads are then seeded and untrained, or None: nothing is trained.
    `image_size` is the length that an image's short side is resized to, 800 by default; the long
    side gets at most 1333/800 of it. Classes count the background, as torchvision does: 91 for
    COCO. `labels` is a file with a class name a line, the background's first; without it 91 classes
    are COCO's.

    Raises UsageError for what cannot be used, BackendUnavailable where a library is missing, and
    VerificationFailed where a graph does not compute what torchvision's detector does; then it has
    written nothing.

    Example: `rexdeploy.export_detector(task="segment", weights="maskrcnn.pth", name="street")`
    """
    wanted = next((known for known in DETECTORS if known == task), None)
    if wanted is None:
        raise UsageError(f"task: got '{task}', expected classify, {' or '.join(DETECTORS)}")
    size = MIN_SIZE if image_size is None else image_size
    if not _MIN_SIZE <= size <= _LARGEST:
        raise UsageError(
            f"image size: got {size}, expected {_MIN_SIZE} to {_LARGEST} pixels, of a detector's "
            "short side"
        )
    if name is not None:
        check_name(name)
    out = Path(out)
    check_writable(out)
    report("loading the network")
    path = None if weights is None else Path(weights)
    if weights == "pretrained":
        path, _ = fetch_pretrained("rexnet", 1.0 if width is None else width)
    masks = task == "segment"
    loaded = load_detector(
        path, masks=masks, width=width, num_classes=num_classes, family=None, seed=SEED
    )
    origin = WeightsOrigin(f"untrained (seed {SEED})", "", trained=False)
    if path is not None:
        origin = WeightsOrigin(printable(path.name), sha256_of(path), trained=loaded.heads_trained)
    spec = ModelSpec(
        family=loaded.config.family,
        width=loaded.config.width,
        num_classes=loaded.config.num_classes,
        input_name=IMAGES,
        output_name=DETECTIONS,
        preprocess=Preprocess(height=size, width=size * MAX_SIZE // MIN_SIZE),
        weights=origin,
        task=wanted,
    )
    folder = out / (name or f"{spec.family}_{spec.width:.5g}_{task}")
    _check_replaceable(folder, spec)
    names = _coco() if labels is None and spec.num_classes == COCO_CLASSES else None
    names = names or labels_for(labels, 0 if labels is None else spec.num_classes)
    detector = sized(loaded.build(), spec)
    report(f"exporting {spec.title} to ONNX")
    graphs = {
        role: labelled(simplify(graph), spec, role)
        for role, graph in stage_graphs(detector, masks, grid_sample=False).items()
    }
    report("comparing with torchvision")
    comparisons, whole = _checked(detector, spec, graphs)
    saved = safetensors.torch.save(
        {key: value.contiguous() for key, value in loaded.state_dict.items()}
    )
    if path is None:
        spec = replace(spec, weights=replace(origin, sha256=sha256(saved)))
    files = {"weights.safetensors": saved}
    if names is not None:
        files["labels.txt"] = ("\n".join(names) + "\n").encode()
    files |= {f"{role}.onnx": _bytes(graph) for role, graph in graphs.items()}
    report(f"writing {folder}")
    bundle = _write(folder, spec, files, command)
    return DetectorExport(
        bundle,
        loaded.heads_trained,
        {role: len(graph.graph.node) for role, graph in graphs.items()},
        tuple(comparisons),
        whole,
    )


def labelled(model: ModelProto, spec: ModelSpec, role: Role) -> ModelProto:
    """The graph with a note of what it is."""
    onnx.helper.set_model_props(
        model,
        {
            "rexdeploy.name": spec.title,
            "rexdeploy.role": role,
            "rexdeploy.task": spec.task,
            "rexdeploy.preprocess": json.dumps(asdict(spec.preprocess)),
        },
    )
    return model


def _checked(
    detector: Any, spec: ModelSpec, graphs: dict[Role, ModelProto]
) -> tuple[list[Comparison], SetComparison]:
    """Each graph beside torch, and all together; raises VerificationFailed."""
    # Small images: what the graph computes does not hang on their size, and theirs is open.
    small = Preprocess(height=96, width=128)
    judge = Judge(detector, spec, list(varied_pixels(_CHECK_IMAGES, small, _CHECK_SEED)))
    comparisons = []
    for role, graph in graphs.items():
        artifact = Artifact("onnx", f"{role}.onnx", "0" * 64, precision="fp32", role=role)
        comparisons += judge.compare(artifact, graph, None)
    stages = {role: OnnxStage(_bytes(graph), role) for role, graph in graphs.items()}
    whole = judge.end_to_end(stages, ONNXRUNTIME)
    checked: list[Comparison | SetComparison] = [*comparisons, whole]
    for item in checked:
        if item.failures:
            raise VerificationFailed(
                f"the edge {item.reference} -> {item.candidate} is broken: {item.failures[0]}; "
                "nothing was written"
            )
    return comparisons, whole


def _coco() -> list[str]:
    """COCO's 91 names as torchvision has them; an id that COCO does not use says so."""
    weights = import_detection().FasterRCNN_ResNet50_FPN_Weights.COCO_V1
    names: list[str] = weights.meta["categories"]
    return [f"unused {index}" if name == "N/A" else name for index, name in enumerate(names)]


def _check_replaceable(path: Path, spec: ModelSpec) -> None:
    """Raises UsageError if an untrained network would replace a trained one, or another task's."""
    if not (path / MANIFEST).exists():
        return
    current = Bundle.open(path).manifest.model
    if current.task != spec.task:
        raise UsageError(
            f"{path} holds a network that can {current.task}, and would be replaced by one that "
            f"can {spec.task}; give another --name"
        )
    if current.weights.trained and not spec.weights.trained:
        raise UsageError(
            f"{path} holds trained weights ({current.weights.source}) and would be replaced by "
            "an untrained network; give --weights, or another --name"
        )


def _bytes(model: ModelProto) -> bytes:
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _write(path: Path, spec: ModelSpec, files: dict[str, bytes], command: str) -> Bundle:
    built_with = {"opset": str(MIN_OPSET)} | {
        package: metadata.version(package)
        for package in ("rexdeploy", "torch", "torchvision", "onnx", "onnxsim", "onnxruntime")
    }
    weights = Artifact(
        "weights", "weights.safetensors", sha256(files["weights.safetensors"]), command=command
    )
    added = [weights]
    for role in ("features", "boxes", "masks"):
        data = files.get(f"{role}.onnx")
        if data is not None:
            added.append(
                Artifact(
                    "onnx",
                    f"{role}.onnx",
                    sha256(data),
                    parent_sha256=weights.sha256,
                    precision="fp32",
                    built_with=built_with,
                    command=command,
                    role=role,
                )
            )

    if "labels.txt" in files:
        added.append(Artifact("labels", "labels.txt", sha256(files["labels.txt"]), command=command))

    def merge(current: Manifest | None) -> Manifest:
        names = {item.file for item in added}
        derived = [
            item
            for item in (current.artifacts if current else ())
            if item.parent_sha256 and item.file not in names and item.kind != "report"
        ]
        return Manifest(DETECTOR_FORMAT, path.name, spec, ()).with_artifacts(*added, *derived)

    return commit(path, merge, files)


def stage_graphs(
    detector: nn.Module, masks: bool, grid_sample: bool, opset: int = MIN_OPSET
) -> dict[Role, ModelProto]:
    """All graphs of torchvision's detector over a ReXNet, float32, as torch exports them.

    Inputs and outputs are those of the stages in `models/detector_stages.py`, by the names in
    `INPUTS` and `OUTPUTS`. Raises UsageError if masks are asked of a detector that has none.
    """
    heads = head_graphs(detector, masks, grid_sample, opset)
    return {"features": feature_graph(detector, opset), **heads}


def feature_graph(detector: nn.Module, opset: int = MIN_OPSET) -> ModelProto:
    """`FeatureStage`: any batch, and any height and width that are multiples of 32."""
    sizes = {
        0: Dim("batch"),
        2: SIZE_MULTIPLE * Dim("rows", min=1),
        3: SIZE_MULTIPLE * Dim("columns", min=1),
    }
    samples = (torch.zeros(2, 3, *_SAMPLE_SIZE),)  # torch.export specialises on a batch of 1
    return _graph(FeatureStage(detector), "features", samples, (sizes,), opset)


def head_graphs(
    detector: nn.Module, masks: bool, grid_sample: bool, opset: int = MIN_OPSET
) -> dict[Role, ModelProto]:
    """`BoxStage`, and `MaskStage` if masks are asked for: one image, any number of boxes.

    With `grid_sample` the pooling is GridSample and AveragePool, for builders without RoiAlign, and
    each level needs at least one box; RoiAlign takes none, too.
    """
    heads: dict[Role, nn.Module] = {"boxes": BoxStage(detector, grid_sample)}
    if masks:
        if getattr(detector.roi_heads, "mask_predictor", None) is None:
            raise UsageError("masks: got a detector without a mask head; export it without masks")
        heads["masks"] = MaskStage(detector, grid_sample)
    height, width = _SAMPLE_SIZE
    samples = (
        *(torch.zeros(1, FPN_CHANNELS, height // s, width // s) for s in POOLED_STRIDES),
        *(torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(level, 1) for level in LEVELS),
    )
    sizes = (
        *({2: Dim(f"height{level}"), 3: Dim(f"width{level}")} for level in LEVELS),
        *({0: Dim(f"boxes{level}")} for level in LEVELS),
    )
    return {role: _graph(stage, role, samples, sizes, opset) for role, stage in heads.items()}


def _graph(
    stage: nn.Module,
    role: Role,
    samples: tuple[torch.Tensor, ...],
    sizes: tuple[dict[int, Any], ...],
    opset: int,
) -> ModelProto:
    graph = export_module(stage.eval(), samples, sizes, INPUTS[role], OUTPUTS[role], opset)
    _name_sizes(graph)
    return graph


def _name_sizes(graph: ModelProto) -> None:
    """Plain names for the open sizes of outputs, which torch.export gives as formulas."""
    for value in graph.graph.output:
        dims = value.type.tensor_type.shape.dim
        counted = "anchors" if value.name in ("objectness", "deltas") else "boxes"
        names = {
            **({0: "batch"} if value.name in OUTPUTS["features"] else {0: counted}),
            1: counted,
            2: f"height{value.name[1:]}",
            3: f"width{value.name[1:]}",
        }
        for place, dim in enumerate(dims):
            if dim.HasField("dim_param"):
                dim.dim_param = names[place]
