"""From an ONNX graph to a TensorRT engine whose precision is proven."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import ModelProto

from rexdeploy import gpu, tensorrt_api
from rexdeploy.bundle import DEFAULT_ROOT, Bundle, check_writable, commit, sha256
from rexdeploy.errors import BackendUnavailable, UsageError, VerificationFailed
from rexdeploy.manifest import (
    DEFAULT_BATCH,
    FORMAT,
    Artifact,
    BatchRange,
    Manifest,
    ModelSpec,
    Precision,
    Preprocess,
    WeightsOrigin,
)
from rexdeploy.precision import ARITHMETIC_OPS, precision_of, to_fp16
from rexdeploy.progress import Report, silent
from rexdeploy.tensorrt_api import FLAVORS, EngineSettings, Flavor, PrecisionProof

MAX_BATCH = 4096


@dataclass(frozen=True)
class BuildOptions:
    """How to build an engine."""

    fp16: bool = False
    batch: BatchRange | None = None  # None: 1:8:64, or what a fixed-batch graph has
    flavor: str = "auto"
    targets: tuple[str, ...] = ()
    workspace_mib: int | None = None
    force: bool = False
    command: str = "rexdeploy build-trt"


@dataclass(frozen=True)
class BuildResult:
    """An engine in its bundle."""

    bundle: Bundle
    engine: Artifact
    reused: bool  # answered from the bundle, nothing was built


def build(bundle: Bundle, options: BuildOptions, report: Report = silent) -> BuildResult:
    """Builds an engine into the bundle, or finds the one that these settings would give.

    With `fp16` it first makes the typed float16 graph. Raises VerificationFailed, and writes
    nothing, if the built engine does not compute in the precision that was asked for.
    """
    flavor = _choose_flavor(options)
    trt = tensorrt_api.load(flavor)
    fp32 = bundle.manifest.find("onnx", "fp32") or bundle.manifest.find("onnx")
    if fp32 is None:
        raise UsageError(f"{bundle.path} holds no ONNX graph; run 'rexdeploy export' first")
    graph_artifact, graph, files = _graph(bundle, fp32, options.fp16, report)
    settings = EngineSettings(
        flavor, _batch(options.batch, graph_artifact.batch), options.targets, options.workspace_mib
    )
    found_gpu = gpu.detect()
    built_with = _built_with(settings, trt.__version__, found_gpu)
    target = _target_label(settings, found_gpu)
    file = f"{graph_artifact.precision or 'mixed'}.{flavor}-{target}.engine"
    engine = _same_engine(bundle, graph_artifact, settings, built_with)
    if engine is not None and not options.force:
        bundle.read(engine)  # an answer from the bundle must be a whole one
        return BuildResult(bundle, engine, reused=True)

    report(f"building a {graph_artifact.precision} engine with {trt.__name__} {trt.__version__}")
    onnx_bytes = files.get(graph_artifact.file) or bundle.read(graph_artifact)
    built = tensorrt_api.build(onnx_bytes, settings)
    report("proving its precision")
    proof = tensorrt_api.prove(built.layers, _arithmetic_nodes(graph))
    _check_precision(proof, graph_artifact.precision)

    engine = Artifact(
        "engine",
        file,
        sha256(built.plan),
        parent_sha256=graph_artifact.sha256,
        precision=graph_artifact.precision,
        batch=settings.batch,
        built_with=built_with
        | {
            "layers": str(proof.layers),
            "half_layers": str(proof.half_layers),
            "half_share": f"{proof.half_share:.4f}",
        },
        command=options.command,
    )
    added = [graph_artifact, engine] if graph_artifact.file in files else [engine]
    report(f"writing {bundle.path / file}")
    updated = bundle.update(*added, files={**files, file: built.plan})
    return BuildResult(updated, engine, reused=False)


def import_onnx(path: Path, root: Path = DEFAULT_ROOT, command: str = "") -> Bundle:
    """A bundle around somebody's own ONNX classifier; its graph becomes the reference.

    The preprocessing is taken to be ImageNet's at the graph's image size. Raises UsageError unless
    the graph has one float32 image input `[N, 3, H, W]` and one output `[N, classes]`.
    """
    check_writable(root)
    try:
        data = path.read_bytes()
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
        model = onnx.shape_inference.infer_shapes(model)
    except OSError as error:
        raise UsageError(f"ONNX graph {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # protobuf's DecodeError, onnx's ValidationError, and more
        reason = (str(error).strip().splitlines() or ["not a protobuf"])[0]
        raise UsageError(f"{path} is not a valid ONNX model ({reason})") from None
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    shapes = [_shape(value) for value in [*inputs, *model.graph.output]]
    if (
        len(inputs) != 1
        or len(shapes) != 2
        or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT
        or [len(shape) for shape in shapes] != [4, 2]
        or shapes[0][1] != 3
        or not all(shapes[0][2:] + shapes[1][1:])
    ):
        raise UsageError(
            f"{path} has inputs and outputs {shapes} (0 is dynamic), expected one float32 input "
            "[N, 3, height, width] and one output [N, classes]"
        )
    digest = sha256(data)
    spec = ModelSpec(
        family="onnx",
        width=None,
        num_classes=shapes[1][1],
        input_name=inputs[0].name,
        output_name=model.graph.output[0].name,
        preprocess=Preprocess(height=shapes[0][2], width=shapes[0][3]),
        weights=WeightsOrigin(path.name, digest, trained=True),
    )
    fixed = shapes[0][0]
    artifact = Artifact(
        "onnx",
        "model.onnx",
        digest,
        precision=precision_of(model),
        batch=BatchRange(fixed, fixed, fixed) if fixed else None,
        command=command,
    )

    def merge(current: Manifest | None) -> Manifest:
        if current and current.model.family != "onnx":
            raise UsageError(
                f"{root / path.stem} holds another model ({current.model.title}); "
                "rename the ONNX file, or choose another folder with --out"
            )
        derived = [item for item in current.artifacts if item.parent_sha256] if current else []
        return Manifest(FORMAT, path.stem, spec, tuple(derived)).with_artifacts(artifact)

    return commit(root / path.stem, merge, {"model.onnx": data})


def _choose_flavor(options: BuildOptions) -> Flavor:
    if options.targets and options.flavor == "tensorrt":
        raise UsageError(
            "--target is for --flavor rtx: full TensorRT builds for the GPU it runs on"
        )
    unknown = [name for name in options.targets if name not in tensorrt_api.target_names()]
    if unknown:
        raise UsageError(
            f"target: got '{unknown[0]}', expected {', '.join(tensorrt_api.target_names())}"
        )
    for flavor in FLAVORS:
        if options.flavor == flavor:
            return flavor
    if options.flavor != "auto":
        raise UsageError(f"flavor: got '{options.flavor}', expected auto, {', '.join(FLAVORS)}")
    # Full TensorRT builds only on the GPU it will run on; RTX builds anywhere.
    if not options.targets and gpu.detect() is not None and _can_load("tensorrt"):
        return "tensorrt"
    if _can_load("rtx"):
        return "rtx"
    raise BackendUnavailable(
        "neither TensorRT-RTX nor (with a GPU) TensorRT can be loaded: "
        "pip install 'rexdeploy[rtx]'; 'rexdeploy doctor' says more"
    )


def _can_load(flavor: Flavor) -> bool:
    try:
        tensorrt_api.load(flavor)
    except BackendUnavailable:
        return False
    return True


def _graph(
    bundle: Bundle, fp32: Artifact, fp16: bool, report: Report
) -> tuple[Artifact, ModelProto, dict[str, bytes]]:
    """The graph to build from, and its bytes by file name if it is new to the bundle."""
    if not fp16 or fp32.precision == "fp16":
        return fp32, onnx.load_from_string(bundle.read(fp32)), {}
    existing = bundle.manifest.find("onnx", "fp16")
    if existing is not None and existing.parent_sha256 == fp32.sha256:
        return existing, onnx.load_from_string(bundle.read(existing)), {}
    report("making the float16 graph")
    model = to_fp16(onnx.load_from_string(bundle.read(fp32)))
    data = model.SerializeToString(deterministic=True)
    artifact = Artifact(
        "onnx",
        "fp16.onnx",
        sha256(data),
        parent_sha256=fp32.sha256,
        precision="fp16",
        batch=fp32.batch,
        built_with={"onnx": onnx.__version__},
        command="rexdeploy build-trt --fp16",
    )
    return artifact, model, {artifact.file: data}


def _batch(asked: BatchRange | None, fixed: BatchRange | None) -> BatchRange:
    """The engine's batch range; a graph with a fixed batch leaves no choice."""
    if fixed is None:
        batch = asked or DEFAULT_BATCH
    elif asked in (None, fixed):
        batch = fixed
    else:
        raise UsageError(
            f"batch range: got {asked}, but the ONNX graph has a fixed batch of {fixed.opt}; "
            "export it with --batch dynamic"
        )
    if batch.max > MAX_BATCH:
        raise UsageError(f"batch range: got {batch}, expected at most {MAX_BATCH}")
    return batch


def _built_with(
    settings: EngineSettings, version: str, found_gpu: gpu.Gpu | None
) -> dict[str, str]:
    """Everything that decides an engine, beside its graph and batch range."""
    described = {
        "flavor": settings.flavor,
        "version": version,
        "targets": " ".join(settings.targets) or "sm80 and newer",
        "workspace_mib": str(settings.workspace_mib or "default"),
    }
    if settings.flavor == "tensorrt":  # such an engine runs only on the kind of GPU that built it
        described["targets"] = found_gpu.target if found_gpu else "unknown"
        described["gpu"] = found_gpu.name if found_gpu else "unknown"
        described["driver"] = found_gpu.driver if found_gpu else "unknown"
    return described


def _target_label(settings: EngineSettings, found_gpu: gpu.Gpu | None) -> str:
    if settings.flavor == "tensorrt":
        return found_gpu.target if found_gpu else "unknown"
    return "-".join(settings.targets) or "sm80plus"


def _same_engine(
    bundle: Bundle, graph: Artifact, settings: EngineSettings, built_with: dict[str, str]
) -> Artifact | None:
    """The bundle's engine of this very graph, range, flavour, version and target, if any."""
    for artifact in bundle.manifest.artifacts:
        if (
            artifact.kind == "engine"
            and artifact.parent_sha256 == graph.sha256
            and artifact.batch == settings.batch
            and built_with.items() <= artifact.built_with.items()
        ):
            return artifact
    return None


def _arithmetic_nodes(graph: ModelProto) -> set[str]:
    """Their names; TensorRT's parser calls a nameless node after its first output."""
    return {
        node.name or f"node_of_{node.output[0]}"
        for node in graph.graph.node
        if node.op_type in ARITHMETIC_OPS
    }


def _check_precision(proof: PrecisionProof, precision: Precision | None) -> None:
    """Raises VerificationFailed unless the engine computes in the graph's precision."""
    share = f"{proof.half_layers} of {proof.layers} layers in Half"
    if precision == "fp16" and not proof.is_fp16:
        slow = ", ".join(proof.float_arithmetic[:3]) or "none named"
        raise VerificationFailed(
            f"the engine is not FP16: {share} ({proof.half_share:.0%}), convolutions in Float: "
            f"{slow}; nothing was written"
        )
    if precision == "fp32" and proof.half_layers:
        raise VerificationFailed(f"the engine is not float32: {share}; nothing was written")


def _shape(value: onnx.ValueInfoProto) -> list[int]:
    """Dimensions, 0 for a dynamic one."""
    return [dim.dim_value for dim in value.type.tensor_type.shape.dim]
