"""The files to judge: what each is, what it was made from, and which backends run it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

from onnx import ModelProto, TensorProto

from rexdeploy.backends import (
    ENGINE_BACKENDS,
    ONNX_BACKENDS,
    backends_of,
    has_onnxruntime_cuda,
    open_backend,
)
from rexdeploy.backends.tensorrt_api import BACKENDS, RTX_MAGIC, is_plan
from rexdeploy.bundle.manifest import DEFAULT_BATCH, MAX_BATCH, Artifact, BatchRange, ModelSpec
from rexdeploy.bundle.metadata import preprocess_of
from rexdeploy.bundle.precision import PRECISIONS, TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import read_plain
from rexdeploy.graphs.emulate import sixteen_bit_types
from rexdeploy.graphs.products import Product, products
from rexdeploy.graphs.read import NotOnnx, graph_inputs, parse, read_with_external_data, type_name
from rexdeploy.graphs.wrapper import forms
from rexdeploy.parity.layer_types import prove
from rexdeploy.parity.quantized import is_quantized

if TYPE_CHECKING:
    from rexdeploy.backends.trt import TensorRTBackend

MAX_GRAPH_BATCH = 64  # of ONNX graphs, which run on the CPU; engines run at all their sizes
_NARROWEST_FIRST: tuple[Precision, ...] = ("bf16", "fp16")  # of what a graph is told to round to


@dataclass(frozen=True)
class Candidate:
    """A file to judge, and what it was made from."""

    file: str
    model: bytes
    kind: str
    batch: BatchRange | None
    parent: str  # a file's name, or the reference's
    backends: tuple[str, ...]
    spec: ModelSpec  # with the candidate's own input and output
    claimed: Artifact | None = None  # what its manifest says of it; None: a file from elsewhere
    is_ours: bool = True  # made by this tool: it rounds exactly where its parent is told to
    built_in: Precision | None = None  # the narrowest type of what cannot be asked for it

    @cached_property
    def graph(self) -> ModelProto:
        """The parsed graph, of kind "onnx"."""
        return parse(self.model, self.file)

    @cached_property
    def products(self) -> list[Product]:
        """The graph's convolutions and matrix products."""
        return products(self.graph)

    @cached_property
    def narrow_types(self) -> frozenset[int]:
        """The 16-bit types of the graph's tensors."""
        return sixteen_bit_types(self.graph)

    @cached_property
    def narrow(self) -> Precision | None:
        """The narrowest type that it computes in; None for float32."""
        if self.kind != "onnx" or self.built_in is not None:
            return self.built_in if self.built_in != "fp32" else None
        if is_quantized(self.graph):
            return "int8"
        return next(
            (name for name in _NARROWEST_FIRST if PRECISIONS[name].onnx in self.narrow_types), None
        )

    @property
    def is_equalized(self) -> bool:
        """Whether it has to be its parent to the bit, with blocks that give other values."""
        return self.claimed is not None and self.claimed.is_equalized

    @property
    def is_16_bit(self) -> bool:
        """Whether runtimes on a CPU compute it in float32, as they do 16 bits."""
        return self.narrow in _NARROWEST_FIRST

    @cached_property
    def proof(self) -> PrecisionProof | None:
        """A graph's own types, or what an engine's build reported."""
        if self.kind == "engine":
            return self.claimed.proof if self.claimed else None
        wanted = self.claimed.precision if self.claimed else None
        return prove(self.products, self.products, TYPE_NAMES[wanted] if wanted else None)

    @cached_property
    def fault(self) -> str | None:
        """Why it is not in the precision that its manifest claims, whatever its logits.

        What is rounded between float32 products is float32 by its products, and would be given the
        room of 16 bits.
        """
        if self.claimed is None or self.kind == "engine":
            return self.claimed.proof_fault if self.claimed else None
        given = self.graph.graph.output[0].type.tensor_type.elem_type
        if given != TensorProto.FLOAT:
            return f"it gives {type_name(given)}, expected FLOAT"
        allowed = self.claimed.precision or "fp16"  # what tune-precision mixes claims none
        others = sorted(map(type_name, self.narrow_types - {PRECISIONS[allowed].onnx}))
        if others:
            return f"it rounds to {', '.join(others)} inside"
        return None if self.proof is None or self.proof.holds else self.proof.summary


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
    artifacts = bundle.manifest.artifacts
    files = {artifact.sha256: artifact.file for artifact in artifacts if artifact.kind != "weights"}
    candidates: dict[str, Candidate] = {}
    for artifact in sorted(artifacts, key=lambda item: item.kind == "engine"):
        if artifact.kind not in ("onnx", "engine"):
            continue
        parent = files.get(artifact.parent_sha256 or "", reference_name)
        built_in = None  # a graph's types decide its limits, not what the manifest says of them
        if artifact.kind == "engine":
            # A mixed graph's engine has its graph's types, of which the narrowest counts.
            made_from = candidates.get(parent)
            built_in = artifact.precision or (made_from.narrow if made_from else None)
        candidate = candidates[artifact.file] = Candidate(
            artifact.file,
            bundle.read(artifact),
            artifact.kind,
            artifact.batch,
            parent,
            _backends_for(artifact, backends, require),
            bundle.manifest.model,
            artifact,
            built_in=built_in,
        )
        if artifact.kind == "onnx":
            _of_known_types(candidate, None)
    return list(candidates.values())


def _of_known_types(candidate: Candidate, told: Precision | None) -> Candidate:
    """The graph, with the type that a person has `told` where it has types without limits.

    Raises UsageError where nobody has.
    """
    unknown = sorted({item.precision for item in candidate.products} - set(TYPE_NAMES.values()))
    if unknown and told is None:
        raise UsageError(
            f"{candidate.file} computes in {', '.join(unknown)}, for which there are no limits; "
            f"expected {', '.join(TYPE_NAMES.values())}, or say with --precision (with "
            "--candidate) which one's limits are to hold"
        )
    return replace(candidate, built_in=told) if unknown else candidate


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
        backend = BACKENDS["rtx" if data[:4] == RTX_MAGIC else "tensorrt"]
        return Candidate(
            path.name,
            data,
            "engine",
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
        _fixed_batch(model, path),
        reference_name,
        tuple(asked if backends else dict.fromkeys(["onnxruntime", *asked])),
        replace(spec, input=takes, output=gives),
        is_ours=False,
    )
    return _of_known_types(candidate, told_precision)


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
        with closing(open_backend(backend, plan, spec)) as engine:
            return cast("TensorRTBackend", engine).batch
    except RexdeployError:
        return None


def _backends_for(
    artifact: Artifact, asked: Sequence[str], require: Sequence[str]
) -> tuple[str, ...]:
    """The backends to run a file on: those `asked` for, or else those that are worth trying.

    ONNX Runtime's CUDA is tried only where it is installed or required, OpenVINO only where it is
    required: a line about them in every machine's table would say nothing.
    """
    missing = {"openvino"} if has_onnxruntime_cuda() else {"openvino", "onnxruntime-cuda"}
    return tuple(
        name
        for name in backends_of(artifact)
        if (
            any(is_meant(wanted, name) for wanted in asked)
            if asked
            else name in require or name not in missing
        )
    )


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
