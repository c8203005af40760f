"""Runs files along the chain, and holds each against what it was made from within its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

from onnx import ModelProto

from rexdeploy.arrays import Array, Images
from rexdeploy.backends import Kernels, Rows, open_backend, run_batches
from rexdeploy.bundle.manifest import BatchRange, InputForm, ModelSpec
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.graphs.cast import to_precision
from rexdeploy.graphs.emulate import Twin, as_typed, twin, widened
from rexdeploy.graphs.wrapper import unwrap
from rexdeploy.parity.candidates import MAX_GRAPH_BATCH, Candidate, Skipped, sizes
from rexdeploy.parity.compare import (
    Compared,
    Comparison,
    Limits,
    Signal,
    check_sums,
    comparable,
    compare,
)
from rexdeploy.parity.limits import (
    ENGINE_MARGIN,
    GRAPH_MARGIN,
    LIMITS,
    NO_DIFFERENCE,
    ceiling,
    float32_limits,
    rounding_limits,
)
from rexdeploy.parity.quantized import quantized_twin, written_out
from rexdeploy.parity.ranges import _PEAK_BATCH, _PEAK_IMAGES, Headroom, _headroom


@dataclass(frozen=True)
class _Rounding:
    """What rounding to a candidate's types does over the images."""

    numbers: Limits
    signal: Signal  # with the classes that rounding leaves something of
    logits: Array | None = None  # of the parent rounded, by image, as the largest batch gave them
    parent: str = ""  # whose twin that is


class Judge:
    """Runs candidates one after the other, parents first, and keeps what came out."""

    def __init__(
        self,
        inputs: Mapping[InputForm, Images],
        compared: Compared,
        reference: tuple[str, Array],
        signal: Signal,
        noise: Limits | None,
        candidates: Sequence[Candidate],
        default_range: BatchRange,
        most: int,
    ) -> None:
        """`reference`: its name and `comparable` logits `[N, classes]` over all images.

        `signal` is theirs, `noise` what `float32_limits` takes.

        `candidates` are all files that one to judge may have been made from. All images run in each
        candidate's largest batch (`default_range`: where it takes any), the first `most` of them in
        the smaller ones.
        """
        self.edges: list[Comparison] = []
        self.totals: list[Comparison] = []
        self.skipped: list[Skipped] = []
        self.broken: list[Skipped] = []  # what was refused or failed here: no comparison came of it
        self.headroom: list[Headroom] = []
        self.batches: set[int] = set()
        self.ran: set[str] = set()  # backends
        self.signal = signal
        self._inputs, self._compared, self._most = inputs, compared, most
        self._candidates = {candidate.file: candidate for candidate in candidates}
        self._default_range = default_range
        self._reference_name, logits = reference
        self._logits: dict[str, Array] = {self._reference_name: logits}  # by file and image
        self._float32 = float32_limits(noise)
        self._roundings: dict[str, _Rounding | None] = {}

    def run(self, candidate: Candidate, name: str) -> None:
        """Compares a candidate's logits with its parent's and with the reference's.

        TensorRT-RTX serves with two sets of kernels (`Kernels`), so both are judged.
        """
        has_run = self._run(candidate, name, f"{candidate.file} ({name})", "eager")
        if has_run and name == "tensorrt-rtx":
            label = f"{candidate.file} ({name}, fallback kernels)"
            self._run(candidate, name, label, "none")

    def _run(self, candidate: Candidate, name: str, label: str, kernels: Kernels) -> bool:
        """Whether the candidate ran; what came of it is kept."""
        if name == "openvino" and candidate.is_16_bit:
            reason = "OpenVINO computes in float32 here, which says nothing of a 16-bit graph"
            self.skipped.append(Skipped(candidate.parent, label, name, reason, by_choice=True))
            return False
        if candidate.narrow == "bf16" and name == "onnxruntime":
            label = f"{candidate.file} ({name}, bfloat16 emulated)"
        try:
            rows = self._rows(candidate, name, kernels)
        except BackendUnavailable as error:
            self.skipped.append(Skipped(candidate.parent, label, name, str(error)))
            return False
        except UsageError as error:
            raise UsageError(f"{candidate.file}: {error}") from None
        except RexdeployError as error:
            self.broken.append(Skipped(candidate.parent, label, name, str(error)))
            return False
        rounding = self._rounding(candidate) if candidate.narrow else None
        if self._is_strange(candidate, rounding):
            again = "quantize --calib DIR" if candidate.narrow == "int8" else "build-trt"
            reason = (
                "it is not the float32 graph that it was made from, in other types: its nodes are "
                f"others; make it again: rexdeploy {again} --force"
            )
            self.broken.append(Skipped(candidate.parent, label, name, reason))
            return False
        if candidate.narrow == "int8" and rounding is None:
            reason = "no float32 graph here has its nodes: nothing tells what its scales do"
            self.skipped.append(Skipped(candidate.parent, label, name, reason))
            return False
        exact = name == "onnxruntime" and rounding is not None and rounding.logits is not None
        limits = self._limits(candidate, rounding, GRAPH_MARGIN if exact else ENGINE_MARGIN)
        # Where a parent could not run, its own parent has to stand in: the reference.
        parent = candidate.parent if candidate.parent in self._logits else self._reference_name
        refusal = self._refusal(candidate, rounding, 1 if exact else ENGINE_MARGIN / 2)
        if refusal and rounding is not None:  # what no rounding can be is wrong all the same
            limits = self._float32.plus(ENGINE_MARGIN, rounding.numbers)
        signal = rounding.signal if rounding is not None else self.signal
        edge = self._compare(parent, label, rows, signal, limits)
        if candidate.is_equalized and name == "onnxruntime" and edge.error != 0:
            reason = f"equalised, it is not its parent to the bit: error {edge.error:.2g}"
            self.broken.append(Skipped(parent, label, name, reason))
            return False
        if refusal and not edge.failures:
            self.skipped.append(Skipped(parent, label, name, refusal))
        else:
            self.edges.append(edge)
        if rounding is not None and exact and not edge.nonfinite:
            if candidate.narrow == "int8":
                self._hold_as_written(candidate, rounding, counts=not refusal)
            else:
                self._hold_against_twin(candidate, label, rows, rounding)
        if parent != self._reference_name and not refusal:
            total = self._compare(self._reference_name, label, rows, signal, limits)
            self.totals.append(total)
        self._logits.setdefault(candidate.file, rows.by_image())
        return True

    def failures(self) -> list[str]:
        """Why the files that ran do not pass."""
        # Small errors along sound edges can add up to a broken total.
        failed = [item for item in self.edges if item.failures]
        failed = failed or [item for item in self.totals if item.failures]
        first: dict[str, Comparison] = {}  # of each candidate: one of its numbers is enough
        for item in failed:
            first.setdefault(item.candidate, item)
        failures = [
            f"broken edge {reference} -> {candidate}: {reason}"
            for reference, candidate, reason in (
                *((item.reference, item.candidate, item.reason) for item in self.broken),
                *((item.reference, item.candidate, item.failures[0]) for item in first.values()),
            )
        ]
        if not self.edges and not self.broken:
            reasons = "; ".join(f"{skip.candidate}: {skip.reason}" for skip in self.skipped)
            failures.append(
                f"nothing was compared: fewer than two backends ran ({reasons or 'no file fits'})"
            )
        return failures

    def _rows(self, candidate: Candidate, name: str, kernels: Kernels) -> Rows:
        model = candidate.model
        if name == "onnxruntime" and candidate.narrow:
            model = as_typed(candidate.graph).SerializeToString()
        wanted = self._sizes(candidate)
        with closing(open_backend(name, model, candidate.spec, kernels=kernels)) as backend:
            rows = run_batches(backend, self._inputs[candidate.spec.input], wanted, self._most)
        self.batches.update(wanted)
        self.ran.add(name)
        if candidate.spec.output == "probabilities":
            check_sums(rows.logits, exact=candidate.narrow is None or candidate.is_ours)
        return replace(rows, logits=comparable(rows.logits, candidate.spec.output, self._compared))

    def _is_strange(self, candidate: Candidate, rounding: _Rounding | None) -> bool:
        """Whether a graph of our making is not the float32 graph that it was made from.

        Without one it would be held to the looser limits of somebody else's.
        """
        if candidate.narrow == "int8":  # whatever it says that it was made from
            return rounding is None and candidate.kind == "onnx" and candidate.is_ours
        parent = self._candidates.get(candidate.parent)
        if parent is None or rounding is None or rounding.logits is not None:
            return False
        is_ours = candidate.kind == parent.kind == "onnx" and candidate.is_ours
        # Of somebody's own graph, whose opset bfloat16 may have to raise, the nodes can differ.
        is_like_it = candidate.spec.family != "onnx" or candidate.narrow == "fp16"
        return is_ours and is_like_it and parent.narrow is None

    def _sizes(self, candidate: Candidate) -> list[int]:
        return sizes(candidate, self._default_range)

    def _limits(self, candidate: Candidate, rounding: _Rounding | None, margin: float) -> Limits:
        if candidate.narrow is None:
            return self._float32
        if rounding is None:  # nothing here can measure it
            rounding, margin = _Rounding(LIMITS[candidate.narrow], self.signal), 1
        return rounding_limits(
            self._float32, rounding.numbers, margin, candidate.narrow, self.signal.constant
        )

    def _refusal(self, candidate: Candidate, rounding: _Rounding | None, room: float) -> str | None:
        """Why a limit with room for honest rounding would let an answer of any image pass."""
        if candidate.narrow is None or rounding is None:
            return None
        allowed = ceiling(self.signal.constant)
        needed = NO_DIFFERENCE.plus(room, rounding.numbers)
        if allowed.hold(needed) or not LIMITS[candidate.narrow].hold(rounding.numbers):
            return None  # there is room, or it fails by what no graph may do
        other = "--bf16" if candidate.narrow == "fp16" else "float16"
        other += ", or 'rexdeploy tune-precision'" if candidate.narrow != "int8" else ""
        return (
            f"rounding to {candidate.narrow} alone makes an error of {rounding.numbers.error:.2g} "
            f"(root mean square {rounding.numbers.rms:.2g}) of the signal, and an answer that "
            f"ignores its image has {self.signal.constant.error:.2g} "
            f"({self.signal.constant.rms:.2g}) on these images: too near to judge; more or other "
            f"images (--samples, --images), or {other} may help"
        )

    def _hold_against_twin(
        self, candidate: Candidate, label: str, rows: Rows, rounding: _Rounding
    ) -> None:
        """Compares the largest batch's rows with those of the parent, rounded alike."""
        assert rounding.logits is not None
        last = slice(len(rows.images) - rows.last, None)
        comparison = compare(
            rounding.logits[rows.images[last]],
            rows.logits[last],
            names=(f"{rounding.parent}, rounded", label),
            signal=self.signal,
            limits=self._float32,
        )
        # Another converter may round elsewhere: then the margin on its rounding is all there is.
        if candidate.is_ours or not comparison.failures:
            self.edges.append(self._if_reproducible(candidate, comparison, rounding))

    def _hold_as_written(self, candidate: Candidate, rounding: _Rounding, counts: bool) -> None:
        """Compares what an INT8 graph says with its parent, rounded alike, by the same arithmetic.

        Where its kernels, which round halves otherwise, were refused, it `counts` as no pass.
        """
        model = written_out(candidate.graph)
        assert model is not None and rounding.logits is not None  # noqa: PT018
        comparison = compare(
            rounding.logits,
            self._by_image(model, candidate.spec, self._sizes(candidate)[-1]),
            names=(f"{rounding.parent}, rounded", f"{candidate.file} (as written)"),
            signal=self.signal,
            limits=self._float32,
        )
        if (candidate.is_ours or not comparison.failures) and (counts or comparison.failures):
            self.edges.append(comparison)

    def _if_reproducible(
        self, candidate: Candidate, comparison: Comparison, rounding: _Rounding
    ) -> Comparison:
        """The comparison, with room for what our own conversion does here, if that is not exact.

        On x86 onnxruntime computes both in float32 and they agree to the bit; one with float16
        kernels of its own (64-bit Arm has some) may round sums as well.
        """
        if not comparison.failures or comparison.nonfinite:
            return comparison
        parent = self._candidates[rounding.parent]
        found = twin(parent.graph, candidate.graph)
        assert found is not None
        assert candidate.narrow is not None
        core = unwrap(parent.graph)
        converted = to_precision(core, candidate.narrow, found.float32)
        # Against its own twin, not the candidate's: what a candidate rounds elsewhere is its own
        # doing, and says nothing of the runtime.
        sound = twin(core, converted)
        assert sound is not None
        size = self._sizes(candidate)[-1]
        spread = compare(
            self._by_image(sound.model, parent.spec.core, size),
            self._by_image(as_typed(converted), parent.spec.core, size),
            signal=self.signal,
            limits=self._float32,
        )
        if not spread.failures:
            return comparison
        room = self._float32.plus(2, spread.numbers)
        most = self._float32.plus(1.5, rounding.numbers)
        return replace(comparison, limits=room.at_most(most))

    def _rounding(self, candidate: Candidate) -> _Rounding | None:
        """What rounding does to a candidate; None where it cannot be measured here."""
        if candidate.file not in self._roundings:
            try:
                self._roundings[candidate.file] = self._measure(candidate)
            except BackendUnavailable:
                self._roundings[candidate.file] = None
        return self._roundings[candidate.file]

    def _measure(self, candidate: Candidate) -> _Rounding | None:
        if candidate.kind == "engine":
            graph = self._candidates.get(candidate.parent)
            if graph is not None and graph.kind == "onnx":
                return self._rounding(graph) if graph.narrow else None
            return self._of_conversion(candidate)
        if candidate.built_in is not None:
            return None  # in types that nothing here can round to
        size = self._sizes(candidate)[-1]
        if candidate.narrow == "int8":
            return self._of_quantization(candidate, size)
        for parent in self._float32_graphs(candidate):
            found = twin(parent.graph, candidate.graph)
            if found is not None:
                rounding, headroom = self._of_twin(parent, found, size)
                if headroom:
                    self.headroom.append(replace(headroom, file=candidate.file))
                return rounding
        models = (widened(candidate.graph), as_typed(candidate.graph))
        return self._rounded(*(self._by_image(model, candidate.spec, size) for model in models))

    def _of_quantization(self, candidate: Candidate, size: int) -> _Rounding | None:
        """What rounding by its scales does to its parent: corrected biases make no room here."""
        own_biases = candidate.claimed is None or candidate.claimed.has_own_biases
        for parent in self._float32_graphs(candidate):
            model = quantized_twin(parent.graph, candidate.graph, own_biases=False)
            if model is None:
                continue
            logits = self._by_image(model, parent.spec, size)
            expected = self._logits.get(parent.file, self._logits[self._reference_name])
            rounding = self._rounded(expected, logits)
            if own_biases and (own := quantized_twin(parent.graph, candidate.graph, True)):
                logits = self._by_image(own, parent.spec, size)
            return replace(rounding, logits=logits, parent=parent.file)
        return None

    def _of_conversion(self, candidate: Candidate) -> _Rounding | None:
        """Of an engine from elsewhere: what our own conversion to its type would do."""
        assert candidate.narrow is not None
        if candidate.narrow == "int8":
            return None  # by which scales, nobody knows
        for parent in self._float32_graphs(candidate):
            core_graph = unwrap(parent.graph)
            found = twin(core_graph, to_precision(core_graph, candidate.narrow))
            if found is not None:
                core = replace(parent, spec=parent.spec.core)
                return self._of_twin(core, found, self._default_range.samples()[-1])[0]
        return None

    def _of_twin(
        self, parent: Candidate, found: Twin, size: int
    ) -> tuple[_Rounding, Headroom | None]:
        """What rounding does to the parent, and the largest value that float16 has to hold."""
        fixed = parent.batch.opt if parent.batch else size
        logits = self._by_image(found.model, parent.spec, fixed)
        expected = self._logits.get(parent.file, self._logits[self._reference_name])
        rounding = replace(self._rounded(expected, logits), logits=logits, parent=parent.file)
        pool = self._inputs[parent.spec.input][:_PEAK_IMAGES]
        return rounding, _headroom(found, pool, min(fixed, _PEAK_BATCH))

    def _rounded(self, expected: Array, got: Array) -> _Rounding:
        signal = self.signal.under(expected, got)
        spread = compare(expected, got, signal=signal, limits=self._float32)
        return _Rounding(spread.numbers, signal)

    def _float32_graphs(self, candidate: Candidate) -> list[Candidate]:
        """Graphs that a candidate may have been made from, its parent first."""
        others = (item for item in self._candidates.values() if item.file != candidate.file)
        graphs = [item for item in others if item.kind == "onnx" and item.narrow is None]
        return sorted(graphs, key=lambda item: item.file != candidate.parent)

    def _by_image(self, model: ModelProto, spec: ModelSpec, size: int) -> Array:
        """A graph's logits by image, in batches of one size."""
        with closing(open_backend("onnxruntime", model.SerializeToString(), spec)) as backend:
            rows = run_batches(backend, self._inputs[spec.input], [min(size, MAX_GRAPH_BATCH)])
        return comparable(rows.by_image(), spec.output, self._compared)

    def _compare(
        self, reference: str, label: str, rows: Rows, signal: Signal, limits: Limits
    ) -> Comparison:
        return compare(
            self._logits[reference][rows.images],
            rows.logits,
            names=(reference, label),
            signal=signal,
            limits=limits,
        )
