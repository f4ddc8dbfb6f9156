"""Λ_max of a plan: the paper's equations where there is one prefill and one PD cluster, and beyond."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import DeploymentError, PlanError
from kvstore.schedule.deployment import Cluster, Deployment, Link, Slo
from kvstore.schedule.link_rate import loss_limited_bytes_per_s
from kvstore.schedule.planning.lengths import PointMasses
from kvstore.schedule.planning.plan import CONVENTIONS, Band, Plan, PrefixMove, Split, Traffic, divided, plan_of
from kvstore.schedule.planning.throughput import throughput
from tests.unit.planned import GBIT, H20, H200, KV, LENGTHS, TRAFFIC


def paper(egress_gbit: float = 100.0, **link: float) -> Deployment:
    return Deployment(
        (Cluster("prfaas", H200, 4, 0), Cluster("pd", H20, 3, 5)),
        (Link("prfaas", "pd", egress_gbit * GBIT, **link),),
    )


def test_the_papers_deployment_is_the_papers_equation() -> None:
    result = throughput(paper(), plan_of([["pd"], ["prfaas"]], [19_400]), TRAFFIC)
    p = LENGTHS.share(19_400)
    prfaas = 4 / H200.prefill(LENGTHS.mean(19_400))
    prefill = 3 / H20.prefill(LENGTHS.mean(0, 19_400))
    decode = 5 * 20 / (0.025 * 1024)
    assert result.requests_per_s == pytest.approx(min(prfaas / p, prefill / (1 - p), decode), rel=1e-12)
    assert result.part("prefill of prfaas").requests_per_s == pytest.approx(prfaas, rel=1e-12)
    assert result.part("prefill of pd").requests_per_s == pytest.approx(prefill, rel=1e-12)
    assert result.part("decode of pd").requests_per_s == pytest.approx(decode, rel=1e-12)
    assert result.part("decode of pd").share == 1.0
    assert result.shares == pytest.approx((1 - p, p), rel=1e-12)
    assert result.requests_per_s == pytest.approx(3.24, rel=0.03)
    assert result.link_bytes_per_s("prfaas") / GBIT == pytest.approx(13, rel=0.1)


def test_a_thin_link_ends_the_rate_by_name() -> None:
    result = throughput(paper(egress_gbit=5), plan_of([["pd"], ["prfaas"]], [19_400]), TRAFFIC)
    assert result.binding == ("link prfaas to pd",)
    expected = 5 * GBIT / KV.total_bytes(LENGTHS.mean(19_400))
    assert result.part("link prfaas to pd").requests_per_s == pytest.approx(expected, rel=1e-12)
    assert result.requests_per_s == pytest.approx(expected / LENGTHS.share(19_400), rel=1e-12)


@pytest.mark.parametrize("side", ["egress", "ingress"])
def test_egress_and_ingress_limit_like_a_link(side: str) -> None:
    wide = paper()
    name = "prfaas" if side == "egress" else "pd"
    narrow = replace(
        wide,
        clusters=tuple(
            replace(each, **{f"{side}_bytes_per_s": 5 * GBIT}) if each.name == name else each for each in wide.clusters
        ),
    )
    plan = plan_of([["pd"], ["prfaas"]], [19_400])
    result = throughput(narrow, plan, TRAFFIC)
    assert result.binding == (f"{side} of {name}",)
    assert result.requests_per_s == pytest.approx(throughput(paper(5), plan, TRAFFIC).requests_per_s, rel=1e-12)


def test_prefixes_that_come_the_other_way_use_the_other_link() -> None:
    deployment = replace(paper(), links=(*paper().links, Link("pd", "prfaas", 1 * GBIT)))
    plan = plan_of([["pd"], ["prfaas"]], [19_400])
    still = throughput(deployment, plan, replace(TRAFFIC, moves=(PrefixMove("pd", "prfaas", 10e6),)))
    assert still.requests_per_s == throughput(paper(), plan, TRAFFIC).requests_per_s
    assert still.part("link pd to prfaas").share == pytest.approx(LENGTHS.share(19_400))
    moved = throughput(deployment, plan, replace(TRAFFIC, moves=(PrefixMove("pd", "prfaas", 250e6),)))
    assert moved.binding == ("link pd to prfaas",)
    assert moved.requests_per_s == pytest.approx(1 * GBIT / 250e6 / LENGTHS.share(19_400), rel=1e-9)
    with pytest.raises(PlanError, match="no link leads there"):
        throughput(paper(), plan, replace(TRAFFIC, moves=(PrefixMove("pd", "prfaas", 1.0),)))


def test_hand_overs_the_other_way_are_counted_too() -> None:
    """A PD cluster that prefills for another one."""
    deployment = Deployment(
        (Cluster("a", H20, 4, 1), Cluster("b", H200, 4, 7)), (Link("a", "b", 10 * GBIT), Link("b", "a", 10 * GBIT))
    )
    result = throughput(deployment, plan_of([["a"], ["b"]], [30_000]), TRAFFIC)
    assert result.link_bytes_per_s("a", "b") > 0
    assert result.link_bytes_per_s("a", "b") == pytest.approx(
        sum(flow.bytes_per_s for flow in result.flows if (flow.prefill, flow.decode) == ("a", "b"))
    )
    decoded = sum(flow.requests_per_s for flow in result.flows)
    assert decoded == pytest.approx(result.requests_per_s, rel=1e-9)


def test_a_lossy_link_delivers_what_the_formula_says() -> None:
    link = Link("prfaas", "pd", 100 * GBIT, round_trip_s=0.02, loss=1e-4)
    assert loss_limited_bytes_per_s(link, 1) == pytest.approx(1460 * 1.22 / (0.02 * 0.01))
    assert loss_limited_bytes_per_s(link, 10**6) == 100 * GBIT
    assert loss_limited_bytes_per_s(replace(link, loss=0.0)) == 100 * GBIT
    slow = throughput(paper(round_trip_s=0.02, loss=1e-4), plan_of([["pd"], ["prfaas"]], [19_400]), TRAFFIC)
    assert slow.binding == ("link prfaas to pd",)


def test_equal_clusters_share_a_band() -> None:
    """Two halves serve as much as the whole, whoever decodes."""
    whole = Deployment((Cluster("x", H200, 4, 0), Cluster("pd", H20, 4, 6)), (Link("x", "pd", 50 * GBIT),))
    halves = Deployment(
        (Cluster("x", H200, 2, 0), Cluster("y", H200, 2, 0), Cluster("pd", H20, 2, 4), Cluster("qd", H20, 2, 2)),
        tuple(Link(a, b, 50 * GBIT) for a in ("x", "y") for b in ("pd", "qd")),
    )
    for convention in CONVENTIONS:
        one = throughput(whole, plan_of([["pd"], ["x"]], [15_000]), TRAFFIC, convention)
        two = throughput(halves, plan_of([["pd", "qd"], ["x", "y"]], [15_000]), TRAFFIC, convention)
        # Decode of a half may bind where that of the whole does not, since there is no link between pd and qd.
        assert two.requests_per_s == pytest.approx(one.requests_per_s, rel=1e-6)
        for part in two.parts:
            assert part.used_share <= 1 + 1e-9


def test_where_decode_ends_the_rate_prefill_shares_what_is_left() -> None:
    """Both prefill the same lengths, and neither is busier than the other."""
    deployment = Deployment((Cluster("x", H200, 4, 0), Cluster("pd", H20, 6, 2)), (Link("x", "pd", 50 * GBIT),))
    result = throughput(deployment, plan_of([["pd", "x"]]), TRAFFIC)
    assert result.binding == ("decode of pd",)
    used = [result.part(f"prefill of {name}").used_share for name in ("x", "pd")]
    assert used[0] == pytest.approx(used[1], rel=1e-6)
    assert result.requests_per_s == pytest.approx(2 * H20.decode_requests_per_s(1024), rel=1e-9)


def test_no_more_flows_than_come() -> None:
    """Where one band ends the rate, another's clusters have room for more than there is."""
    deployment = Deployment(
        (Cluster("a", H20, 5, 9), Cluster("b", H20, 2, 9), Cluster("x", H200, 1, 0)),
        (Link("x", "a", 50 * GBIT), Link("x", "b", 50 * GBIT)),
    )
    result = throughput(deployment, plan_of([["a", "b"], ["x"]], [10_000]), TRAFFIC)
    assert result.binding == ("prefill of x",)
    for number, share in enumerate(result.shares):
        coming = sum(flow.requests_per_s for flow in result.flows if flow.band == number)
        assert coming == pytest.approx(result.requests_per_s * share, rel=1e-12)


def test_what_need_not_cross_does_not() -> None:
    """Two clusters that could decode for each other, and have no reason to."""
    deployment = Deployment(
        (Cluster("a", H20, 4, 4), Cluster("b", H20, 4, 4)), (Link("a", "b", 50 * GBIT), Link("b", "a", 50 * GBIT))
    )
    assert throughput(deployment, plan_of([["a", "b"]]), TRAFFIC).link_bytes_per_s() == 0


def test_the_two_conventions_differ_by_jensen() -> None:
    """T is convex, so the mean of T is above T of the mean, and less is served."""
    plan = plan_of([["pd"]])
    deployment = Deployment((Cluster("pd", H20, 9, 3),))
    at_mean, mean = (throughput(deployment, plan, TRAFFIC, each).requests_per_s for each in CONVENTIONS)
    assert at_mean > mean
    points = Traffic(PointMasses([5000.0]), 1024)
    assert throughput(deployment, plan, points, "mean") == replace(
        throughput(deployment, plan, points, "at-mean"), convention="mean"
    )


def test_what_cannot_be_served_is_an_error() -> None:
    deployment = Deployment(
        (Cluster("a", H200, 2, 0), Cluster("b", H20, 0, 2), Cluster("c", H20, 2, 1)), (Link("a", "b", GBIT),)
    )
    with pytest.raises(PlanError, match="nobody prefills prompts above 20000"):
        throughput(deployment, plan_of([["a"], ["b"]], [20_000]), TRAFFIC)
    with pytest.raises(DeploymentError, match="no link to one that decodes"):
        throughput(deployment, plan_of([["c"]], splits=[Split("b", 2, 0)]), TRAFFIC)


def test_a_threshold_outside_of_the_lengths_leaves_a_band_without_requests() -> None:
    result = throughput(paper(), plan_of([["pd"], ["prfaas"]], [1e6]), TRAFFIC)
    assert result.shares == (1.0, 0.0)
    assert result.mean_tokens[1] == 0.0
    assert [part.name for part in result.parts] == ["prefill of pd", "decode of pd"]


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ((Band(0, 10, ("a",)),), "set it to infinity"),
        ((Band(0, 10, ("a",)), Band(11, inf, ("b",))), "ascend from 0 and meet"),
        ((Band(0, 10, ("a",)), Band(10, inf, ("a",))), "stands twice"),
        ((Band(0, inf, ()),), "a cluster that prefills"),
        ((), "a cluster that prefills"),
    ],
)
def test_bands_must_meet(bands: tuple[Band, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(bands)


def test_a_split_must_add_up() -> None:
    with pytest.raises(PlanError, match="add up to the 8 instances"):
        divided(paper(), [Split("pd", 3, 4)])
    assert divided(paper(), [Split("pd", 4, 4)]).cluster("pd").prefill_instances == 4
    with pytest.raises(PlanError, match="2 groups of clusters need 1 threshold"):
        plan_of([["a"], ["b"]], [])


@settings(max_examples=60, deadline=None)
@given(
    threshold=st.floats(300, 120_000),
    gbit=st.floats(0.5, 100),
    factor=st.floats(1.01, 10),
    prefill=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    decode=st.tuples(st.integers(1, 6), st.integers(0, 6)),
    convention=st.sampled_from(CONVENTIONS),
)
def test_more_of_anything_never_serves_less(
    threshold: float, gbit: float, factor: float, prefill: tuple[int, int], decode: tuple[int, int], convention: str
) -> None:
    def served(gbit: float, prefill: tuple[int, int], decode: tuple[int, int]) -> float:
        deployment = Deployment(
            (Cluster("a", H20, prefill[0], decode[0]), Cluster("b", H200, prefill[1], decode[1])),
            (Link("a", "b", gbit * GBIT), Link("b", "a", gbit * GBIT)),
        )
        plan = plan_of([["a"], ["b"]], [threshold])
        result = throughput(deployment, plan, TRAFFIC, convention)  # type: ignore[arg-type]
        assert max(part.used_share for part in result.parts) <= 1 + 1e-7
        assert result.binding, "something ends every rate"
        return result.requests_per_s

    base = served(gbit, prefill, decode)
    slack = 1 + 1e-6
    assert served(gbit * factor, prefill, decode) * slack >= base
    assert served(gbit, (prefill[0] + 1, prefill[1]), decode) * slack >= base
    assert served(gbit, prefill, (decode[0], decode[1] + 1)) * slack >= base
    tripled = served(3 * gbit, (3 * prefill[0], 3 * prefill[1]), (3 * decode[0], 3 * decode[1]))
    assert tripled == pytest.approx(3 * base, rel=1e-6)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=2, max_size=3),
    st.floats(0.1, 40.0),
    st.lists(st.integers(200, 60_000), min_size=2, max_size=2, unique=True).map(sorted),
)
@settings(max_examples=60, deadline=None)
def test_flows_serve_each_band_once(instances: list[tuple[int, int]], link_gbit: float, cuts: list[int]) -> None:
    """What stays in a cluster costs a linear program nothing, so it might serve a band more than once."""
    names = [f"c{number}" for number in range(len(instances))]
    clusters = tuple(Cluster(name, H20, *each) for name, each in zip(names, instances, strict=True))
    links = tuple(Link(a, b, link_gbit * GBIT) for a in names for b in names if a != b)
    result = throughput(
        Deployment(clusters, links), plan_of([[name] for name in names], cuts[: len(names) - 1]), TRAFFIC
    )
    for band, share in enumerate(result.shares):
        served = sum(flow.requests_per_s for flow in result.flows if flow.band == band)
        assert served == pytest.approx(result.requests_per_s * share, rel=1e-9)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), inf, 1.7e308, 5e-324])
def test_rates_that_no_link_has_are_refused(value: float) -> None:
    with pytest.raises(DeploymentError, match="leave a dead link out"):
        Link("a", "b", value)
    for side in ("egress_bytes_per_s", "ingress_bytes_per_s"):
        with pytest.raises(DeploymentError, match=f"{side}=.* leave it out for no limit"):
            Cluster("a", H20, 1, 1, **{side: value})


def test_a_hardly_measurable_round_trip_limits_nothing() -> None:
    assert loss_limited_bytes_per_s(Link("a", "b", 1e9, 5e-324, 1e-7)) == 1e9
    with pytest.raises(DeploymentError, match=r"round_trip_s=1.7e\+308 must be from 0 to 3600"):
        Link("a", "b", 1e9, 1.7e308)


@pytest.mark.parametrize(("limits", "message"), [
    ((0.0, 0.03), "ttft_s=0.0 must be positive"),
    ((10.0, float("nan")), "tpot_s=nan must be positive"),
    ((inf, 0.03), "ttft_s=inf must be positive"),
    ((10.0, 0.03, 90.0), "share=90.0 of the requests must be in"),
])  # fmt: skip
def test_limits_that_say_nothing_are_refused(limits: tuple[float, ...], message: str) -> None:
    with pytest.raises(DeploymentError, match=message):
        Slo(*limits)
