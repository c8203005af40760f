"""What each command's result looks like in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rexdeploy.bench.ratios import paired_ratio
from rexdeploy.console import print_table, say
from rexdeploy.text import one_line

if TYPE_CHECKING:
    from rexdeploy.bench.competitors import Latency
    from rexdeploy.bench.harness import Benchmark
    from rexdeploy.bundle.manifest import Artifact
    from rexdeploy.bundle.store import Bundle
    from rexdeploy.inference.classifier import Classifier
    from rexdeploy.inference.rows import Results
    from rexdeploy.inference.stream import Row
    from rexdeploy.models.zoo import Cost, PaperRow, Published
    from rexdeploy.parity.localize import Localization
    from rexdeploy.parity.ranges import Ranges
    from rexdeploy.serving.deploy import Deployment
    from rexdeploy.serving.processes import Binary
    from rexdeploy.serving.repository import Deployed
    from rexdeploy.serving.server import Address, Guard
    from rexdeploy.steps.build import BuildResult
    from rexdeploy.steps.export import ExportResult
    from rexdeploy.steps.inspection import Inspection
    from rexdeploy.steps.tune import Trial, Tuning
    from rexdeploy.steps.verify import Verification


def show_export(result: ExportResult) -> None:
    """The new bundle's graph, and how far it is from the network."""
    graph = result.bundle.manifest.find("onnx", "fp32")
    padded = graph.built_with["align"] if graph else "off"
    last = result.comparisons[-1]
    worst = max(result.comparisons, key=lambda comparison: comparison.error)
    model = result.bundle.manifest.model
    say(
        model.title,
        f"  {_describe(result.bundle, graph)}, {result.nodes} nodes "
        f"({result.nodes_before} before simplification)",
        f"  channels padded to a multiple of {padded}" if padded != "off" else None,
        f"  takes {model.input}, gives {model.output}" if model != model.core else None,
        f"  torch -> {last.candidate}: error {worst.error:.1e} of the signal "
        f"(limit {worst.limits.error:.1g}), top-1 agreement {last.top1:.0%}",
        "next: rexdeploy build-trt --fp16",
    )


def show_build(result: BuildResult) -> None:
    """The engine, and the proof of its precision."""
    model, built = result.bundle.manifest.model, result.engine.built_with
    say(
        model.title,
        f"  {_describe(result.bundle, result.engine)}",
        f"  {built.get('flavor')} {built.get('version')}, for {built.get('targets')}",
        f"  precision: {result.engine.proof.summary}" if result.engine.proof else None,
        "  preprocessing is taken to be ImageNet's (mean, std, 87.5 % centre crop)"
        if model.family == "onnx"
        else None,
        "  unchanged: answered from the bundle (--force rebuilds)" if result.reused else None,
        "next: rexdeploy verify",
    )


def show_inspection(result: Inspection) -> None:
    """The file's header or signature, its place, the proof of its precision, what runs it here."""
    header, graph, place, proof = result.header, result.graph, result.place, result.proof
    say(f"{result.file}: {result.kind}, {result.size_bytes / 2**20:.1f} MiB")
    if header is not None:
        targets = f", for {', '.join(header.targets)}" if header.targets else ""
        say(f"  version {header.version or 'not told by its header'}{targets}")
    if graph is not None:
        say(
            f"  opset {graph.opset}, {graph.nodes} nodes",
            *(f"  input {line}" for line in graph.inputs),
            *(f"  output {line}" for line in graph.outputs),
            *(f"  {one_line(f'{name} = {text}', 160)}" for name, text in graph.metadata.items()),
        )
    if place is None:
        say("  bundle: in none")
    else:
        say(f"  bundle: {place.bundle}, {place.model}: {' -> '.join(place.chain)}")
        if place.artifact.batch is not None:
            say(f"  batch {place.artifact.batch}")
    say(
        f"  precision: {proof.summary}" if proof else None,
        f"  precision, by: {result.proof_of}" if proof else f"  precision: {result.proof_of}",
        f"  not as asked: {_listed(proof.differing)}" if proof and proof.differing else None,
        f"  not found in it: {_listed(proof.not_found)}" if proof and proof.not_found else None,
        *(
            f"  {runner.backend}: {'can load it here (not run)' if runner.ready else 'no: '}"
            f"{runner.reason}"
            for runner in result.runners
        ),
    )


def show_verification(bundle: Bundle, result: Verification, every_block: bool) -> None:
    """Every comparison, what was skipped and why, and the verdict."""
    from rexdeploy.parity.compare import correlation_text
    from rexdeploy.parity.judge import HEADROOM

    batches = ", ".join(map(str, result.batches)) or "none"
    say(
        f"{bundle.path}, {result.model}: {result.images}, batches {batches}; "
        f"signal {result.signal:.3g}" + f" ({result.compared})" * (result.compared != "logits")
    )
    columns = ("edge", "error / limit", "rms / limit", "class r / limit", "top-1", "verdict")
    lines = [
        (
            f"{comparison.reference} -> {comparison.candidate}",
            f"{comparison.error:.2g} / {comparison.limits.error:.2g}",
            f"{comparison.rms:.2g} / {comparison.limits.rms:.2g}",
            f"{correlation_text(comparison.correlation)} / "
            f"{correlation_text(comparison.limits.correlation)}",
            f"{comparison.top1:.1%}",
            "FAILED" if comparison.failures else "ok",
        )
        for comparison in (*result.edges, *result.totals)
    ]
    for verdict, items in (("FAILED", result.broken), ("skipped", result.skipped)):
        lines += [(f"{item.reference} -> {item.candidate}", *"----", verdict) for item in items]
    print_table(columns, lines)
    for skip in result.skipped:
        say(f"skipped {skip.candidate}: {skip.reason}")
    for localization in result.localizations:
        if every_block:
            show_localization(localization)
        elif not localization.over:
            worst = max(localization.blocks, key=lambda block: block.own)
            say(
                f"{localization.candidate}: each of {len(localization.blocks)} blocks does what "
                f"{localization.reference}'s does (worst {worst.own:.1e} of its size, limit "
                f"{localization.limit:g})"
            )
    for reason in result.not_localized:
        say(f"not walked: {reason}")
    for room in result.headroom:
        say(
            f"{room.file}: largest float16 value {room.peak:.4g} (node {room.node}), "
            f"{room.factor:.3g} times within its range"
        )
        if room.is_low:
            say(
                f"warning: {room.file}: below {HEADROOM:g} times, other images may overflow: judge "
                "it over your own (--images), or see 'rexdeploy tune-precision' and "
                "build-trt --bf16"
            )
    if result.images.endswith("synthetic images"):
        say("synthetic images show what computes wrongly; --images DIR shows what yours do")
    if not result.failures:
        unproven = f"; NOT verified: {len(result.skipped)} skipped" if result.skipped else ""
        edges = "1 edge is within its limits"
        if len(result.edges) > 1:
            edges = f"{len(result.edges)} edges are within their limits"
        say(f"passed: {edges}{unproven}")


def show_localization(result: Localization) -> None:
    """The error block by block, and the first block and node that add more than their share."""
    say(
        "",
        f"{result.reference} -> {result.candidate} block by block, {result.images} images: of the "
        "tensor's spread; and of its size,",
        "when the block is given the reference's own input",
    )
    lines = [
        (
            block.name,
            f"{block.total:.1e}",
            f"{block.own:.1e}",
            f"{result.limit:g}",
            "OVER" if block.name in result.over else "ok",
        )
        for block in result.blocks
    ]
    print_table(("block", "error so far", "its own", "limit", ""), lines)
    culprit = result.culprit
    if culprit is None and result.is_finite:
        say(f"{result.candidate}: no block stands out")
        return
    if culprit is None:
        say(
            f"{result.candidate}: NaN or infinite values from {result.first_nonfinite} on, though "
            "no block makes them of the reference's own input"
        )
        return
    weight = f", weights {culprit.node.weight}" if culprit.node.weight else ""
    say(
        f"{result.candidate}: leaves {result.reference} in {culprit.block}, first at node "
        f"{culprit.node.name} ({culprit.node.op_type}{weight})"
    )


def show_ranges(result: Ranges) -> None:
    """Every block's largest values, and what float16 makes of them."""
    lines = [
        (
            block.name,
            f"{block.output:.4g}",
            f"{block.inside:.4g}",
            f"{block.inside / result.fp16_max:.1%}",
            f"{block.inside / result.bf16_max:.0e}",
            f"{block.node.name} ({block.node.op_type})",
            block.verdict,
        )
        for block in result.blocks
    ]
    columns = ("block", "output", "inside", "of FP16", "of BF16", "largest at", "in FP16")
    print_table(columns, lines)
    say(
        f"Largest absolute values over {result.images} images; FP16 holds {result.fp16_max:g}, "
        f"BF16 {result.bf16_max:.2g}"
    )


def show_tuning(result: Tuning) -> None:
    """The ranges, what was found, and what comes next."""
    show_ranges(result.ranges)
    resumed = f", {result.resumed} more from an earlier run" if result.resumed else ""
    say(
        f"{result.bundle.path}: {result.images}, {result.trials} trials{resumed}",
        f"  plain FP16: {_error_of(result.plain)} (limits: error {result.limits.error:.2g}, root "
        f"mean square {result.limits.rms:.2g})",
    )
    if not result.best.float32:
        mixed = result.bundle.manifest.find_file("fp16.onnx")
        earlier = mixed.built_with.get("float32") if mixed else None
        say(
            "  nothing has to stay float32",
            f"  kept: the bundle's fp16.onnx, which an earlier search has mixed ({earlier} in "
            "float32)"
            if earlier
            else None,
            "next: rexdeploy build-trt --fp16",
        )
    elif result.healed:
        say(
            f"  in float32: {_kept(result.best)}",
            f"  mixed: {_error_of(result.best)}",
            f"  written: {result.bundle.path / (result.written or '')}",
            "next: rexdeploy build-trt --fp16",
        )


def show_runner(classifier: Classifier, quiet: bool, silent: bool) -> None:
    """What runs, unless `silent`, and on stderr, unless `quiet`, why nothing better does."""
    if not quiet:
        reasons = (one_line(f"passed over: {reason}") for reason in classifier.passed_over)
        say(*reasons, to_stderr=True)
    if not silent:
        say(f"{classifier.title} on {classifier.backend}")


def show_row(row: Row, silent: bool) -> None:
    """One image's classes, unless `silent`; on stderr, why it has none."""
    if row.error is not None:
        say("error: " + one_line(f"{row.file}: {row.error}"), to_stderr=True)
    elif not silent:
        lines = (f"  {item.probability:7.2%}  {item.label}" for item in row.predictions)
        say(row.file, *lines)


def show_results(results: Results) -> None:
    """How many rows a results file has, and how many of them are errors."""
    before = f", {len(results.done)} of them by an earlier run" if results.done else ""
    errors = f"; {results.errors} could not be read: see column error" if results.errors else ""
    say(f"  {results.out}, {results.rows} rows{before}{errors}")


def _kept(trial: Trial) -> str:
    blocks = ", ".join(trial.float32)
    return f"{blocks}; of these {', '.join(trial.nodes)}" if trial.nodes else blocks


def _error_of(trial: Trial) -> str:
    if trial.error is None:
        return "NaN or infinite logits"
    return f"error {trial.error:.2g} of the signal"


def show_benchmark(result: Benchmark) -> None:
    """Percentiles of every competitor, its relative speed, and how near it is to the machine's.

    No share of the roofline: at batch 1 the weights and activations stay in the caches, and most
    networks would look nearer to the machine's limit than they are.
    """
    _show_machine(result)
    firsts = {(row.network, row.batch, row.threads): row for row in reversed(result.latencies)}

    def first_of(row: Latency) -> Latency:
        return firsts[row.network, row.batch, row.threads]

    columns = (
        "network", "form", "backend", "precision", "batch", "threads", "p50 ms", "p90", "p99",
        "spread", "images/s", "ratio (95 %)", "of matrix",
    )  # fmt: skip
    lines = [
        (
            row.network,
            row.form,
            row.backend if row.mode == "host" else f"{row.backend}, {row.mode}",
            row.precision,
            str(row.batch),
            str(row.threads or "-"),
            *(f"{row.percentile_ms(percent):.2f}" for percent in (50, 90, 99)),
            f"{row.spread:.0%}",
            f"{row.images_per_s:.0f}",
            str(paired_ratio(first_of(row).samples_ms, row.samples_ms)),
            _share(row.matrix_ms, row),
        )
        for row in result.latencies
    ]
    print_table(columns, lines)
    _show_end(result)


def show_published_table(result: Benchmark, rows: Sequence[PaperRow]) -> None:
    """The published comparison tables in their own layout, with this machine's latencies."""
    _show_machine(result)
    backends = list(
        dict.fromkeys((row.backend, row.batch, row.threads, row.mode) for row in result.latencies)
    )
    columns = (
        "Model", "Input Res.", "Top-1 acc.", "Top-5 acc.", "FLOPs/params.",
        "published CPU/GPU",
        *(f"{name}, batch {batch}, {threads or 'GPU'}" for name, batch, threads, _ in backends),
    )  # fmt: skip
    medians = {
        (row.network, row.backend, row.batch, row.threads, row.mode): row.percentile_ms(50)
        for row in result.latencies
    }
    lines = [
        (
            row.network,
            f"{row.resolution}x{row.resolution}",
            f"{row.top1:.1f}",
            row.top5,
            f"{row.gmacs}B/{row.params_m}M",
            f"{row.cpu_ms:.0f}ms/{row.gpu_ms:.0f}ms",
            *(_milliseconds(medians.get((row.network, *backend))) for backend in backends),
        )
        for row in rows
    ]
    print_table(columns, lines)
    say(
        "Published: CPU is a Xeon E5-2630 v4 with one image; GPU a V100 with 64 images, for the "
        "lites two M40.",
        f"Here: medians of {result.rounds} rounds, by backend, batch and threads; untrained "
        "weights; ReXNets exported in the aligned form.",
    )
    _show_end(result)


def _show_machine(result: Benchmark) -> None:
    say(f"{result.machine['processor']}, {result.machine['cores']} cores")
    if "gpu" in result.machine:
        say(f"{result.machine['gpu']}; clocks {result.machine['gpu clocks']}")
    for probe in result.probes:
        where = "GPU" if probe.threads is None else f"{probe.threads} threads"
        unit = "Gflop/s" if probe.what == "matrix product" else "GB/s"
        say(f"  {probe.what}, {where}: {probe.rate / 1e9:.0f} {unit}")


def _show_end(result: Benchmark) -> None:
    for reason in result.skipped:
        say(f"skipped {reason}")
    if result.interrupted:
        say(f"interrupted after {result.rounds} rounds")


def show_models(rows: Sequence[tuple[Published, Cost, bool]]) -> None:
    """The published table beside the computed costs, and whether they agree."""
    columns = ("network", "top-1", "top-5", "GMACs", "computed", "params M", "computed", "")
    lines = [
        (
            f"{row.family} {row.width:.1f}",
            *(f"{value:.1f}" if value else "-" for value in (row.top1, row.top5)),
            f"{row.gmacs:.{row.decimals[0]}f}",
            f"{cost.macs / 1e9:.3f}",
            f"{row.params_m:.{row.decimals[1]}f}",
            f"{cost.parameters / 1e6:.3f}",
            "agrees" if agrees else "DIFFERS",
        )
        for row, cost, agrees in rows
    ]
    print_table(columns, lines)
    say(
        "Published: ImageNet-1k, 224 x 224; their FLOPs are multiply-accumulates. 'agrees': to one "
        "unit of the last printed digit.",
        "One published slip: the comparison table gives ReXNet 2.0 as 1.8B / 19M, which is width "
        "2.2; the model",
        "table's 1.5B / 16M is right. No accuracy is published for 2.2.",
    )


def show_deployment(title: str, result: Deployment, server: Binary | str) -> None:
    """Where a bundle went in a model repository, and how to serve it.

    `server` is this machine's, or why there is none.
    """
    from rexdeploy.serving.repository import DEFAULT_REPOSITORY

    if isinstance(server, str):
        step = f"not served here: {server}"
    elif server.backends and result.backend not in server.backends:
        step = f"not served here: no {result.backend} backend in the tritonserver {server.origin}"
    elif result.repository == DEFAULT_REPOSITORY:
        step = "next: rexdeploy serve"
    else:
        step = f"next: rexdeploy serve --repository {shlex.quote(str(result.repository))}"
    version = (
        f"version {result.version}" if result.added else f"unchanged, version {result.version}"
    )
    say(
        f"{title} in {result.repository}: {version}",
        f"  {result.name}: {result.backend} backend ({result.reason}), batches up to "
        f"{result.batch.max}",
        f"  {result.image_name}: the same, of image files",
        step,
    )


def show_serving(
    title: str,
    result: Deployed,
    others: Sequence[Deployed],
    server: Binary,
    address: Address,
    guard: Guard,
) -> None:
    """Where a server answers, which other models it has, what it exposes, a command to try it."""
    beside = ", ".join(f"{other.image_name} (version {other.version})" for other in others)
    output = result.signature.output_name
    header = (
        f'{{"inputs":[{{"name":"image","datatype":"UINT8","shape":[1,\'$n\'],'
        f'"parameters":{{"binary_data_size":\'$n\'}}}}],'
        f'"outputs":[{{"name":"{output}","parameters":{{"classification":5}}}}]}}'
    )
    opened = f"; open to every client: {', '.join(guard.opened)}" if guard.opened else ""
    say(
        f"{title}, tritonserver {server.origin}",
        f"  HTTP     {address.http}/v2/models/{result.image_name}",
        f"  gRPC     {address.grpc}",
        f"  metrics  {address.metrics}",
        f"  and      {beside}" if others else None,
        f"  limit    {guard.request_bytes / 2**20:.0f} MiB a request{opened}",
    )
    if not address.is_local:
        say(
            f"  exposed  whoever reaches {address.host} can classify images and read models' "
            "configurations, statistics and metrics, without a password and unencrypted"
        )
    say(
        "the five best classes of photo.jpg:",
        f"  n=$(wc -c < photo.jpg); h='{header}'",
        '  { printf %s "$h"; cat photo.jpg; } | curl -s --data-binary @- \\',
        "  -H 'Content-Type: application/octet-stream' \\",
        f'  -H "Inference-Header-Content-Length: ${{#h}}" '
        f"{address.http}/v2/models/{result.image_name}/infer",
        "Ctrl-C ends it",
    )


def show_log_line(line: str) -> None:
    """A line of a server's log."""
    say(line, to_stderr=True)


def _share(limit_ms: float | None, row: Latency) -> str:
    return "-" if limit_ms is None else f"{limit_ms / row.percentile_ms(50):.0%}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}ms"


def _listed(names: Sequence[str], most: int = 10) -> str:
    """The first names, and how many more there are; --json has them all."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return one_line(", ".join(names[:most])) + more


def _describe(bundle: Bundle, artifact: Artifact | None) -> str:
    """`artifacts/rexnet_1.5/fp32.onnx, 37.0 MiB, batch dynamic`."""
    if artifact is None:
        return str(bundle.path)
    file = bundle.path / artifact.file
    size = file.stat().st_size / 2**20
    return f"{file}, {size:.1f} MiB, batch {artifact.batch or 'dynamic'}"
