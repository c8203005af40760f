"""Ratios of paired samples: known values, what the interval promises, and what must not move it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.interleaved import paired_ratio

TIMES = st.lists(
    st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4), st.floats(0.5, 2)), min_size=1, max_size=60
)


def test_known_samples_give_known_ratios_and_ranks() -> None:
    """The ranks are the tables' of the sign test: 2nd of 10, 10th of 30."""
    ten = paired_ratio([float(n) for n in range(1, 11)], [1.0] * 10)
    assert (ten.median, ten.interval) == (5.5, (2.0, 9.0))
    thirty = paired_ratio([float(n) for n in range(30, 0, -1)], [1.0] * 30)
    assert (thirty.median, thirty.interval) == (15.5, (10.0, 21.0))
    six = paired_ratio([3.0, 1.0, 2.0, 4.0, 6.0, 5.0], [2.0] * 6)
    assert (six.median, six.interval) == (1.75, (0.5, 3.0))
    assert str(six) == "1.75 (0.50-3.00)"


def test_too_few_rounds_have_no_interval() -> None:
    five = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (five.median, five.interval, str(five)) == (3.0, None, "3.00")
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    """Over skewed times, as those of a shared machine are: no normal distribution is supposed."""
    random = np.random.default_rng(0)
    for rounds in (6, 10, 30):
        held = 0
        for _ in range(2000):
            first = 2 * random.lognormal(0, 0.5, rounds)  # the ratio's median is 2
            ratio = paired_ratio(list(first), list(random.lognormal(0, 0.5, rounds)))
            assert ratio.interval is not None
            held += ratio.interval[0] <= 2 <= ratio.interval[1]
        assert 0.95 - 0.015 <= held / 2000 <= 0.995, rounds


@given(TIMES)
def test_a_round_that_slows_both_changes_nothing(rows: list[tuple[float, float, float]]) -> None:
    first, second, slow = (list(values) for values in zip(*rows, strict=True))
    quiet = paired_ratio(first, second)
    noisy = paired_ratio(
        [time * by for time, by in zip(first, slow, strict=True)],
        [time * by for time, by in zip(second, slow, strict=True)],
    )
    assert noisy.median == pytest.approx(quiet.median)
    assert (noisy.interval is None) == (quiet.interval is None) == (len(rows) < 6)
    if quiet.interval is not None:
        assert noisy.interval == pytest.approx(quiet.interval)
        assert quiet.interval[0] <= quiet.median <= quiet.interval[1]


@given(TIMES)
def test_exchanged_competitors_have_the_inverse_interval(
    rows: list[tuple[float, float, float]],
) -> None:
    first, second, _ = (list(values) for values in zip(*rows, strict=True))
    interval, inverse = (
        paired_ratio(*pair).interval for pair in ((first, second), (second, first))
    )
    assert (interval is None) == (inverse is None)
    if interval is not None and inverse is not None:
        assert inverse == pytest.approx((1 / interval[1], 1 / interval[0]))


def test_pairing_finds_what_a_drifting_machine_hides() -> None:
    """A fifth faster in every round, on a machine that becomes three times as slow."""
    drift = np.linspace(1, 3, 30)
    ratio = paired_ratio(list(12 * drift), list(10 * drift))
    assert ratio.median == pytest.approx(1.2)
    assert ratio.interval == pytest.approx((1.2, 1.2))
