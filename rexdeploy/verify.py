"""Proves that everything in a bundle computes the reference network's logits, edge by edge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from rexdeploy import images
from rexdeploy.backends import (
    ENGINE_BACKENDS,
    ONNX_BACKENDS,
    engine_backend,
    has_onnxruntime_cuda,
    open_backend,
)
from rexdeploy.blocks import literal
from rexdeploy.bundle import Bundle, sha256
from rexdeploy.compare import (
    Array,
    Compared,
    Comparison,
    Signal,
    comparable,
    compare,
)
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.images import Images
from rexdeploy.interface import forms
from rexdeploy.localize import Localization, localize
from rexdeploy.manifest import (
    DEFAULT_BATCH,
    TYPE_NAMES,
    Artifact,
    BatchRange,
    InputForm,
    ModelSpec,
    Precision,
    Preprocess,
    to_json,
)
from rexdeploy.parity import LIMITS, Rows, run_batches
from rexdeploy.precision import emulate_bf16, parse, precision_of, products
from rexdeploy.progress import Report, silent
from rexdeploy.proof import PrecisionProof, prove
from rexdeploy.tensorrt_api import RTX_MAGIC
from rexdeploy.walk import GraphWalk, TorchWalk, Walk

Float32 = npt.NDArray[np.float32]

REFERENCE = "torch"
MIN_SAMPLES, MAX_SAMPLES = 2, 4096
MAX_GRAPH_BATCH = 64  # of ONNX graphs, which run on the CPU; engines run at all their sizes

_ENGINE_SUFFIXES = {".engine", ".plan", ".trt"}


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare, over which images."""

    images: Path | None = None  # None: seeded synthetic images
    samples: int = 16
    candidate: Path | None = None  # judge this file instead of the bundle's own
    backends: tuple[str, ...] = ()  # empty: every one that a file's kind allows
    require: tuple[str, ...] = ()  # backends whose absence is a failure
    localize: bool = False  # compare every graph with its parent block by block, too


@dataclass(frozen=True)
class Skipped:
    """A comparison that could not be made here; it has not passed."""

    reference: str
    candidate: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Verification:
    """All comparisons of one run, in the order of the chain."""

    model: str
    files: dict[str, str]  # SHA-256 by name of every file that was judged
    compared: Compared
    images: str
    batches: tuple[int, ...]
    signal: float  # of the reference, in logits
    proofs: dict[str, PrecisionProof]  # by file: a graph's types, or what a build reported
    edges: tuple[Comparison, ...]  # each file against what it was made from
    totals: tuple[Comparison, ...]  # each file against the reference, where that is another
    skipped: tuple[Skipped, ...]
    failures: tuple[str, ...]  # why the whole does not pass; empty if it does
    localizations: tuple[Localization, ...] = ()  # block by block, if asked for; no verdict
    not_localized: tuple[str, ...] = ()  # the files that could not be, and why

    @property
    def passed(self) -> bool:
        return not self.failures


@dataclass(frozen=True)
class _Candidate:
    """A file to judge, and what it was made from."""

    file: str
    model: bytes
    kind: str
    precision: Precision | None
    batch: BatchRange | None
    parent: str  # a file's name, or REFERENCE
    backends: tuple[str, ...]
    spec: ModelSpec  # with the candidate's own input and output
    proof: PrecisionProof | None = None  # a graph's own types, or what an engine's build reported


def verify(bundle: Bundle, options: VerifyOptions, report: Report = silent) -> Verification:
    """Compares every file of the bundle with its parent and with the reference.

    Raises UsageError where nothing can be judged: unusable files, or a reference whose logits do
    not vary over the images.
    """
    _check_options(options)
    spec = bundle.manifest.model
    _check_preprocess(bundle)
    pool, described = images.pool(options.images, options.samples, spec.preprocess)
    report("running the reference")
    images_of_core = images.normalise(pool, spec.preprocess)
    inputs: dict[InputForm, Images] = {"uint8": pool, "float32": images_of_core}
    reference_name, reference = _reference(bundle, images_of_core)
    candidates = (
        [_foreign(options.candidate, spec, options, reference_name)]
        if options.candidate
        else _own(bundle, options, reference_name)
    )
    ends_in_softmax = any(item.spec.output == "probabilities" for item in candidates)
    compared: Compared = "log-probabilities" if ends_in_softmax else "logits"
    judge = _Judge(inputs, compared, reference_name, reference, _range_of(candidates))
    for candidate in candidates:
        for backend in candidate.backends:
            report(f"running {candidate.file} ({backend})")
            judge.run(candidate, backend)
    localizations, not_localized = (
        _localize(bundle, candidates, images_of_core, reference_name, report)
        if options.localize
        else ((), ())
    )
    return Verification(
        model=spec.title,
        files={candidate.file: sha256(candidate.model) for candidate in candidates},
        compared=compared,
        images=described,
        batches=tuple(sorted(judge.batches)),
        signal=judge.signal.size,
        proofs={item.file: item.proof for item in candidates if item.proof},
        edges=tuple(judge.edges),
        totals=tuple(judge.totals),
        skipped=tuple(judge.skipped),
        failures=(*judge.failures(options.require), *_unproven(candidates)),
        localizations=localizations,
        not_localized=not_localized,
    )


def store(bundle: Bundle, verification: Verification, command: str = "rexdeploy verify") -> None:
    """Writes a verification of the bundle's own files to its verify.json.

    Raises RexdeployError where the bundle cannot be written, or was changed meanwhile.
    """
    data = to_json(verification)
    graph = bundle.manifest.find("onnx")
    artifact = Artifact(
        "report",
        "verify.json",
        sha256(data),
        parent_sha256=graph.sha256 if graph else None,
        command=command,
    )
    bundle.update(artifact, files={artifact.file: data})


class _Judge:
    """Runs candidates one after the other, parents first, and keeps what came out."""

    def __init__(
        self,
        inputs: Mapping[InputForm, Images],
        compared: Compared,
        reference_name: str,
        reference: Float32,
        default_range: BatchRange,
    ) -> None:
        self.edges: list[Comparison] = []
        self.totals: list[Comparison] = []
        self.skipped: list[Skipped] = []
        self.batches: set[int] = set()
        self._inputs, self._compared = inputs, compared
        self._reference_name, self._default_range = reference_name, default_range
        expected = comparable(reference, "logits", compared)
        self.signal = Signal.of(expected)
        self._logits: dict[str, Array] = {reference_name: expected}  # by file, one row an image
        self._backends: set[str] = set()  # that ran something
        self._crashed: list[str] = []  # broken edges without a comparison

    def run(self, candidate: _Candidate, name: str) -> None:
        """Compares a candidate's logits with its parent's and with the reference's."""
        label, model = f"{candidate.file} ({name})", candidate.model
        if name == "openvino" and candidate.precision != "fp32":
            reason = "OpenVINO computes in float32 here, which says nothing of a 16-bit graph"
            self.skipped.append(Skipped(candidate.parent, label, name, reason))
            return
        if candidate.precision == "bf16" and name == "onnxruntime":
            # It has no bfloat16 arithmetic on a CPU (1.32), only casts.
            label = f"{candidate.file} ({name}, bfloat16 emulated)"
            model = emulate_bf16(parse(model, candidate.file)).SerializeToString()
        elif candidate.precision != "fp32" and name == "onnxruntime":
            model = literal(parse(model, candidate.file)).SerializeToString()
        sizes = (candidate.batch or self._default_range).samples()
        if candidate.kind == "onnx" and candidate.batch is None:
            # On a CPU: what an engine takes at once may not fit this machine's memory.
            sizes = [size for size in sizes if size <= MAX_GRAPH_BATCH] or [MAX_GRAPH_BATCH]
        try:
            backend = open_backend(name, model, candidate.spec)
        except BackendUnavailable as error:
            self.skipped.append(Skipped(candidate.parent, label, name, str(error)))
            return
        except UsageError as error:
            raise UsageError(f"{candidate.file}: {error}") from None
        try:
            rows = run_batches(backend, self._inputs[candidate.spec.input], sizes)
        except RexdeployError as error:
            self._crashed.append(f"broken edge {candidate.parent} -> {label}: {error}")
            return
        finally:
            backend.close()
        self.batches.update(sizes)
        self._backends.add(name)
        outputs = comparable(rows.logits, candidate.spec.output, self._compared)
        rows = replace(rows, logits=outputs)
        # Where a parent could not run, its own parent has to stand in: the reference.
        parent = candidate.parent if candidate.parent in self._logits else self._reference_name
        self.edges.append(self._compare(parent, label, rows, candidate.precision))
        if parent != self._reference_name:
            self.totals.append(
                self._compare(self._reference_name, label, rows, candidate.precision)
            )
        self._logits.setdefault(candidate.file, rows.by_image())

    def failures(self, required: Sequence[str]) -> list[str]:
        """Why the whole does not pass."""
        broken = [comparison for comparison in self.edges if comparison.failures]
        # Small errors along sound edges can add up to a broken total.
        broken = broken or [comparison for comparison in self.totals if comparison.failures]
        failures = self._crashed + [
            f"broken edge {comparison.reference} -> {comparison.candidate}: "
            f"{comparison.failures[0]}"
            for comparison in broken
        ]
        if not self.edges and not self._crashed:
            reasons = "; ".join(f"{skip.candidate}: {skip.reason}" for skip in self.skipped)
            failures.append(
                f"nothing was compared: fewer than two backends ran ({reasons or 'no file fits'})"
            )
        for asked in required:
            if not any(_is_meant(asked, name) for name in self._backends):
                reasons = "; ".join(
                    skip.reason for skip in self.skipped if _is_meant(asked, skip.backend)
                )
                failures.append(
                    f"required backend {asked} did not run: {reasons or 'no file for it'}"
                )
        return failures

    def _compare(
        self, reference: str, label: str, rows: Rows, precision: Precision | None
    ) -> Comparison:
        return compare(
            self._logits[reference][rows.images],
            rows.logits,
            names=(reference, label),
            signal=self.signal,
            limit=LIMITS[precision or "fp16"],
        )


def _localize(
    bundle: Bundle,
    candidates: Sequence[_Candidate],
    pool: Float32,
    reference_name: str,
    report: Report,
) -> tuple[tuple[Localization, ...], tuple[str, ...]]:
    """Every graph against its parent, block by block, and why some cannot be.

    The graphs that pass as well: what a limit on logits hides, a block's own error can show.
    """
    walks: dict[str, Walk] = {}
    found, unable = [], []
    for candidate in candidates:
        if candidate.kind != "onnx":
            unable.append(
                f"{candidate.file}: an engine does not show its inner tensors; its graph's blocks "
                "preview its rounding"
            )
            continue
        if candidate.precision == "bf16":
            unable.append(
                f"{candidate.file}: ONNX Runtime has no bfloat16 arithmetic to walk its blocks with"
            )
            continue
        report(f"walking the blocks of {candidate.file}")
        try:
            if not walks:
                walks[reference_name] = _reference_walk(bundle, reference_name)
            walk = GraphWalk(parse(candidate.model, candidate.file))
            walks[candidate.file] = walk
            parent = candidate.parent if candidate.parent in walks else reference_name
            found.append(
                localize(
                    walks[parent],
                    walk,
                    pool,
                    names=(parent, candidate.file),
                    precision=candidate.precision,
                )
            )
        except RexdeployError as error:
            unable.append(f"{candidate.file}: {error}")
    return tuple(found), tuple(unable)


def _reference_walk(bundle: Bundle, name: str) -> Walk:
    """The reference of `_reference`, block by block."""
    if name == REFERENCE:
        weights = bundle.manifest.find("weights")
        assert weights is not None  # _reference has read it
        return TorchWalk(bundle.read(weights), bundle.manifest.model)
    graph = bundle.manifest.find("onnx")
    assert graph is not None
    return GraphWalk(parse(bundle.read(graph), name))


def _check_options(options: VerifyOptions) -> None:
    if not MIN_SAMPLES <= options.samples <= MAX_SAMPLES:
        raise UsageError(f"samples: got {options.samples}, expected {MIN_SAMPLES} to {MAX_SAMPLES}")
    known = (*ONNX_BACKENDS, *ENGINE_BACKENDS)
    for name in (*options.backends, *options.require):
        if name not in known:
            raise UsageError(f"backend: got '{name}', expected one of {', '.join(known)}")


def _reference(bundle: Bundle, pool: Float32) -> tuple[str, Float32]:
    """The reference and its logits of normalised images: ours, or somebody's graph as it came."""
    spec = bundle.manifest.model
    is_ours = spec.family != "onnx"
    artifact = bundle.manifest.find("weights" if is_ours else "onnx")
    if artifact is None:
        raise UsageError(
            f"{bundle.path} holds no reference for {spec.title}; remove the folder and make it "
            "anew with 'rexdeploy export'"
        )
    backend = open_backend(
        "pytorch" if is_ours else "onnxruntime", bundle.read(artifact), spec.core
    )
    try:
        if artifact.batch is None:
            logits = backend.run(pool)
        else:
            logits = run_batches(backend, pool, [artifact.batch.opt]).by_image()
    finally:
        backend.close()
    return (REFERENCE if is_ours else artifact.file), logits


def _check_preprocess(bundle: Bundle) -> None:
    """Raises UsageError if the manifest's preprocessing is not the one that the graph was given."""
    graph = bundle.manifest.find("onnx")
    if graph is None:
        return
    told = {e.key: e.value for e in parse(bundle.read(graph), graph.file).metadata_props}
    preprocess = bundle.manifest.model.preprocess
    written = told.get("rexdeploy.preprocess")
    if written is not None and msgspec.json.decode(written, type=Preprocess) != preprocess:
        raise UsageError(
            f"{bundle.path}: the manifest's preprocessing is not that of {graph.file}; "
            f"make it again: {graph.command or 'rexdeploy export'}"
        )


def _own(bundle: Bundle, options: VerifyOptions, reference_name: str) -> list[_Candidate]:
    """The bundle's graphs and engines, every parent before its children."""
    files = {artifact.sha256: artifact.file for artifact in bundle.manifest.artifacts}
    candidates: list[_Candidate] = []
    for kind in ("onnx", "engine"):
        for artifact in bundle.manifest.artifacts:
            if artifact.kind != kind or artifact.file == reference_name:
                continue
            parent = files.get(artifact.parent_sha256 or "", reference_name)
            backends = _backends_of(artifact, options)
            if backends:
                model = bundle.read(artifact)
                precision, proof = artifact.precision, artifact.proof
                if kind == "onnx":  # its types decide its limit, not what the manifest says of them
                    graph = parse(model, artifact.file)
                    found = products(graph)
                    proof = prove(found, found, TYPE_NAMES[precision] if precision else None)
                    precision = precision_of(graph)
                candidates.append(
                    _Candidate(
                        artifact.file,
                        model,
                        kind,
                        precision,
                        artifact.batch,
                        reference_name if parent.endswith(".safetensors") else parent,
                        backends,
                        bundle.manifest.model,
                        proof,
                    )
                )
    return candidates


def _foreign(
    path: Path, spec: ModelSpec, options: VerifyOptions, reference_name: str
) -> _Candidate:
    """A candidate from elsewhere: what it is, it must tell itself."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"candidate {path} cannot be read ({error.strerror})") from None
    if data[:4] == RTX_MAGIC or path.suffix in _ENGINE_SUFFIXES:
        backend = "tensorrt-rtx" if data[:4] == RTX_MAGIC else "tensorrt"
        return _Candidate(path.name, data, "engine", None, None, reference_name, (backend,), spec)
    try:
        model = parse(data, f"candidate {path}")
    except UsageError as error:
        raise UsageError(f"{error}, and no TensorRT engine either") from None
    told = {entry.key: entry.value for entry in model.metadata_props}
    family, width = told.get("rexdeploy.family"), told.get("rexdeploy.width")
    if family and spec.width is not None and (family, width) != (spec.family, f"{spec.width:g}"):
        raise UsageError(
            f"candidate {path} is a {family} {width}, expected {spec.family} {spec.width:g}; "
            "name its own bundle"
        )
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value if model.graph.input else 0
    takes, gives = forms(model)
    return _Candidate(
        path.name,
        data,
        "onnx",
        precision_of(model),
        BatchRange(batch, batch, batch) if batch else None,
        reference_name,
        tuple(name for name in options.backends if name in ONNX_BACKENDS) or ("onnxruntime",),
        replace(spec, input=takes, output=gives),
    )


def _backends_of(artifact: Artifact, options: VerifyOptions) -> tuple[str, ...]:
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
        wanted = tuple(
            name for name in possible if name in options.require or is_there.get(name, False)
        )
    if options.backends:
        return tuple(
            name for name in possible if any(_is_meant(asked, name) for asked in options.backends)
        )
    return wanted


def _is_meant(asked: str, backend: str) -> bool:
    """Whether a backend is the one asked for; "tensorrt" means an engine of either flavour."""
    return backend == asked or (asked == "tensorrt" and backend in ENGINE_BACKENDS)


def _unproven(candidates: Sequence[_Candidate]) -> list[str]:
    """Files that are not in the precision that their manifest says, whatever their logits."""
    return [
        f"{item.file} is not in the precision that the manifest says: {item.proof.summary}"
        for item in candidates
        if item.proof is not None and not item.proof.holds
    ]


def _range_of(candidates: Sequence[_Candidate]) -> BatchRange:
    """The range to run graphs of any batch size at: that of the engines made from them."""
    ranges = [candidate.batch for candidate in candidates if candidate.batch]
    return ranges[0] if ranges else DEFAULT_BATCH
