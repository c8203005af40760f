"""Writes the measured figures into README.md, docs/ and artifacts/benchmarks/README.md.

    python scripts/readme_figures.py [--check]

Each figure stands between `<!-- figures: NAME -->` and `<!-- end -->` and is computed from the raw
samples of artifacts/benchmarks/*.json. --check changes nothing and exits with 1 if a file would
change. A ratio is the median over the rounds with its 95 % interval (rexdeploy/interleaved.py).
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rexdeploy.interleaved import Ratio, paired_ratio
from rexdeploy.models.zoo import paper_rows

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "artifacts" / "benchmarks"
TEXTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), FOLDER / "README.md")
NETWORKS = ("rexnet_1.0", "rexnet_1.5", "rexnet_lite_1.0")
V1 = NETWORKS[:2]
SETTINGS = ((1, 1), (1, 2), (16, 1), (16, 2))  # batch size and threads
OURS = "16"  # what `export --align auto` makes
OPENVINO_FORMS = (OURS, "timm", "published", "plain")
AIM = 1.35  # of the published code's time, for V1
BLOCK = re.compile(r"(<!-- figures: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)


class Measured:
    """One network's competitors, from all of its files (batch sizes are files of their own)."""

    def __init__(self, network: str) -> None:
        documents = [json.loads(path.read_text()) for path in _files(network)]
        self.network = network
        self.machine = _only(_machine(document) for document in documents)
        self.openvino = _only(document["machine"]["openvino"] for document in documents)
        self.rows: dict[tuple[str, str, int, int], dict[str, Any]] = {}
        for document in documents:
            for row in document["latencies"]:
                key = row["backend"], row["form"], row["batch"], row["threads"]
                if key in self.rows:
                    raise SystemExit(f"{network}: {key} is in two files")
                self.rows[key] = row

    def samples(self, backend: str, form: str, batch: int, threads: int) -> list[float]:
        """Milliseconds, in the order of the rounds."""
        samples: list[float] = self.rows[backend, form, batch, threads]["samples_ms"]
        return samples

    def median(self, backend: str, form: str, batch: int, threads: int) -> float:
        """Median milliseconds."""
        return statistics.median(self.samples(backend, form, batch, threads))

    def ratio(
        self, slower: tuple[str, str], faster: tuple[str, str], batch: int, threads: int
    ) -> Ratio:
        """Of two competitors, each a backend and a form."""
        return paired_ratio(
            self.samples(*slower, batch, threads), self.samples(*faster, batch, threads)
        )

    @property
    def today(self) -> str:
        """The form that a user has without us: timm's network, which has no lite."""
        return "timm" if ("onnxruntime", "timm", 1, 1) in self.rows else "published"

    def best_openvino(self, batch: int, threads: int) -> str:
        """The form that OpenVINO runs fastest, ours included: whatever a user of it would take."""
        forms = [form for form in OPENVINO_FORMS if ("openvino", form, batch, threads) in self.rows]
        return min(forms, key=lambda form: self.median("openvino", form, batch, threads))

    def matrix_share(self, batch: int, threads: int) -> str:
        """The matrix rate's time for the published arithmetic, of ours."""
        row = self.rows["onnxruntime", OURS, batch, threads]
        return f"{row['matrix_ms'] / statistics.median(row['samples_ms']):.0%}"


def figures() -> dict[str, str]:
    """Every block's text by its name."""
    measured = [Measured(network) for network in NETWORKS]
    return {name: block(measured) for name, block in BLOCKS.items()}


def filled(text: str, blocks: dict[str, str]) -> str:
    """The text with every block's figures in the place of those that are there."""
    return BLOCK.sub(lambda match: match[1] + blocks[match[2]] + match[4], text)


def main() -> int:
    """Rewrites the texts, or says which are not up to date."""
    blocks, stale = figures(), []
    for path in TEXTS:
        before = path.read_text()
        after = filled(before, blocks)
        if after != before:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(after)
    print(*(f"{path}: the figures have changed" for path in stale), sep="\n")
    return 1 if stale and "--check" in sys.argv else 0


def _headline(measured: Sequence[Measured]) -> str:
    """The range over V1's networks, batch sizes and threads, and what the intervals reach."""
    ratios = [
        data.ratio(("onnxruntime", "timm"), ("onnxruntime", OURS), *setting)
        for data in measured
        if data.network in V1
        for setting in SETTINGS
    ]
    return f"{_range(ratios)} times ({_reach(ratios)})"


def _about(measured: Sequence[Measured]) -> str:
    rounds = {
        batch: _only(
            len(row["samples_ms"])
            for data in measured
            for key, row in data.rows.items()
            if key[2] == batch
        )
        for batch in sorted({batch for batch, _ in SETTINGS})
    }
    counts = " and ".join(f"{count} at batch {batch}" for batch, count in rounds.items())
    machine = _only(data.machine for data in measured)
    return _paragraph(
        f"Median milliseconds, float32, interleaved rounds ({counts}) on {machine}, a shared "
        "virtual machine (`scripts/benchmark.sh`; the [files and a "
        "log](../artifacts/benchmarks/README.md) of what paid and what did not):"
    )


def _speed_table(measured: Sequence[Measured]) -> str:
    columns = (
        "network", "batch", "threads", "today's export", "aligned", "today's / aligned",
        "published", "plain", "OpenVINO, best form", "OpenVINO / aligned", "PyTorch",
        "of matrix rate",
    )  # fmt: skip
    lines = []
    for data in measured:
        for setting in SETTINGS:
            aligned, best = ("onnxruntime", OURS), data.best_openvino(*setting)
            lines.append(
                (
                    data.network,
                    *map(str, setting),
                    f"{data.median('onnxruntime', data.today, *setting):.1f} ({data.today})",
                    f"{data.median(*aligned, *setting):.1f}",
                    str(data.ratio(("onnxruntime", data.today), aligned, *setting)),
                    f"{data.median('onnxruntime', 'published', *setting):.1f}",
                    f"{data.median('onnxruntime', 'plain', *setting):.1f}",
                    f"{data.median('openvino', best, *setting):.1f} ({_form(best)})",
                    str(data.ratio(("openvino", best), aligned, *setting)),
                    f"{data.median('pytorch', 'plain', *setting):.1f}",
                    data.matrix_share(*setting),
                )
            )
    return _table(columns, lines)


def _openvino(measured: Sequence[Measured]) -> str:
    """Which runtime is the faster one, row by row, as far as the intervals tell."""
    faster, slower, undecided = [], 0, 0
    for data in measured:
        for batch, threads in SETTINGS:
            best = data.best_openvino(batch, threads)
            ratio = data.ratio(("openvino", best), ("onnxruntime", OURS), batch, threads)
            low, high = ratio.interval or (0.0, float("inf"))
            if high < 1:
                faster.append(f"{data.network} at batch {batch} and {_threads(threads)}, {ratio}")
            elif low > 1:
                slower += 1
            else:
                undecided += 1
    version = _only(data.openvino for data in measured)
    listed = f" ({'; '.join(faster)})" if faster else ""
    return _paragraph(
        f"OpenVINO {version}, on whichever form it likes best (ours among them), takes longer than "
        f"ONNX Runtime on the aligned graph in {slower} of these {slower + len(faster) + undecided}"
        f" rows, and is the faster runtime in {len(faster)}{listed}; in {undecided} the interval "
        "holds 1."
    )


def _paper_about(_: Sequence[Measured]) -> str:
    document = json.loads((FOLDER / "cpu-paper.json").read_text())
    return _paragraph(
        f"The published comparison tables again, one image, two threads, {document['rounds']} "
        f"rounds on {_machine(document)} (the published figures are a Xeon E5-2630 v4's; "
        "`artifacts/benchmarks/cpu-paper.json`):"
    )


def _paper_table(_: Sequence[Measured]) -> str:
    document = json.loads((FOLDER / "cpu-paper.json").read_text())
    medians = {
        (row["network"], row["backend"]): statistics.median(row["samples_ms"])
        for row in document["latencies"]
    }
    columns = (
        "Model", "Input Res.", "Top-1 acc.", "FLOPs/params.", "published CPU", "PyTorch",
        "ONNX Runtime",
    )  # fmt: skip
    lines = [
        (
            row.network,
            f"{row.resolution}x{row.resolution}",
            f"{row.top1:.1f}",
            f"{row.gmacs}B/{row.params_m}M",
            f"{row.cpu_ms:.0f}ms",
            *(f"{medians[row.network, backend]:.1f}ms" for backend in ("pytorch", "onnxruntime")),
        )
        for row in paper_rows()
    ]
    return _table(columns, lines)


def _startup(_: Sequence[Measured]) -> str:
    document = json.loads((FOLDER / "startup-cpu.json").read_text())
    first, second, third = (
        f"{statistics.median(row['load_ms']) / 1e3:.2f}" for row in document["networks"]
    )
    return _paragraph(
        f"Loading a classifier for ONNX Runtime takes {first} s beyond importing onnxruntime for "
        f"V1 1.0, {second} s for 2.0 and {third} s for 3.0 (`scripts/startup.py`, on "
        f"{_machine(document)})."
    )


def _training(_: Sequence[Measured]) -> str:
    document = json.loads((FOLDER / "training-step-cpu.json").read_text())
    ours, plain = (document["seconds"][name] for name in ("ours", "timm"))
    return _paragraph(
        f"A training step ({document['network']}) takes {paired_ratio(ours, plain)} times as long "
        f"as plain code with timm's own network, optimiser and schedule ({len(ours)} pairs in "
        f"turns, `scripts/training_step.py`, on {_machine(document)})."
    )


def _int8(_: Sequence[Measured]) -> str:
    document = json.loads((FOLDER / "int8-cpu.json").read_text())
    rows = {
        (row["network"], row["form"], row["backend"], row["threads"]): row["samples_ms"]
        for row in document["latencies"]
    }
    lines = []
    for network, title in (("v1_1.0", "V1 1.0"), ("lite_1.0", "lite 1.0")):
        for threads in (1, 2):
            own, int8, other = (
                rows[network, form, backend, threads]
                for form, backend in (
                    (OURS, "onnxruntime"),
                    ("int8", "onnxruntime"),
                    ("int8", "openvino"),
                )
            )
            medians = (f"{statistics.median(samples):.2f}" for samples in (own, int8, other))
            ratios = (paired_ratio(own, int8), paired_ratio(other, int8))
            lines.append((title, str(threads), *medians, *map(str, ratios)))
    columns = ("network", "threads", "float32 ms", "INT8 ms", "INT8 in OpenVINO", "times as fast")
    return (
        _paragraph(
            f"Medians of {document['rounds']} interleaved rounds, batch 1, 224 pixels, on "
            f"{_machine(document)} (`scripts/int8_speed.py`); float32 is our aligned graph in ONNX "
            "Runtime, OpenVINO runs the same INT8 file:"
        )
        + _table((*columns, "than OpenVINO"), lines)
        + "\n"
    )


def _serving(_: Sequence[Measured]) -> str:
    document = json.loads((FOLDER / "serving-cpu.json").read_text())
    mixed = document["mixed"]
    one, eight, batched, alone = (f"{way['images_per_second']:.1f}" for way in document["ways"])
    return _paragraph(
        f"`scripts/load_test.py` sent {mixed['sent']} requests over {document['connections']} "
        f"connections, broken ones among them, while a new version took over: {mixed['right']} "
        f"right, {mixed['refused']} refused as they should be, {mixed['wrong']} wrong, "
        f"{mixed['lost']} lost. On {_machine(document)}, V1 1.0 classified {one} JPEG files a "
        f"second in one process, one by one, {eight} in batches of 8, and {batched} through the "
        f"server ({alone} without its batching)."
    )


def _eight(measured: Sequence[Measured]) -> str:
    """How 16 compares with 8, wherever 8 was measured."""
    ratios, batches = [], set()
    for data in measured:
        for setting in SETTINGS:
            if ("onnxruntime", "8", *setting) in data.rows:
                pair = ("onnxruntime", "8"), ("onnxruntime", OURS)
                ratios.append(data.ratio(*pair, *setting))
                batches.add(setting[0])
    named = " and ".join(map(str, sorted(batches)))
    return f"{_range(ratios)} times the speed of 8 ({_reach(ratios)}; batch {named})"


def _openvino_forms(measured: Sequence[Measured]) -> str:
    """What the aligned graph is worth in OpenVINO."""
    texts = []
    for form, name in (("published", "the published export's"), ("timm", "timm's")):
        ratios = [
            data.ratio(("openvino", form), ("openvino", OURS), *setting)
            for data in measured
            if ("openvino", form, 1, 1) in data.rows
            for setting in SETTINGS
        ]
        texts.append(f"{_range(ratios)} times {name} speed ({_reach(ratios)})")
    return " and ".join(texts)


def _aim_published(measured: Sequence[Measured]) -> str:
    texts, ratios = [], []
    for data in measured:
        if data.network in V1:
            own = [
                data.ratio(("onnxruntime", "published"), ("onnxruntime", OURS), *setting)
                for setting in SETTINGS
            ]
            ratios += own
            texts.append(f"{data.network}: {', '.join(map(str, own))}")
    reached = sum(ratio.median >= AIM for ratio in ratios)
    return f"{'; '.join(texts)}: in {reached} of {len(ratios)}"


def _aim_lite(measured: Sequence[Measured]) -> str:
    ratios = [
        measured[2].ratio(("onnxruntime", "published"), ("onnxruntime", OURS), *setting)
        for setting in SETTINGS
    ]
    return ", ".join(map(str, ratios))


def _aim_openvino(measured: Sequence[Measured]) -> str:
    data, texts = measured[0], []
    for threads in (1, 2):
        names = {"published": "published", "plain": "our plain", OURS: "aligned", "timm": "timm's"}
        others = ", ".join(
            f"{data.median('openvino', form, 1, threads):.1f} ({name})"
            for form, name in names.items()
        )
        ours = data.median("onnxruntime", OURS, 1, threads)
        texts.append(f"{_threads(threads)}: {ours:.1f} against {others} ms")
    return "; ".join(texts)


def _aim_matrix(measured: Sequence[Measured]) -> str:
    return measured[0].matrix_share(1, 1)


BLOCKS: dict[str, Callable[[Sequence[Measured]], str]] = {
    "headline": _headline,
    "about": _about,
    "speed": _speed_table,
    "openvino": _openvino,
    "paper-about": _paper_about,
    "paper": _paper_table,
    "startup": _startup,
    "int8": _int8,
    "training": _training,
    "serving": _serving,
    "eight": _eight,
    "openvino-forms": _openvino_forms,
    "aim-published": _aim_published,
    "aim-lite": _aim_lite,
    "aim-openvino": _aim_openvino,
    "aim-matrix": _aim_matrix,
}


def _files(network: str) -> list[Path]:
    """`cpu-rexnet_1.0.json`, and `cpu-rexnet_1.0-batch16.json` beside it."""
    files = sorted(FOLDER.glob(f"cpu-{network}.json")) + sorted(
        FOLDER.glob(f"cpu-{network}-*.json")
    )
    if not files:
        raise SystemExit(f"no {FOLDER}/cpu-{network}.json: scripts/benchmark.sh writes it")
    return files


def _machine(document: dict[str, Any]) -> str:
    """`2 cores of an Intel Xeon Processor with AVX-512`."""
    name, _, vectors = document["machine"]["processor"].replace("(R)", "").rpartition(" ")
    units = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    described = f"{name} with {units[vectors]}" if vectors in units else f"{name} {vectors}"
    article = "an" if described.strip()[0] in "AEIOU" else "a"
    return f"{document['machine']['cores']} cores of {article} {described.strip()}"


def _only(values: Any) -> Any:
    """The value that all have; figures of two machines or libraries do not share a table."""
    found = set(values)
    if len(found) != 1:
        raise SystemExit(f"measure again: the files disagree: {', '.join(map(str, found))}")
    return found.pop()


def _range(ratios: Sequence[Ratio]) -> str:
    medians = [ratio.median for ratio in ratios]
    return f"{min(medians):.2f} to {max(medians):.2f}"


def _reach(ratios: Sequence[Ratio]) -> str:
    intervals = [ratio.interval for ratio in ratios]
    if None in intervals:
        raise SystemExit("too few rounds for an interval: 6 at least")
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    return f"95 % intervals from {low:.2f} to {high:.2f}"


def _form(form: str) -> str:
    return "aligned" if form == OURS else form


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    header = f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    return header + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _paragraph(text: str) -> str:
    return "\n" + textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False) + "\n"


if __name__ == "__main__":
    sys.exit(main())
