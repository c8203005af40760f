"""The benchmark harness: what it records, in which order, and what it refuses. Never a speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rexdeploy import bench as module
from rexdeploy.bench import WARMUP_ROUNDS, BenchOptions, Latency, bench
from rexdeploy.bundle import Bundle
from rexdeploy.errors import BackendUnavailable, UsageError
from tests.helpers import assert_refused, run_cli

QUICK = BenchOptions(rounds=2)
LATENCY = Latency("b", "m", "off", "f", "onnxruntime", 4, 1, tuple(float(n) for n in range(1, 102)))


def test_percentiles_are_of_the_raw_samples() -> None:
    assert [LATENCY.percentile_ms(percent) for percent in (50, 90, 99)] == [51, 91, 100]
    shuffled = replace(LATENCY, samples_ms=tuple(np.random.default_rng(0).permutation(101) + 1.0))
    assert shuffled.percentile_ms(90) == 91
    assert LATENCY.images_per_s == pytest.approx(4 / 0.051)


def test_competitors_take_turns_after_a_warm_up() -> None:
    """Known tasks in the place of models: their order is the harness's."""
    calls: list[str] = []
    samples, interrupted = module._time(
        [lambda: calls.append("a"), lambda: calls.append("b")], 3, lambda message: None
    )
    assert calls == ["a", "b"] * (WARMUP_ROUNDS + 3)
    assert [len(taken) for taken in samples] == [3, 3]
    assert not interrupted


def test_ctrl_c_keeps_the_complete_rounds() -> None:
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == WARMUP_ROUNDS + 3:
            raise KeyboardInterrupt

    samples, interrupted = module._time([lambda: None, interrupt], 10, lambda message: None)
    assert [len(taken) for taken in samples] == [2, 2]
    assert interrupted
    calls = WARMUP_ROUNDS + 2
    with pytest.raises(KeyboardInterrupt):  # before the first complete round there is nothing
        module._time([interrupt], 10, lambda message: None)


def test_every_combination_is_timed_and_the_machine_is_named(
    v1_original: Bundle, lite_original: Bundle
) -> None:
    options = BenchOptions(("onnxruntime", "pytorch", "tensorrt"), (1, 3), (1,), 2)
    result = bench([v1_original, lite_original], options)
    timed = {(row.bundle, row.backend, row.batch) for row in result.latencies}
    expected = {
        (b, n, s) for b in ("v1", "lite") for n in ("onnxruntime", "pytorch") for s in (1, 3)
    }
    assert timed == expected
    assert all(len(row.samples_ms) == 2 and min(row.samples_ms) > 0 for row in result.latencies)
    graphs = {row.bundle: row.align for row in result.latencies if row.backend == "onnxruntime"}
    assert graphs == {"v1": "16", "lite": "16"}
    assert {row.align for row in result.latencies if row.backend == "pytorch"} == {"off"}
    assert result.skipped == ("v1 has no file for tensorrt", "lite has no file for tensorrt")
    assert result.machine["processor"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: got 0, expected 1 to"),
        ({"threads": (10_000,)}, "threads: got 10000, expected 1 to this machine's"),
        ({"batches": (0,)}, "batch: got 0, expected 1 or more"),
        ({"backends": ("onnx",)}, "backend: got 'onnx', expected one of pytorch, onnxruntime"),
        (
            {"backends": ("tensorrt-rtx",), "batches": (9,)},
            "batch: got 9, but v1 on tensorrt-rtx takes 1 to 8",
        ),
    ],
)
def test_unusable_options_are_refused(
    change: dict[str, object], message: str, v1_original: Bundle
) -> None:
    with pytest.raises(UsageError, match=message):
        bench([v1_original], replace(QUICK, **change))  # type: ignore[arg-type]


def test_nothing_to_time_is_an_error_with_the_reason(v1_original: Bundle) -> None:
    with pytest.raises(BackendUnavailable, match="nothing to time: v1 has no file for tensorrt"):
        bench([v1_original], replace(QUICK, backends=("tensorrt",)))


def test_the_command_prints_a_table_and_writes_the_samples(
    v1_bundle: Bundle, tmp_path: Path
) -> None:
    result = run_cli("bench", "v1", "--rounds", "2", "--json", "b.json", cwd=tmp_path)
    assert result.code == 0, result.err
    assert "onnxruntime" in result.out
    written = json.loads((tmp_path / "b.json").read_text())
    assert len(written["latencies"][0]["samples_ms"]) == 2
    assert written["rounds"] == 2
    assert_refused(run_cli("bench", "--rounds", "0", cwd=tmp_path), "rounds: got 0")
    assert_refused(run_cli("bench", "--batch", "1,x", cwd=tmp_path), "batch: got '1,x'")
