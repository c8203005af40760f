"""From an ONNX graph to a TensorRT engine whose precision is proven."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from rexdeploy import machine
from rexdeploy.backends import tensorrt_api, tensorrt_build
from rexdeploy.backends.tensorrt_api import FLAVORS, Flavor
from rexdeploy.backends.tensorrt_build import BUILD_REVISION, EngineSettings
from rexdeploy.bundle.manifest import DEFAULT_BATCH, INT8_TRT, Artifact, BatchRange
from rexdeploy.bundle.precision import PRECISIONS, TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.bundle.store import Bundle, commit, sha256
from rexdeploy.errors import BackendUnavailable, UsageError, VerificationFailed
from rexdeploy.graphs.engine_graph import Form, Source, engine_form
from rexdeploy.graphs.products import products
from rexdeploy.graphs.read import parse
from rexdeploy.graphs.wrapper import interface_nodes
from rexdeploy.parity.layer_types import PROOF_REVISION, prove
from rexdeploy.progress import Report, Result, several, silent
from rexdeploy.text import printable

MAX_WORKSPACE_MIB = 1 << 20


@dataclass(frozen=True, repr=False)
class BuildResult(Result):
    """An engine in its bundle."""

    bundle: Bundle
    engine: Artifact
    reused: bool  # answered from the bundle, nothing was built

    def __repr__(self) -> str:
        proof = self.engine.proof
        how = "unchanged" if self.reused else "built"
        summary = f"; {proof.summary}" if proof else ""
        return f"<BuildResult {self.bundle.path / self.engine.file}: {how}{summary}>"

    def _document(self) -> dict[str, Any]:
        path = printable(str(self.bundle.path))
        return {"bundle": path, "engine": self.engine, "reused": self.reused}


def build_trt(
    bundle: Source | Bundle | Path | str | None = None,
    *,
    fp16: bool = False,
    bf16: bool = False,
    int8: bool = False,
    batch: BatchRange | str | None = None,
    flavor: str = "auto",
    target: str | Sequence[str] = (),
    workspace: int | None = None,
    force: bool = False,
    command: str = "rexdeploy build-trt",
    report: Report = silent,
) -> BuildResult:
    """Builds an engine into a bundle, or finds the one that these settings would give.

    `bundle` is one, its folder, its name in artifacts/, None (the latest one there), or what
    `import_onnx` gives. `batch` are the sizes to accept, such as "1:8:64", which it is unless the
    graph's is fixed. `flavor` is "tensorrt", "rtx" or "auto", `target` one compute capability of
    an RTX engine, such as "sm89", or several, and `workspace` bounds its scratch memory, in MiB.
    `force` builds even if nothing has changed. `command` is what the manifest says that made it.

    It first makes the graph that TensorRT gets: of our own aligned graphs the form with plain
    shortcuts (`to_plain_adds`), with `fp16` or `bf16` the typed one; `int8` takes the graph that
    'quantize' has made for TensorRT (`target="trt"`) and accepted. Raises UsageError,
    BackendUnavailable where TensorRT or its GPU is missing, and VerificationFailed if the built
    engine does not compute in the precision that was asked for; then it has written nothing.

    Example: `rexdeploy.build_trt("rexnet_1.5", fp16=True, flavor="rtx", target="sm89")`
    """
    asked = [name for name, is_on in (("fp16", fp16), ("bf16", bf16), ("int8", int8)) if is_on]
    if len(asked) > 1:
        raise UsageError(f"got {' and '.join(f'--{name}' for name in asked)}, expected one of them")
    source = bundle if isinstance(bundle, Source) else Source(Bundle.find(bundle))
    bundle, targets = source.bundle, several(target)
    flavor = _choose_flavor(flavor, targets, workspace)
    trt = tensorrt_api.load(flavor)
    root_graph = bundle.manifest.graph
    if root_graph is None:
        raise UsageError(f"{bundle.path} holds no ONNX graph; run 'rexdeploy export' first")
    sizes = batch_range(batch, root_graph.batch)
    wanted: Precision | None = "fp16" if fp16 else "bf16" if bf16 else None
    if int8:
        form = _int8_form(source)
    else:
        form = engine_form(source, root_graph, wanted, command, report, force)
    graph_artifact, data = form.artifact, form.data
    files = {**source.new_files, **form.files}
    graph = parse(data, graph_artifact.file)
    settings = EngineSettings(
        flavor,
        sizes,
        tuple(sorted(set(targets), key=tensorrt_api.target_names().index)),
        workspace,
    )
    built_with = _built_with(settings, trt.__version__)
    engine = _same_engine(source, graph_artifact, settings, built_with)
    if engine is not None and not force:
        if form.made:  # the engine was whole, its graph was not
            bundle = bundle.update(*form.made, files=files)
        return BuildResult(bundle, engine, reused=True)

    precision = graph_artifact.precision or ("int8-mixed" if int8 else "mixed")
    report(f"building an engine in {precision} with {trt.__name__} {trt.__version__}")
    built = tensorrt_build.build(data, settings)
    report("proving its precision")
    # A mixed graph (of tune-precision) is to be computed in each product's own type.
    kind = TYPE_NAMES[graph_artifact.precision] if graph_artifact.precision else None
    is_ours = root_graph.multiple > 0 and not int8  # INT8 engines requantise in Float
    free = float32_nodes(graph, graph_artifact.precision) if is_ours else None
    proof = prove(built.layers, products(graph), kind, free)
    _check_precision(proof)

    built_for = built_with["targets"].replace(" and newer", "plus").replace(" ", "-")
    engine = Artifact(
        "engine",
        f"{precision}.{flavor}-{built_for}.engine",
        sha256(built.plan),
        parent_sha256=graph_artifact.sha256,
        precision=graph_artifact.precision,
        batch=settings.batch,
        built_with=built_with,
        command=command,
        proof=proof,
    )
    report(f"writing {bundle.path / engine.file}")
    files[engine.file] = built.plan
    if source.is_new:
        manifest = bundle.manifest.with_artifacts(*form.made, engine)
        return BuildResult(commit(bundle.path, lambda _: manifest, files), engine, reused=False)
    return BuildResult(bundle.update(*form.made, engine, files=files), engine, reused=False)


def _int8_form(source: Source) -> Form:
    """The INT8 graph that quantize has made for TensorRT; raises UsageError where there is none."""
    artifact = source.bundle.manifest.find_file(INT8_TRT)
    if artifact is None:
        raise UsageError(
            f"{source.bundle.path} holds no {INT8_TRT}, which --int8 is built from; run 'rexdeploy "
            "quantize --target trt --calib DIR' first"
        )
    if artifact.refused is not None:
        raise UsageError(
            f"{INT8_TRT} is not accepted ({artifact.refused}), and no engine is built from it; "
            "quantize it again with other images or another bar"
        )
    return Form(artifact, source.read(artifact), (), {})


def _choose_flavor(asked: str, targets: Sequence[str], workspace: int | None) -> Flavor:
    if workspace is not None and not 1 <= workspace <= MAX_WORKSPACE_MIB:
        raise UsageError(f"workspace: got {workspace}, expected 1 to {MAX_WORKSPACE_MIB} MiB")
    if targets and asked == "tensorrt":
        raise UsageError(
            "--target is for --flavor rtx: full TensorRT builds for the GPU it runs on"
        )
    unknown = [name for name in targets if name not in tensorrt_api.target_names()]
    if unknown:
        raise UsageError(
            f"target: got '{unknown[0]}', expected {', '.join(tensorrt_api.target_names())}"
        )
    for flavor in FLAVORS:
        if asked == flavor:
            return flavor
    if asked != "auto":
        raise UsageError(f"flavor: got '{asked}', expected auto, {', '.join(FLAVORS)}")
    # Full TensorRT builds only on the GPU it will run on; RTX builds anywhere.
    if not targets and machine.detect() is not None and _can_load("tensorrt"):
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


def batch_range(asked: BatchRange | str | None, fixed: BatchRange | None) -> BatchRange:
    """An engine's batch range; a graph with a `fixed` batch leaves no choice."""
    if isinstance(asked, str):
        asked = BatchRange.parse(asked)
    if fixed is not None and asked not in (None, fixed):
        raise UsageError(
            f"batch range: got {asked}, but the ONNX graph has a fixed batch of {fixed.opt}; "
            "export it with --batch dynamic"
        )
    return fixed or asked or DEFAULT_BATCH


def _built_with(settings: EngineSettings, version: str) -> dict[str, str]:
    """Everything that decides an engine, beside its graph and batch range."""
    described = {
        "flavor": settings.flavor,
        "version": version,
        "revision": BUILD_REVISION,
        "proof": PROOF_REVISION,
        "targets": " ".join(settings.targets) or "sm80 and newer",
        "workspace_mib": str(settings.workspace_mib or "default"),
    }
    if settings.flavor == "tensorrt":  # such an engine runs only on the kind of GPU that built it
        found = machine.detect()
        if found is None:
            raise BackendUnavailable(
                "no NVIDIA GPU found, and full TensorRT builds for the GPU it runs on; "
                "use --flavor rtx"
            )
        described |= {"targets": found.target, "gpu": found.name, "driver": found.driver}
    return described


def _same_engine(
    source: Source, graph: Artifact, settings: EngineSettings, built_with: dict[str, str]
) -> Artifact | None:
    """The bundle's engine of this very graph, range, flavour, version and target, if whole."""
    for artifact in source.bundle.manifest.artifacts:
        if (
            artifact.kind == "engine"
            and artifact.parent_sha256 == graph.sha256
            and artifact.batch == settings.batch
            and artifact.proof_fault is None  # an engine of an older rexdeploy has no proof
            and built_with.items() <= artifact.built_with.items()
        ):
            try:
                source.read(artifact)
            except UsageError:  # damaged: build it again
                return None
            return artifact
    return None


def float32_nodes(graph: ModelProto, precision: Precision | None) -> frozenset[str]:
    """The nodes of a graph of ours that may be float32 in an engine of another precision.

    The interface is so by design, and a cast at an end of the core reads or writes float32. Of a
    bfloat16 graph, TensorRT-RTX (1.7) computes average pools in float32, between casts of its own.
    """
    kinds = {"Cast", *(("AveragePool", "GlobalAveragePool") if precision == "bf16" else ())}
    named = frozenset(node.name for node in graph.graph.node if node.op_type in kinds)
    return interface_nodes(graph) | named


def _check_precision(proof: PrecisionProof) -> None:
    """Raises VerificationFailed unless the engine computes in the types that were asked for."""
    others = [kind for kind, count in proof.layers.items() if count and kind != proof.wanted]
    if proof.holds and not (proof.wanted == "Float" and others):
        return
    titles = {kind.rtx: kind.tensorrt for kind in PRECISIONS.values()}
    asked = titles.get(proof.wanted or "", "in its graph's types")
    if not others and not proof.differing and proof.not_found:
        raise VerificationFailed(
            f"the engine cannot be proven to be {asked}: of the graph's convolutions and matrix "
            f"products, {len(proof.not_found)} are in no layer that its build reported "
            f"(first: {', '.join(proof.not_found[:3])}); nothing was written"
        )
    odd = f"layers in another type: {', '.join(proof.differing[:3]) or 'none'}"
    if proof.not_found:
        odd += f"; not found in the engine: {', '.join(proof.not_found[:3])}"
    raise VerificationFailed(
        f"the engine is not {asked}: {proof.summary}; {odd}; nothing was written"
    )
