"""The fast search for a plan against all plans."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.profile import PolynomialCurve, Profile
from kvstore.schedule.deployment import Cluster, Deployment, Link
from kvstore.schedule.planning.candidates import all_orders, orders_count
from kvstore.schedule.planning.exhaustive import exhaustive_plan
from kvstore.schedule.planning.lengths import PointMasses
from kvstore.schedule.planning.optimum import best_plan
from kvstore.schedule.planning.plan import CONVENTIONS, Convention, Split, Traffic, plan_of
from kvstore.schedule.planning.throughput import throughput
from kvstore.schedule.prefill_service import PrefillServiceModel
from tests.unit.planned import GBIT, H20, H200, KV, TRAFFIC


def paper(gbit: float = 100.0, instances: int = 8) -> Deployment:
    return Deployment(
        (Cluster("prfaas", H200, instances // 2, 0), Cluster("pd", H20, 1, instances - 1, convertible=True)),
        (Link("prfaas", "pd", gbit * GBIT),),
    )


def test_the_papers_optimum() -> None:
    best = best_plan(paper(), TRAFFIC)
    assert best.plan.splits == (Split("pd", 3, 5),)
    assert best.plan.thresholds[0] == pytest.approx(19_400, rel=0.03)
    assert best.requests_per_s == pytest.approx(3.24, rel=0.03)
    # The paper's condition of the optimum: both prefill parts are full at the same rate.
    parts = [best.part("prefill of prfaas"), best.part("prefill of pd")]
    assert parts[0].used_share == pytest.approx(parts[1].used_share, rel=1e-3)


def test_homogeneous_instances_divide_as_in_the_paper() -> None:
    best = best_plan(Deployment((Cluster("pd", H20, 6, 6),)), TRAFFIC, free=["pd"])
    assert best.plan.splits == (Split("pd", 9, 3),)
    assert best.plan.thresholds == ()
    assert best.requests_per_s == pytest.approx(2.11, rel=0.03)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("gbit", [2.0, 10.0, 100.0])
def test_nothing_that_was_tried_is_better(gbit: float, convention: Convention) -> None:
    best = best_plan(paper(gbit), TRAFFIC, convention)
    tried = exhaustive_plan(paper(gbit), TRAFFIC, convention)
    assert best.requests_per_s >= tried.requests_per_s * (1 - 1e-9)
    assert best.requests_per_s <= tried.requests_per_s * 1.02
    assert best.plan.splits == tried.plan.splits


def test_a_thin_link_leaves_more_to_the_pd_cluster() -> None:
    thresholds = [best_plan(paper(gbit), TRAFFIC).plan.thresholds[0] for gbit in (1.0, 3.0, 100.0)]
    assert thresholds == sorted(thresholds, reverse=True)
    assert thresholds[0] > thresholds[2]


CLUSTERS = st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.floats(0.1, 3), st.floats(0, 0.4), st.floats(0, 0.02),
    st.sampled_from([None, 0.5, 2.0]), st.sampled_from([None, 0.5, 2.0]), st.booleans(),
)  # fmt: skip


@st.composite
def problems(draw: st.DrawFn, most: int = 3) -> tuple[Deployment, Traffic]:
    clusters = []
    drawn = draw(st.lists(CLUSTERS, min_size=1, max_size=most))
    for number, (prefill, decode, base_s, linear_s, square_s, egress, ingress, free) in enumerate(drawn):
        profile = Profile(
            f"p{number}", "test", PolynomialCurve((base_s, linear_s, square_s), 1000.0), KV, PolynomialCurve((0.02,)),
            16, 8, 131072,
        )  # fmt: skip
        # A first cluster that does everything keeps every problem possible.
        extra = 1 if number == 0 else 0
        clusters.append(
            Cluster(
                f"c{number}", profile, prefill + extra, max(decode, 1 - prefill) + extra,
                None if egress is None else egress * GBIT, None if ingress is None else ingress * GBIT,
                convertible=free,
            )
        )  # fmt: skip
    links = [
        Link(a.name, b.name, draw(st.sampled_from([0.3, 1.0, 30.0])) * GBIT)
        for a in clusters
        for b in clusters
        if a != b and (b.name == "c0" or draw(st.booleans()))
    ]
    lengths = draw(st.lists(st.integers(200, 60_000), min_size=1, max_size=6, unique=True))
    weights = draw(st.lists(st.floats(0.1, 1), min_size=len(lengths), max_size=len(lengths)))
    traffic = Traffic(PointMasses([float(each) for each in lengths], weights), draw(st.floats(16, 4096)))
    service = draw(st.sampled_from([PrefillServiceModel(), PrefillServiceModel("chunked", 4096)]))
    return Deployment(tuple(clusters), tuple(links), service), traffic


@settings(max_examples=40, deadline=None)
@given(problem=problems(2), convention=st.sampled_from(CONVENTIONS))
def test_fast_finds_what_trying_all_finds(problem: tuple[Deployment, Traffic], convention: Convention) -> None:
    deployment, traffic = problem
    best = best_plan(deployment, traffic, convention)
    tried = exhaustive_plan(deployment, traffic, convention)
    assert best.requests_per_s <= tried.requests_per_s * (1 + 1e-6)
    assert best.requests_per_s >= tried.requests_per_s * (1 - 1e-6)
    assert max(part.used_share for part in best.parts) <= 1 + 1e-6
    assert best.binding
    for number, share in enumerate(best.shares):
        coming = sum(flow.requests_per_s for flow in best.flows if flow.band == number)
        assert coming == pytest.approx(best.requests_per_s * share, rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(problem=problems(2), gbit=st.floats(1.1, 20), convention=st.sampled_from(CONVENTIONS))
def test_more_never_plans_less(problem: tuple[Deployment, Traffic], gbit: float, convention: Convention) -> None:
    deployment, traffic = problem
    base = best_plan(deployment, traffic, convention).requests_per_s
    wider = replace(
        deployment, links=tuple(replace(link, bytes_per_s=link.bytes_per_s * gbit) for link in deployment.links)
    )
    assert best_plan(wider, traffic, convention).requests_per_s >= base * (1 - 1e-6)
    first, *rest = deployment.clusters
    larger = replace(deployment, clusters=(replace(first, prefill_instances=first.prefill_instances + 1), *rest))
    assert best_plan(larger, traffic, convention).requests_per_s >= base * (1 - 1e-6)


def test_three_clusters_take_the_lengths_that_each_is_best_at() -> None:
    middle = replace(H200, name="middle", prefill=PolynomialCurve((0.2, 0.06, 8e-4), 1000.0))
    deployment = Deployment(
        (Cluster("pd", H20, 3, 6), Cluster("middle", middle, 2, 0), Cluster("long", H200, 4, 0)),
        (Link("middle", "pd", 50 * GBIT), Link("long", "pd", 50 * GBIT)),
    )
    best = best_plan(deployment, TRAFFIC, "mean")
    tried = exhaustive_plan(deployment, TRAFFIC, "mean", thresholds_max=48)
    assert best.requests_per_s >= tried.requests_per_s * (1 - 1e-9)
    assert best.requests_per_s <= tried.requests_per_s * 1.03
    assert best.plan.bands[0].clusters == tried.plan.bands[0].clusters == ("middle",)
    assert "long" in best.plan.bands[-1].clusters
    one_less = throughput(deployment, plan_of([["pd"], ["long"]], [19_400]), TRAFFIC, "mean")
    assert best.requests_per_s > one_less.requests_per_s


def test_many_divisions_are_climbed_to_the_top() -> None:
    """Three clusters of ten instances: 1331 divisions, more than are tried one by one."""
    deployment = Deployment(
        tuple(Cluster(name, profile, 5, 5, convertible=True) for name, profile in
              (("a", H20), ("b", H20), ("c", H200))),
        tuple(Link(a, b, 100 * GBIT) for a in "abc" for b in "abc" if a != b),
    )  # fmt: skip
    traffic = Traffic(PointMasses([1000.0, 8000.0, 20_000.0, 60_000.0], [4, 3, 2, 1]), 1024)
    best = best_plan(deployment, traffic)
    # Between them a and b are one cluster of twenty, which is small enough to try everything.
    merged = Deployment(
        (Cluster("ab", H20, 10, 10, convertible=True), Cluster("c", H200, 5, 5, convertible=True)),
        (Link("ab", "c", 400 * GBIT), Link("c", "ab", 400 * GBIT)),
    )
    tried = exhaustive_plan(merged, traffic)
    assert best.requests_per_s == pytest.approx(tried.requests_per_s, rel=0.02)
    # That it may not be the top is said, and where everything was tried nothing is.
    assert best.note == "a better plan may exist: 1,331 divisions of the instances were climbed, not all tried"
    assert best_plan(merged, traffic).note == tried.note == ""


def test_sixteen_clusters_are_planned() -> None:
    deployment = Deployment(
        tuple(Cluster(f"pd{n}", H20, 3, 5) for n in range(10)) + tuple(Cluster(f"x{n}", H200, 5, 0) for n in range(6)),
        tuple(Link(f"x{n}", f"pd{m}", 20 * GBIT) for n in range(6) for m in range(10)),
    )
    best = best_plan(deployment, TRAFFIC, "mean", thresholds_max=64)
    assert len(best.plan.bands) == 2
    assert "of 5,315,654,681,981,355 orders of the 16 clusters that prefill 2 were tried" in best.note
    lumped = Deployment((Cluster("x", H200, 30, 0), Cluster("pd", H20, 30, 50)), (Link("x", "pd", 1200 * GBIT),))
    assert best.requests_per_s == pytest.approx(best_plan(lumped, TRAFFIC, "mean").requests_per_s, rel=1e-3)


def test_orders_are_counted_right() -> None:
    for members in range(5):
        orders = list(all_orders(tuple(range(members))))
        assert len(set(orders)) == len(orders) == orders_count(members)


def test_what_is_too_large_or_unknown_is_an_error() -> None:
    with pytest.raises(PlanError, match="use the fast one"):
        exhaustive_plan(paper(instances=1000), TRAFFIC, thresholds_max=4096)
    with pytest.raises(PlanError, match="elsewhere may be divided and is no cluster"):
        best_plan(paper(), TRAFFIC, free=["elsewhere"])


def test_given_thresholds_are_the_only_ones() -> None:
    tried = exhaustive_plan(paper(), TRAFFIC, thresholds=[10_000, 30_000])
    assert set(tried.plan.thresholds) <= {10_000.0, 30_000.0}
    assert tried.plan.bands[-1].upto_tokens == inf
    assert np.isfinite(tried.requests_per_s)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_what_bands_share_moves_thresholds(convention: Convention) -> None:
    """Two prefill clusters send into one narrow ingress, which no band has for itself."""
    deployment = Deployment(
        (
            Cluster("pd", H20, 8, 9, ingress_bytes_per_s=3 * GBIT),
            Cluster("x", replace(H200, name="x"), 3, 0),
            Cluster("y", replace(H200, name="y", prefill=PolynomialCurve((0.3, 0.05, 5e-4), 1000.0)), 1, 0),
        ),
        (Link("x", "pd", 100 * GBIT), Link("y", "pd", 100 * GBIT)),
    )
    traffic = Traffic(PointMasses([2e3, 6e3, 12e3, 20e3, 30e3, 50e3, 80e3, 120e3], [5, 8, 9, 8, 6, 4, 2, 1]), 1024)
    best, tried = (search(deployment, traffic, convention) for search in (best_plan, exhaustive_plan))
    assert "ingress of pd" in tried.binding
    assert best.requests_per_s == pytest.approx(tried.requests_per_s, rel=1e-6)
