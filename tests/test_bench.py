"""The benchmark harness: what it records, in which order, and what it refuses. Never a speed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rexdeploy import machine
from rexdeploy.backends import Backend, open_backend
from rexdeploy.bundle.store import Bundle
from rexdeploy.errors import BackendUnavailable, RexdeployError, UsageError
from rexdeploy.interleaved import WARMUP_ROUNDS, Task, paired_ratio, time_rounds
from rexdeploy.models.zoo import cost
from rexdeploy.progress import silent
from rexdeploy.timing.configurations import BenchOptions, Latency
from rexdeploy.timing.harness import bench_published_table, time_networks
from rexdeploy.timing.networks import BundleNetwork, compared
from tests.helpers import assert_refused, entry, run_cli

QUICK = BenchOptions(rounds=2)
LATENCY = Latency(
    "net", "model", "16", "file", "onnxruntime", "fp32", "host", 4, 1,
    tuple(float(n) for n in range(1, 102)),
)  # fmt: skip


def test_percentiles_are_of_the_raw_samples() -> None:
    assert [LATENCY.percentile_ms(percent) for percent in (50, 90, 99)] == [51, 91, 100]
    shuffled = replace(LATENCY, samples_ms=tuple(np.random.default_rng(0).permutation(101) + 1.0))
    assert shuffled.percentile_ms(90) == 91
    assert LATENCY.images_per_s == pytest.approx(4 / 0.051)
    assert LATENCY.spread == pytest.approx(50 / 51)


def test_competitors_take_turns_after_a_warm_up() -> None:
    """Known tasks in the place of models: their order is the harness's."""
    calls: list[str] = []
    tasks = [Task(lambda: calls.append("a")), Task(lambda: calls.append("b"))]
    result = time_rounds(tasks, 3, silent)
    assert calls == ["a", "a", "b", "b"] * (WARMUP_ROUNDS + 3)  # an untimed run before each
    assert [len(taken) for taken in result.samples_ms] == [3, 3]
    assert (result.count, result.faults, result.interrupted) == (3, {}, False)


def test_a_task_with_a_clock_of_its_own_is_timed_by_it() -> None:
    assert time_rounds([Task(lambda: None, lambda: 7.5)], 2, silent).samples_ms == ((7.5, 7.5),)


def test_a_task_that_fails_loses_only_its_own_samples() -> None:
    """In the middle of the rounds, as an error of a GPU that sticks would come."""
    calls = 0

    def breaks() -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * (WARMUP_ROUNDS + 1) + 1:
            raise RexdeployError("illegal address")

    result = time_rounds([Task(lambda: None), Task(breaks), Task(lambda: None)], 4, silent)
    assert [len(taken) for taken in result.samples_ms] == [4, 0, 4]
    assert result.faults == {1: "illegal address"}
    assert calls == 2 * (WARMUP_ROUNDS + 1) + 1  # it is not run again


def test_ctrl_c_keeps_the_complete_rounds() -> None:
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * (WARMUP_ROUNDS + 2) + 1:
            raise KeyboardInterrupt

    result = time_rounds([Task(lambda: None), Task(interrupt)], 10, silent)
    assert [len(taken) for taken in result.samples_ms] == [2, 2]
    assert (result.count, result.interrupted) == (2, True)
    calls = 2 * (WARMUP_ROUNDS + 2)
    with pytest.raises(KeyboardInterrupt):  # before the first complete round there is nothing
        time_rounds([Task(interrupt)], 10, silent)


def test_every_combination_is_timed_and_the_machine_is_named(
    small_v1_original: Bundle, small_lite_original: Bundle
) -> None:
    options = BenchOptions(("onnxruntime", "pytorch", "openvino", "tensorrt"), (1, 3), (1,), 2)
    result = time_networks(
        [BundleNetwork(small_v1_original), BundleNetwork(small_lite_original)], options
    )
    expected = {
        (network, "plain" if backend == "pytorch" else "16", backend, batch)
        for network in ("small_v1", "small_lite")
        for backend in ("onnxruntime", "pytorch", "openvino")
        for batch in (1, 3)
    }
    assert {(row.network, row.form, row.backend, row.batch) for row in result.latencies} == expected
    assert all(len(row.samples_ms) == 2 and min(row.samples_ms) > 0 for row in result.latencies)
    assert result.skipped == (
        "small_v1 (16) has no file for tensorrt",
        "small_lite (16) has no file for tensorrt",
    )
    assert result.machine["processor"]
    assert {(probe.what, probe.threads) for probe in result.probes} == {
        ("matrix product", 1),
        ("copy", 1),
    }


def test_each_row_is_held_against_the_rates_of_its_own_threads(small_v1_original: Bundle) -> None:
    result = time_networks(
        [BundleNetwork(small_v1_original)], BenchOptions(batches=(1, 2), rounds=2)
    )
    (product,) = (probe for probe in result.probes if probe.what == "matrix product")
    one, two = result.latencies
    assert one.matrix_ms is not None
    assert one.roofline_ms is not None
    assert two.matrix_ms is not None
    assert two.matrix_ms == pytest.approx(2 * one.matrix_ms)
    # 963 of V1 0.3's 1000 classes are missing, each of them 384 multiply-accumulates.
    macs = cost("rexnet", 0.3, 64).macs - 963 * 384
    assert one.matrix_ms == pytest.approx(1e3 * 2 * macs / product.rate)
    assert one.roofline_ms > one.matrix_ms


def test_onnxruntimes_threads_spin_within_a_timed_run_only(
    small_v1: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any spinning it is slower than it need be, with all of it the others are."""
    within, ever = "session.force_spinning_stop", "session.intra_op.allow_spinning"
    opened: list[dict[str, str]] = []

    def recorded(*arguments: Any, **options: Any) -> Backend:
        backend = open_backend(*arguments, **options)
        opened.append(_settings(backend, within, ever))
        return backend

    monkeypatch.setattr("rexdeploy.timing.configurations.open_backend", recorded)
    time_networks([BundleNetwork(small_v1)], BenchOptions(threads=(1, 2), rounds=1))
    assert opened == [{within: "1", ever: ""}] * 2
    # A server's network shares its cores with those that decode images.
    graph = entry(small_v1, "fp32.onnx")
    served = open_backend("onnxruntime", small_v1.read(graph), small_v1.manifest.model, 2)
    assert _settings(served, within, ever) == {within: "", ever: "0"}


def _settings(backend: Any, *names: str) -> dict[str, str]:
    """What an onnxruntime session was configured with; "" where nothing was said."""
    options = backend._session.get_session_options()
    settings = {}
    for name in names:
        try:
            settings[name] = options.get_session_config_entry(name)
        except RuntimeError:
            settings[name] = ""
    return settings


def test_peers_take_part_in_the_same_run(small_v1_original: Bundle) -> None:
    subjects = compared([small_v1_original], ["published", "plain", "mobilenetv3_small_050"])
    result = time_networks(subjects, BenchOptions(("pytorch",), rounds=1))
    assert [(row.network, row.form) for row in result.latencies] == [
        ("small_v1", "plain"),  # once, though the PyTorch code of two forms is the same
        ("small_v1", "published"),
        ("mobilenetv3_small_050", "timm"),
    ]


def test_bundles_of_one_name_and_the_float16_of_a_cpu(
    small_v1: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is dropped, and what computes in float32 is not timed as float16."""
    # A float16 product of 1024 takes a CPU a second, and which rate it gives proves nothing here.
    monkeypatch.setattr("rexdeploy.timing.roofline.MATRIX_SIZE", 64)
    other = tmp_path / "other" / "small_v1"
    shutil.copytree(small_v1.path, other)
    subjects = compared([small_v1, Bundle.open(other)], ["16"])  # 16 is the bundles' own form
    result = time_networks(subjects, BenchOptions(rounds=1))
    assert [row.network for row in result.latencies] == [str(small_v1.path), str(other)]
    half = time_networks(
        subjects[:1], BenchOptions(("pytorch", "onnxruntime"), rounds=1, fp16=True)
    )
    assert [(row.backend, row.precision) for row in half.latencies] == [("pytorch", "fp16")]
    assert half.latencies[0].roofline_ms is not None  # counted on the module, which is float32 yet
    assert "it computes float16 graphs in float32" in half.skipped[0]


def test_gpu_backends_are_skipped_with_a_reason_where_there_is_none(
    small_v1_original: Bundle,
) -> None:
    if machine.detect() is not None:
        pytest.skip("this machine has a GPU")
    options = BenchOptions(("onnxruntime", "pytorch-cuda", "pytorch-cuda-compile"), rounds=1)
    result = time_networks([BundleNetwork(small_v1_original)], options)
    assert [row.backend for row in result.latencies] == ["onnxruntime"]
    assert all("PyTorch finds no NVIDIA GPU" in reason for reason in result.skipped)
    assert len(result.skipped) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: got 0, expected 1 to"),
        ({"threads": (10_000,)}, "threads: got 10000, expected 1 to this machine's"),
        ({"batches": (0,)}, "batch: got 0, expected 1 or more"),
        ({"backends": ("onnx",)}, "backend: got 'onnx', expected one of pytorch, pytorch-comp"),
        (
            {"backends": ("tensorrt-rtx",), "batches": (9,)},
            "batch: got 9, but small_v1 on tensorrt-rtx takes 1 to 8",
        ),
    ],
)
def test_unusable_options_are_refused(
    change: dict[str, object], message: str, small_v1_original: Bundle
) -> None:
    with pytest.raises(UsageError, match=message):
        time_networks([BundleNetwork(small_v1_original)], replace(QUICK, **change))  # type: ignore[arg-type]


def test_nothing_to_time_is_an_error_with_the_reason(small_v1_original: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="nothing to time: small_v1 .16. has no file"):
        time_networks([BundleNetwork(small_v1_original)], replace(QUICK, backends=("tensorrt",)))


def test_the_table_has_ratios_to_the_first_row_with_intervals(
    small_v1: Bundle, tmp_path: Path
) -> None:
    arguments = ("--backend", "onnxruntime", "--backend", "pytorch", "--batch", "1,2")
    result = run_cli(
        "bench", "small_v1", *arguments, "--rounds", "6", "--json", "b.json", cwd=tmp_path
    )
    assert result.code == 0, result.err
    rows = json.loads((tmp_path / "b.json").read_text())["latencies"]
    shown = [line for line in result.out.splitlines() if line.split()[:1] == ["small_v1"]]
    assert len(shown) == len(rows) == 4
    for line, row in zip(shown, rows, strict=True):
        (first,) = (
            other["samples_ms"]
            for other in rows
            if (other["backend"], other["batch"]) == ("onnxruntime", row["batch"])
        )
        assert str(paired_ratio(first, row["samples_ms"])) in line
        assert ("1.00 (1.00-1.00)" in line) == (row["backend"] == "onnxruntime")


def test_a_table_keeps_the_cpus_rows_where_no_gpu_is(
    small_v1_original: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    if machine.detect() is not None:
        pytest.skip("this machine has a GPU")
    monkeypatch.setattr(
        "rexdeploy.timing.harness.published_table", lambda: [BundleNetwork(small_v1_original)]
    )
    options = replace(QUICK, backends=("pytorch-cuda", "onnxruntime"))
    result = bench_published_table(options)
    assert [(row.backend, row.batch) for row in result.latencies] == [("onnxruntime", 1)]
    assert "PyTorch finds no NVIDIA GPU" in result.skipped[0]
    with pytest.raises(BackendUnavailable, match="PyTorch finds no NVIDIA GPU"):
        bench_published_table(replace(options, backends=("pytorch-cuda",)))


@pytest.mark.slow
def test_the_published_table_is_printed_in_its_own_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rexdeploy.interleaved.WARMUP_ROUNDS", 0)  # of 17 whole networks
    result = run_cli(
        "bench", "--table", "paper", "--backend", "pytorch", "--rounds", "1",
        "--json", "p.json", "--plot", "p.svg", cwd=tmp_path,
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = [line.split() for line in result.out.splitlines() if "B/" in line and "x" in line]
    assert len(rows) == 17
    assert rows[0][:6] == ["rexnet_0.9", "224x224", "77.2", "93.5", "0.35B/4.1M", "45ms/20ms"]
    assert all(row[6].endswith("ms") for row in rows)
    written = json.loads((tmp_path / "p.json").read_text())["latencies"]
    assert {row["network"] for row in written} == {row[0] for row in rows}
    drawn = (tmp_path / "p.svg").read_text()
    assert "efficientnet_b3" in drawn
    assert "published top-1 accuracy" in drawn


def test_the_command_prints_a_table_and_writes_the_samples(
    small_v1: Bundle, tmp_path: Path
) -> None:
    result = run_cli("bench", "small_v1", "--rounds", "2", "--json", "b.json", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "onnxruntime" in result.out
    assert "roofline" not in result.out  # its share flatters where tensors stay in caches
    written = json.loads((tmp_path / "b.json").read_text())
    assert len(written["latencies"][0]["samples_ms"]) == 2
    assert written["rounds"] == 2
    assert_refused(run_cli("bench", "--rounds", "0", cwd=tmp_path), "rounds: got 0")
    for arguments, message in (
        (("--batch", "1,x"), "batch: got '1,x'"),
        (("--compare", "efficientnet_b00"), "near: efficientnet_b0,"),
        (("--compare", "qqqqqqqq"), "timm.list_models() lists them"),
        (("--plot", "x.gif"), "plot: got 'x.gif', expected a file that ends in .png, .svg, .pdf"),
        (("--plot", "no/x.png"), "cannot write no/x.png"),
        (("--table", "papers"), "table: got 'papers', expected paper"),
        (("small_v1", "--table", "paper"), "leave out bundles"),
    ):
        assert_refused(run_cli("bench", *arguments, cwd=tmp_path), message)
