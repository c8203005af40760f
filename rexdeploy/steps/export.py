"""From a checkpoint to a bundle: the PyTorch network, and a checked ONNX graph of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast, get_args

import onnx
import safetensors.torch
import torch
from onnx import ModelProto

from rexdeploy.arrays import Array
from rexdeploy.backends import open_backend, run_batches
from rexdeploy.bundle.labels import IMAGENET_CLASSES, labels_for
from rexdeploy.bundle.manifest import (
    FORMAT,
    MANIFEST,
    MAX_CLASSES,
    Artifact,
    BatchRange,
    InputForm,
    Manifest,
    ModelSpec,
    OutputForm,
    Preprocess,
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
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.graphs.from_torch import MIN_OPSET, add_metadata, check_graph, export_graph
from rexdeploy.graphs.from_torch import simplify as simplified
from rexdeploy.graphs.wrapper import PIXELS, PROBABILITIES, wrap
from rexdeploy.images import decode
from rexdeploy.images.sets import varied, varied_pixels
from rexdeploy.models.align import AUTO_MULTIPLE
from rexdeploy.models.align import align as aligned
from rexdeploy.models.rexnet import CONFIGS, Family, RexNet, check_width, recalibrate_batch_norms
from rexdeploy.models.weights import read_weights
from rexdeploy.parity.compare import Compared, Comparison, Signal, comparable, compare
from rexdeploy.parity.limits import float32_limits, float32_noise
from rexdeploy.progress import Report, Result, silent
from rexdeploy.text import printable

ALIGNMENTS = ("auto", "off", "8", "16")
INPUT, OUTPUT = "input", "logits"
SEED = 0
FINAL = "final"  # the graph with uint8 input or probabilities around its core
_CHECK_BATCHES = (1, 2, 5)
_CHECK_IMAGES = 8
_CHECK_SEED = 2  # other images than `verify` judges by
_CALIBRATION_IMAGES = 16
DEFAULT_IMAGE_SIZE = 224
_MIN_IMAGE_SIZE, _MAX_IMAGE_SIZE = 32, 1024


@dataclass(frozen=True, repr=False)
class ExportResult(Result):
    """A new bundle, and how far its ONNX graph is from the network."""

    bundle: Bundle
    nodes_before: int  # of the graph as exported
    nodes: int
    comparisons: tuple[Comparison, ...]  # torch to exported, and exported to simplified
    trained_at: int | None = None  # pixels, where the checkpoint says it

    def __repr__(self) -> str:
        worst = max(comparison.error for comparison in self.comparisons)
        model = self.bundle.manifest.model.title
        return (
            f"<ExportResult {self.bundle.path}: {model}, {self.nodes} nodes; error {worst:.1e} of "
            "the signal: ok>"
        )

    def _document(self) -> dict[str, Any]:
        return {
            "bundle": printable(str(self.bundle.path)),
            "manifest": self.bundle.manifest,
            "comparisons": self.comparisons,
            "trained_at": self.trained_at,
        }


def export(
    *,
    width: float | None = None,
    lite: bool = False,
    weights: Path | str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    batch: int | str = "dynamic",
    opset: int = MIN_OPSET,
    simplify: bool = True,
    align: str = "auto",
    input: str = "float32",  # noqa: A002 - the command's name for it
    output: str = "logits",
    labels: Path | str | None = None,
    name: str | None = None,
    out: Path | str = DEFAULT_ROOT,
    command: str = "rexdeploy export",
    report: Report = silent,
) -> ExportResult:
    """Writes a bundle with the network's weights and a checked ONNX graph.

    `weights` is a checkpoint's file, "pretrained", or None for an untrained network; `width`,
    `lite` and `num_classes` must agree with it. `batch` is "dynamic" or one size. `align` pads
    channels: "auto", "off", "8" or "16". `input` is "float32" or "uint8", `output` "logits" or
    "probabilities", `labels` a file with a class name a line. Without `labels` and `image_size`
    they are those that `finetune` has noted in the checkpoint; else ImageNet's labels for 1000
    classes, and 224. The bundle is the folder `name` in `out`, and `command` is what its manifest
    says that made it.

    Raises UsageError for what cannot be used, BackendUnavailable where a library is missing, and
    VerificationFailed where the graph's logits are not the network's; then it has written nothing.

    Example: `rexdeploy.export(weights="rexnetv1_1.5.pth", labels="classes.txt")`
    """
    fixed = _fixed_batch(batch)
    if width is not None:
        check_width(width)
    _check_sizes(image_size, num_classes, opset)
    _check_words(align, input, output, name)
    out = Path(out)
    check_writable(out)
    report("loading the network")
    notes = None
    if weights is None:
        image_size = image_size or DEFAULT_IMAGE_SIZE
        model, family, width, origin = _untrained(lite, width, num_classes, image_size)
    else:
        checkpoint, origin = read_weights(lite, width, num_classes, weights)
        model, family, width = checkpoint.build(), checkpoint.family, checkpoint.width
        notes = checkpoint.notes
        image_size = image_size or (notes.image_size if notes else DEFAULT_IMAGE_SIZE)
        check_image_size(image_size)
    spec = ModelSpec(
        family=family,
        width=width,
        num_classes=model.config.num_classes,
        input_name=PIXELS if input == "uint8" else INPUT,
        output_name=PROBABILITIES if output == "probabilities" else OUTPUT,
        preprocess=Preprocess(height=image_size, width=image_size),
        weights=origin,
        input=cast(InputForm, input),  # _check_words has looked
        output=cast(OutputForm, output),
    )
    if name is None:
        name = f"{family}_{width:.5g}"
        name += "" if "." in name else ".0"
    path = out / name
    _check_replaceable(path, spec)
    if labels is None and notes is not None:
        names: list[str] | None = list(notes.labels)
    else:
        names = labels_for(labels, spec.num_classes)

    report(f"exporting {spec.title} to ONNX")
    multiple = _multiple(align)
    shaped = aligned(model, multiple) if multiple else model
    core_spec = replace(spec.core, input_name=INPUT, output_name=OUTPUT)
    exported = export_graph(shaped, core_spec, fixed, opset)
    check_graph(exported, core_spec, fixed, opset)
    graphs = {"exported": exported}
    if simplify:
        report("simplifying")
        graphs["simplified"] = simplified(exported)
        check_graph(graphs["simplified"], core_spec, fixed, opset)
    core = graphs["simplified" if simplify else "exported"]
    if spec != spec.core:
        graphs[FINAL] = wrap(core, spec)
        check_graph(graphs[FINAL], spec, fixed, opset)
    report("comparing logits")
    comparisons = _compare(model, graphs, spec, fixed)
    for comparison in comparisons:
        if comparison.failures:
            raise VerificationFailed(
                f"the edge {comparison.reference} -> {comparison.candidate} is broken: "
                f"{comparison.failures[0]}; nothing was written"
            )

    final = graphs.get(FINAL, core)
    saved = safetensors.torch.save(dict(model.state_dict()))
    if not origin.trained:
        spec = replace(spec, weights=replace(origin, sha256=sha256(saved)))
    files = {
        "weights.safetensors": saved,
        "fp32.onnx": add_metadata(final, spec, align=str(multiple or "off")).SerializeToString(
            deterministic=True
        ),
    }
    if names is not None:
        files["labels.txt"] = ("\n".join(names) + "\n").encode()
    report(f"writing {path}")
    batches = BatchRange(fixed, fixed, fixed) if fixed else None
    settings = {"opset": str(opset), "align": str(multiple or "off")}
    bundle = _write(path, spec, files, batches, settings, command)
    return ExportResult(
        bundle,
        len(exported.graph.node),
        len(final.graph.node),
        tuple(comparisons),
        notes.image_size if notes else None,
    )


def _fixed_batch(batch: int | str) -> int | None:
    """The one batch size of the graph; None: any."""
    if batch == "dynamic":
        return None
    if isinstance(batch, str):
        if not batch.isdecimal() or len(batch) > 9:
            raise UsageError(f"batch: got '{batch}', expected 'dynamic' or a number")
        batch = int(batch)
    if not 1 <= batch <= 1024:
        raise UsageError(f"batch: got {batch}, expected 'dynamic' or 1 to 1024")
    return batch


def check_image_size(image_size: int) -> None:
    """Raises UsageError for a size that no network here is made for."""
    if not _MIN_IMAGE_SIZE <= image_size <= _MAX_IMAGE_SIZE:
        raise UsageError(
            f"image size: got {image_size}, expected {_MIN_IMAGE_SIZE} to {_MAX_IMAGE_SIZE} pixels"
        )


def _check_sizes(image_size: int | None, num_classes: int | None, opset: int) -> None:
    if image_size is not None:
        check_image_size(image_size)
    if num_classes is not None and not 1 <= num_classes <= MAX_CLASSES:
        raise UsageError(f"number of classes: got {num_classes}, expected 1 to {MAX_CLASSES}")
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= opset <= newest:
        raise UsageError(
            f"opset: got {opset}, expected {MIN_OPSET} to {newest} "
            f"(torch {torch.__version__}'s exporter writes {MIN_OPSET} when asked for less)"
        )


def _check_words(align: str, takes: str, gives: str, name: str | None) -> None:
    if align not in ALIGNMENTS:
        raise UsageError(f"align: got '{align}', expected {', '.join(ALIGNMENTS)}")
    for what, got, forms in (
        ("input", takes, get_args(InputForm)),
        ("output", gives, get_args(OutputForm)),
    ):
        if got not in forms:
            raise UsageError(f"{what}: got '{got}', expected {' or '.join(forms)}")
    if name is not None:
        check_name(name)


def _untrained(
    lite: bool, width: float | None, num_classes: int | None, image_size: int
) -> tuple[RexNet, Family, float, WeightsOrigin]:
    family: Family = "rexnet_lite" if lite else "rexnet"
    width = 1.0 if width is None else width
    config = CONFIGS[family](width, num_classes or IMAGENET_CLASSES)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = RexNet(config)
    preprocess = Preprocess(height=image_size, width=image_size)
    calibration = varied(_CALIBRATION_IMAGES, preprocess, seed=SEED)
    recalibrate_batch_norms(model, torch.from_numpy(calibration))
    return model, family, width, WeightsOrigin(f"untrained (seed {SEED})", "", trained=False)


def _check_replaceable(path: Path, spec: ModelSpec) -> None:
    """Raises UsageError if an untrained network would replace a trained one."""
    if not (path / MANIFEST).exists():
        return
    current = Bundle.open(path).manifest
    if current.model.task != spec.task:
        raise UsageError(f"{path} holds a detector; give another --name")
    if current.model.weights.trained and not spec.weights.trained:
        raise UsageError(
            f"{path} holds trained weights ({current.model.weights.source}) and would be replaced "
            "by an untrained network; give --weights, or another --name"
        )


def _compare(
    model: RexNet, graphs: dict[str, ModelProto], spec: ModelSpec, batch: int | None
) -> list[Comparison]:
    """Each graph against torch and against the graph before it, at batch 1, 2 and 5."""
    pixels = varied_pixels(_CHECK_IMAGES, spec.preprocess, seed=_CHECK_SEED)
    pool = torch.from_numpy(decode.normalise(pixels, spec.preprocess))
    with torch.inference_mode():
        reference = model(pool).numpy()
        exact = copy.deepcopy(model).double()(pool.double()).numpy()
    sizes = (batch,) if batch else _CHECK_BATCHES
    comparisons = []
    before: tuple[str, Array] | None = None
    for name, graph in graphs.items():
        own = spec if name == FINAL else spec.core
        backend = open_backend("onnxruntime", graph.SerializeToString(), own)
        try:
            rows = run_batches(backend, decode.model_input(pixels, own), sizes)
        finally:
            backend.close()
        compared: Compared = "logits" if own.output == "logits" else "log-probabilities"
        signal = Signal.of(comparable(reference, "logits", compared))
        limits = float32_limits(float32_noise(reference, exact, signal, compared))
        edges = [("torch", reference[rows.images])] + ([before] if before else [])
        comparisons += [
            compare(
                comparable(expected, "logits", compared),
                comparable(rows.logits, own.output, compared),
                names=(reference_name, name),
                signal=signal,
                limits=limits,
            )
            for reference_name, expected in edges
        ]
        before = (name, rows.logits)
    return comparisons


def _multiple(align: str) -> int:
    """The multiple to pad channels to; 0 leaves the network as published."""
    if align == "auto":
        return AUTO_MULTIPLE
    return 0 if align == "off" else int(align)


def _write(
    path: Path,
    spec: ModelSpec,
    files: dict[str, bytes],
    batch: BatchRange | None,
    settings: dict[str, str],
    command: str,
) -> Bundle:
    versions = {
        package: metadata.version(package)
        for package in ("rexdeploy", "torch", "onnx", "onnxsim", "onnxruntime")
        if _installed(package)
    }
    weights_hash = sha256(files["weights.safetensors"])
    added = [
        Artifact("weights", "weights.safetensors", weights_hash, command=command),
        Artifact(
            "onnx",
            "fp32.onnx",
            sha256(files["fp32.onnx"]),
            parent_sha256=weights_hash,
            precision="fp32",
            batch=batch,
            built_with=versions | settings,
            command=command,
        ),
    ]
    if "labels.txt" in files:
        added.append(Artifact("labels", "labels.txt", sha256(files["labels.txt"]), command=command))

    def merge(current: Manifest | None) -> Manifest:
        # Exported again unchanged, what was built from it is still right, and is kept.
        names = {item.file for item in added}
        derived = [
            item
            for item in (current.artifacts if current else ())
            if item.parent_sha256 and item.file not in names
        ]
        return Manifest(FORMAT, path.name, spec, ()).with_artifacts(*added, *derived)

    return commit(path, merge, files)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
