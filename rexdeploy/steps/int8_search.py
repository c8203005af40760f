"""Searches for the plainest INT8 graph that passes its bar, and times it; goes on where it was."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import ModelProto

from rexdeploy.arrays import Float32
from rexdeploy.backends import open_backend
from rexdeploy.backends.onnxrt import GraphSession
from rexdeploy.bundle.manifest import (
    BIASES,
    CHANNELS,
    INT8,
    INT8_TRT,
    KEPT,
    REFUSED,
    REVISION,
    SPEED,
    WEIGHT_BITS,
    Artifact,
)
from rexdeploy.bundle.store import Bundle, sha256
from rexdeploy.errors import RexdeployError, UsageError
from rexdeploy.graphs import quantize as ops
from rexdeploy.graphs.products import precision_of
from rexdeploy.graphs.wrapper import change_core
from rexdeploy.interleaved import Ratio, Task, paired_ratio, time_rounds
from rexdeploy.machine import machine
from rexdeploy.minimal_set import minimal
from rexdeploy.parity.block_by_block import GraphWalk
from rexdeploy.parity.int8_bar import Bar, Trial
from rexdeploy.progress import Report, silent

if TYPE_CHECKING:
    from onnxruntime.quantization.calibrate import TensorsData

FILES: dict[ops.Target, str] = {"cpu": INT8, "trt": INT8_TRT}
STATES: dict[ops.Target, str] = {"cpu": "quantize.json", "trt": "quantize.tensorrt.json"}
ROUNDS = 60
_CORRECTED = 64  # images that biases are corrected by
_TIMED = 6  # graphs at the most, beside the float32 one


@dataclass(frozen=True)
class Timed:
    """A graph's time beside the float32 one's, batch 1, one thread, in the same rounds."""

    trial: Trial
    ms: float  # the median
    ratio: Ratio  # of the float32 graph's time to its own


@dataclass(frozen=True)
class _State:
    """What a search keeps in the bundle, to go on after an interruption."""

    key: str  # of everything that a trial's outcome depends on
    trials: tuple[Trial, ...] = ()
    alone: dict[str, float] = field(default_factory=dict)  # rms of a trial with one block in int8


def _run(model: ModelProto, images: Float32) -> dict[str, Float32]:
    """All outputs of a graph with float32 input, in batches."""
    session = GraphSession(model.SerializeToString())
    name, outputs = model.graph.input[0].name, [value.name for value in model.graph.output]
    parts = [session.run({name: batch}, outputs) for batch in ops.batches(model, images, ops.BATCH)]
    return {output: np.concatenate([part[output] for part in parts]) for output in outputs}


class Search:
    """Makes INT8 graphs and judges them, and remembers what came out."""

    def __init__(
        self,
        bundle: Bundle,
        root: Artifact,
        model: ModelProto,
        bar: Bar,
        calibrated: Float32,
        target: ops.Target,
        reduce_range: bool,
        report: Report,
    ) -> None:
        self.bundle = bundle
        self._root, self._model, self._bar, self._calibrated = root, model, bar, calibrated
        self._target, self._reduce, self._report = target, reduce_range, report
        self._ranges: dict[tuple[ops.Method, bool], TensorsData] = {}
        self._models: dict[tuple[object, ...], bytes] = {}
        self._found: dict[bool, dict[str, set[str]]] = {}  # blocks, by whether it is equalised
        import onnxruntime

        key = hashlib.sha256(
            f"{root.sha256} {target} {reduce_range} {ops.REVISION} "
            f"{onnx.__version__} {onnxruntime.__version__}".encode()
            + bar.key
            + calibrated.tobytes()
        ).hexdigest()
        self.warnings: list[str] = []
        earlier = bundle.read_report(STATES[target], _State)
        self._state = earlier if earlier and earlier.key == key else _State(key)
        self.resumed = len(self._state.trials)

    @property
    def trials(self) -> tuple[Trial, ...]:
        return self._state.trials

    def best(self, max_blocks: int) -> Trial:
        """The first graph that passes, from the plainest on, or else the nearest."""
        plain = min((self.judge(Trial(method)) for method in ops.METHODS), key=_rank)
        if plain.passes:
            return plain
        tried = [plain, self.judge(replace(plain, corrected=True))]
        for corrected in (False, True):
            if min(tried, key=_rank).passes or self._equalized == self._model:
                break
            for method in dict.fromkeys(("minmax", plain.method)):
                tried.append(self.judge(Trial(method, equalized=True, corrected=corrected)))
        best = min(tried, key=_rank)
        if best.passes or not max_blocks:
            return best
        return min((best, self._with_blocks(best, max_blocks)), key=_rank)

    def _with_blocks(self, base: Trial, most: int) -> Trial:
        """The trial with few blocks given back to float32, the worst first."""
        try:
            blocks = self._blocks(base.equalized)
        except UsageError as error:
            self.warnings.append(f"no blocks can be given back to float32: {error}")
            return base
        order = {name: index for index, name in enumerate(blocks)}
        every = set[str]().union(*blocks.values())
        alone = {name: self._alone(base, name, every - nodes) for name, nodes in blocks.items()}

        def judge(names: Iterable[str]) -> Trial:
            kept = tuple(sorted(names, key=order.__getitem__))
            return self.judge(replace(base, float32=kept))

        return minimal(judge, sorted(alone, key=lambda name: -alone[name]), most)

    def judge(self, asked: Trial) -> Trial:
        """Makes and runs a graph; what was run before, it remembers."""
        settings = (asked.method, asked.equalized, asked.corrected, asked.float32)
        for known in self._state.trials:
            if (known.method, known.equalized, known.corrected, known.float32) == settings:
                return known
        self._report(f"trial {len(self._state.trials) + 1}: {asked.title}")
        trial = self._bar.judged(Trial(*settings), self.model(asked))
        self._keep(replace(self._state, trials=(*self._state.trials, trial)))
        return trial

    def _alone(self, base: Trial, name: str, others: set[str]) -> float:
        """What a block in int8 does to the logits where all `others` are float32."""
        key = f"{base.title}: {name}"
        if key not in self._state.alone:
            self._report(f"{name} in int8 alone")
            made = self._graph(base, others).SerializeToString()
            found = self._bar.judged(base, made).rms
            self._keep(replace(self._state, alone=self._state.alone | {key: found}))
        return self._state.alone[key]

    def _keep(self, state: _State) -> None:
        self._state = state
        self.bundle = self.bundle.with_report(STATES[self._target], state, self._root)

    def model(self, trial: Trial) -> bytes:
        """The trial's graph, its core only."""
        key = (trial.method, trial.equalized, trial.corrected, trial.float32)
        if key not in self._models:
            blocks = self._blocks(trial.equalized) if trial.float32 else {}
            nodes = set[str]().union(*(blocks[name] for name in trial.float32))
            made = self._graph(trial, nodes)
            self._models[key] = made.SerializeToString(deterministic=True)
        return self._models[key]

    def write(
        self, trial: Trial, whole: ModelProto, refused: list[str], calibrated_as: str, command: str
    ) -> str:
        """Puts the graph into the bundle, and before it the equalised one that it is made from."""
        parent, made, files = self._root, [], {}
        if trial.equalized:
            data = change_core(whole, lambda _: self._base(True)).SerializeToString(
                deterministic=True
            )
            file = parent.file.replace(".onnx", ".equalized.onnx")
            notes = {"onnx": onnx.__version__, REVISION: ops.REVISION, CHANNELS: "equalised"}
            parent = replace(
                parent,
                file=file,
                sha256=sha256(data),
                parent_sha256=parent.sha256,
                built_with=notes,
                command=command,
            )
            made.append(parent)
            files[file] = data
        core = onnx.load_from_string(self.model(trial))
        data = change_core(whole, lambda _: core).SerializeToString(deterministic=True)
        notes = {
            "onnx": onnx.__version__,
            REVISION: ops.REVISION,
            "target": self._target,
            "judged_on": machine()["processor"],
            "quantised": trial.title,
            WEIGHT_BITS: "7" if self._reduce else "8",
            "agreement": f"{trial.agreement:.4f}",
            "calibrated": calibrated_as,
        }
        notes |= {BIASES: "corrected"} if trial.corrected else {}
        notes |= {KEPT: ", ".join(trial.float32)} if trial.float32 else {}
        notes |= {REFUSED: "; ".join(refused)} if refused else {}
        notes |= {SPEED: "not judged: nothing here runs it"} if self._target == "trt" else {}
        artifact = Artifact(
            "onnx",
            FILES[self._target],
            sha256(data),
            parent_sha256=parent.sha256,
            precision=precision_of(core),
            batch=self._root.batch,
            built_with=notes,
            command=command,
        )
        files[artifact.file] = data
        self.bundle = self.bundle.update(*made, artifact, files=files)
        return artifact.file

    def refuse_earlier(self, refused: list[str]) -> None:
        """Marks the graph that is there from before: nothing takes what is not accepted now."""
        earlier = self.bundle.manifest.find_file(FILES[self._target])
        if earlier is not None:
            notes = earlier.built_with | {REFUSED: f"judged again: {'; '.join(refused)}"}
            self.bundle = self.bundle.update(replace(earlier, built_with=notes), files={})

    def time(self, best: Trial) -> tuple[float, tuple[Timed, ...]]:
        """The float32 graph's time, and those of the graphs on the way to the best; it is last."""
        nearest = {len(item.float32): item for item in sorted(self.trials, key=lambda t: -t.rank)}
        others = [trial for _, trial in sorted(nearest.items()) if trial != best]
        chosen = [*others[: _TIMED - 1], best]
        models = [self._model.SerializeToString(), *map(self.model, chosen)]
        spec, batch = self.bundle.manifest.model.core, self._root.batch
        size = batch.opt if batch else 1
        images = self._calibrated[np.arange(size) % len(self._calibrated)]
        with ExitStack() as stack:
            tasks = []
            for model in models:
                backend = open_backend("onnxruntime", model, spec, threads=1, spin=True)
                stack.callback(backend.close)
                tasks.append(Task(functools.partial(backend.run, images)))
            rounds = time_rounds(tasks, ROUNDS, silent)
        if rounds.interrupted:
            raise KeyboardInterrupt
        if rounds.faults:
            raise RexdeployError(f"timing: {next(iter(rounds.faults.values()))}")
        own, *rest = rounds.samples_ms
        timed = [
            Timed(trial, float(np.median(taken)), paired_ratio(own, taken))
            for trial, taken in zip(chosen, rest, strict=True)
        ]
        return float(np.median(own)), tuple(timed)

    @functools.cached_property
    def _equalized(self) -> ModelProto:
        self._report("equalising channels")
        return ops.equalized(self._model, self._calibrated[:_CORRECTED], _run)

    def _blocks(self, equalized: bool) -> dict[str, set[str]]:
        """The names of each block's nodes; raises UsageError for what is no ReXNet."""
        if equalized not in self._found:
            names = GraphWalk(self._base(equalized)).node_names
            self._found[equalized] = {name: nodes for name, nodes in names.items() if nodes}
        return self._found[equalized]

    def _base(self, equalized: bool) -> ModelProto:
        return self._equalized if equalized else self._model

    def _graph(self, trial: Trial, keep: set[str]) -> ModelProto:
        base = self._base(trial.equalized)
        kind = (trial.method, trial.equalized)
        if kind not in self._ranges:
            self._report(f"taking ranges ({trial.method})")
            self._ranges[kind] = ops.calibrate(base, self._calibrated, trial.method)
        made = ops.quantized(base, self._ranges[kind], self._target, keep, self._reduce)
        if trial.corrected:
            made = ops.corrected(made, base, self._calibrated[:_CORRECTED], _run)
        return made


def _rank(trial: Trial) -> float:
    return trial.rank
