"""An INT8 graph in a bundle: only if it is accurate enough, and faster."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from rexdeploy import machine
from rexdeploy.backends.onnxrt import fused
from rexdeploy.bundle.labels import read_labels
from rexdeploy.bundle.store import Bundle, check_writable
from rexdeploy.errors import UsageError
from rexdeploy.graphs import quantize as ops
from rexdeploy.graphs.engine_graph import Form, Source, engine_form
from rexdeploy.graphs.read import parse
from rexdeploy.graphs.wrapper import unwrap
from rexdeploy.images import decode
from rexdeploy.images.calibration import read_pools
from rexdeploy.interleaved import Ratio
from rexdeploy.parity.compare import Limits
from rexdeploy.parity.int8_bar import Bar, Trial
from rexdeploy.progress import Report, Result, silent
from rexdeploy.steps.int8_search import FILES, Search, Timed
from rexdeploy.text import printable

AGREEMENT = 0.99  # of answers with the float32 graph's, where no labels are given
MAX_DROP = 0.5  # points of top-1, where they are
MAX_BLOCKS = 6
MIN_OPSET = 13  # the first in which a weight has a scale for each channel
FASTER = 1.02  # what the interval of the ratio has to lie above


@dataclass(frozen=True, repr=False)
class Quantization(Result):
    """What an INT8 graph of a network comes to; for TensorRT it is judged by its accuracy alone."""

    bundle: Bundle
    target: ops.Target
    machine: dict[str, str]
    calibrated: str
    judged: str
    bar: str
    limits: Limits  # on the logits, whatever the bar
    trials: tuple[Trial, ...]
    best: Trial
    reduced: bool  # weights of 7 bits
    float32_ms: float | None
    timed: tuple[Timed, ...]  # the best last; none where nothing here runs it
    products: tuple[int, int] | None  # in int8 and in other types, as ONNX Runtime runs them
    float_operators: tuple[str, ...]
    refused: tuple[str, ...]  # why it is not accepted
    written: str | None
    warnings: tuple[str, ...] = ()
    resumed: int = 0

    @property
    def accepted(self) -> bool:
        """Whether it is accurate enough and faster."""
        return not self.refused

    def __repr__(self) -> str:
        verdict = "accepted" if self.accepted else f"NOT accepted: {self.refused[0]}"
        return f"<Quantization of {self.bundle.path}: {self.best.title}; {verdict}>"

    def _document(self) -> dict[str, Any]:
        names = (
            *("target", "machine", "calibrated", "judged", "bar", "accepted", "refused"),
            *("best", "trials", "reduced", "float32_ms", "timed", "products", "float_operators"),
            *("written", "warnings"),
        )
        values = {name: getattr(self, name) for name in names}
        return {"bundle": printable(str(self.bundle.path)), **values}


def quantize(
    bundle: Bundle | Path | str | None = None,
    *,
    calib: Path | str,
    target: str = "cpu",
    data: Path | str | None = None,
    agreement: float = AGREEMENT,
    max_drop: float = MAX_DROP,
    max_blocks: int = MAX_BLOCKS,
    reduce_range: bool = False,
    keep: bool = False,
    force: bool = False,
    command: str = "rexdeploy quantize",
    report: Report = silent,
) -> Quantization:
    """Makes an INT8 graph of a bundle's float32 one, and keeps it if it is accurate and faster.

    `bundle` is one, its folder, its name in artifacts/, or None: the latest one there. Ranges come
    from images of `calib`. The graph is judged by the share of its answers that are the float32
    graph's (`agreement`, over other images of `calib`), or with labelled images in `data` (see
    `find_labelled`) by the points of top-1 it loses (`max_drop`). `target` is "cpu", for ONNX
    Runtime, or "trt", a graph for TensorRT. Where the bar is missed: biases are corrected, channels
    equalised, and up to `max_blocks` blocks given back to float32. `reduce_range` takes weights of
    7 bits, as it does by itself on a processor without VNNI. `keep` writes what is not accepted,
    too, and marks it; `force` replaces what is there.

    Raises UsageError for what cannot be quantised or judged. A graph that misses its bar, or is not
    2 % faster than the float32 one in the same rounds, is in the result with its reasons.

    Example: `rexdeploy.quantize("mine", calib="train", data="val")`
    """
    wanted = _check_options(target, agreement, max_drop, max_blocks)
    bundle = Bundle.find(bundle)
    bundle, form = _float32_form(bundle, wanted, force, command, report)
    whole = parse(form.data, form.artifact.file)
    opset = next((e.version for e in whole.opset_import if not e.domain), 0)
    if opset < MIN_OPSET:
        raise UsageError(
            f"{form.artifact.file} is of opset {opset}, and INT8 by channel needs {MIN_OPSET}; "
            "export it again with a later one"
        )
    check_writable(bundle.path)
    warnings = []
    saturates = not machine.has_int8() and wanted == "cpu"
    if saturates and not reduce_range:
        warnings.append("this processor has no VNNI, whose sums saturate: weights have 7 bits")
        reduce_range = True
    model = unwrap(whole)
    report("reading images")
    spec = bundle.manifest.model
    labels, where = read_labels(bundle), None if data is None else Path(data)
    pools = read_pools(Path(calib), where, labels, spec.preprocess)
    batch = form.artifact.batch
    core = model.SerializeToString()
    bar = Bar(core, spec, batch, pools.judged, pools.shown, agreement, max_drop)
    calibrated = decode.normalise(pools.calibrated, spec.preprocess)
    search = Search(bundle, form.artifact, model, bar, calibrated, wanted, reduce_range, report)
    best = search.best(max_blocks)
    timed: tuple[Timed, ...] = ()
    float32_ms, counted = None, None
    refused = bar.refusals(best)
    if wanted == "cpu":
        counted = ops.quantized_products(onnx.load_from_string(fused(search.model(best))))
        if not counted[0]:
            refused.append("ONNX Runtime runs none of its products in int8")
        report("timing")
        float32_ms, timed = search.time(best)
        refused += slow(timed[-1].ratio)
    else:
        warnings.append("its speed is not judged: nothing here runs it as TensorRT would")
    written = None
    if not refused or keep:
        written = search.write(best, whole, refused, pools.calibrated_as, command)
    else:
        search.refuse_earlier(refused)
    return Quantization(
        bundle=search.bundle,
        target=wanted,
        machine=machine.machine(),
        calibrated=pools.calibrated_as,
        judged=pools.judged_as,
        bar=str(bar),
        limits=bar.limits,
        trials=search.trials,
        best=best,
        reduced=reduce_range,
        float32_ms=float32_ms,
        timed=timed,
        products=counted,
        float_operators=tuple(ops.float_operators(model)),
        refused=tuple(refused),
        written=written,
        warnings=(*warnings, *pools.warnings, *search.warnings),
        resumed=search.resumed,
    )


def slow(ratio: Ratio) -> list[str]:
    """Why a graph is not fast enough, by how many times as fast it is; empty if it is."""
    if ratio.interval is not None and ratio.interval[0] >= FASTER:
        return []
    return [f"it is {ratio} times as fast as the float32 graph, expected 95 % above {FASTER}"]


def _check_options(target: str, agreement: float, max_drop: float, max_blocks: int) -> ops.Target:
    if not 0 < agreement <= 1:
        raise UsageError(f"agreement: got {agreement:g}, expected a share above 0, such as 0.99")
    if not 0 <= max_drop <= 100:
        raise UsageError(f"max drop: got {max_drop:g}, expected points of top-1, 0 to 100")
    if max_blocks < 0:
        raise UsageError(f"max blocks: got {max_blocks}, expected 0 or more")
    for known in ops.TARGETS:
        if target == known:
            return known
    raise UsageError(f"target: got '{target}', expected {' or '.join(ops.TARGETS)}")


def _float32_form(
    bundle: Bundle, target: ops.Target, force: bool, command: str, report: Report
) -> tuple[Bundle, Form]:
    """The graph to quantise, in the bundle; raises UsageError for what cannot be."""
    manifest = bundle.manifest
    root = manifest.graph
    if root is None:
        raise UsageError(f"{bundle.path} holds no ONNX graph; run 'rexdeploy export' first")
    if not manifest.model.weights.trained:
        raise UsageError(
            f"{bundle.path} holds untrained weights, of which INT8 leaves 10 to 30 % of the "
            "answers: nothing could be judged; export a trained checkpoint"
        )
    file = FILES[target]
    if manifest.find_file(file) is not None and not force:
        raise UsageError(f"{bundle.path} holds {file} already; --force makes it anew")
    if target == "trt":
        form = engine_form(Source(bundle), root, None, command, report)
        if form.made:
            bundle = bundle.update(*form.made, files=form.files)
    else:
        form = Form(root, bundle.read(root), (), {})
    if form.artifact.precision != "fp32":
        raise UsageError(f"{form.artifact.file} is not a float32 graph, which INT8 is made from")
    return bundle, form
