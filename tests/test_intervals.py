"""Intervals: what they cover in simulations, and what exact tests and tables say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.intervals import mcnemar, median, paired_difference, wilson


@pytest.mark.parametrize(
    ("count", "lost", "won"),
    [
        (100, 0.05, 0.02),
        (500, 0.02, 0.01),
        (1000, 0.002, 0.002),  # a change of precision: hardly any pair differs
        (2000, 0.03, 0.01),
        (5000, 0.002, 0.001),
    ],
)
def test_the_paired_interval_covers_the_truth(count: int, lost: float, won: float) -> None:
    """93 to 97 % of 2,000 simulated evaluations."""
    rng = np.random.default_rng(0)
    pairs = rng.multinomial(count, (lost, won, 1 - lost - won), size=2000)
    covered = 0
    for was_lost, was_won, _ in pairs.tolist():
        found = paired_difference(was_lost, was_won, count).difference
        covered += found.low <= won - lost <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 400))
def test_a_paired_interval_turns_round_with_its_pairs(lost: int, won: int, same: int) -> None:
    count = lost + won + same + 1
    one, other = paired_difference(lost, won, count), paired_difference(won, lost, count)
    assert one.difference.value == pytest.approx(-other.difference.value)
    assert one.difference.low == pytest.approx(-other.difference.high, abs=1e-9)
    assert one.p_value == other.p_value
    assert -1 <= one.difference.low <= one.difference.value <= one.difference.high <= 1
    assert one.difference.low < one.difference.high
    # The interval and the test agree on a clear difference.
    if one.p_value < 0.01:
        assert one.difference.low > 0 or one.difference.high < 0


@pytest.mark.parametrize("count", [1, 100, 50_000])
def test_images_that_all_agree_leave_an_interval(count: int) -> None:
    """Without unequal pairs the score test's bounds have a closed form."""
    found = paired_difference(0, 0, count)
    bound = 1.959964**2 / (count + 1.959964**2)
    difference = found.difference
    assert (difference.low, difference.high) == pytest.approx((-bound, bound), rel=1e-5)
    assert (difference.value, found.p_value) == (0, 1)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(lost: int, won: int) -> None:
    pairs = lost + won
    tail = sum(math.comb(pairs, k) for k in range(min(lost, won) + 1)) / 2**pairs
    assert mcnemar(lost, won) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_mcnemar_of_very_many_pairs_is_finite() -> None:
    assert mcnemar(25_000, 25_000) == pytest.approx(1, abs=0.01)
    assert mcnemar(20_000, 30_000) < 1e-300


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],  # Newcombe (1998)
)
def test_wilson(hits: int, count: int, low: float, high: float) -> None:
    found = wilson(hits, count)
    assert (found.low, found.value, found.high) == pytest.approx(
        (low, hits / count, high), abs=1e-4
    )


def test_a_median_has_an_interval_from_six_values_on() -> None:
    assert median([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    found = median([6.0, 1.0, 5.0, 2.0, 4.0, 3.0])
    assert found is not None
    assert (found.low, found.value, found.high) == (1.0, 3.5, 6.0)
    found = median([float(value) for value in range(1, 22)])
    assert found is not None
    assert (found.low, found.value, found.high) == (6.0, 11.0, 16.0)  # the sign test's, n = 21
