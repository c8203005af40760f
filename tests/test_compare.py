"""Comparisons: known numbers, planted differences, and what cannot be judged."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rexdeploy.arrays import Array, softmax
from rexdeploy.errors import UsageError
from rexdeploy.parity.compare import Comparison, Limits, Signal, compare, correlation_text

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((8, 20)).astype(np.float32)


def _limits(error: float) -> Limits:
    """A limit on the error alone."""
    return Limits(error, float("inf"), -1.0)


def _compare(
    candidate: Array, limits: float | Limits = 0.01, reference: Array = LOGITS
) -> Comparison:
    if isinstance(limits, float):
        limits = _limits(limits)
    return compare(reference, candidate, signal=Signal.of(reference), limits=limits)


def test_equal_logits_pass_with_perfect_numbers() -> None:
    result = _compare(LOGITS.copy())
    assert (result.error, result.kl, result.top1, result.top5, result.nonfinite) == (0, 0, 1, 1, 0)
    assert result.cosine == pytest.approx(1)
    assert result.failures == ()


def test_the_error_is_in_units_of_signal() -> None:
    signal = LOGITS.astype(np.float64).std(axis=0).mean()
    candidate = LOGITS.copy()
    candidate[3, 7] += 0.5
    result = _compare(candidate)
    assert result.signal == pytest.approx(signal)
    assert result.error == pytest.approx(0.5 / signal, rel=1e-5)
    assert result.failures == (f"error {0.5 / signal:.2g} of the signal is over the limit 0.01",)


@given(st.floats(1e-3, 1e3), st.floats(-5, 5))
def test_the_error_does_not_depend_on_the_logits_scale(scale: float, noise: float) -> None:
    exact = LOGITS.astype(np.float64)
    candidate = exact + noise
    plain = _compare(candidate, reference=exact)
    scaled = _compare(candidate * scale, reference=exact * scale)
    assert scaled.error == pytest.approx(plain.error, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_logit_fails_whatever_the_limit(bad: float) -> None:
    candidate = LOGITS.copy()
    candidate[0, 0] = bad
    result = _compare(candidate, 1e9)
    assert result.nonfinite == 1
    assert result.failures == ("1 logits are NaN or infinite",)


def test_a_constant_candidate_has_no_cosine_to_boast_of() -> None:
    """Plain cosine gives a backend that ignores its input 0.998; centred, it gets nothing."""
    offset = 20 * RNG.standard_normal(20).astype(np.float32)
    reference = LOGITS + offset
    constant = np.repeat(reference.mean(axis=0, keepdims=True), 8, axis=0)
    result = _compare(constant, 0.5, reference)
    assert result.cosine < 0.5
    assert result.failures


def test_agreement_of_the_top_classes_is_counted() -> None:
    candidate = LOGITS.copy()
    candidate[0] = -candidate[0]
    result = _compare(candidate)
    assert result.top1 == 7 / 8
    assert 7 / 8 <= result.top5 < 1
    assert result.kl > 0


def test_kl_is_that_of_the_definition() -> None:
    candidate = LOGITS + RNG.standard_normal(LOGITS.shape).astype(np.float32)
    p, q = softmax(LOGITS), softmax(candidate)
    assert _compare(candidate).kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean())


@pytest.mark.parametrize("shape", [(8, 19), (7, 20), (8, 20, 1)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="got logits of shape"):
        _compare(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (LOGITS[:1], "at least 2 different images"),
        (np.repeat(LOGITS[:1], 8, axis=0), "do not vary over the 8 images"),
        (np.zeros((4, 3)), "do not vary"),
        (LOGITS[:1] + 1e-5 * LOGITS, "do not vary"),
        (np.where(LOGITS > 2, np.nan, LOGITS), "NaN or infinite"),
    ],
)
def test_a_reference_that_proves_nothing_is_refused(
    logits: npt.NDArray[np.float64], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Signal.of(logits)


def test_softmax_does_not_overflow() -> None:
    probabilities = softmax(np.array([[1e4, 0.0, -1e4]]))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities[0, 0] == pytest.approx(1)


def test_the_root_mean_square_is_over_all_logits_in_units_of_signal() -> None:
    candidate = LOGITS.copy()
    candidate[3, 7] += 0.5
    result = _compare(candidate)
    assert result.rms == pytest.approx(0.5 / np.sqrt(LOGITS.size) / result.signal, rel=1e-5)
    strict = _compare(candidate, Limits(1e9, 0.9 * result.rms, -1.0))
    assert strict.failures == (
        f"root mean square error {result.rms:.2g} of the signal is over the limit "
        f"{0.9 * result.rms:.2g}",
    )


def test_two_classes_that_change_places_are_found_by_their_correlation() -> None:
    candidate = LOGITS.copy()
    candidate[:, [4, 11]] = candidate[:, [11, 4]]
    result = _compare(candidate, Limits(1e9, 1e9, 0.9))
    expected = np.corrcoef(LOGITS[:, 4], LOGITS[:, 11])[0, 1]
    assert result.correlation == pytest.approx(expected, rel=1e-5)
    assert result.least_class in (4, 11)
    assert result.failures[0].startswith(f"class {result.least_class} correlates by ")
    assert "below the limit 0.90" in result.failures[0]


def test_a_class_that_hardly_varies_has_no_say_by_its_correlation() -> None:
    reference = LOGITS.astype(np.float64)
    reference[:, 2] *= 1e-3
    candidate = reference.copy()
    candidate[:, 2] = -candidate[:, 2]
    signal = Signal.of(reference)
    assert not signal.varying[2]
    assert signal.varying.sum() == 19
    result = _compare(candidate, float("inf"), reference)
    assert result.correlation == pytest.approx(1)


def test_a_constant_answer_has_the_numbers_that_the_signal_says() -> None:
    signal = Signal.of(LOGITS)
    constant = np.repeat(signal.mean[None], len(LOGITS), axis=0)
    result = _compare(constant, float("inf"))
    assert result.numbers.error == pytest.approx(signal.constant.error)
    assert result.numbers.rms == pytest.approx(signal.constant.rms)
    assert result.correlation == signal.constant.correlation == 0


def test_every_number_over_its_limit_is_a_failure_of_its_own() -> None:
    result = _compare(-LOGITS, Limits(0.1, 0.1, 0.99))
    assert [text.split()[0] for text in result.failures] == ["error", "root", "class"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1"), (1 - 4e-9, "1-4e-09"), (0.9986, "0.9986"), (0.31, "0.31"), (-0.06, "-0.06"),
     (float("nan"), "nan")],
)  # fmt: skip
def test_a_correlation_is_told_apart_from_one(value: float, text: str) -> None:
    assert correlation_text(value) == text


def test_classes_of_which_rounding_leaves_no_likeness_do_not_count() -> None:
    """One of four is lost to rounding: the least correlation is that of the others."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 4))
    rounded = exact + 0.01 * rng.standard_normal((64, 4))
    rounded[:, 2] = rng.standard_normal(64)
    signal = Signal.of(exact)
    assert signal.under(exact, exact).varying.tolist() == [True] * 4
    told = signal.under(exact, rounded)
    assert told.varying.tolist() == [True, True, False, True]
    limits = Limits(9, 9, 0.9)
    before = compare(exact, rounded, signal=signal, limits=limits)
    after = compare(exact, rounded, signal=told, limits=limits)
    assert (before.least_class, before.correlation < 0.5) == (2, True)
    assert after.correlation > 0.999
    # Two that changed places are still found, as long as they count.
    swapped = rounded[:, [1, 0, 2, 3]]
    found = compare(exact, swapped, signal=told, limits=limits)
    assert found.least_class in (0, 1)
    assert found.failures


def test_where_rounding_leaves_too_few_classes_all_count() -> None:
    rng = np.random.default_rng(0)
    exact = rng.standard_normal((64, 4))
    half, fewer = exact.copy(), exact.copy()
    half[:, :2] = rng.standard_normal((64, 2))
    fewer[:, :3] = rng.standard_normal((64, 3))
    signal = Signal.of(exact)
    assert signal.under(exact, half).varying.tolist() == [False, False, True, True]
    assert signal.under(exact, fewer).varying.all()
    assert signal.under(exact, np.full_like(exact, np.nan)).varying.all()
