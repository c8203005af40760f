"""Proves that everything in a bundle computes the reference network's logits, edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from onnx import ModelProto, TensorProto

from rexdeploy.arrays import Float32
from rexdeploy.backends import (
    ENGINE_BACKENDS,
    ONNX_BACKENDS,
    engine_backend,
    has_onnxruntime_cuda,
    open_backend,
)
from rexdeploy.backends.tensorrt_api import RTX_MAGIC, is_plan
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import (
    DEFAULT_BATCH,
    MAX_BATCH,
    VERIFICATION,
    Artifact,
    BatchRange,
    ModelSpec,
    to_json,
)
from rexdeploy.bundle.metadata import check_preprocess, preprocess_of
from rexdeploy.bundle.precision import TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.files import read_plain
from rexdeploy.graphs.bounds import check_memory
from rexdeploy.graphs.emulate import sixteen_bit_types
from rexdeploy.graphs.products import precision_of, products
from rexdeploy.graphs.read import NotOnnx, graph_inputs, parse, read_with_external_data, type_name
from rexdeploy.graphs.wrapper import forms
from rexdeploy.images import decode, sets
from rexdeploy.parity.batches import run_batches
from rexdeploy.parity.compare import Compared, Comparison, Limits, Signal, comparable
from rexdeploy.parity.judge import Candidate, Headroom, Judge, Skipped, is_meant, sizes
from rexdeploy.parity.limits import float32_noise, walk_room
from rexdeploy.parity.localize import OWN_LIMITS, Localization, localize
from rexdeploy.parity.proof import prove
from rexdeploy.parity.walk import GraphWalk, TorchWalk, Walk
from rexdeploy.progress import Report, silent

if TYPE_CHECKING:
    from rexdeploy.backends.trt import TensorRTBackend

REFERENCE = "torch"
MIN_SAMPLES, MAX_SAMPLES = 2, 4096
MAX_LOGITS = 1 << 25
"""Rows times classes: each takes some 200 bytes while two files are compared, 6 GiB in all."""
MAX_VALUES = 5 << 27
"""Of all images together: each takes 13 bytes while they are prepared, 8 GiB in all."""
MAX_DISTINCT = 256  # images at the most; larger batches draw them in random order
_REFERENCE_BATCH = 16
_NOISE_IMAGES = 16  # synthetic ones are of every kind by then
_ENGINE_SUFFIXES = {".engine", ".plan", ".trt"}
_CLAIMED_TYPES: dict[Precision | None, frozenset[int]] = {
    "fp32": frozenset(),
    "fp16": frozenset({TensorProto.FLOAT16}),
    "bf16": frozenset({TensorProto.BFLOAT16}),
    None: frozenset({TensorProto.FLOAT16}),  # what tune-precision mixes
}
"""The 16-bit types that a bundle's graph may hold, by the precision that its manifest claims."""


@dataclass(frozen=True)
class VerifyOptions:
    """What to compare, over which images."""

    images: Path | None = None  # None: seeded synthetic images
    samples: int = 16
    candidate: Path | None = None  # judge this file instead of the bundle's own
    backends: tuple[str, ...] = ()  # empty: every one that a file's kind allows
    require: tuple[str, ...] = ()  # backends whose absence is a failure
    localize: bool = False  # walk the blocks of 16-bit graphs, too
    precision: Precision | None = None  # of a candidate that does not tell it


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
    broken: tuple[Skipped, ...]  # what was refused or failed here, so that nothing was compared
    failures: tuple[str, ...]  # why the whole does not pass; empty if it does
    headroom: tuple[Headroom, ...]  # of float16 graphs that were made from float32 ones here
    localizations: tuple[Localization, ...]  # graphs block by block
    not_localized: tuple[str, ...]  # the graphs that could not be, and why

    @property
    def passed(self) -> bool:
        return not self.failures


def verify(bundle: Bundle, options: VerifyOptions, report: Report = silent) -> Verification:
    """Compares every file of the bundle with its parent and with the reference.

    Raises UsageError where nothing can be judged: unusable files, or a reference whose logits do
    not vary over the images.
    """
    _check_options(options)
    spec = bundle.manifest.model
    _check_preprocess(bundle)
    read_labels(bundle)  # for what is wrong with them
    reference_name = _reference_artifact(bundle).file if spec.family == "onnx" else REFERENCE
    candidates = _own(bundle, options, reference_name)
    files = candidates
    if options.candidate:
        candidates = [_foreign(options.candidate, spec, options, reference_name)]
        files = [*candidates, *(item for item in files if item.kind == "onnx")]
    else:
        candidates = [item for item in candidates if item.file != reference_name]
    otherwise = _range_of(candidates)
    rows = max((sizes(item, otherwise)[-1] for item in candidates if item.backends), default=0)
    _check_sizes(files, otherwise, max(options.samples, rows), spec)
    pool, described = sets.pool(
        options.images, options.samples, spec.preprocess, min(rows, MAX_DISTINCT)
    )
    report("running the reference")
    images_of_core = decode.normalise(pool, spec.preprocess)
    logits = _reference(bundle, images_of_core)
    ends_in_softmax = any(item.spec.output == "probabilities" for item in candidates)
    compared: Compared = "log-probabilities" if ends_in_softmax else "logits"
    signal = Signal.of(comparable(logits, "logits", compared))
    few = slice(_NOISE_IMAGES)
    noise = _noise(bundle, images_of_core[few], logits[few], signal, compared)
    judge = Judge(
        {"uint8": pool, "float32": images_of_core},
        compared,
        (reference_name, comparable(logits, "logits", compared)),
        signal,
        noise,
        files,
        otherwise,
        options.samples,
    )
    for candidate in candidates:
        for backend in candidate.backends:
            report(f"running {candidate.file} ({backend})")
            judge.run(candidate, backend)
        if not candidate.backends:
            judge.skipped.append(_left_out(candidate, options))
    limit = OWN_LIMITS["fp32"] * (1 if noise is None else walk_room(noise))
    walked, not_walked = _walk(
        bundle, files, candidates, images_of_core, reference_name, options.localize, limit, report
    )
    return Verification(
        model=spec.title,
        files={candidate.file: sha256(candidate.model) for candidate in candidates},
        compared=compared,
        images=described,
        batches=tuple(sorted(judge.batches)),
        signal=signal.size,
        proofs={item.file: item.proof for item in candidates if item.proof},
        edges=tuple(judge.edges),
        totals=tuple(judge.totals),
        skipped=tuple(judge.skipped),
        broken=tuple(judge.broken),
        failures=(
            *_with_culprits(judge.failures(), walked),
            *_off_blocks(judge.edges, walked),
            *_not_run(judge, options.require),
            *_unproven(candidates),
        ),
        headroom=tuple(judge.headroom),
        localizations=walked,
        not_localized=not_walked,
    )


def store(bundle: Bundle, verification: Verification, command: str = "rexdeploy verify") -> None:
    """Writes a verification of the bundle's own files to its verify.json.

    Raises RexdeployError where the bundle cannot be written, or was changed meanwhile.
    """
    data = to_json(verification)
    graph = bundle.manifest.find("onnx")
    artifact = Artifact(
        "report",
        VERIFICATION,
        sha256(data),
        parent_sha256=graph.sha256 if graph else None,
        command=command,
    )
    bundle.update(artifact, files={artifact.file: data})


def _walk(
    bundle: Bundle,
    files: Sequence[Candidate],
    candidates: Sequence[Candidate],
    pool: Float32,
    reference_name: str,
    with_rounding: bool,
    float32_limit: float,
    report: Report,
) -> tuple[tuple[Localization, ...], tuple[str, ...]]:
    """Every float32 graph against its parent, block by block, and why some cannot be.

    What a limit on logits hides, a block's own error shows: given the parent's own input, a block
    of 1 % off in a single channel stands out from float32's rounding a hundred times. 16-bit graphs
    are walked `with_rounding` only: the twins of `rounding.py` hold them to the bit.
    """
    walks: dict[str, Walk] = {}
    found, unable = [], []
    for candidate in candidates:
        if candidate.kind != "onnx":
            if with_rounding:
                unable.append(
                    f"{candidate.file}: an engine does not show its inner tensors; its graph's "
                    "blocks preview its rounding"
                )
            continue
        if not candidate.backends or (candidate.narrow and not with_rounding):
            continue
        if candidate.narrow == "bf16":
            unable.append(
                f"{candidate.file}: ONNX Runtime has no bfloat16 arithmetic to walk its blocks with"
            )
            continue
        report(f"walking the blocks of {candidate.file}")
        try:
            if not walks:
                walks[reference_name] = _reference_walk(bundle, reference_name)
            parent = candidate.parent
            if parent not in walks:
                graph = next((item for item in files if item.file == parent), None)
                walks[parent] = GraphWalk(graph.graph) if graph else walks[reference_name]
            walks[candidate.file] = walk = GraphWalk(candidate.graph)
            found.append(
                localize(
                    walks[parent],
                    walk,
                    pool,
                    names=(parent, candidate.file),
                    limit=OWN_LIMITS[candidate.narrow] if candidate.narrow else float32_limit,
                )
            )
        except RexdeployError as error:
            unable.append(f"{candidate.file}: {error}")
    return tuple(found), tuple(unable)


def _off_blocks(edges: Sequence[Comparison], walked: Sequence[Localization]) -> list[str]:
    """Float32 graphs that pass by their logits, and have a block that is wrong."""
    failures = []
    for walk in walked:
        broken = any(
            edge.failures and edge.candidate.startswith(f"{walk.candidate} (") for edge in edges
        )
        if walk.limit < OWN_LIMITS["fp16"] and walk.over and not broken:
            block = next(block for block in walk.blocks if block.name in walk.over)
            failures.append(
                f"broken edge {walk.reference} -> {walk.candidate}: {block.name} alone is off by "
                f"{block.own:.2g} of its size, over the limit {walk.limit:g}{_culprit(walk)}"
            )
    return failures


def _with_culprits(failures: Sequence[str], walked: Sequence[Localization]) -> list[str]:
    """The failures, each with the node that a walk of its file has found."""
    named = []
    for failure in failures:
        walk = next(
            (w for w in walked if f" -> {w.candidate} (" in failure and w.culprit is not None), None
        )
        named.append(failure + _culprit(walk) if walk else failure)
    return named


def _culprit(walk: Localization) -> str:
    if walk.culprit is None:
        return ""
    return f"; first at node {walk.culprit.node.name} in {walk.culprit.block}"


def _reference_walk(bundle: Bundle, name: str) -> Walk:
    """The reference of `_reference`, block by block."""
    if name == REFERENCE:
        return TorchWalk(bundle.read(_reference_artifact(bundle)), bundle.manifest.model)
    return GraphWalk(parse(bundle.read(_reference_artifact(bundle)), name))


def _check_options(options: VerifyOptions) -> None:
    if not MIN_SAMPLES <= options.samples <= MAX_SAMPLES:
        raise UsageError(f"samples: got {options.samples}, expected {MIN_SAMPLES} to {MAX_SAMPLES}")
    known = (*ONNX_BACKENDS, *ENGINE_BACKENDS)
    for name in (*options.backends, *options.require):
        if name not in known:
            raise UsageError(f"backend: got '{name}', expected one of {', '.join(known)}")


def _check_sizes(
    files: Sequence[Candidate], otherwise: BatchRange, rows: int, spec: ModelSpec
) -> None:
    """Raises UsageError for what takes too much memory: the graphs, the images, the logits."""
    for item in files:
        if item.kind == "onnx":
            most = max(_REFERENCE_BATCH, sizes(item, otherwise)[-1])
            size = item.batch.opt if item.batch else most
            check_memory(item.graph, size, item.spec.input_shape, item.file)
    logits = rows * spec.num_classes
    if logits > MAX_LOGITS:
        raise UsageError(
            f"{rows} rows of {spec.num_classes} classes are {logits} logits, expected at most "
            f"{MAX_LOGITS}; give fewer --samples, or files of smaller batches"
        )
    values = rows * 3 * spec.preprocess.height * spec.preprocess.width
    if values > MAX_VALUES:
        raise UsageError(
            f"{rows} images of {spec.preprocess.width} x {spec.preprocess.height} pixels are "
            f"{values} values, expected at most {MAX_VALUES}; give fewer --samples, or files of "
            "smaller batches"
        )


def _reference_artifact(bundle: Bundle) -> Artifact:
    """The weights of our network, or somebody's graph as it came; raises UsageError."""
    spec = bundle.manifest.model
    weights = bundle.manifest.find("weights")
    if spec.family == "onnx" and weights is not None:
        raise UsageError(
            f"{bundle.path}: the manifest says that it holds somebody's own ONNX graph, and lists "
            f"{weights.file}, which are no such graph's; make the bundle anew"
        )
    artifact = bundle.manifest.find("onnx") if spec.family == "onnx" else weights
    if artifact is None:
        raise UsageError(
            f"{bundle.path} holds no reference for {spec.title}; remove the folder and make it "
            "anew with 'rexdeploy export'"
        )
    return artifact


def _reference(bundle: Bundle, pool: Float32) -> Float32:
    """The reference's logits of normalised images."""
    artifact, spec = _reference_artifact(bundle), bundle.manifest.model
    name = "onnxruntime" if spec.family == "onnx" else "pytorch"
    backend = open_backend(name, bundle.read(artifact), spec.core)
    try:
        size = artifact.batch.opt if artifact.batch else _REFERENCE_BATCH
        logits: Float32 = run_batches(backend, pool, [size]).by_image().astype(np.float32)
        return logits
    finally:
        backend.close()


def _noise(
    bundle: Bundle, pool: Float32, logits: Float32, signal: Signal, compared: Compared
) -> Limits | None:
    """What float32 does to our own network's logits; None for somebody's graph."""
    spec = bundle.manifest.model
    if spec.family == "onnx":
        return None
    import torch

    from rexdeploy.backends.pytorch import reference

    model = reference(bundle.read(_reference_artifact(bundle)), spec).double()
    with torch.inference_mode():
        exact = np.concatenate(
            [
                model(torch.from_numpy(pool[start : start + 4]).double()).numpy()
                for start in range(0, len(pool), 4)
            ]
        )
    return float32_noise(logits, exact, signal, compared)


def _check_preprocess(bundle: Bundle) -> None:
    """Raises UsageError if the manifest's preprocessing is not the one that the graph was given."""
    graph = bundle.manifest.find("onnx")
    if graph is not None:
        check_preprocess(bundle, graph, bundle.read(graph))


def _own(bundle: Bundle, options: VerifyOptions, reference_name: str) -> list[Candidate]:
    """The bundle's graphs and engines, every parent before its children."""
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
                _backends_of(artifact, options),
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


def _foreign(path: Path, spec: ModelSpec, options: VerifyOptions, reference_name: str) -> Candidate:
    """A candidate from elsewhere: what it is, it must tell itself."""
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
            options.precision,
            _profile(data, backend, spec),
            reference_name,
            (backend,),
            spec,
            is_ours=False,
            built_in=options.precision,
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
    asked = [name for name in ONNX_BACKENDS if name in (*options.backends, *options.require)]
    candidate = Candidate(
        path.name,
        data,
        "onnx",
        None,
        _fixed_batch(model, path),
        reference_name,
        tuple(asked if options.backends else dict.fromkeys(["onnxruntime", *asked])),
        replace(spec, input=takes, output=gives),
        is_ours=False,
    )
    return _by_its_types(candidate, None, options.precision)


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
            name for name in possible if any(is_meant(asked, name) for asked in options.backends)
        )
    return wanted


def _left_out(candidate: Candidate, options: VerifyOptions) -> Skipped:
    reason = f"left out: --backend {', '.join(options.backends)} does not run it"
    return Skipped(candidate.parent, candidate.file, "", reason, by_choice=True)


def _not_run(judge: Judge, required: Sequence[str]) -> list[str]:
    """The required backends that did not run, or not every file of theirs."""
    failures = []
    for asked in required:
        ran = any(is_meant(asked, name) for name in judge.ran)
        missed = [
            skip for skip in judge.skipped if is_meant(asked, skip.backend) and not skip.by_choice
        ]
        if missed and ran:
            failures.append(
                f"required backend {asked} did not run "
                + "; ".join(f"{skip.candidate}: {skip.reason}" for skip in missed)
            )
        elif not ran:
            reasons = "; ".join(skip.reason for skip in missed)
            failures.append(f"required backend {asked} did not run: {reasons or 'no file for it'}")
    return failures


def _unproven(candidates: Sequence[Candidate]) -> list[str]:
    """Files that are not in the precision that their manifest says, whatever their logits."""
    return [
        f"{item.file} is not in the precision that the manifest says: {fault}"
        for item in candidates
        if (fault := _proof_fault(item)) is not None
    ]


def _proof_fault(item: Candidate) -> str | None:
    """Why a file's proof does not show its precision; a candidate from elsewhere claims none."""
    if item.kind == "engine" or item.proof_fault is not None:
        return item.proof_fault
    return None if item.proof is None or item.proof.holds else item.proof.summary


def _types_fault(graph: ModelProto, claimed: Precision | None) -> str | None:
    """Why a graph's tensors are not of the types that its manifest claims.

    What is rounded between float32 products is float32 by its products, and would be given the room
    of 16 bits.
    """
    given = graph.graph.output[0].type.tensor_type.elem_type
    if given != TensorProto.FLOAT:
        return f"it gives {type_name(given)}, expected FLOAT"
    others = sixteen_bit_types(graph) - _CLAIMED_TYPES[claimed]
    names = sorted(map(type_name, others))
    return f"it rounds to {', '.join(names)} inside" if names else None


def _range_of(candidates: Sequence[Candidate]) -> BatchRange:
    """The range to run graphs of any batch size at: what all their engines take.

    And from one row to eight at least: what engines take says nothing of other servers of a graph.
    """
    ranges = [candidate.batch for candidate in candidates if candidate.batch]
    if not ranges:
        return DEFAULT_BATCH
    widest = max(ranges, key=lambda item: item.max)
    most = max(widest.max, DEFAULT_BATCH.opt)
    return BatchRange(1, widest.opt, most)
