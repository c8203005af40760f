"""Proves that everything in a bundle computes the reference network's logits, edge by edge."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rexdeploy.arrays import Float32
from rexdeploy.backends import ENGINE_BACKENDS, ONNX_BACKENDS, open_backend, run_batches
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import VERIFICATION, Artifact, BatchRange, ModelSpec, to_json
from rexdeploy.bundle.metadata import check_preprocess
from rexdeploy.bundle.precision import TYPE_NAMES, Precision, PrecisionProof
from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.graphs.bounds import check_memory
from rexdeploy.graphs.read import parse
from rexdeploy.images import decode, sets
from rexdeploy.parity.block_by_block import GraphWalk, TorchWalk, Walk
from rexdeploy.parity.candidates import (
    Candidate,
    Skipped,
    foreign_candidate,
    is_meant,
    own_candidates,
    range_of,
    sizes,
)
from rexdeploy.parity.compare import Compared, Comparison, Limits, Signal, comparable
from rexdeploy.parity.judge import Judge
from rexdeploy.parity.limits import float32_noise, walk_room
from rexdeploy.parity.localize import OWN_LIMITS, Localization, off_blocks, with_culprits
from rexdeploy.parity.localize import localize as localized
from rexdeploy.parity.ranges import Headroom
from rexdeploy.progress import Report, Result, several, silent
from rexdeploy.text import one_line

REFERENCE = "torch"
SAMPLES, MIN_SAMPLES, MAX_SAMPLES = 16, 2, 4096
MAX_LOGITS = 1 << 25
"""Rows times classes: each takes some 200 bytes while two files are compared, 6 GiB in all."""
MAX_VALUES = 5 << 27
"""Of all images together: each takes 13 bytes while they are prepared, 8 GiB in all."""
MAX_DISTINCT = 256  # images at the most; larger batches draw them in random order
_REFERENCE_BATCH = 16
_NOISE_IMAGES = 16  # synthetic ones are of every kind by then


@dataclass(frozen=True, repr=False)
class Verification(Result):
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

    def __repr__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED, {self.failures[0]}"
        counts = f"{len(self.edges)} edges, {len(self.skipped)} skipped"
        return one_line(f"<Verification of {self.model}: {verdict}; {counts}>", 240)

    def store(self, bundle: Bundle, command: str = "rexdeploy verify") -> None:
        """Writes the result to the verify.json of the bundle whose own files were judged.

        Raises RexdeployError where the bundle cannot be written, or was changed meanwhile.
        """
        data = to_json(self)
        graph = bundle.manifest.graph
        artifact = Artifact(
            "report",
            VERIFICATION,
            sha256(data),
            parent_sha256=graph.sha256 if graph else None,
            command=command,
        )
        bundle.update(artifact, files={artifact.file: data})


def verify(
    bundle: Bundle | Path | str | None = None,
    *,
    images: Path | str | None = None,
    samples: int | None = None,
    candidate: Path | str | None = None,
    backend: str | Sequence[str] = (),
    require: str | Sequence[str] = (),
    localize: bool = False,
    precision: str | None = None,
    require_signature: Path | str | None = None,
    report: Report = silent,
) -> Verification:
    """Compares every file of the bundle with its parent and with the reference; writes nothing.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. At most
    `samples` `images` of a folder are compared (None: 16), or synthetic ones. `candidate` is an
    ONNX graph or an engine to judge instead of the bundle's own files, as `precision` where it does
    not tell it. `backend` (one name or several) leaves out all other backends, and the absence of a
    `require`d one is a failure. `localize` walks the blocks of 16-bit graphs, too.
    `require_signature` is the public key that must have signed the bundle.

    What does not pass is in the result's `failures`. Raises UsageError where nothing can be judged:
    unusable options or files, or a reference whose logits do not vary over the images;
    BackendUnavailable where the reference cannot run.

    Example: `rexdeploy.verify("rexnet_1.5", images="photos", require="tensorrt").failures`
    """
    asked = None if precision is None else _precision(precision, candidate)
    samples = SAMPLES if samples is None else samples
    if not MIN_SAMPLES <= samples <= MAX_SAMPLES:
        raise UsageError(f"samples: got {samples}, expected {MIN_SAMPLES} to {MAX_SAMPLES}")
    known = (*ONNX_BACKENDS, *ENGINE_BACKENDS)
    backends, required = several(backend), several(require)
    for name in (*backends, *required):
        if name not in known:
            raise UsageError(f"backend: got '{name}', expected one of {', '.join(known)}")
    bundle = find(bundle, require_signature)
    spec = bundle.manifest.model
    if (graph := bundle.manifest.graph) is not None:
        check_preprocess(bundle, graph, bundle.read(graph))
    read_labels(bundle)  # for what is wrong with them
    reference_name = _reference_artifact(bundle).file if spec.family == "onnx" else REFERENCE
    candidates = own_candidates(bundle, reference_name, backends, required)
    files = candidates
    if candidate is not None:
        candidates = [
            foreign_candidate(Path(candidate), spec, reference_name, backends, required, asked)
        ]
        files = [*candidates, *(item for item in files if item.kind == "onnx")]
    else:
        candidates = [item for item in candidates if item.file != reference_name]
    otherwise = range_of(candidates)
    rows = max((sizes(item, otherwise)[-1] for item in candidates if item.backends), default=0)
    _check_sizes(files, otherwise, max(samples, rows), spec)
    pool, described = sets.pool(images, samples, spec.preprocess, min(rows, MAX_DISTINCT))
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
        samples,
    )
    for item in candidates:
        for name in item.backends:
            report(f"running {item.file} ({name})")
            judge.run(item, name)
        if not item.backends:
            reason = f"left out: --backend {', '.join(backends)} does not run it"
            judge.skipped.append(Skipped(item.parent, item.file, "", reason, by_choice=True))
    limit = OWN_LIMITS["fp32"] * (1 if noise is None else walk_room(noise))
    walked, not_walked = _walk(
        bundle, files, candidates, images_of_core, reference_name, localize, limit, report
    )
    return Verification(
        model=spec.title,
        files={item.file: sha256(item.model) for item in candidates},
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
            *with_culprits(judge.failures(), walked),
            *off_blocks(judge.edges, walked),
            *_not_run(judge, required),
            *(
                f"{item.file} is not in the precision that the manifest says: {item.fault}"
                for item in candidates
                if item.fault is not None
            ),
        ),
        headroom=tuple(judge.headroom),
        localizations=walked,
        not_localized=not_walked,
    )


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
    are walked `with_rounding` only: their twins (`graphs/emulate.py`) hold them to the bit.
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
        if candidate.narrow == "int8":
            unable.append(f"{candidate.file}: its Q/DQ pairs cut the blocks; it is held as a whole")
            continue
        if candidate.is_equalized:  # its blocks give other values, its logits have to be equal
            if "onnxruntime" not in candidate.backends:
                unable.append(f"{candidate.file}: only onnxruntime holds it to the bit")
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
            limit = OWN_LIMITS[candidate.narrow] if candidate.narrow else float32_limit
            names = (parent, candidate.file)
            found.append(localized(walks[parent], walk, pool, names=names, limit=limit))
        except RexdeployError as error:
            unable.append(f"{candidate.file}: {error}")
    return tuple(found), tuple(unable)


def _reference_walk(bundle: Bundle, name: str) -> Walk:
    """The reference of `_reference`, block by block."""
    if name == REFERENCE:
        return TorchWalk(bundle.read(_reference_artifact(bundle)), bundle.manifest.model)
    return GraphWalk(parse(bundle.read(_reference_artifact(bundle)), name))


def _precision(text: str, candidate: Path | str | None) -> Precision:
    for name in TYPE_NAMES:
        if name == text:
            if candidate is None:
                raise UsageError(
                    f"got --precision {text} without --candidate: a bundle's files are judged by "
                    "their own types"
                )
            return name
    raise UsageError(f"precision: got '{text}', expected one of {', '.join(TYPE_NAMES)}")


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
    artifact = bundle.manifest.graph if spec.family == "onnx" else weights
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
    size = artifact.batch.opt if artifact.batch else _REFERENCE_BATCH
    with closing(open_backend(name, bundle.read(artifact), spec.core)) as backend:
        logits: Float32 = run_batches(backend, pool, [size]).by_image().astype(np.float32)
    return logits


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
        batches = torch.split(torch.from_numpy(pool).double(), 4)
        exact = torch.cat([model(batch) for batch in batches]).numpy()
    return float32_noise(logits, exact, signal, compared)


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
