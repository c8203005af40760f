"""From a checkpoint to a bundle: the PyTorch network, and a checked ONNX graph of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from importlib import metadata, resources
from pathlib import Path
from typing import cast, get_args

import onnx
import safetensors.torch
import torch
from onnx import ModelProto

from rexdeploy.arrays import Array
from rexdeploy.backends import open_backend
from rexdeploy.bundle.labels import parse_labels
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
from rexdeploy.bundle.store import DEFAULT_ROOT, Bundle, check_writable, commit, sha256
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.files import MAX_TEXT_BYTES, read_plain, sha256_of
from rexdeploy.graphs.from_torch import MIN_OPSET, add_metadata, check_graph, export_graph, simplify
from rexdeploy.graphs.wrapper import PIXELS, PROBABILITIES, wrap
from rexdeploy.images import decode
from rexdeploy.images.sets import varied, varied_pixels
from rexdeploy.models.align import AUTO_MULTIPLE, align
from rexdeploy.models.checkpoints import Checkpoint, load_checkpoint
from rexdeploy.models.rexnet import CONFIGS, Family, RexNet, recalibrate_batch_norms
from rexdeploy.models.zoo import fetch_pretrained
from rexdeploy.parity.batches import run_batches
from rexdeploy.parity.compare import Compared, Comparison, Signal, comparable, compare
from rexdeploy.parity.limits import float32_limits, float32_noise
from rexdeploy.progress import Report, silent
from rexdeploy.text import plain, printable

ALIGNMENTS = ("auto", "off", "8", "16")
INPUT, OUTPUT = "input", "logits"
SEED = 0
FINAL = "final"  # the graph with uint8 input or probabilities around its core
_CHECK_BATCHES = (1, 2, 5)
_CHECK_IMAGES = 8
_CHECK_SEED = 2  # other images than `verify` judges by
_CALIBRATION_IMAGES = 16
_MIN_IMAGE_SIZE, _MAX_IMAGE_SIZE = 32, 1024
_IMAGENET_CLASSES = 1000


@dataclass(frozen=True)
class ExportOptions:
    """What to export; None and False leave the choice to the checkpoint, or to the defaults."""

    width: float | None = None
    lite: bool = False
    weights: str | None = None  # a file, "pretrained", or None for an untrained network
    num_classes: int | None = None
    image_size: int = 224
    batch: int | None = None  # None: dynamic
    opset: int = MIN_OPSET
    simplify: bool = True
    align: str = "auto"  # "off", or the multiple that channels are padded to
    input: str = "float32"  # or "uint8"
    output: str = "logits"  # or "probabilities"
    labels: Path | None = None
    name: str | None = None
    out: Path = DEFAULT_ROOT
    command: str = "rexdeploy export"


@dataclass(frozen=True)
class ExportResult:
    """A new bundle, and how far its ONNX graph is from the network."""

    bundle: Bundle
    nodes_before: int  # of the graph as exported
    nodes: int
    comparisons: tuple[Comparison, ...]  # torch to exported, and exported to simplified


def export(options: ExportOptions, report: Report = silent) -> ExportResult:
    """Writes a bundle; raises UsageError, BackendUnavailable or VerificationFailed and writes none.

    `report` is told each step as it begins.
    """
    _check_options(options)
    check_writable(options.out)
    report("loading the network")
    model, spec = _reference(options)
    name = options.name or f"{spec.family}_{spec.width or 0:.5g}"
    if "." not in name and options.name is None:
        name += ".0"
    path = options.out / name
    _check_replaceable(path, spec)
    labels = _labels(options, spec.num_classes)

    report(f"exporting {spec.title} to ONNX")
    multiple = _multiple(options.align)
    shaped = align(model, multiple) if multiple else model
    core_spec = replace(spec.core, input_name=INPUT, output_name=OUTPUT)
    exported = export_graph(shaped, core_spec, options.batch, options.opset)
    check_graph(exported, core_spec, options.batch, options.opset)
    graphs = {"exported": exported}
    if options.simplify:
        report("simplifying")
        graphs["simplified"] = simplify(exported)
        check_graph(graphs["simplified"], core_spec, options.batch, options.opset)
    core = graphs["simplified" if options.simplify else "exported"]
    if spec != spec.core:
        graphs[FINAL] = wrap(core, spec)
        check_graph(graphs[FINAL], spec, options.batch, options.opset)
    report("comparing logits")
    comparisons = _compare(model, graphs, spec, options.batch)
    for comparison in comparisons:
        if comparison.failures:
            raise VerificationFailed(
                f"the edge {comparison.reference} -> {comparison.candidate} is broken: "
                f"{comparison.failures[0]}; nothing was written"
            )

    final = graphs.get(FINAL, core)
    weights = safetensors.torch.save(dict(model.state_dict()))
    if not spec.weights.trained:
        spec = replace(spec, weights=replace(spec.weights, sha256=sha256(weights)))
    files = {
        "weights.safetensors": weights,
        "fp32.onnx": add_metadata(final, spec, align=str(multiple or "off")).SerializeToString(
            deterministic=True
        ),
    }
    if labels is not None:
        files["labels.txt"] = ("\n".join(labels) + "\n").encode()
    report(f"writing {path}")
    bundle = _write(path, name, spec, files, multiple, options)
    return ExportResult(bundle, len(exported.graph.node), len(final.graph.node), tuple(comparisons))


def _check_options(options: ExportOptions) -> None:
    if options.align not in ALIGNMENTS:
        raise UsageError(f"align: got '{options.align}', expected {', '.join(ALIGNMENTS)}")
    if not _MIN_IMAGE_SIZE <= options.image_size <= _MAX_IMAGE_SIZE:
        raise UsageError(
            f"image size: got {options.image_size}, expected {_MIN_IMAGE_SIZE} to "
            f"{_MAX_IMAGE_SIZE} pixels"
        )
    if options.num_classes is not None and not 1 <= options.num_classes <= MAX_CLASSES:
        raise UsageError(
            f"number of classes: got {options.num_classes}, expected 1 to {MAX_CLASSES}"
        )
    if options.batch is not None and not 1 <= options.batch <= 1024:
        raise UsageError(f"batch: got {options.batch}, expected 'dynamic' or 1 to 1024")
    for name, got, forms in (
        ("input", options.input, get_args(InputForm)),
        ("output", options.output, get_args(OutputForm)),
    ):
        if got not in forms:
            raise UsageError(f"{name}: got '{got}', expected {' or '.join(forms)}")
    newest = onnx.defs.onnx_opset_version()
    if not MIN_OPSET <= options.opset <= newest:
        raise UsageError(
            f"opset: got {options.opset}, expected {MIN_OPSET} to {newest} "
            f"(torch {torch.__version__}'s exporter writes {MIN_OPSET} when asked for less)"
        )
    if options.name is not None and (
        options.name in ("", ".", "..")
        or "/" in options.name
        or options.name.startswith(".")
        or plain(options.name) != options.name
    ):
        raise UsageError(f"name: got '{options.name}', expected a plain folder name")


def _reference(options: ExportOptions) -> tuple[RexNet, ModelSpec]:
    """The network in evaluation mode, and its spec."""
    preprocess = Preprocess(height=options.image_size, width=options.image_size)
    if options.weights is None:
        family: Family = "rexnet_lite" if options.lite else "rexnet"
        width = 1.0 if options.width is None else options.width
        num_classes = options.num_classes or _IMAGENET_CLASSES
        model = _untrained(family, width, num_classes, preprocess)
        origin = WeightsOrigin(f"untrained (seed {SEED})", "", trained=False)
    else:
        checkpoint, origin = _trained(options, options.weights)
        family, width = checkpoint.family, checkpoint.width
        num_classes = checkpoint.num_classes
        model = checkpoint.build()
    return model, ModelSpec(
        family=family,
        width=width,
        num_classes=num_classes,
        input_name=PIXELS if options.input == "uint8" else INPUT,
        output_name=PROBABILITIES if options.output == "probabilities" else OUTPUT,
        preprocess=preprocess,
        weights=origin,
        input=cast(InputForm, options.input),  # _check_options has looked
        output=cast(OutputForm, options.output),
    )


def _untrained(family: Family, width: float, num_classes: int, preprocess: Preprocess) -> RexNet:
    config = CONFIGS[family](width, num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = RexNet(config)
    calibration = varied(_CALIBRATION_IMAGES, preprocess, seed=SEED)
    recalibrate_batch_norms(model, torch.from_numpy(calibration))
    return model


def _trained(options: ExportOptions, weights: str) -> tuple[Checkpoint, WeightsOrigin]:
    if weights == "pretrained":
        family: Family = "rexnet_lite" if options.lite else "rexnet"
        path, source = fetch_pretrained(family, 1.0 if options.width is None else options.width)
    else:
        path, source = Path(weights), printable(Path(weights).name)
    checkpoint = load_checkpoint(path)
    _check_agrees(options, checkpoint, path)
    if options.width is not None:  # several widths of lite have one shape: keep the one asked for
        checkpoint = replace(checkpoint, width=options.width)
    return checkpoint, WeightsOrigin(source, sha256_of(path), trained=True)


def _check_agrees(options: ExportOptions, checkpoint: Checkpoint, path: Path) -> None:
    """Raises UsageError where an option contradicts what the checkpoint's weights say."""
    if options.lite and checkpoint.family != "rexnet_lite":
        raise UsageError(
            f"--lite contradicts {path}, which holds a {checkpoint.family} "
            f"{checkpoint.width:g}; leave --lite out"
        )
    config = CONFIGS[checkpoint.family]
    if options.width is not None and config(options.width, checkpoint.num_classes) != config(
        checkpoint.width, checkpoint.num_classes
    ):
        raise UsageError(
            f"--width {options.width:g} contradicts {path}, which holds a {checkpoint.family} "
            f"{checkpoint.width:g}; leave --width out"
        )
    if options.num_classes not in (None, checkpoint.num_classes):
        raise UsageError(
            f"--num-classes {options.num_classes} contradicts {path}, which has "
            f"{checkpoint.num_classes} classes; leave --num-classes out"
        )


def _check_replaceable(path: Path, spec: ModelSpec) -> None:
    """Raises UsageError if an untrained network would replace a trained one."""
    if not (path / MANIFEST).exists():
        return
    current = Bundle.open(path).manifest
    if current.model.weights.trained and not spec.weights.trained:
        raise UsageError(
            f"{path} holds trained weights ({current.model.weights.source}) and would be replaced "
            "by an untrained network; give --weights, or another --name"
        )


def _labels(options: ExportOptions, num_classes: int) -> list[str] | None:
    """One label a class: from the file given, or ImageNet-1k's for a network of 1000 classes."""
    if options.labels is None:
        if num_classes != _IMAGENET_CLASSES:
            return None
        return resources.files("rexdeploy").joinpath("data/imagenet1k.txt").read_text().splitlines()
    try:
        data = read_plain(options.labels, MAX_TEXT_BYTES)
    except OSError as error:
        raise UsageError(f"labels {options.labels} cannot be read ({error.strerror})") from None
    labels = parse_labels(data, f"labels {options.labels}")
    if len(labels) != num_classes:
        raise UsageError(
            f"labels {options.labels}: got {len(labels)} lines, expected one for each of the "
            f"{num_classes} classes"
        )
    return labels


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
    name: str,
    spec: ModelSpec,
    files: dict[str, bytes],
    multiple: int,
    options: ExportOptions,
) -> Bundle:
    versions = {
        package: metadata.version(package)
        for package in ("rexdeploy", "torch", "onnx", "onnxsim", "onnxruntime")
        if _installed(package)
    }
    weights_hash = sha256(files["weights.safetensors"])
    batch = BatchRange(options.batch, options.batch, options.batch) if options.batch else None
    added = [
        Artifact("weights", "weights.safetensors", weights_hash, command=options.command),
        Artifact(
            "onnx",
            "fp32.onnx",
            sha256(files["fp32.onnx"]),
            parent_sha256=weights_hash,
            precision="fp32",
            batch=batch,
            built_with=versions | {"opset": str(options.opset), "align": str(multiple or "off")},
            command=options.command,
        ),
    ]
    if "labels.txt" in files:
        added.append(
            Artifact("labels", "labels.txt", sha256(files["labels.txt"]), command=options.command)
        )

    def merge(current: Manifest | None) -> Manifest:
        # Exported again unchanged, what was built from it is still right, and is kept.
        names = {item.file for item in added}
        derived = [
            item
            for item in (current.artifacts if current else ())
            if item.parent_sha256 and item.file not in names
        ]
        return Manifest(FORMAT, name, spec, ()).with_artifacts(*added, *derived)

    return commit(path, merge, files)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True
