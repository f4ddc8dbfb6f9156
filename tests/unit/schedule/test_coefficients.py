"""Prices of resources: what others wait for, low below the knee, and without flapping."""

from __future__ import annotations

from itertools import pairwise
from math import isfinite

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.schedule.policies.coefficients import (
    PricingPolicy,
    decode_price,
    link_price,
    queue_elasticity,
    utilisation_of_queue,
)
from kvstore.schedule.policies.knee import LoadCurve
from kvstore.schedule.policies.snapshot import LinkState
from tests.unit.schedule.snapshots import cluster_state, snapshot


def test_an_idle_system_has_no_prices() -> None:
    policy = PricingPolicy()
    idle = snapshot(0.0, cluster_state("prfaas", decode=0), cluster_state("pd"))
    found = policy.observe(policy.begin(), idle).coefficients
    assert found.decode == {"pd": 0.0}
    assert set(found.link.values()) == {0.0}


@given(st.floats(0.01, 1e4), st.integers(1, 512))
def test_utilisation_and_waiting_are_two_names_of_one_thing(waiting: float, servers: int) -> None:
    utilisation = utilisation_of_queue(waiting, servers)
    assert 0 < utilisation < 1
    power = (2 * (servers + 1)) ** 0.5
    assert utilisation**power / (1 - utilisation) == pytest.approx(waiting, rel=1e-4)


@given(st.floats(0.01, 0.99), st.integers(1, 256))
def test_the_elasticity_of_a_queue_is_that_of_its_curve(utilisation: float, servers: int) -> None:
    curve, load, step = LoadCurve.of_servers(1.0, servers), utilisation * servers, 1e-5
    slope = (curve.latency_s(load * (1 + step)) / curve.latency_s(load * (1 - step)) - 1) / (2 * step)
    assert queue_elasticity(utilisation, servers) == pytest.approx(slope, rel=1e-2, abs=1e-4)
    assert queue_elasticity(utilisation, 1) == pytest.approx(utilisation / (1 - utilisation))


@given(
    st.lists(st.integers(0, 10_000), min_size=2, max_size=40),
    st.integers(1, 64),
    st.integers(0, 5000),
    st.integers(0, 5000),
    st.floats(0, 1),
)
def test_prices_are_finite_and_grow_with_what_waits(
    backlog: list[int], servers: int, running: int, decode_waiting: int, share: float
) -> None:
    policy = PricingPolicy()
    memory = policy.begin()
    for at, waiting in enumerate(sorted(backlog)):
        pd = cluster_state("pd", prefill=servers, waiting=waiting, running=running, decode_waiting=decode_waiting)
        memory = policy.observe(memory, snapshot(float(at), pd, cluster_state("other"), used_share=share))
    found = memory.coefficients
    for price in (*found.decode.values(), *found.link.values()):
        assert isfinite(price)
        assert price >= 0
    by_running = [decode_price(cluster_state(running=each)) for each in (0, 50, 100)]
    assert all(a <= b for a, b in pairwise(by_running))
    assert decode_price(cluster_state(running=100, decode_waiting=50)) > decode_price(cluster_state(running=100))


def test_a_dead_link_has_no_price_and_no_instance_no_cluster() -> None:
    assert link_price(1.0, LinkState("a", "b", 0.0, 0.0, 1.0, 0.0)) == 0.0
    policy = PricingPolicy()
    found = policy.observe(policy.begin(), snapshot(0.0, cluster_state(prefill=1, decode=0))).coefficients
    assert "pd" not in found.decode


def test_the_regime_changes_beyond_the_knee_and_comes_back() -> None:
    policy = PricingPolicy()
    memory = policy.begin()
    regimes = []
    for at in range(600):
        waiting = 30 if 100 <= at < 200 else 0
        memory = policy.observe(memory, snapshot(float(at), cluster_state(waiting=waiting, wait_s=waiting * 0.5)))
        regimes.append(memory.coefficients.pressure["pd"].regime)
    assert regimes[50] == "below"
    assert regimes[190] == "beyond"
    assert regimes[-1] == "below"


@given(st.lists(st.floats(0, 1), min_size=50, max_size=200), st.booleans())
def test_the_regime_never_flaps_inside_the_band(noise: list[float], begins_beyond: bool) -> None:
    """Whatever happens between the two elasticities, the regime stays as it was."""
    policy = PricingPolicy(smoothing_s=0.001)
    servers = 4
    # Fractions of a prompt stand for the mean of a longer look.
    band = [each / 50 for each in range(1, 200)]
    band = [each for each in band if 0.5 <= queue_elasticity(utilisation_of_queue(each, servers), servers) < 1]
    assert len(band) > 5
    memory = policy.begin()
    if begins_beyond:
        memory = policy.observe(memory, snapshot(0.0, cluster_state(prefill=servers, waiting=100)))
    regimes = set()
    for at, each in enumerate(noise, 1):
        waiting = band[min(int(each * len(band)), len(band) - 1)]
        memory = policy.observe(memory, snapshot(float(at), cluster_state(prefill=servers, waiting=waiting)))
        regimes.add(memory.coefficients.pressure["pd"].regime)
    assert regimes == {"beyond" if begins_beyond else "below"}


def test_a_measured_knee_is_used_where_snapshots_carry_it() -> None:
    """Latency that rises with load long before anything waits, as where prompts share an instance."""
    rng = np.random.default_rng(2)
    policy = PricingPolicy(smoothing_s=1.0)
    memory = policy.begin()
    curve = LoadCurve(service_s=1.0, wait_s=1.0, power=1.0, capacity=10.0)
    for at in range(400):
        load = float(rng.uniform(1, 9))
        state = cluster_state(served_per_s=load, latency_s=curve.latency_s(load))
        memory = policy.observe(memory, snapshot(float(at), state))
    for load, regime in ((2.0, "below"), (8.0, "beyond"), (4.5, "beyond"), (2.0, "below")):
        for at in range(20):
            state = cluster_state(served_per_s=load, latency_s=curve.latency_s(load))
            memory = policy.observe(memory, snapshot((memory.observed_s or 0.0) + 1 + at, state))
        pressure = memory.coefficients.pressure["pd"]
        assert (pressure.by, pressure.regime) == ("knee", regime)
        assert pressure.knee is not None
        assert pressure.knee.load == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("bad", [{"smoothing_s": 0.0}, {"leave_elasticity": 1.0}, {"knee_every_s": -1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="must be"):
        PricingPolicy(**bad)  # type: ignore[arg-type]
