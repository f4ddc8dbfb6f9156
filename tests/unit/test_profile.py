"""What a model costs: curves that never fall, bytes of a cache, seconds behind a prefix."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvstore.errors import ProfileError
from kvstore.limits import PROFILE_NUMBER_MAX, PROFILE_POINTS_MAX
from kvstore.profile import Curve, Interpolation, KvSize, MeasuredCurve, PolynomialCurve, Profile

ROUNDING = 1e-12
"""Relative; of curves that go through logarithms."""

MEMO = PolynomialCurve((1.0,))

tokens = st.floats(1, 1e6)
interpolations: st.SearchStrategy[Interpolation] = st.sampled_from(("log-log", "linear"))


@st.composite
def measured_curves(draw: st.DrawFn) -> MeasuredCurve:
    xs = sorted(draw(st.lists(st.integers(1, 1_000_000), min_size=1, max_size=8, unique=True)))
    assume(all(x1 - x0 > 1e-5 * x1 for x0, x1 in pairwise(xs)))
    ys = sorted(draw(st.lists(st.floats(1e-3, 1e3), min_size=len(xs), max_size=len(xs))))
    curve = MeasuredCurve(tuple(map(float, xs)), tuple(ys), draw(interpolations))
    assume(has_seconds(curve))
    return curve


def has_seconds(curve: MeasuredCurve) -> bool:
    """Whether a profile can have it: steep pieces between near points go on to where float64 has no number."""
    try:
        return curve(1) >= 1 / PROFILE_NUMBER_MAX and curve(131_072) <= PROFILE_NUMBER_MAX
    except OverflowError:
        return False


@st.composite
def polynomials(draw: st.DrawFn) -> PolynomialCurve:
    coefficients = draw(st.lists(st.floats(0, 100), min_size=1, max_size=4))
    assume(max(coefficients) > 1e-6)
    return PolynomialCurve(tuple(coefficients), unit=draw(st.floats(1, 1e4)))


curves: st.SearchStrategy[Curve] = st.one_of(measured_curves(), polynomials())


@st.composite
def sizes(draw: st.DrawFn) -> KvSize:
    has_window = draw(st.booleans())
    return KvSize(
        state_bytes=draw(st.integers(0, 1 << 32)),
        token_bytes=draw(st.integers(1, 1 << 20)),
        window_token_bytes=draw(st.integers(1, 1 << 20)) if has_window else 0,
        window_tokens=draw(st.integers(1, 1 << 17)) if has_window else 0,
    )


def profile(prefill: Curve, kv: KvSize | None = None) -> Profile:
    return Profile("x", "a test", prefill, kv or KvSize(1e6, 1e4), PolynomialCurve((0.02, 1e-4)), 20, 8, 131072)


@given(curve=curves, low=tokens, high=tokens)
def test_more_work_never_costs_less(curve: Curve, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert curve(high) >= curve(low) * (1 - ROUNDING)
    assert curve(low) >= 0


@given(curve=measured_curves(), at=st.floats(1e-3, 1e7))
def test_a_measured_curve_is_positive_everywhere(curve: MeasuredCurve, at: float) -> None:
    assume(curve.interpolation == "linear" or len(curve.xs) == 1 or curve.xs[1] > 2 * curve.xs[0])
    assert curve(at) > 0


@given(curve=measured_curves())
def test_a_measured_curve_goes_through_its_points(curve: MeasuredCurve) -> None:
    for x, y in zip(curve.xs, curve.ys, strict=True):
        assert curve(x) == pytest.approx(y, rel=1e-9)


@given(curve=curves, xs=st.lists(tokens, min_size=1, max_size=20))
def test_many_values_are_those_one_by_one(curve: Curve, xs: list[float]) -> None:
    many = curve.many(np.array(xs))
    assert many.shape == (len(xs),)
    assert many == pytest.approx([curve(x) for x in xs], rel=1e-9)


def test_many_keeps_the_shape() -> None:
    curve = MeasuredCurve((1.0, 10.0), (1.0, 2.0))
    assert curve.many(np.ones((3, 2))).shape == (3, 2)
    assert KvSize(1, 1).many(np.ones((3, 2))).shape == (3, 2)


def test_a_power_law_stays_one() -> None:
    curve = MeasuredCurve((10.0, 100.0), (2 * 10**1.5, 2 * 100**1.5))
    for x in (1.0, 30.0, 1e5):
        assert curve(x) == pytest.approx(2 * x**1.5)


def test_linear_interpolation_keeps_a_line_and_charges_for_little() -> None:
    curve = MeasuredCurve((100.0, 200.0), (1.0, 3.0), "linear")
    assert curve(150) == pytest.approx(2)
    assert curve(300) == pytest.approx(5)
    assert curve(10) == pytest.approx(0.1), "the line itself would be negative there"


def test_one_point_is_a_constant() -> None:
    assert MeasuredCurve((20.0,), (0.025,))(1) == pytest.approx(0.025)
    assert MeasuredCurve((20.0,), (0.025,), "linear")(64) == pytest.approx(0.025)


@pytest.mark.parametrize("interpolation", ["log-log", "linear"])
@pytest.mark.parametrize("x", [0.0, -1.0, float("nan")])
def test_there_is_no_cost_of_nothing(interpolation: Interpolation, x: float) -> None:
    curve = MeasuredCurve((1.0, 10.0), (1.0, 2.0), interpolation)
    with pytest.raises(ProfileError, match="positive amounts"):
        curve(x)
    with pytest.raises(ProfileError, match="positive amounts"):
        curve.many(np.array([1.0, x]))


@pytest.mark.parametrize(
    ("xs", "ys", "message"),
    [
        ((), (), "1 to 256 points"),
        ((1.0, 2.0), (1.0,), "2 and 1"),
        (tuple(map(float, range(1, PROFILE_POINTS_MAX + 2))), (1.0,) * (PROFILE_POINTS_MAX + 1), "1 to 256"),
        ((0.0, 2.0), (1.0, 2.0), "not positive"),
        ((1.0, 2.0), (1.0, float("inf")), "not positive and finite"),
        ((1.0, 2.0), (float("nan"), 2.0), "not positive and finite"),
        ((2.0, 1.0), (1.0, 2.0), "ascend"),
        ((1.0, 1.0), (1.0, 2.0), "ascend"),
        ((1.0, 1.0 + 1e-9), (1.0, 2.0), "almost one"),
        ((1.0, 2.0), (2.0, 1.0), "falls from 2.0 at 1.0 to 1.0 at 2.0"),
    ],
)
def test_impossible_points_are_refused(xs: tuple[float, ...], ys: tuple[float, ...], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        MeasuredCurve(xs, ys)


@pytest.mark.parametrize(
    ("coefficients", "unit"),
    [((), 1.0), ((0.0,), 1.0), ((1.0, -1e-9), 1.0), ((float("nan"),), 1.0), ((1.0,), 0.0), ((1.0,), float("inf"))],
)
def test_impossible_polynomials_are_refused(coefficients: tuple[float, ...], unit: float) -> None:
    with pytest.raises(ProfileError):
        PolynomialCurve(coefficients, unit)


@given(kv=sizes(), low=tokens, high=tokens)
def test_a_longer_prompt_leaves_more_behind(kv: KvSize, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert kv.total_bytes(low) <= kv.total_bytes(high)
    assert kv.resume_bytes(low) <= kv.total_bytes(low)


@given(kv=sizes(), length=tokens, present=tokens, more=tokens)
def test_who_has_more_needs_less_but_always_the_states(kv: KvSize, length: float, present: float, more: float) -> None:
    missing = kv.missing_bytes(length, present)
    assert kv.missing_bytes(length, present + more) <= missing
    assert kv.missing_bytes(length, 0) == pytest.approx(kv.total_bytes(length))
    assert missing >= kv.resume_bytes(length)
    if present >= length:
        assert missing == kv.resume_bytes(length)


@given(kv=sizes(), lengths=st.lists(tokens, min_size=1, max_size=10))
def test_many_sizes_are_those_one_by_one(kv: KvSize, lengths: list[float]) -> None:
    assert kv.many(np.array(lengths)) == pytest.approx([kv.total_bytes(length) for length in lengths])


def test_a_window_holds_its_last_tokens_only() -> None:
    kv = KvSize(0, 10, window_token_bytes=100, window_tokens=128)
    assert kv.total_bytes(64) == 64 * 110
    assert kv.total_bytes(1000) == 1000 * 10 + 128 * 100
    assert kv.missing_bytes(1000, 990) == 10 * 10 + 128 * 100


@pytest.mark.parametrize(
    "arguments", [(0, 0), (-1, 1), (1, float("nan")), (1, float("inf")), (1, 1, 5, 0), (1, 1, 0, 5)]
)
def test_impossible_sizes_are_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ProfileError):
        KvSize(*arguments)  # type: ignore[arg-type]


@given(curve=curves, whole=tokens, share=st.floats(0, 1), more=st.floats(0, 1))
def test_a_prefix_never_saves_more_than_it_cost(curve: Curve, whole: float, share: float, more: float) -> None:
    costs = profile(curve)
    present = whole * share
    longer = present + (whole - present) * more
    assume(whole - longer > 1e-6 * whole)
    left_s = costs.prefill_s(whole, present)
    assert 0 <= left_s <= curve(whole) * (1 + ROUNDING)
    assert left_s >= curve(whole - present) * (1 - ROUNDING)
    if present > 0:
        assert left_s >= (curve(whole) - curve(present)) * (1 - ROUNDING)
    assert costs.prefill_s(whole, longer) <= left_s * (1 + 1e-9) + 1e-9


def test_nothing_left_to_prefill_takes_no_time() -> None:
    assert profile(PolynomialCurve((1.0,))).prefill_s(100, 100) == 0


def test_rates_of_a_profile() -> None:
    costs = profile(PolynomialCurve((0.5, 1e-4)), KvSize(1e6, 1e4))
    assert costs.kv_throughput_bytes_per_s(1000) == pytest.approx((1e6 + 1e7) / 0.6)
    assert costs.decode_requests_per_s(1000) == pytest.approx(20 / (0.022 * 1000))


@pytest.mark.parametrize("what", ["decode_batch_max", "accelerators", "tokens_max"])
def test_counts_are_at_least_one(what: str) -> None:
    values: dict[str, Any] = {"decode_batch_max": 1, "accelerators": 1, "tokens_max": 1, what: 0}
    with pytest.raises(ProfileError, match=what):
        Profile(name="x", source="y", prefill=PolynomialCurve((1.0,)), kv=KvSize(1, 1), decode_step=MEMO, **values)


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        (MeasuredCurve((1.0, 1.01), (1e-3, 10.0)), "131072 tokens would take inf s"),
        (MeasuredCurve((100_000.0, 100_001.0), (1e-3, 10.0)), "1 tokens would take 0 s"),
        (PolynomialCurve((0.5, 1.0), unit=1e-300), "1 tokens would take 1e[+]300 s"),
        (PolynomialCurve((0.0, 0.0, 1.0), unit=1e20), "1 tokens would take 1e-40 s"),
    ],
)
def test_curves_that_go_on_to_nothing_or_for_ever_are_refused(curve: Curve, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        profile(curve)
    with pytest.raises(ProfileError, match="a decode step of"):
        Profile("x", "a test", PolynomialCurve((1.0,)), KvSize(1e6, 1e4), curve, 131_072, 8, 131_072)


def test_only_what_a_profile_has_is_inferred() -> None:
    with pytest.raises(ProfileError, match="'speed' cannot be inferred"):
        Profile(
            "x", "y", PolynomialCurve((1.0,)), KvSize(1, 1), PolynomialCurve((1.0,)), 1, 1, 1, (("speed", "guessed"),)
        )
