"""Batches without a period, and limits that follow the rounding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.arrays import Float32, Images
from rexdeploy.backends import run_batches
from rexdeploy.bundle.precision import Precision
from rexdeploy.errors import RexdeployError
from rexdeploy.parity.compare import Limits, Signal
from rexdeploy.parity.limits import (
    ENGINE_MARGIN,
    GRAPH_MARGIN,
    LIMITS,
    NOISE_MARGIN,
    ceiling,
    float32_limits,
    float32_noise,
    rounding_limits,
    walk_room,
)

CONSTANT = Limits(error=6.0, rms=1.1, correlation=0.0)


class _Echo:
    """Gives back the images' own numbers, and keeps the batches that it was given."""

    name = "echo"

    def __init__(self, rows_lost: int = 0) -> None:
        self.batches: list[list[int]] = []
        self._lost = rows_lost

    def run(self, images: Images) -> Float32:
        self.batches.append(images[:, 0].astype(int).tolist())
        return images[self._lost :].astype(np.float32)

    def close(self) -> None:
        """Nothing to free."""


def _numbered(count: int) -> Float32:
    return np.arange(count, dtype=np.float32)[:, None]


def test_every_row_says_which_image_it_is_of() -> None:
    backend = _Echo()
    rows = run_batches(backend, _numbered(10), [4, 1], most=3)
    np.testing.assert_array_equal(rows.logits[:, 0], rows.images)
    np.testing.assert_array_equal(rows.by_image(), _numbered(10))
    assert [len(batch) for batch in backend.batches] == [1, 1, 1, 4, 4, 4]
    assert rows.last == 12
    assert rows.images[-12:-2].tolist() == list(range(10))


def test_smaller_sizes_run_the_first_images_and_none_is_run_twice_at_once() -> None:
    backend = _Echo()
    run_batches(backend, _numbered(64), [1, 5, 8, 64], most=16)
    assert sum(len(batch) == 1 for batch in backend.batches) == 16
    assert sum(len(batch) == 5 for batch in backend.batches) == 4
    assert backend.batches[-1] == list(range(64))
    run_batches(backend, _numbered(6), [2])  # all of them
    assert backend.batches[-3:] == [[0, 1], [2, 3], [4, 5]]


@given(st.integers(2, 9), st.integers(2, 64))
def test_a_batch_larger_than_the_images_are_many_has_no_period(count: int, size: int) -> None:
    rows = run_batches(_Echo(), _numbered(count), [max(size, 6 * count)])
    order = rows.images.tolist()
    assert order[:count] == list(range(count))
    assert set(order) == set(range(count))
    for period in range(1, len(order) // 2 + 1):
        assert any(a != b for a, b in zip(order, order[period:], strict=False))
    for tile in (8, 16, 32):
        if len(order) >= 2 * tile:
            assert order[:tile] != order[tile : 2 * tile]


def test_another_number_of_rows_is_a_failure() -> None:
    with pytest.raises(RexdeployError, match=r"gave logits of shape \[3, 1\] for a batch of 4"):
        run_batches(_Echo(rows_lost=1), _numbered(8), [4])


def test_float32_limits_follow_the_noise_up_to_the_constant_ones() -> None:
    noise = Limits(error=5e-5, rms=5e-6, correlation=1 - 1e-10)
    limits = float32_limits(noise)
    assert limits.error == pytest.approx(1e-4 + NOISE_MARGIN * 5e-5)
    assert limits.rms == pytest.approx(1e-5 + NOISE_MARGIN * 5e-6)
    assert 1 - limits.correlation == pytest.approx(1e-8 + NOISE_MARGIN**2 * 1e-10)
    assert float32_limits(None) == LIMITS["fp32"]
    assert float32_limits(Limits(1.0, 1.0, 0.0)) == LIMITS["fp32"]


def test_noise_is_float32_against_float64_in_units_of_signal() -> None:
    exact = np.random.default_rng(0).standard_normal((6, 9))
    signal = Signal.of(exact)
    rounded = exact.copy()
    rounded[2, 3] += 0.5
    noise = float32_noise(rounded, exact, signal, "logits")
    assert noise.error == pytest.approx(0.5 / signal.size)
    assert noise.rms == pytest.approx(0.5 / signal.size / np.sqrt(54))


def test_limits_of_16_bits_follow_their_rounding_and_nothing_else() -> None:
    float32 = Limits(1e-3, 1e-4, 1 - 1e-7)
    nothing = Limits(0.0, 0.0, 1.0)
    assert rounding_limits(float32, nothing, GRAPH_MARGIN, "fp16", CONSTANT) == float32
    rounding = Limits(error=0.1, rms=0.01, correlation=0.999)
    limits = rounding_limits(float32, rounding, GRAPH_MARGIN, "fp16", CONSTANT)
    assert limits.error == pytest.approx(0.201)
    assert limits.rms == pytest.approx(0.0201)
    assert 1 - limits.correlation == pytest.approx(0.004, rel=1e-3)
    engine = rounding_limits(float32, rounding, ENGINE_MARGIN, "fp16", CONSTANT)
    assert engine.error == pytest.approx(0.301)
    assert 1 - engine.correlation == pytest.approx(0.009, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_no_rounding_takes_a_limit_near_the_constant_answer(precision: Precision) -> None:
    rounding = Limits(error=50.0, rms=20.0, correlation=float("nan"))
    limits = rounding_limits(LIMITS["fp32"], rounding, ENGINE_MARGIN, precision, CONSTANT)
    assert limits == ceiling(CONSTANT).at_most(LIMITS[precision])
    assert limits.error <= 3.0
    assert limits.rms <= 0.55
    assert limits.correlation >= 0.5


def test_limits_hold_what_is_within_them_and_never_nan() -> None:
    limits = Limits(1.0, 0.5, 0.9)
    assert limits.hold(limits)
    for numbers in (
        Limits(1.1, 0.5, 0.9), Limits(1.0, 0.6, 0.9), Limits(1.0, 0.5, 0.8),
        Limits(float("nan"), 0.5, 0.9), Limits(1.0, float("nan"), 0.9),
        Limits(1.0, 0.5, float("nan")),
    ):  # fmt: skip
        assert not limits.hold(numbers)


def test_a_blocks_share_grows_with_what_float32_does_to_the_network() -> None:
    """Large offsets inside a sound network made its head round 1.4e-5, above the usual share."""
    assert walk_room(Limits(1e-4, 5e-6, 1.0)) == 1
    assert walk_room(Limits(1e-3, 3e-5, 1.0)) == pytest.approx(3)
    assert walk_room(Limits(1.0, 1.0, 0.5)) == 10
