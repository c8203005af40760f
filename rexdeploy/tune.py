"""Finds the few blocks that a float16 graph must keep in float32 to stay within its limit."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto

from rexdeploy import images
from rexdeploy.backends import open_backend
from rexdeploy.blocks import literal
from rexdeploy.bundle import Bundle, sha256
from rexdeploy.compare import Signal, compare
from rexdeploy.errors import UsageError, VerificationFailed
from rexdeploy.forms import Source, engine_form
from rexdeploy.localize import localize
from rexdeploy.manifest import Artifact, ModelSpec, to_json
from rexdeploy.parity import LIMITS, run_batches
from rexdeploy.precision import beyond_fp16, node_name, parse, precision_of, to_fp16
from rexdeploy.progress import Report, silent
from rexdeploy.ranges import Ranges, measure_ranges
from rexdeploy.walk import GraphWalk

Float32 = npt.NDArray[np.float32]

STATE = "tune.json"
MIXED = "fp16.onnx"  # in place of the plain one, so that all that takes a float16 graph takes it
MAX_BLOCKS = 6  # of a ReXNet's 19: with more in float32 there is little left to gain from float16
MIN_SAMPLES, MAX_SAMPLES = 2, 256
_BATCH = 4


@dataclass(frozen=True)
class TuneOptions:
    """Over which images the float16 graph must hold, and how much may stay float32."""

    images: Path | None = None  # None: seeded synthetic images
    samples: int = 8
    max_blocks: int = MAX_BLOCKS
    command: str = "rexdeploy tune-precision"


@dataclass(frozen=True)
class Trial:
    """One mixed graph that was run."""

    float32: tuple[str, ...]  # the blocks that it keeps
    error: float | None  # of the logits, in units of signal; None where they are not finite

    @property
    def rank(self) -> float:
        """The error, with logits that are not finite behind all others."""
        return float("inf") if self.error is None else self.error


@dataclass(frozen=True)
class Tuning:
    """What a search came to."""

    bundle: Bundle
    images: str
    plain: Trial  # nothing kept
    best: Trial
    limit: float  # on the error
    trials: int  # that this run made
    resumed: int  # that an earlier run had made
    ranges: Ranges
    written: str | None  # the mixed graph's file; None if nothing was to heal, or no cure

    @property
    def healed(self) -> bool:
        """Whether the best graph is within the limit."""
        return self.best.rank <= self.limit


@dataclass(frozen=True)
class _State:
    """What a search keeps in the bundle, to go on after an interruption."""

    key: str  # of everything that a trial's outcome depends on
    trials: tuple[Trial, ...] = ()


def tune(bundle: Bundle, options: TuneOptions, report: Report = silent) -> Tuning:
    """Searches, and writes the mixed graph into the bundle in place of its float16 one.

    Blocks are ranked by what float16 does to each alone, taken into the set until the whole graph
    is within the limit, and put back one by one where it stays so. Every trial is a run of the
    whole graph, kept in the bundle: an interrupted search goes on where it was.

    Raises UsageError where the bundle has no float32 graph of ReXNet's blocks, or where nothing can
    be judged. Without a cure nothing is written: the result's `healed` is False.
    """
    if not MIN_SAMPLES <= options.samples <= MAX_SAMPLES:
        raise UsageError(f"samples: got {options.samples}, expected {MIN_SAMPLES} to {MAX_SAMPLES}")
    if options.max_blocks < 1:
        raise UsageError(f"max blocks: got {options.max_blocks}, expected at least 1")
    root = bundle.manifest.find("onnx")
    if root is None:
        raise UsageError(f"{bundle.path} holds no ONNX graph; run 'rexdeploy export' first")
    form = engine_form(Source(bundle), root, None, options.command, report)
    if form.made:
        bundle = bundle.update(*form.made, files=form.files)
    root, model = form.artifact, parse(form.data, form.artifact.file)
    if precision_of(model) != "fp32":
        raise UsageError(f"{root.file} is not a float32 graph, so it leaves nothing to choose")
    spec = bundle.manifest.model
    pool, described = images.pool(options.images, options.samples, spec.preprocess)
    report("measuring the blocks' ranges")
    ranges = measure_ranges(model, pool)
    search = _Search(bundle, root, model, pool, report)
    plain = search.judge(())
    best = plain
    if not search.passes(plain):
        report("measuring each block in float16 alone")
        best = _minimal(search, _by_sensitivity(model, pool), options.max_blocks)
    written = None
    if best.float32 and search.passes(best):
        written = search.write(best, options)
    return Tuning(
        search.bundle,
        described,
        plain,
        best,
        LIMITS["fp16"],
        search.made,
        search.resumed,
        ranges,
        written,
    )


def _by_sensitivity(model: ModelProto, pool: Float32) -> list[str]:
    """The blocks' names, worst in float16 first: those that overflow, in the graph's order."""
    # Nodes whose very weights pass float16's limit stay float32 here; their block comes first.
    unfit = beyond_fp16(model)
    half = GraphWalk(to_fp16(model, unfit))
    result = localize(GraphWalk(model), half, pool, names=("float32", "float16"), precision="fp16")
    nodes = _nodes_by_block(model)
    errors = {
        block.name: float("inf") if nodes[block.name] & unfit else block.own
        for block in result.blocks
    }
    return sorted(errors, key=lambda name: -errors[name])


def _nodes_by_block(model: ModelProto) -> dict[str, set[str]]:
    nodes = [node_name(node) for node in model.graph.node]
    walk = GraphWalk(model)
    return {block.name: {nodes[position] for position in block.nodes} for block in walk.blocks}


def _minimal(search: _Search, ranked: list[str], most: int) -> Trial:
    """A small set within the limit, or else the best one that was tried."""
    low, high = 0, 1
    trial = search.judge(ranked[:1])
    tried = [trial]
    most = min(most, len(ranked))
    while not search.passes(trial) and high < most:
        low, high = high, min(2 * high, most)
        trial = search.judge(ranked[:high])
        tried.append(trial)
    if not search.passes(trial):
        return min(tried, key=lambda item: item.rank)
    while high - low > 1:
        middle = (low + high) // 2
        found = search.judge(ranked[:middle])
        if search.passes(found):
            high, trial = middle, found
        else:
            low = middle
    for name in reversed(ranked[: high - 1]):  # without its last one, the set was found to fail
        without = search.judge(kept for kept in trial.float32 if kept != name)
        if search.passes(without):
            trial = without
    return trial


class _Search:
    """Runs mixed graphs, and remembers what came out."""

    def __init__(
        self, bundle: Bundle, root: Artifact, model: ModelProto, pool: Float32, report: Report
    ) -> None:
        self.bundle, self.made = bundle, 0
        self._root, self._model, self._pool, self._report = root, model, pool, report
        self._spec: ModelSpec = bundle.manifest.model
        self._blocks = _nodes_by_block(model)
        self._order = {name: index for index, name in enumerate(self._blocks)}
        self._limit = LIMITS["fp16"]
        self._seconds: list[float] = []
        backend = open_backend("onnxruntime", model.SerializeToString(), self._spec)
        try:
            size = root.batch.opt if root.batch else _BATCH
            self._size = size
            self._reference = run_batches(backend, pool, [size]).by_image()
        finally:
            backend.close()
        self._signal = Signal.of(self._reference)
        key = hashlib.sha256(
            f"{root.sha256} {self._limit} {onnx.__version__}".encode() + pool.tobytes()
        ).hexdigest()
        self._state = _read_state(bundle, key)
        self.resumed = len(self._state.trials)

    def passes(self, trial: Trial) -> bool:
        return trial.rank <= self._limit

    def judge(self, blocks: Iterable[str]) -> Trial:
        """Runs the graph with these blocks in float32, or remembers what came of it."""
        kept = tuple(sorted(blocks, key=self._order.__getitem__))
        for known in self._state.trials:
            if known.float32 == kept:
                return known
        named = ", ".join(kept) or "nothing"
        left = f" (each takes {np.mean(self._seconds):.0f} s)" if self._seconds else ""
        self._report(f"trial {len(self._state.trials) + 1}: {named} in float32{left}")
        start = time.perf_counter()
        trial = Trial(kept, self._error(kept))
        self._seconds.append(time.perf_counter() - start)
        self.made += 1
        self._state = replace(self._state, trials=(*self._state.trials, trial))
        data = to_json(self._state)
        state = Artifact("report", STATE, sha256(data), parent_sha256=self._root.sha256)
        self.bundle = self.bundle.update(state, files={STATE: data})
        return trial

    def _error(self, blocks: tuple[str, ...]) -> float | None:
        """Of the mixed graph's logits against the float32 graph's."""
        try:
            mixed = self._mixed(blocks)
        except VerificationFailed:  # a weight that float16 cannot hold, outside these blocks
            return None
        backend = open_backend("onnxruntime", literal(mixed).SerializeToString(), self._spec)
        try:
            rows = run_batches(backend, self._pool, [self._size])
        finally:
            backend.close()
        comparison = compare(
            self._reference[rows.images],
            rows.logits,
            names=(self._root.file, MIXED),
            signal=self._signal,
            limit=self._limit,
        )
        return None if comparison.nonfinite else comparison.error

    def write(self, trial: Trial, options: TuneOptions) -> str:
        """Puts the mixed graph into the bundle; engines of the graph that it replaces go."""
        data = self._mixed(trial.float32).SerializeToString(deterministic=True)
        artifact = Artifact(
            "onnx",
            MIXED,
            sha256(data),
            parent_sha256=self._root.sha256,
            precision=None,  # of its products, some are float32
            batch=self._root.batch,
            built_with={
                "onnx": onnx.__version__,
                "float32": ", ".join(trial.float32),
                "error": f"{trial.rank:.2g}",
            },
            command=options.command,
        )
        self.bundle = self.bundle.update(artifact, files={artifact.file: data})
        return artifact.file

    def _mixed(self, blocks: tuple[str, ...]) -> ModelProto:
        kept = set[str]().union(*(self._blocks[name] for name in blocks))
        return to_fp16(self._model, kept)


def _read_state(bundle: Bundle, key: str) -> _State:
    """What an earlier run of this very search has found; nothing if there is none to be read."""
    for artifact in bundle.manifest.artifacts:
        if artifact.file == STATE:
            try:
                state = msgspec.json.decode(bundle.read(artifact), type=_State)
            except (UsageError, msgspec.DecodeError):
                break
            if state.key == key:
                return state
    return _State(key)
