"""Lengths of prompts: ranges add up, means and quantiles are those of samples."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.schedule.planning.lengths import LengthDistribution, PointMasses, TruncatedLogNormal

CASE_STUDY = TruncatedLogNormal(9.9, 1.0, 128, 131_072)

log_normals = st.builds(
    TruncatedLogNormal,
    mu=st.floats(7, 11),
    sigma=st.floats(0.3, 2),
    tokens_min=st.integers(1, 500),
    tokens_max=st.integers(60_000, 200_000),
)
point_masses = st.lists(st.tuples(st.integers(1, 5_000), st.floats(0.01, 10)), min_size=1, max_size=20).map(
    lambda pairs: PointMasses([tokens for tokens, _ in pairs], [weight for _, weight in pairs])
)
distributions: st.SearchStrategy[LengthDistribution] = st.one_of(log_normals, point_masses)


@given(distributions, st.floats(0, 1))
def test_two_ranges_that_meet_are_the_whole(lengths: LengthDistribution, where: float) -> None:
    threshold = lengths.tokens_min + where * (lengths.tokens_max - lengths.tokens_min)
    short, long = lengths.share(upto=threshold), lengths.share(above=threshold)
    assert short + long == pytest.approx(1)
    total = 0.0
    if short > 1e-6:
        assert lengths.tokens_min <= lengths.mean(upto=threshold) <= threshold
        total += short * lengths.mean(upto=threshold)
    if long > 1e-6:
        assert threshold <= lengths.mean(above=threshold) <= lengths.tokens_max
        total += long * lengths.mean(above=threshold)
    if min(short, long) > 1e-6:
        assert total == pytest.approx(lengths.mean(), rel=1e-6)


@given(distributions, st.floats(0.001, 0.999))
def test_a_quantile_is_where_the_share_is_reached(lengths: LengthDistribution, share: float) -> None:
    tokens = lengths.quantile(share)
    assert lengths.share(upto=tokens) >= share - 1e-6
    assert lengths.share(upto=tokens * (1 - 1e-4)) <= share + 1e-6


@given(log_normals, st.floats(0.05, 0.95))
def test_the_quadrature_agrees_with_the_closed_form(lengths: TruncatedLogNormal, share: float) -> None:
    threshold = lengths.quantile(share)
    assert lengths.expected(lambda tokens: tokens, above=threshold) == pytest.approx(lengths.mean(above=threshold))
    assert lengths.expected(lambda tokens: tokens, upto=threshold) == pytest.approx(lengths.mean(upto=threshold))


def test_the_log_normal_is_that_of_samples() -> None:
    rng = np.random.default_rng(7)
    samples = np.exp(rng.normal(9.9, 1.0, 400_000))
    samples = samples[(samples >= 128) & (samples <= 131_072)]
    assert CASE_STUDY.mean() == pytest.approx(samples.mean(), rel=5e-3)
    assert CASE_STUDY.share(above=19_400) == pytest.approx((samples > 19_400).mean(), abs=3e-3)
    assert CASE_STUDY.quantile(0.9) == pytest.approx(np.quantile(samples, 0.9), rel=1e-2)
    assert CASE_STUDY.expected(np.sqrt, 1_000, 50_000) == pytest.approx(
        np.sqrt(samples[(samples > 1_000) & (samples <= 50_000)]).mean(), rel=5e-3
    )


def test_point_masses_by_hand() -> None:
    lengths = PointMasses([100, 200, 100, 400])
    assert lengths.lengths == (100, 200, 400)
    assert (lengths.share(upto=100), lengths.share(above=100), lengths.share(100, 200)) == (0.5, 0.5, 0.25)
    assert lengths.mean() == 200
    assert lengths.mean(above=100) == 300
    assert lengths.expected(np.square, above=100) == (200**2 + 400**2) / 2
    assert [lengths.quantile(share) for share in (0, 0.5, 0.51, 0.75, 0.76, 1)] == [100, 100, 200, 200, 400, 400]
    assert PointMasses([5, 7], [1, 0]).lengths == (5,)


@pytest.mark.parametrize("lengths", [CASE_STUDY, PointMasses([128, 500])])
def test_a_range_without_prompts_is_named(lengths: LengthDistribution) -> None:
    assert lengths.share(above=lengths.tokens_max) == 0
    assert lengths.share(upto=lengths.tokens_min / 2) == 0
    for above, upto in ((lengths.tokens_max, inf), (0.0, 100.0), (300.0, 200.0)):
        for ask in (lambda: lengths.mean(above, upto), lambda: lengths.expected(np.sqrt, above, upto)):  # noqa: B023
            with pytest.raises(PlanError, match="no prompt is longer than"):
                ask()


NAN = float("nan")


@pytest.mark.parametrize(
    ("mu", "sigma", "low", "high"),
    [(NAN, 1, 1, 9), (9, 0, 1, 9), (9, 1, 0, 9), (9, 1, 9, 9), (9, 1, 1, inf), (50, 1, 1, 9)],
)
def test_impossible_log_normals_are_refused(mu: float, sigma: float, low: float, high: float) -> None:
    with pytest.raises(PlanError):
        TruncatedLogNormal(mu, sigma, low, high)


@pytest.mark.parametrize(
    ("tokens", "weights"),
    [([], None), ([0], None), ([NAN], None), ([1, 2], [1]), ([1], [0]), ([1], [-1]), ([1], [inf])],
)
def test_impossible_point_masses_are_refused(tokens: list[float], weights: list[float] | None) -> None:
    with pytest.raises(PlanError):
        PointMasses(tokens, weights)


@pytest.mark.parametrize("share", [-0.1, 1.1, NAN])
@pytest.mark.parametrize("lengths", [CASE_STUDY, PointMasses([3])])
def test_a_quantile_needs_a_share(lengths: LengthDistribution, share: float) -> None:
    with pytest.raises(PlanError, match="within 0 and 1"):
        lengths.quantile(share)
