"""Verifies a detector's bundle: every file beside the reference, stage by stage and as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rexdeploy.arrays import UInt8
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import DETECTORS, VERIFICATION, Artifact, Preprocess, Role, to_json
from rexdeploy.bundle.metadata import check_preprocess
from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.detection.judge import Judge, SetComparison, Skip
from rexdeploy.detection.reference import rebuilt
from rexdeploy.detection.runtime import ONNXRUNTIME, OnnxStage, Stage
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.graphs.read import parse
from rexdeploy.images import decode, sets
from rexdeploy.parity.compare import Comparison
from rexdeploy.progress import Report, Result, silent
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from onnx import ModelProto

SAMPLES = 2  # a detector's images are 20 times as large as a classifier's


@dataclass(frozen=True, repr=False)
class DetectorVerification(Result):
    """All comparisons of one run."""

    model: str
    files: dict[str, str]  # SHA-256 by name of every file that was judged
    images: str
    edges: tuple[Comparison, ...]  # one for each tensor of each file
    sets: tuple[SetComparison, ...]  # from end to end
    skipped: tuple[Skip, ...]
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.failures

    def __repr__(self) -> str:
        verdict = "passed" if self.passed else f"FAILED, {self.failures[0]}"
        counts = f"{len(self.edges)} tensors, {len(self.skipped)} files skipped"
        return one_line(f"<Verification of {self.model}: {verdict}; {counts}>", 240)

    def store(self, bundle: Bundle, command: str = "rexdeploy verify") -> None:
        """Writes the result to the bundle's verify.json; raises like `Bundle.update`."""
        data, graph = to_json(self), bundle.manifest.graph
        parent = graph.sha256 if graph else None
        artifact = Artifact("report", VERIFICATION, sha256(data), parent, command=command)
        bundle.update(artifact, files={artifact.file: data})


def verify_detector(
    bundle: Bundle | Path | str | None = None,
    *,
    images: Path | str | None = None,
    samples: int = SAMPLES,
    require_signature: Path | str | None = None,
    report: Report = silent,
) -> DetectorVerification:
    """Compares every graph of a detector's bundle with torchvision's detector; writes nothing.

    Stage by stage, each given the reference's own inputs, and from end to end by detections matched
    as sets. At most `samples` images of the folder `images`, or synthetic ones. What cannot run
    here is `skipped`. Raises UsageError where nothing can be judged, BackendUnavailable without
    torchvision.

    Example: `rexdeploy.verify_detector("street", images="photos").failures`
    """
    if not 1 <= samples <= 256:
        raise UsageError(f"samples: got {samples}, expected 1 to 256")
    bundle = find(bundle, require_signature, DETECTORS)
    spec = bundle.manifest.model
    weights = bundle.manifest.find("weights")
    if weights is None:
        raise UsageError(f"{bundle.path} holds no weights; run 'rexdeploy export' again")
    read_labels(bundle)  # as many as classes, or an error
    report("running the reference")
    pixels, described = _images(images, samples, spec.preprocess)
    judge = Judge(rebuilt(bundle.read(weights), spec), spec, pixels)
    edges: list[Comparison] = []
    skipped: list[Skip] = []
    failures: list[str] = []
    float32: dict[Role, Stage] = {}
    files = {weights.file: weights.sha256}
    passed: dict[str, tuple[Role, ModelProto]] = {}  # float32 graphs by their hash
    for artifact in bundle.manifest.artifacts:
        if artifact.role is None:
            if artifact.kind in ("onnx", "engine"):
                failures.append(f"{artifact.file} has no role in a detector")
            continue
        if artifact.kind == "engine":
            bundle.read(artifact)
            if (fault := artifact.proof_fault) is not None:
                failures.append(f"{artifact.file}: {fault}")
            skipped.append(Skip(artifact.file, "an engine needs an NVIDIA GPU"))
            continue
        if artifact.role not in judge.roles:
            failures.append(f"{artifact.file}: no stage '{artifact.role}' can {spec.task}")
            continue
        report(f"comparing {artifact.file}")
        files[artifact.file] = artifact.sha256
        data = bundle.read(artifact)
        try:
            model = parse(data, artifact.file)
            check_preprocess(bundle, artifact, data)
            role, parent = passed.get(artifact.parent_sha256 or "", (None, None))
            found = judge.compare(artifact, model, parent if role == artifact.role else None)
        except (RexdeployError, UsageError) as error:
            failures.append(f"{artifact.file}: {error}")
            continue
        edges += found
        failures += [
            f"the edge {edge.reference} -> {edge.candidate} is broken: {edge.failures[0]}"
            for edge in found
            if edge.failures
        ]
        if artifact.precision == "fp32" and not any(edge.failures for edge in found):
            passed[artifact.sha256] = artifact.role, model
            float32.setdefault(artifact.role, OnnxStage(data, artifact.role))
    whole = []
    missing = [role for role in judge.roles if role not in float32]
    if missing:
        failures.append(f"no float32 graph of stage {', '.join(missing)} has passed")
    else:
        report("detecting from end to end")
        found_sets = judge.end_to_end(float32, ONNXRUNTIME)
        if found_sets.expected or found_sets.unmatched:
            whole.append(found_sets)
        else:
            why = "nothing is detected in these images: give --images DIR"
            skipped.append(Skip("from end to end", why))
        failures += [f"{item.candidate}: {why}" for item in whole for why in item.failures]
    return DetectorVerification(
        model=spec.title,
        files=files,
        images=described,
        edges=tuple(edges),
        sets=tuple(whole),
        skipped=tuple(skipped),
        failures=tuple(failures),
    )


def _images(folder: Path | str | None, count: int, spec: Preprocess) -> tuple[list[UInt8], str]:
    """Images of any sizes, uint8 RGB `[H, W, 3]`, and a description."""
    if folder is None:
        # Another shape than the canvas's, so that sizes before and after are told apart.
        size = Preprocess(height=spec.height * 3 // 4, width=spec.height)
        return list(sets.varied_pixels(count, size, sets.SEED)), f"{count} synthetic images"
    found = sets.find(Path(folder))
    paths = found[:: max(1, -(-len(found) // count))]
    pixels = [np.asarray(decode.to_rgb(decode.load(path))) for path in paths]
    return pixels, f"{len(paths)} images of {folder}"
