"""The accuracy of every file of a bundle over labelled images, each beside the reference's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from rexdeploy.backends import ENGINE_BACKENDS, ONNX_BACKENDS, open_backend
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.manifest import ModelSpec, Preprocess, to_json
from rexdeploy.bundle.metadata import check_preprocess
from rexdeploy.bundle.signing import find
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.graphs.bounds import check_memory
from rexdeploy.graphs.emulate import as_typed
from rexdeploy.images.labelled import LabelledImages, find_labelled
from rexdeploy.inference.accuracy import Accuracy, Answer, accuracy, beside
from rexdeploy.inference.labelled_run import BATCH, Batch, Runner, run_labelled
from rexdeploy.journal import Journal
from rexdeploy.machine import machine
from rexdeploy.parity.candidates import Candidate, own_candidates
from rexdeploy.progress import Report, Result, several, silent
from rexdeploy.text import one_line, printable

if TYPE_CHECKING:
    from rexdeploy.models.zoo import Published

REFERENCE = "torch"
JOURNAL = ".evaluate.jsonl"
BACKENDS = ("pytorch", *ONNX_BACKENDS, *ENGINE_BACKENDS)

Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Skipped:
    """A file that did not run here, or an image that could not be read."""

    name: str
    reason: str


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What the files of a bundle make of labelled images."""

    bundle: str
    model: str
    folder: str
    machine: dict[str, str]
    images: int  # that were read, and that all rows are about
    classes: int  # that they show, of the network's
    read_as: str
    preprocess: Preprocess
    compared_only: bool  # other preprocessing than the bundle's was asked for
    published: Published | None  # where the weights are the published ones
    baseline: str  # the row that the others are compared with: the first
    rows: tuple[Accuracy, ...]
    skipped: tuple[Skipped, ...]  # files that did not run here
    unreadable: tuple[Skipped, ...]  # images
    failures: tuple[str, ...]  # files that failed while they ran, or gave what is not finite
    resumed: int = 0  # images whose answers are an earlier, killed run's

    def __repr__(self) -> str:
        first = self.rows[0]
        verdict = f"; FAILED, {self.failures[0]}" if self.failures else ""
        return one_line(
            f"<Evaluation of {self.model}, {self.images} images: {first.file} "
            f"{100 * first.top1.value:.2f} % top-1, {len(self.rows) - 1} files beside it{verdict}>",
            240,
        )


@dataclass(frozen=True)
class _Header:
    """What decides the numbers, so that only the same run goes on."""

    bundle: str  # hash of the files that run, and on what
    images: str  # hash of names, sizes and times
    preprocess: Preprocess
    batch: int = BATCH


def evaluate(
    folder: Path | str,
    bundle: Bundle | Path | str | None = None,
    *,
    mapping: Path | str | None = None,
    backend: str | Sequence[str] = (),
    file: str | Sequence[str] = (),
    limit: int | None = None,
    sample: int | None = None,
    seed: int = 0,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    strict: bool = False,
    require_signature: Path | str | None = None,
    report: Report = silent,
    counted: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Runs labelled images through the reference and every file of a bundle that runs here.

    `folder` holds a folder a class, named by its label, synset or index, or images whose classes
    `mapping` has (see `find_labelled`). `bundle` is one, its folder, its name in artifacts/, or
    None: the latest one there. `backend` ("pytorch" is the reference) and `file` leave out all
    others. `limit` takes the first images of every class, `sample` a stratified random part by
    `seed`. `crop_pct` and `interpolation` are for a comparison with other preprocessing than the
    bundle's. `strict`: an image that cannot be read is an error. `counted` is told how many of how
    many images are done.

    A run that was killed goes on where it was. Files that fail are in the result's `failures`.
    Raises UsageError for what cannot be used and BackendUnavailable where nothing can run.

    Example: `rexdeploy.evaluate("val", "mine", backend="onnxruntime").rows[0].top1`
    """
    backends, wanted = several(backend), several(file)
    bundle = find(bundle, require_signature)
    manifest = bundle.manifest
    _check_options(bundle, backends, wanted, limit, sample)
    preprocess = _preprocess(manifest.model.preprocess, crop_pct, interpolation)
    report("looking for images")
    labels = read_labels(bundle)
    mapping = None if mapping is None else Path(mapping)
    images = find_labelled(Path(folder), labels, mapping)
    if sample is not None:
        images = images.sampled(sample, seed)
    if limit is not None:
        images = images.first(limit)
    skipped: list[Skipped] = []
    with ExitStack() as closing:
        runners = _open(bundle, backends, wanted, skipped, report, closing)
        batches, resumed = _run(bundle, preprocess, images, runners, strict, report, counted)
    unreadable = {
        start + place: reason
        for start, batch in zip(range(0, len(images.files), BATCH), batches, strict=True)
        for place, reason in batch.unreadable.items()
    }
    shown = np.delete(images.classes, list(unreadable)).tolist()
    if not shown:
        first, reason = next(iter(unreadable.items()))
        raise UsageError(
            f"{folder}: none of {len(images.files)} images can be read; the first: "
            f"{images.files[first]}: {reason}"
        )
    failures = [
        f"{runner.file} ({runner.backend.name}): {reason}"
        for index, runner in enumerate(runners)
        if (reason := next((batch.failed[index] for batch in batches if index in batch.failed), ""))
    ]
    rows: list[Accuracy] = []
    baseline: list[Answer] = []
    for index, runner in enumerate(runners):
        if any(index in batch.failed for batch in batches):
            continue
        answers = [answer for batch in batches for answer in batch.answers[index]]
        whole = [batch for batch in batches if len(batch.answers[index]) == BATCH]
        row = accuracy(
            answers,
            runner.spec.num_classes,
            [1e3 * batch.seconds[index] / BATCH for batch in whole[1:]],  # warm
            file=runner.file,
            backend=runner.backend.name,
            emulated=runner.emulated,
        )
        rows.append(beside(row, baseline, answers, shown, labels) if rows else row)
        baseline = baseline or answers
    if not rows:
        raise RexdeployError("; ".join(failures))
    failures += [
        f"{row.file} ({row.backend}) gave NaN or infinite values for {row.nonfinite} images"
        for row in rows
        if row.nonfinite
    ]
    return Evaluation(
        bundle=printable(str(bundle.path)),
        model=manifest.model.title,
        folder=printable(images.folder),
        machine=machine(),
        images=len(shown),
        classes=len(set(shown)),
        read_as=images.read_as,
        preprocess=preprocess,
        compared_only=preprocess != manifest.model.preprocess,
        published=_published(manifest.model),
        baseline=f"{rows[0].file} ({rows[0].backend})",
        rows=tuple(rows),
        skipped=tuple(skipped),
        unreadable=tuple(
            Skipped(printable(images.files[index]), reason) for index, reason in unreadable.items()
        ),
        failures=tuple(failures),
        resumed=resumed,
    )


def _check_options(
    bundle: Bundle,
    backends: Sequence[str],
    files: Sequence[str],
    limit: int | None,
    sample: int | None,
) -> None:
    for name in backends:
        if name not in BACKENDS:
            raise UsageError(f"backend: got '{name}', expected one of {', '.join(BACKENDS)}")
    runnable = ("onnx", "engine", "weights")
    known = [item.file for item in bundle.manifest.artifacts if item.kind in runnable]
    for name in files:
        if name not in known:
            raise UsageError(
                f"file: got '{name}', expected one of {bundle.path}'s: {', '.join(known)}"
            )
    for what, count in (("limit", limit), ("sample", sample)):
        if count is not None and count < 1:
            raise UsageError(f"{what}: got {count}, expected 1 or more images")


def _preprocess(own: Preprocess, crop_pct: float | None, interpolation: str | None) -> Preprocess:
    """The bundle's own preprocessing, or another one to compare with."""
    if crop_pct is not None and not 0.1 <= crop_pct <= 1:
        raise UsageError(f"crop pct: got {crop_pct:g}, expected 0.1 to 1")
    for known in get_args(Interpolation):
        if interpolation == known:
            own = replace(own, interpolation=known)
    if interpolation not in (None, own.interpolation):
        names = " or ".join(get_args(Interpolation))
        raise UsageError(f"interpolation: got '{interpolation}', expected {names}")
    return own if crop_pct is None else replace(own, crop_pct=crop_pct)


def _open(
    bundle: Bundle,
    backends: Sequence[str],
    files: Sequence[str],
    skipped: list[Skipped],
    report: Report,
    closing: ExitStack,
) -> list[Runner]:
    """All that runs here, the reference first; says in `skipped` what does not, and why."""
    spec, found = bundle.manifest.model, []
    for candidate in _candidates(bundle, backends, files):
        if candidate.fault is not None:
            skipped.append(Skipped(candidate.file, candidate.fault))
            continue
        for name in candidate.backends:
            report(f"opening {candidate.file} ({name})")
            try:
                runner = _runner(candidate, name)
            except RexdeployError as error:
                if isinstance(error, UsageError):
                    raise
                skipped.append(Skipped(f"{candidate.file} ({name})", str(error)))
                continue
            closing.callback(runner.backend.close)
            found.append(runner)
    if not found:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in skipped)
        raise BackendUnavailable(
            f"{bundle.path}: no file of {spec.title} runs here: {reasons or 'none was asked for'}"
        )
    return found


def _candidates(bundle: Bundle, backends: Sequence[str], files: Sequence[str]) -> list[Candidate]:
    """The reference's weights and every graph and engine, with the backends to run each on."""
    spec, weights = bundle.manifest.model, bundle.manifest.find("weights")
    graphs = [name for name in backends if name != "pytorch"]
    found = [] if backends and not graphs else own_candidates(bundle, REFERENCE, graphs, ())
    if weights is not None and (not backends or "pytorch" in backends):
        own = Candidate(
            weights.file, bundle.read(weights), "weights", None, "", ("pytorch",), spec.core
        )
        found = [own, *found]
    graph = bundle.manifest.graph
    if graph is not None:
        check_preprocess(bundle, graph, bundle.read(graph))
    return [item for item in found if not files or item.file in files]


def _runner(candidate: Candidate, name: str) -> Runner:
    model, emulated = candidate.model, False
    if candidate.kind == "onnx":
        size = candidate.batch.opt if candidate.batch else BATCH
        check_memory(candidate.graph, size, candidate.spec.input_shape, candidate.file)
        if candidate.is_16_bit and name == "openvino":
            raise BackendUnavailable(
                "OpenVINO computes in float32 here, which says nothing of a 16-bit graph"
            )
        if candidate.is_16_bit and name == "onnxruntime":
            emulated = True
            model = as_typed(candidate.graph).SerializeToString()
    backend = open_backend(name, model, candidate.spec)
    return Runner(candidate.file, backend, candidate.spec, candidate.batch, emulated)


def _run(
    bundle: Bundle,
    preprocess: Preprocess,
    images: LabelledImages,
    runners: Sequence[Runner],
    strict: bool,
    report: Report,
    counted: Callable[[int, int], None] | None,
) -> tuple[list[Batch], int]:
    """Every batch's answers, and how many images an earlier run had answered."""
    header = _Header(_files_hash(bundle, runners), _images_hash(images), preprocess)
    path = bundle.path / JOURNAL
    journal: Journal[Batch] | None = None
    try:
        journal = Journal(path, header, Batch)
    except BlockingIOError:
        raise UsageError(
            f"{bundle.path} is being evaluated by another command: wait for it"
        ) from None
    except OSError as error:  # a bundle that may only be read
        report(f"a killed run will begin anew: {path} cannot be written ({error.strerror})")
    done = list(journal.entries) if journal is not None else []
    total = len(images.files)
    resumed = min(len(done) * BATCH, total)
    try:
        if counted is not None:
            counted(resumed, total)
        failed = done[-1].failed if done else {}
        for batch in run_labelled(images, preprocess, runners, resumed, failed):
            start = len(done) * BATCH
            if strict and batch.unreadable:
                place, reason = next(iter(batch.unreadable.items()))
                raise UsageError(f"{printable(images.files[start + place])}: {reason}")
            done.append(batch)
            if journal is not None:
                try:
                    journal.append(batch)
                except OSError as error:
                    raise RexdeployError(
                        f"cannot write {path} ({error.strerror or error}); it keeps what is done: "
                        "make room, and the same command goes on"
                    ) from None
            if counted is not None:
                counted(min(len(done) * BATCH, total), total)
        if journal is not None:
            journal.remove()
    finally:
        if journal is not None:
            journal.close()
    return done, resumed


def _published(spec: ModelSpec) -> Published | None:
    """The published accuracy of published weights; None for others, or without torch."""
    if not spec.weights.source.startswith("timm/"):  # no file's name has a slash
        return None
    try:
        from rexdeploy.models.zoo import PRETRAINED, published  # imports torch
    except ImportError:
        return None
    if not spec.weights.source.startswith(tuple(PRETRAINED.values())):
        return None
    own = (spec.family, spec.width)
    return next((row for row in published() if (row.family, row.width) == own), None)


def _files_hash(bundle: Bundle, runners: Sequence[Runner]) -> str:
    hashes = {item.file: item.sha256 for item in bundle.manifest.artifacts}
    named = [(runner.file, hashes[runner.file], runner.backend.name) for runner in runners]
    return sha256(to_json(named))


def _images_hash(images: LabelledImages) -> str:
    """Of names, classes, sizes and times: what a file holds is not read twice."""
    found = hashlib.sha256(str(Path(images.folder).resolve()).encode(errors="surrogateescape"))
    for file, label in zip(images.files, images.classes.tolist(), strict=True):
        try:
            status = (Path(images.folder) / file).stat()
            size, changed = status.st_size, status.st_mtime_ns
        except OSError:
            size = changed = -1
        found.update(f"{file}\0{label}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return found.hexdigest()
