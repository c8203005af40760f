"""What an ONNX graph or an engine is: header, types, place in a bundle, what can run it here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rexdeploy import machine
from rexdeploy.backends import has_onnxruntime_cuda, tensorrt_api
from rexdeploy.backends.tensorrt_api import PlanHeader
from rexdeploy.bundle.manifest import Artifact
from rexdeploy.bundle.precision import TYPE_NAMES, PrecisionProof
from rexdeploy.bundle.store import Bundle, is_bundle, sha256
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError, VerificationFailed
from rexdeploy.files import read_plain, sha256_of
from rexdeploy.parity.layer_types import prove
from rexdeploy.progress import Report, Result, silent
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from onnx import ModelProto


_AN_IMAGE = (3, 224, 224)  # where a graph leaves open what it takes


@dataclass(frozen=True)
class GraphFacts:
    """What an ONNX graph says of itself."""

    opset: int
    nodes: int
    inputs: tuple[str, ...]  # such as "input float [batch, 3, 224, 224]"
    outputs: tuple[str, ...]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Place:
    """A file's place in a bundle whose manifest has its very hash."""

    bundle: str
    model: str
    chain: tuple[str, ...]  # files, from the weights to this one
    artifact: Artifact


@dataclass(frozen=True)
class Runner:
    """A backend, and whether this machine has what it takes to run the file; nothing was run."""

    backend: str
    ready: bool
    reason: str  # why not, or what its library says of it
    conflict: bool = False  # it never will as things are: build again, or change the version


@dataclass(frozen=True, repr=False)
class Inspection(Result):
    """What is known of a file without running it."""

    file: str
    kind: str
    size_bytes: int
    sha256: str
    header: PlanHeader | None  # of an engine
    graph: GraphFacts | None  # of an ONNX graph
    place: Place | None
    proof: PrecisionProof | None
    proof_of: str  # whose proof it is, or why there is none: then it begins with "skipped"
    runners: tuple[Runner, ...]

    def __repr__(self) -> str:
        verdict = self.proof.summary if self.proof else self.proof_of
        return one_line(f"<Inspection of {self.file}: {self.kind}; {verdict}>", 240)


def inspect(file: Path | str, *, report: Report = silent) -> Inspection:
    """Reads an ONNX graph or an engine; needs no GPU, and for an engine no TensorRT.

    Raises UsageError for any other file, and for one of a bundle that is not what its manifest
    describes; VerificationFailed for an engine whose proof is of another rexdeploy's rules.

    Example: `rexdeploy.inspect("artifacts/rexnet_1.5/fp16.onnx").proof`
    """
    path = Path(file)
    data = _read(path)
    place = _place(path, data)
    if tensorrt_api.is_plan(data):
        return _engine(path, data, place)
    return _graph(path, place, report)


def _read(path: Path) -> bytes:
    try:
        data = read_plain(path)
    except IsADirectoryError:
        raise UsageError(
            f"{path} is a folder, expected a file: an ONNX graph or an engine"
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    if not data:
        raise UsageError(f"{path} is empty, expected an ONNX graph or an engine; copy it again")
    return data


def _place(path: Path, data: bytes) -> Place | None:
    if not is_bundle(path.parent):
        return None
    bundle = Bundle.open(path.parent)
    artifacts = bundle.manifest.artifacts
    artifact = bundle.manifest.find_file(path.name)
    if artifact is None:
        return None
    if sha256(data) != artifact.sha256:
        bundle.read(artifact)  # says so
    chain = [artifact]
    by_hash = {item.sha256: item for item in artifacts}
    while (parent := by_hash.get(chain[0].parent_sha256 or "")) and parent not in chain:
        chain.insert(0, parent)
    files = tuple(item.file for item in chain)
    return Place(str(bundle.path), bundle.manifest.model.title, files, artifact)


def _engine(path: Path, data: bytes, place: Place | None) -> Inspection:
    try:
        header = tensorrt_api.read_header(data)
    except UsageError as error:
        raise UsageError(f"{path} is {error}") from None
    proof = place.artifact.proof if place else None
    if place is not None and proof is not None and place.artifact.proof_fault is not None:
        raise VerificationFailed(
            f"{path}: {place.artifact.proof_fault}; "
            f"build it again: {place.artifact.command or 'rexdeploy build-trt'}"
        )
    if proof is not None:
        proof_of = "what its build reported of it, by the manifest; the hash agrees"
    elif place is not None:
        proof_of = (
            "skipped: the manifest holds no proof of an older rexdeploy; "
            f"build it again: {place.artifact.command or 'rexdeploy build-trt'}"
        )
    else:
        proof_of = (
            "skipped: an engine tells its layers to the GPU it runs on only, and no bundle's "
            "manifest holds what its build reported"
        )
    kind = f"{tensorrt_api.TITLES[header.flavor]} engine"
    runners = (_engine_runner(data, header, place),)
    return Inspection(
        str(path), kind, len(data), sha256(data), header, None, place, proof, proof_of, runners
    )


def _graph(path: Path, place: Place | None, report: Report) -> Inspection:
    from rexdeploy.graphs.products import products
    from rexdeploy.graphs.read import NotOnnx, describe, parse, read_with_external_data

    try:
        data = read_with_external_data(path)
        model = parse(data, str(path))
    except NotOnnx as error:
        raise UsageError(f"{error}, and no TensorRT engine either") from None
    report("counting its arithmetic")
    found = products(model)
    precision = place.artifact.precision if place else None
    inputs, outputs = describe(model)
    return Inspection(
        file=str(path),
        kind="ONNX graph",
        size_bytes=path.stat().st_size,
        sha256=sha256_of(path),
        header=None,
        graph=GraphFacts(
            opset=next((e.version for e in model.opset_import if e.domain in ("", "ai.onnx")), 0),
            nodes=len(model.graph.node),
            inputs=inputs,
            outputs=outputs,
            metadata={entry.key: entry.value for entry in model.metadata_props},
        ),
        place=place,
        proof=prove(found, found, TYPE_NAMES[precision] if precision else None),
        proof_of="the types of its convolutions and products",
        runners=tuple(_graph_runners(data, model, report)),
    )


def _graph_runners(data: bytes, model: ModelProto, report: Report) -> list[Runner]:
    """Whether ONNX Runtime takes the graph; CUDA only where its onnxruntime is installed."""
    from rexdeploy.backends.onnxrt import load_session
    from rexdeploy.graphs.bounds import check_memory

    names = ["onnxruntime", *(["onnxruntime-cuda"] if has_onnxruntime_cuda() else [])]
    try:
        check_memory(model, 1, _AN_IMAGE, "the graph")
    except UsageError as error:
        return [Runner(name, False, str(error)) for name in names]
    runners = []
    for name in names:
        report(f"loading it into {name}")
        try:
            load_session(data, cuda=name == "onnxruntime-cuda")
            runners.append(Runner(name, True, ""))
        except RexdeployError as error:
            runners.append(Runner(name, False, str(error)))
    return runners


def _engine_runner(plan: bytes, header: PlanHeader, place: Place | None) -> Runner:
    """Whether the version, the GPU and the bindings that the engine needs are here."""
    title = tensorrt_api.TITLES[header.flavor]
    name = tensorrt_api.BACKENDS[header.flavor]
    again = "build it again: rexdeploy build-trt"
    try:
        installed = tensorrt_api.load(header.flavor).__version__
    except BackendUnavailable as error:
        return Runner(name, False, str(error))
    if header.version is not None and header.version != installed:
        reason = f"{title} {header.version} built it, and this machine has {installed}; {again}"
        # Full TensorRT runs engines of some neighbouring versions, and decides by itself.
        return Runner(name, False, reason, conflict=header.flavor == "rtx")
    found = machine.detect()
    if found is None:
        return Runner(name, False, "no NVIDIA GPU on this machine")
    targets = header.targets
    if header.flavor == "tensorrt" and place is not None:
        targets = tuple(place.artifact.targets.split())
    if targets and found.target not in targets:
        reason = f"built for {', '.join(targets)}, and this machine has {found.target}; {again}"
        return Runner(name, False, reason)
    if header.flavor == "rtx":
        from rexdeploy.backends.trt_load import validity

        try:
            return Runner(name, True, f"; TensorRT-RTX calls it {validity(plan)}")
        except RexdeployError as error:
            return Runner(name, False, str(error))
    return Runner(name, True, "")
