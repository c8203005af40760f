"""Finds the few blocks that a float16 graph must keep in float32 to stay within its limit."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from rexdeploy import machine
from rexdeploy.arrays import Float32
from rexdeploy.backends import (
    ENGINE_BACKENDS,
    Backend,
    flavor_of,
    open_backend,
    run_batches,
    tensorrt_build,
)
from rexdeploy.backends.tensorrt_api import Flavor
from rexdeploy.bundle.manifest import KEPT, REVISION, Artifact, BatchRange, ModelSpec
from rexdeploy.bundle.store import Bundle, check_writable, sha256
from rexdeploy.errors import BackendUnavailable, UsageError, VerificationFailed
from rexdeploy.graphs.cast import REVISIONS, beyond_fp16, to_precision
from rexdeploy.graphs.emulate import as_typed
from rexdeploy.graphs.engine_graph import Source, engine_form
from rexdeploy.graphs.products import precision_of, products
from rexdeploy.graphs.read import node_name, parse
from rexdeploy.graphs.wrapper import change_core, unwrap
from rexdeploy.images import decode, sets
from rexdeploy.minimal_set import minimal
from rexdeploy.parity.block_by_block import GraphWalk
from rexdeploy.parity.compare import Limits, Signal, compare
from rexdeploy.parity.layer_types import PROOF_REVISION, prove
from rexdeploy.parity.limits import LIMITS, ceiling
from rexdeploy.parity.localize import OWN_LIMITS, localize
from rexdeploy.parity.ranges import Ranges, measure_ranges
from rexdeploy.progress import Report, Result, silent
from rexdeploy.text import printable

STATE = "tune.json"
MIXED = "fp16.onnx"  # in place of the plain one, so that all that takes a float16 graph takes it
MAX_BLOCKS = 6  # of a ReXNet's 19: with more in float32 there is little left to gain from float16
MIN_SAMPLES, MAX_SAMPLES = 2, 256
TRIAL_BACKENDS = ("onnxruntime", *ENGINE_BACKENDS)
_BATCH = 4


@dataclass(frozen=True)
class Trial:
    """One mixed graph that was run."""

    float32: tuple[str, ...]  # the blocks that it keeps
    error: float | None  # of the logits, in units of signal; None where they are not finite
    share: float | None = None  # of the limit on the number that is nearest to its own, or over it
    nodes: tuple[str, ...] = ()  # of these blocks, the nodes that it keeps; empty: all of them

    @property
    def rank(self) -> float:
        """The share of its limits, with logits that are not finite behind all others."""
        return float("inf") if self.share is None else self.share

    @property
    def passes(self) -> bool:
        return self.rank <= 1


@dataclass(frozen=True, repr=False)
class Tuning(Result):
    """What a search came to."""

    bundle: Bundle
    images: str
    plain: Trial  # nothing kept
    best: Trial
    limits: Limits  # on the logits
    trials: int  # that this run made
    resumed: int  # that an earlier run had made
    ranges: Ranges
    written: str | None  # the mixed graph's file; None if nothing was to heal, or no cure

    @property
    def overflowing(self) -> int:
        """How many blocks hold values that float16 cannot."""
        return sum(bool(block.over) for block in self.ranges.blocks)

    @property
    def healed(self) -> bool:
        """Whether the best graph is within the limit."""
        return self.best.passes

    def __repr__(self) -> str:
        kept = ", ".join(self.best.float32) or "nothing"
        verdict = f"{kept} in float32" if self.healed else "NOT healed"
        return f"<Tuning of {self.bundle.path}: {verdict}, {self.trials} trials>"

    def _document(self) -> dict[str, Any]:
        names = ("images", "healed", "limits", "plain", "best", "written", "ranges")
        values = {name: getattr(self, name) for name in names}
        return {"bundle": printable(str(self.bundle.path)), **values}


@dataclass(frozen=True)
class _State:
    """What a search keeps in the bundle, to go on after an interruption."""

    key: str  # of everything that a trial's outcome depends on
    trials: tuple[Trial, ...] = ()


def tune_precision(
    bundle: Bundle | Path | str | None = None,
    *,
    images: Path | str | None = None,
    samples: int = 16,  # the first sixteen synthetic images are of every kind
    max_blocks: int = MAX_BLOCKS,
    backend: str = "onnxruntime",
    command: str = "rexdeploy tune-precision",
    report: Report = silent,
) -> Tuning:
    """Searches, and writes the mixed graph into the bundle in place of its float16 one.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. At most
    `samples` `images` of a folder are run, or synthetic ones, by the `backend`; an engine's has
    each trial built first. `command` is what the manifest says that made the graph.

    Blocks are ranked by what float16 does to each alone, taken into the set until the whole graph
    is within the limit, and put back one by one where it stays so; then, of these blocks, only the
    nodes at values that float16 cannot hold, if an engine can be proven to keep them. Every trial
    is a run of the whole graph, kept in the bundle: an interrupted search goes on where it was.

    Raises UsageError where the bundle has no float32 graph of ReXNet's blocks, or where nothing can
    be judged, and BackendUnavailable where the backend cannot run. Without a cure nothing is
    written: the result's `healed` is False.

    Example: `rexdeploy.tune_precision("rexnet_1.5", images="photos")`
    """
    if not MIN_SAMPLES <= samples <= MAX_SAMPLES:
        raise UsageError(f"samples: got {samples}, expected {MIN_SAMPLES} to {MAX_SAMPLES}")
    if max_blocks < 1:
        raise UsageError(f"max blocks: got {max_blocks}, expected at least 1")
    if backend not in TRIAL_BACKENDS:
        raise UsageError(f"backend: got '{backend}', expected one of {', '.join(TRIAL_BACKENDS)}")
    if backend in ENGINE_BACKENDS and machine.detect() is None:
        raise BackendUnavailable(f"no NVIDIA GPU driver on this machine, for {backend}")
    bundle = Bundle.find(bundle)
    root = bundle.manifest.graph
    if root is None:
        raise UsageError(f"{bundle.path} holds no ONNX graph; run 'rexdeploy export' first")
    preprocess = bundle.manifest.model.preprocess
    pixels, described = sets.pool(images, samples, preprocess)
    pool = decode.normalise(pixels, preprocess)
    check_writable(bundle.path)
    form = engine_form(Source(bundle), root, None, command, report)
    if form.made:
        bundle = bundle.update(*form.made, files=form.files)
    root, whole = form.artifact, parse(form.data, form.artifact.file)
    model = unwrap(whole)
    if precision_of(model) != "fp32":
        raise UsageError(f"{root.file} is not a float32 graph, so it leaves nothing to choose")
    report("measuring the blocks' ranges")
    walk = GraphWalk(model)
    ranges = measure_ranges(walk, pool)
    search = _Search(bundle, root, model, walk.node_names, pool, backend, max_blocks, report)
    best = plain = search.judge(())
    if not plain.passes:
        report("measuring each block in float16 alone")
        best = minimal(search.judge, _by_sensitivity(model, walk, pool), max_blocks)
        if best.passes:
            best = _fewer_nodes(search, best, _nodes_at_fault(model, ranges))
    is_cured = best.float32 and best.passes
    written = search.write(best, whole, command) if is_cured else None
    return Tuning(
        search.bundle,
        described,
        plain,
        best,
        search.limits,
        search.made,
        search.resumed,
        ranges,
        written,
    )


def _by_sensitivity(model: ModelProto, walk: GraphWalk, pool: Float32) -> list[str]:
    """The blocks' names, worst in float16 first: those that overflow, in the graph's order."""
    # Nodes whose very weights pass float16's limit stay float32 here; their block comes first.
    unfit = beyond_fp16(model)
    half = GraphWalk(to_precision(model, "fp16", unfit))
    result = localize(walk, half, pool, names=("float32", "float16"), limit=OWN_LIMITS["fp16"])
    errors = {
        block.name: float("inf") if walk.node_names[block.name] & unfit else block.own
        for block in result.blocks
    }
    return sorted(errors, key=lambda name: -errors[name])


def _nodes_at_fault(model: ModelProto, ranges: Ranges) -> set[str]:
    """The nodes that write or read what float16 cannot hold."""
    over = {name for block in ranges.blocks for name in block.over}
    values = {
        tensor for node in model.graph.node if node_name(node) in over for tensor in node.output
    }
    readers = {node_name(node) for node in model.graph.node if values & set(node.input)}
    return over | readers | beyond_fp16(model)


def _fewer_nodes(search: _Search, blocks: Trial, nodes: set[str]) -> Trial:
    """The trial with only these of its nodes in float32, if that heals as well and is kept."""
    if not nodes or not nodes < search.nodes_of(blocks):
        return blocks  # rounding, not overflow, or more than the blocks that are enough
    fewer = search.judge(blocks.float32, tuple(sorted(nodes)))
    return fewer if fewer.passes and search.is_kept(fewer) else blocks


def _most_trials(most: int) -> int:
    """None kept, doubling, bisecting, leaving one out at a time, and nodes instead of blocks."""
    steps = math.ceil(math.log2(most)) if most > 1 else 0
    return 1 + (1 + steps) + steps + (most - 1) + 1


class _Search:
    """Runs mixed graphs, and remembers what came out."""

    def __init__(
        self,
        bundle: Bundle,
        root: Artifact,
        model: ModelProto,
        blocks: dict[str, set[str]],
        pool: Float32,
        trials_on: str,
        max_blocks: int,
        report: Report,
    ) -> None:
        self.bundle, self.made = bundle, 0
        self._backend, self._most = trials_on, _most_trials(max_blocks)
        self._root, self._model, self._pool, self._report = root, model, pool, report
        self._spec: ModelSpec = bundle.manifest.model.core
        self._blocks = blocks  # the names of each one's nodes
        self._order = {name: index for index, name in enumerate(blocks)}
        self._seconds: list[float] = []
        self._size = root.batch.opt if root.batch else _BATCH
        with closing(open_backend("onnxruntime", model.SerializeToString(), self._spec)) as backend:
            self._reference = run_batches(backend, pool, [self._size]).by_image()
        self._signal = Signal.of(self._reference)
        self.limits = LIMITS["fp16"].at_most(ceiling(self._signal.constant))
        key = hashlib.sha256(
            f"{root.sha256} {self.limits} {onnx.__version__} {trials_on} "
            f"{REVISIONS['fp16']} {PROOF_REVISION} {tensorrt_build.BUILD_REVISION}".encode()
            + pool.tobytes()
        ).hexdigest()
        earlier = bundle.read_report(STATE, _State)
        self._state = earlier if earlier and earlier.key == key else _State(key)
        self.resumed = len(self._state.trials)

    def nodes_of(self, trial: Trial) -> set[str]:
        """The names of all nodes of the trial's blocks."""
        return set[str]().union(*(self._blocks[name] for name in trial.float32))

    def judge(self, blocks: Iterable[str], nodes: tuple[str, ...] = ()) -> Trial:
        """Runs the graph with these blocks, or nodes of them, in float32.

        What was run before, it remembers.
        """
        kept = tuple(sorted(blocks, key=self._order.__getitem__))
        for known in self._state.trials:
            if (known.float32, known.nodes) == (kept, nodes):
                return known
        number = len(self._state.trials) + 1
        named = ", ".join(kept) or "nothing"
        if nodes:
            named = f"{len(nodes)} nodes of {named}"
        left = float(np.mean(self._seconds or [0])) * max(1, self._most - number + 1)
        estimate = f", at most {left:.0f} s left" if left else ""
        self._report(f"trial {number} of at most {self._most}: {named} in float32{estimate}")
        start = time.perf_counter()
        trial = self._run(Trial(kept, None, nodes=nodes))
        self._seconds.append(time.perf_counter() - start)
        self.made += 1
        self._state = replace(self._state, trials=(*self._state.trials, trial))
        self.bundle = self.bundle.with_report(STATE, self._state, self._root)
        return trial

    def is_kept(self, trial: Trial) -> bool:
        """Whether an engine computes in float32 what the trial keeps: TensorRT-RTX may undo it."""
        mixed = self._mixed(trial)
        try:
            self._report("proving that an engine keeps these nodes")
            built = tensorrt_build.build(mixed.SerializeToString(), self._settings("rtx"))
        except BackendUnavailable:
            return False  # nobody knows without TensorRT-RTX: whole blocks are the safe choice
        return prove(built.layers, products(mixed)).holds

    def _settings(self, flavor: Flavor) -> tensorrt_build.EngineSettings:
        batch = BatchRange(self._size, self._size, self._size)
        return tensorrt_build.EngineSettings(flavor, batch, (), None)

    def _open(self, mixed: ModelProto) -> Backend:
        if self._backend == "onnxruntime":
            return open_backend(self._backend, as_typed(mixed).SerializeToString(), self._spec)
        settings = self._settings(flavor_of(self._backend))
        built = tensorrt_build.build(mixed.SerializeToString(), settings)
        return open_backend(self._backend, built.plan, self._spec)

    def _run(self, trial: Trial) -> Trial:
        """The trial with the mixed graph's logits held against the float32 graph's."""
        try:
            mixed = self._mixed(trial)
        except VerificationFailed:  # a weight that float16 cannot hold, outside these blocks
            return trial
        with closing(self._open(mixed)) as backend:
            rows = run_batches(backend, self._pool, [self._size])
        reference = self._reference[rows.images]
        comparison = compare(reference, rows.logits, signal=self._signal, limits=self.limits)
        if comparison.nonfinite:
            return trial
        return replace(trial, error=comparison.error, share=comparison.share)

    def write(self, trial: Trial, whole: ModelProto, command: str) -> str:
        """Puts the mixed graph into the bundle; engines of the graph that it replaces go."""
        mixed = change_core(whole, lambda _: self._mixed(trial))
        data = mixed.SerializeToString(deterministic=True)
        kept = ", ".join(trial.float32)
        notes = {REVISION: REVISIONS["fp16"], KEPT: kept, "error": f"{trial.error:.2g}"}
        notes |= {"float32_nodes": ", ".join(trial.nodes)} if trial.nodes else {}
        artifact = Artifact(
            "onnx",
            MIXED,
            sha256(data),
            parent_sha256=self._root.sha256,
            precision=None,  # of its products, some are float32
            batch=self._root.batch,
            built_with={"onnx": onnx.__version__} | notes,
            command=command,
        )
        self.bundle = self.bundle.update(artifact, files={artifact.file: data})
        return artifact.file

    def _mixed(self, trial: Trial) -> ModelProto:
        return to_precision(self._model, "fp16", trial.nodes or self.nodes_of(trial))
