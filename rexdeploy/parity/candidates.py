"""The files to judge: what each is, what it was made from, and which backends run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from onnx import ModelProto, TensorProto

from rexdeploy.backends import (
    ENGINE_BACKENDS,
    ONNX_BACKENDS,
    engine_backend,
    has_onnxruntime_cuda,
    open_backend,
)
from rexdeploy.backends.tensorrt_api import RTX_MAGIC, is_plan
from rexdeploy.bundle.manifest import DEFAULT_BATCH, MAX_BATCH, Artifact, BatchRange, ModelSpec
from rexdeploy.bundle.metadata import preprocess_of
from rexdeploy.bundle.precision import PRECISIONS, TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import read_plain
from rexdeploy.graphs.emulate import sixteen_bit_types
from rexdeploy.graphs.products import precision_of, products
from rexdeploy.graphs.read import NotOnnx, graph_inputs, parse, read_with_external_data, type_name
from rexdeploy.graphs.wrapper import forms
from rexdeploy.parity.layer_types import prove

if TYPE_CHECKING:
    from rexdeploy.backends.trt import TensorRTBackend

MAX_GRAPH_BATCH = 64  # of ONNX graphs, which run on the CPU; engines run at all their sizes
_NARROWEST_FIRST: tuple[Precision, ...] = ("bf16", "fp16")


@dataclass(frozen=True)
class Candidate:
    """A file to judge, and what it was made from."""

    file: str
    model: bytes
    kind: str
    precision: Precision | None  # None: mixed, or an engine that does not tell
    batch: BatchRange | None
    parent: str  # a file's name, or the reference's
    backends: tuple[str, ...]
    spec: ModelSpec  # with the candidate's own input and output
    proof: PrecisionProof | None = None  # a graph's own types, or what an engine's build reported
    proof_fault: str | None = None  # why a file of the bundle is not what its manifest claims
    is_ours: bool = True  # made by this tool: it rounds exactly where its parent is told to
    built_in: Precision | None = None  # the narrowest type of what cannot be asked for it

    @cached_property
    def graph(self) -> ModelProto:
        """The parsed graph, of kind "onnx"."""
        return parse(self.model, self.file)

    @cached_property
    def narrow(self) -> Precision | None:
        """The narrowest 16-bit type that it computes in; None for float32."""
        if self.kind != "onnx" or self.built_in is not None:
            return self.built_in if self.built_in != "fp32" else None
        types = sixteen_bit_types(self.graph)
        return next((name for name in _NARROWEST_FIRST if PRECISIONS[name].onnx in types), None)


@dataclass(frozen=True)
class Skipped:
    """A comparison that could not be made here; it has not passed."""

    reference: str
    candidate: str
    backend: str
    reason: str
    by_choice: bool = False  # it was not asked for, or no machine could run it so


def sizes(candidate: Candidate, otherwise: BatchRange) -> list[int]:
    """The batch sizes to run a candidate at, ascending; `otherwise` where it takes any."""
    wanted = (candidate.batch or otherwise).samples()
    if candidate.kind == "onnx" and candidate.batch is None:
        # On a CPU: what an engine takes at once may not fit this machine's memory.
        wanted = [size for size in wanted if size <= MAX_GRAPH_BATCH] or [MAX_GRAPH_BATCH]
    return wanted


def is_meant(asked: str, backend: str) -> bool:
    """Whether a backend is the one asked for; "tensorrt" means an engine of either flavour."""
    return backend == asked or (asked == "tensorrt" and backend in ENGINE_BACKENDS)


_ENGINE_SUFFIXES = {".engine", ".plan", ".trt"}


def own_candidates(
    bundle: Bundle, reference_name: str, backends: Sequence[str], require: Sequence[str]
) -> list[Candidate]:
    """The bundle's graphs and engines, every parent before its children.

    Each with those of the `backends` (empty: all) that run its kind; those to `require` are tried
    also where they are not installed.
    """
    files = {artifact.sha256: artifact.file for artifact in bundle.manifest.artifacts}
    candidates: dict[str, Candidate] = {}
    for kind in ("onnx", "engine"):
        for artifact in bundle.manifest.artifacts:
            if artifact.kind != kind:
                continue
            parent = files.get(artifact.parent_sha256 or "", reference_name)
            made_from = candidates.get(parent)
            candidate = Candidate(
                artifact.file,
                bundle.read(artifact),
                kind,
                artifact.precision,
                artifact.batch,
                reference_name if parent.endswith(".safetensors") else parent,
                _backends_of(artifact, backends, require),
                bundle.manifest.model,
                artifact.proof,
                # A mixed graph's engine has its graph's types, of which the narrowest counts.
                built_in=artifact.precision or (made_from.narrow if made_from else None),
                proof_fault=artifact.proof_fault if kind == "engine" else None,
            )
            if kind == "onnx":  # its types decide its limits, not what the manifest says of them
                candidate = replace(
                    _by_its_types(candidate, artifact.precision, None),
                    proof_fault=_types_fault(candidate.graph, artifact.precision),
                )
            candidates[artifact.file] = candidate
    return list(candidates.values())


def _by_its_types(
    candidate: Candidate, wanted: Precision | None, told: Precision | None
) -> Candidate:
    """A graph with the precision and the proof that its own types give.

    Raises UsageError for types without a limit of their own, unless a person has told one.
    """
    found = products(candidate.graph)
    unknown = sorted({item.precision for item in found} - set(TYPE_NAMES.values()))
    if unknown and told is None:
        raise UsageError(
            f"{candidate.file} computes in {', '.join(unknown)}, for which there are no limits; "
            f"expected {', '.join(TYPE_NAMES.values())}, or say with --precision (with "
            "--candidate) which one's limits are to hold"
        )
    return replace(
        candidate,
        precision=precision_of(candidate.graph),
        proof=prove(found, found, TYPE_NAMES[wanted] if wanted else None),
        built_in=told if unknown else None,
    )


def foreign_candidate(
    path: Path,
    spec: ModelSpec,
    reference_name: str,
    backends: Sequence[str],
    require: Sequence[str],
    told_precision: Precision | None,
) -> Candidate:
    """A candidate from elsewhere: what it is, it must tell itself.

    `told_precision`: a person's word where it does not. Raises UsageError for a file that is none.
    """
    try:
        data = read_plain(path)
    except OSError as error:
        raise UsageError(f"candidate {path} cannot be read ({error.strerror})") from None
    if not data:
        raise UsageError(f"candidate {path} is empty; copy it again")
    if path.suffix in _ENGINE_SUFFIXES and not is_plan(data):
        raise UsageError(
            f"candidate {path} begins as no engine of TensorRT or TensorRT-RTX does; copy or "
            "build it again, or give a graph a name that ends in .onnx"
        )
    if is_plan(data):
        backend = "tensorrt-rtx" if data[:4] == RTX_MAGIC else "tensorrt"
        return Candidate(
            path.name,
            data,
            "engine",
            told_precision,
            _profile(data, backend, spec),
            reference_name,
            (backend,),
            spec,
            is_ours=False,
            built_in=told_precision,
        )
    try:
        data = read_with_external_data(path)
        model = parse(data, f"candidate {path}")
    except OSError as error:
        raise UsageError(f"candidate {path} cannot be read ({error.strerror})") from None
    except NotOnnx as error:
        raise UsageError(f"{error}, and no TensorRT engine either") from None
    told = {entry.key: entry.value for entry in model.metadata_props}
    family, width = told.get("rexdeploy.family"), told.get("rexdeploy.width")
    if family and spec.width is not None and (family, width) != (spec.family, f"{spec.width:g}"):
        raise UsageError(
            f"candidate {path} is a {family} {width}, expected {spec.family} {spec.width:g}; "
            "name its own bundle"
        )
    if preprocess_of(told, f"candidate {path}") not in (None, spec.preprocess):
        raise UsageError(
            f"candidate {path} was made for other preprocessing than {spec.title}'s; "
            "name its own bundle"
        )
    takes, gives = forms(model)
    asked = [name for name in ONNX_BACKENDS if name in (*backends, *require)]
    candidate = Candidate(
        path.name,
        data,
        "onnx",
        None,
        _fixed_batch(model, path),
        reference_name,
        tuple(asked if backends else dict.fromkeys(["onnxruntime", *asked])),
        replace(spec, input=takes, output=gives),
        is_ours=False,
    )
    return _by_its_types(candidate, None, told_precision)


def _fixed_batch(model: ModelProto, path: Path) -> BatchRange | None:
    """The one batch size that a graph from elsewhere takes; None where it takes any."""
    inputs = graph_inputs(model)
    dimensions = inputs[0].type.tensor_type.shape.dim if inputs else []
    size = dimensions[0].dim_value if dimensions else 0
    if not 0 <= size <= MAX_BATCH:
        raise UsageError(
            f"candidate {path} takes batches of exactly {size}, expected 1 to {MAX_BATCH}; "
            "export it with a dynamic batch"
        )
    return BatchRange(size, size, size) if size > 0 else None


def _profile(plan: bytes, backend: str, spec: ModelSpec) -> BatchRange | None:
    """The batch sizes that an engine itself takes; None where it cannot be loaded.

    The judge, which runs it next, says why it cannot be.
    """
    try:
        engine = open_backend(backend, plan, spec)
    except RexdeployError:
        return None
    try:
        return cast("TensorRTBackend", engine).batch
    finally:
        engine.close()


def _backends_of(
    artifact: Artifact, backends: Sequence[str], require: Sequence[str]
) -> tuple[str, ...]:
    """The backends to run an artifact on.

    ONNX Runtime's CUDA is tried only where it is installed or asked for, OpenVINO only where it is
    asked for: a line about them in every machine's table would say nothing.
    """
    if artifact.kind == "engine":
        possible: tuple[str, ...] = (engine_backend(artifact),)
        wanted = possible
    else:
        possible = ONNX_BACKENDS
        is_there = {"onnxruntime": True, "onnxruntime-cuda": has_onnxruntime_cuda()}
        wanted = tuple(name for name in possible if name in require or is_there.get(name, False))
    if backends:
        return tuple(name for name in possible if any(is_meant(asked, name) for asked in backends))
    return wanted


def _types_fault(graph: ModelProto, claimed: Precision | None) -> str | None:
    """Why a graph's tensors are not of the types that its manifest claims.

    What is rounded between float32 products is float32 by its products, and would be given the room
    of 16 bits.
    """
    given = graph.graph.output[0].type.tensor_type.elem_type
    if given != TensorProto.FLOAT:
        return f"it gives {type_name(given)}, expected FLOAT"
    allowed = claimed or "fp16"  # what tune-precision mixes claims none
    others = sixteen_bit_types(graph) - {PRECISIONS[allowed].onnx}
    names = sorted(map(type_name, others))
    return f"it rounds to {', '.join(names)} inside" if names else None


def range_of(candidates: Sequence[Candidate]) -> BatchRange:
    """The range to run graphs of any batch size at: what all their engines take.

    And from one row to eight at least: what engines take says nothing of other servers of a graph.
    """
    ranges = [candidate.batch for candidate in candidates if candidate.batch]
    if not ranges:
        return DEFAULT_BATCH
    widest = max(ranges, key=lambda item: item.max)
    most = max(widest.max, DEFAULT_BATCH.opt)
    return BatchRange(1, widest.opt, most)
