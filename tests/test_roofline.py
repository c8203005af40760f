"""The roofline's arithmetic, on layers and rates that are known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from rexdeploy.bundle.precision import PRECISIONS, Precision
from rexdeploy.models.layers import Layer, layers
from rexdeploy.timing import machine_rates
from rexdeploy.timing.roofline import Rates, copy, matrix_ms, product, roofline_ms

RATES = Rates(flops_per_s=100e9, bytes_per_s=10e9)


def test_a_layer_takes_the_longer_of_its_arithmetic_and_its_traffic() -> None:
    busy = Layer(macs=50_000_000, weights=1000, activations=1000)  # 1 ms at 100 Gflop/s
    moving = Layer(macs=1000, weights=1_000_000, activations=1_500_000)  # 10 MB: 1 ms
    assert matrix_ms([busy], 1, RATES) == pytest.approx(1.0)
    assert matrix_ms([busy, busy], 4, RATES) == pytest.approx(8.0)
    assert roofline_ms([busy, moving], 1, RATES) == pytest.approx(2.0)
    # Weights move once for a batch, activations once for each image; float16 is half of both.
    assert roofline_ms([moving], 3, RATES) == pytest.approx(2.2)
    assert roofline_ms([moving], 3, RATES, value_bytes=2) == pytest.approx(1.1)


def test_layers_are_counted_as_they_run() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()
    assert layers(model, 16) == [
        Layer(64 * 8 * 27, 8 * 27 + 8, 3 * 256 + 8 * 64),
        Layer(64 * 8 * 9, 72, 2 * 8 * 64),
        Layer(40, 45, 13),
    ]
    assert not model[0]._forward_hooks  # counting leaves the network as it was


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_probes_do_the_work_that_their_rate_is_computed_from(precision: Precision) -> None:
    flops, task = product(1, precision)
    with torch.profiler.profile(with_flops=True) as profile:
        task.run()
    assert sum(event.flops for event in profile.key_averages()) == flops
    moved, task = copy(1)
    with torch.profiler.profile(profile_memory=True, record_shapes=True) as profile:
        task.run()
    (shape,) = (e.input_shapes[0] for e in profile.events() if e.name == "aten::copy_")
    assert 2 * 4 * shape[0] == moved


def test_every_precision_has_a_rate_of_its_own() -> None:
    made = machine_rates.make({(1, "fp32"), (1, "fp16")}, [])
    assert [(probe.what, probe.threads, probe.precision) for probe, _ in made] == [
        ("matrix product", 1, "fp16"),
        ("matrix product", 1, "fp32"),
        ("copy", 1, None),
    ]
    timed = [replace(probe, samples_ms=(2.0**n,)) for n, (probe, _) in enumerate(made)]
    rates = machine_rates.rates(timed)
    assert rates[1, "fp16"].flops_per_s == 2 * rates[1, "fp32"].flops_per_s
    assert rates[1, "fp16"].bytes_per_s == rates[1, "fp32"].bytes_per_s
    assert machine_rates.rates(timed[:2]) == {}  # the copy failed


@pytest.mark.parametrize(
    ("threads", "precision", "kind", "size"),
    [
        (None, "fp32", "fp32", 4),
        (None, "fp16", "fp16", 2),
        (None, "bf16", "bf16", 2),
        (None, "mixed", "fp16", 2),
        (1, "fp16", "fp16", 2),
        (1, "bf16", "fp32", 4),
        (1, "mixed", "fp32", 4),
    ],
)
def test_limits_are_of_the_type_that_is_computed_in(
    threads: int | None, precision: str, kind: Precision, size: int
) -> None:
    assert machine_rates.computes_in(threads, precision) == kind
    assert PRECISIONS[kind].size_bytes == size


def test_a_gpu_that_pytorch_cannot_use_has_no_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    skipped: list[str] = []
    assert machine_rates.make({(None, "fp16")}, skipped) == []
    assert skipped == [
        "the roofline on the GPU: PyTorch finds no NVIDIA GPU, or this is its CPU build"
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = machine_rates.make({(None, "bf16"), (1, "fp32")}, skipped)
    assert {probe.threads for probe, _ in made} == {1}
    assert skipped[1].startswith("the roofline on the GPU: PyTorch failed on the GPU (")
