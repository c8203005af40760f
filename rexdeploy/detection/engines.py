"""Engines of a detector's stages, and the graphs that they are built from.

TensorRT-RTX 1.7 has neither NonMaxSuppression nor NonZero, which stay on the host, and takes
RoIAlign only where there is a GPU: the heads' graphs pool by GridSample and AveragePool instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx import ModelProto

from rexdeploy.backends import tensorrt_api, tensorrt_build
from rexdeploy.backends.tensorrt_build import EngineSettings, Shapes
from rexdeploy.bundle.manifest import DETECTORS, Artifact, BatchRange, ModelSpec, Role
from rexdeploy.bundle.precision import TYPE_NAMES, Precision
from rexdeploy.bundle.store import Bundle, check_writable, sha256
from rexdeploy.detection.export import head_graphs, labelled
from rexdeploy.detection.preprocess import canvas_side
from rexdeploy.detection.reference import rebuilt
from rexdeploy.detection.runtime import MAPS, ROIS
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.from_torch import simplify
from rexdeploy.graphs.products import products
from rexdeploy.graphs.read import node_name, parse
from rexdeploy.models.detector import FPN_CHANNELS
from rexdeploy.models.detector_stages import POOLED_STRIDES
from rexdeploy.parity.layer_types import prove
from rexdeploy.progress import Report, Result, several, silent
from rexdeploy.text import printable

_LEAST = 32  # pixels of a canvas's side
_BOXES = (1, 256, 1000)  # that a level has: the RPN proposes 1000 in all
_MASKS = (1, 32, 100)


@dataclass(frozen=True, repr=False)
class DetectorEngines(Result):
    """The engines of all stages."""

    bundle: Bundle
    engines: tuple[Artifact, ...]

    def __repr__(self) -> str:
        return f"<DetectorEngines of {self.bundle.path}: {', '.join(e.file for e in self.engines)}>"

    def _document(self) -> dict[str, object]:
        return {"bundle": printable(str(self.bundle.path)), "engines": self.engines}


def build_detector(
    bundle: Bundle | Path | str | None = None,
    *,
    fp16: bool = False,
    target: str | Sequence[str] = (),
    workspace: int | None = None,
    command: str = "rexdeploy build-trt",
    report: Report = silent,
) -> DetectorEngines:
    """Builds a TensorRT-RTX engine of each stage into a detector's bundle, with its proof.

    `target` is a compute capability such as "sm89", or several, `workspace` bounds the scratch
    memory in MiB. With `fp16` the products are float16; coordinates of boxes and the pooling by
    them stay float32, since float16 knows no half pixel above 1024. Raises UsageError,
    BackendUnavailable without TensorRT-RTX or torch, and VerificationFailed where an engine's
    products are not in that precision; then it has written nothing.

    Example: `rexdeploy.build_detector("street", fp16=True, target="sm89").engines`
    """
    if workspace is not None and workspace < 1:
        raise UsageError(f"workspace: got {workspace}, expected 1 or more MiB")
    bundle = Bundle.find(bundle, tasks=DETECTORS)
    check_writable(bundle.path)
    spec, weights = bundle.manifest.model, bundle.manifest.find("weights")
    features = bundle.manifest.find_file("features.onnx")
    if weights is None or features is None:
        raise UsageError(f"{bundle.path} is no whole detector; run 'rexdeploy export' again")
    trt = tensorrt_api.load("rtx")
    known = tensorrt_api.target_names()
    unknown = [name for name in several(target) if name not in known]
    if unknown:
        raise UsageError(f"target: got {unknown[0]}, expected one of {', '.join(known)}")
    targets = tuple(sorted(set(several(target)), key=known.index))
    precision: Precision = "fp16" if fp16 else "fp32"
    report("exporting the heads for TensorRT")
    detector = rebuilt(bundle.read(weights), spec)
    heads = head_graphs(detector, spec.task == "segment", grid_sample=True)
    graphs: dict[Role, tuple[Artifact, ModelProto]] = {
        "features": (features, parse(bundle.read(features), features.file))
    }
    made: list[Artifact] = []
    files: dict[str, bytes] = {}

    def add(file: str, model: ModelProto, role: Role, kind: Precision, parent: str | None) -> None:
        files[file] = model.SerializeToString(deterministic=True)
        made.append(
            replace(
                features,
                file=file,
                sha256=sha256(files[file]),
                parent_sha256=parent,
                precision=kind,
                command=command,
                role=role,
            )
        )

    for role, graph in heads.items():
        model = labelled(simplify(graph), spec, role)
        add(f"{role}.tensorrt.onnx", model, role, "fp32", weights.sha256)
        graphs[role] = made[-1], model
    engines = []
    for role, (parent, model) in graphs.items():
        source = parent
        if precision == "fp16":
            report(f"converting {parent.file}")
            model = to_precision(model, precision, keep=_coordinates(model))
            add(f"{role}.fp16.onnx", model, role, "fp16", parent.sha256)
            source = made[-1]
        settings = EngineSettings(
            "rtx", BatchRange(1, 1, 1), targets, workspace, _shapes(role, spec)
        )
        report(f"building {role} in {precision}")
        built = tensorrt_build.build(model.SerializeToString(), settings)
        proof = prove(built.layers, products(model), TYPE_NAMES[precision])
        if not proof.holds:
            raise VerificationFailed(
                f"the engine of stage '{role}' is not {precision}: {proof.summary}; nothing was "
                "written"
            )
        built_for = "-".join(targets) or "sm80plus"
        engine = Artifact(
            "engine",
            f"{role}.{precision}.rtx-{built_for}.engine",
            sha256(built.plan),
            parent_sha256=source.sha256,
            precision=precision,
            batch=settings.batch,
            built_with={
                "flavor": "rtx",
                "version": trt.__version__,
                "targets": " ".join(targets) or "sm80 and newer",
            },
            command=command,
            proof=proof,
            role=role,
        )
        files[engine.file] = built.plan
        engines.append(engine)
    return DetectorEngines(bundle.update(*made, *engines, files=files), tuple(engines))


def _coordinates(model: ModelProto) -> set[str]:
    """The nodes that stay float32: what makes the grids, the sampling and what is before it."""
    makers = {name: node for node in model.graph.node for name in node.output}
    waiting = [node for node in model.graph.node if node.op_type == "GridSample"]
    kept: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node_name(node) not in kept:
            kept.add(node_name(node))
            waiting += [makers[name] for name in node.input if name in makers]
    return kept


def _shapes(role: Role, spec: ModelSpec) -> dict[str, Shapes]:
    """The least, usual and largest shape of each input of a stage."""
    short, long = spec.preprocess.height, spec.preprocess.width
    largest, usual = canvas_side(long), (canvas_side(short), canvas_side(short * 4 // 3))
    canvases = ((_LEAST, _LEAST), usual, (largest, largest))
    if role == "features":
        low, mid, high = ((1, 3, *canvas) for canvas in canvases)
        return {"images": (low, mid, high)}
    shapes: dict[str, Shapes] = {}
    for name, stride in zip(MAPS, POOLED_STRIDES, strict=True):
        low, mid, high = ((1, FPN_CHANNELS, h // stride, w // stride) for h, w in canvases)
        shapes[name] = (low, mid, high)
    counts = _BOXES if role == "boxes" else _MASKS
    for name in ROIS:
        few, some, most = ((count, 4) for count in counts)
        shapes[name] = (few, some, most)
    return shapes
