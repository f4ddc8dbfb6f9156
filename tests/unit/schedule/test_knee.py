"""The knee of latency over load is found on queues whose knee is known, and never where there is none."""

from __future__ import annotations

import heapq
from math import pi, sin
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.schedule.policies.knee import _POWERS, _SHARES, KneeDetector, KneeMemory, LoadCurve, _fit

if TYPE_CHECKING:
    from collections.abc import Callable


def latency_of_servers_s(servers: int, load: float, service_s: float = 1.0) -> float:
    """M/M/c by Erlang C: mean wait and service."""
    offered, blocked = load * service_s, 1.0
    for each in range(1, servers + 1):
        blocked = offered * blocked / (each + offered * blocked)
    waits = blocked / (1 - offered / servers * (1 - blocked))
    return service_s + waits * service_s / (servers - offered)


def exact_knee(servers: int) -> float:
    """The load of the largest load ÷ latency, by search."""
    loads = np.linspace(0.01, 0.999, 4000) * servers
    return float(loads[int(np.argmax([load / latency_of_servers_s(servers, load) for load in loads]))])


def fed(observations: list[tuple[float, float]], detector: KneeDetector | None = None) -> KneeMemory:
    detector = detector or KneeDetector()
    memory = detector.begin()
    for load, latency_s in observations:
        memory = detector.observe(memory, load, latency_s)
    return memory


def queue_windows(
    servers: int, seconds: int, window_s: int, load_at: Callable[[float], float], seed: int
) -> list[tuple[float, float]]:
    """(served per second, their mean latency) of a simulated M/M/c queue with a rate that changes, by window."""
    rng = np.random.default_rng(seed)
    free = [0.0] * servers
    ended = np.zeros(seconds // window_s + 1)
    latency_s = np.zeros_like(ended)
    now_s, peak = 0.0, max(load_at(at) for at in range(seconds))
    while now_s < seconds:
        now_s += rng.exponential(1 / peak)
        if rng.random() * peak > load_at(now_s):
            continue
        end_s = max(now_s, heapq.heappop(free)) + rng.exponential()
        heapq.heappush(free, end_s)
        if end_s < seconds:
            ended[int(end_s // window_s)] += 1
            latency_s[int(end_s // window_s)] += end_s - now_s
    return [(n / window_s, s / n) for n, s in zip(ended, latency_s, strict=True) if n]


@pytest.mark.parametrize("servers", [1, 2, 4, 8, 16, 64])
def test_the_knee_of_exact_curves(servers: int) -> None:
    loads = np.random.default_rng(servers).uniform(0.1, 0.97, 500) * servers
    knee = KneeDetector().knee(fed([(load, latency_of_servers_s(servers, load)) for load in loads]))
    assert knee.load == pytest.approx(exact_knee(servers), rel=0.03)
    assert knee.latency_s == pytest.approx(latency_of_servers_s(servers, exact_knee(servers)), rel=0.05)
    assert knee.curve is not None
    assert knee.curve.elasticity(knee.load or 0) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("servers", [1, 2, 4, 16])
def test_the_knee_under_noise(servers: int) -> None:
    rng = np.random.default_rng(servers)
    loads = rng.uniform(0.1, 0.95, 1000) * servers
    noisy = [(load, latency_of_servers_s(servers, load) * rng.lognormal(-0.045, 0.3)) for load in loads]
    assert KneeDetector().knee(fed(noisy)).load == pytest.approx(exact_knee(servers), rel=0.06)


@pytest.mark.parametrize("servers", [1, 4, 8])
def test_the_knee_of_a_simulated_queue_that_is_overloaded_at_times(servers: int) -> None:
    """Windows of a queue are autocorrelated, their loads noisy, and those of the overload no steady state."""
    window_s = 200 // servers

    def load_at(at_s: float) -> float:
        return servers * (0.6 + 0.5 * sin(2 * pi * at_s / (window_s * 150)))

    windows = queue_windows(servers, window_s * 600, window_s, load_at, seed=servers)
    knee = KneeDetector().knee(fed(windows))
    assert knee.load == pytest.approx(exact_knee(servers), rel=0.2)


def test_no_knee_is_seen_where_latency_does_not_rise() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        flat = [(rng.uniform(1, 10), rng.lognormal(0, 0.2)) for _ in range(500)]
        knee = KneeDetector().knee(fed(flat))
        assert knee.load is None, knee
        assert "does not rise" in knee.why or "above the highest" in knee.why


def test_no_knee_is_seen_below_it() -> None:
    loads = np.random.default_rng(0).uniform(0.05, 0.35, 500)
    knee = KneeDetector().knee(fed([(load, latency_of_servers_s(1, load)) for load in loads]))
    assert knee.load is None
    assert "above the highest load" in knee.why


def test_the_knee_follows_when_instances_go() -> None:
    rng = np.random.default_rng(1)
    detector = KneeDetector(half_life=100)
    memory = detector.begin()
    for servers in (8, 4):
        for _ in range(800):
            load = rng.uniform(0.1, 0.95) * servers
            memory = detector.observe(memory, load, latency_of_servers_s(servers, load))
        assert detector.knee(memory).load == pytest.approx(exact_knee(servers), rel=0.06)


@settings(max_examples=25)
@given(st.floats(1e-6, 1e9), st.floats(1e-6, 1e6))
def test_the_knee_scales_with_loads_and_not_with_latencies(load_unit: float, latency_unit: float) -> None:
    loads = np.random.default_rng(3).uniform(0.1, 0.95, 300)
    observed = [(load * load_unit, latency_of_servers_s(1, load) * latency_unit) for load in loads]
    # Bins have fixed edges, so a unit shifts observations between them.
    assert KneeDetector().knee(fed(observed)).load == pytest.approx(0.5 * load_unit, rel=0.05)


@given(st.lists(st.tuples(st.floats(allow_nan=True), st.floats(allow_nan=True)), max_size=60))
def test_whatever_is_observed_memory_is_bounded_and_answers_are_finite(observations: list[tuple[float, float]]) -> None:
    detector = KneeDetector()
    memory = fed(observations, detector)
    assert len(memory.bins) <= 129
    knee = detector.knee(memory)
    for value in (knee.load, knee.latency_s, knee.highest_load, knee.improvement):
        assert value is None or np.isfinite(value)


@given(st.floats(1e-3, 1e3), st.integers(1, 256), st.floats(0.01, 0.99))
def test_the_curve_of_servers_is_close_to_erlang(service_s: float, servers: int, share: float) -> None:
    """Sakasegawa's approximation; the figure is that of the whole latency, not of the wait."""
    load = share * servers / service_s
    curve = LoadCurve.of_servers(service_s, servers)
    assert curve.latency_s(load) == pytest.approx(latency_of_servers_s(servers, load, service_s), rel=0.05)
    assert curve.elasticity(load) >= 0
    assert curve.knee() * service_s == pytest.approx(exact_knee_of_curve(servers), rel=1e-6)


def exact_knee_of_curve(servers: int) -> float:
    return LoadCurve.of_servers(1.0, servers).knee()


@pytest.mark.parametrize("bad", [{"half_life": 0.5}, {"certainty": 0.0}, {"half_life": float("nan")}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PlanError, match="half_life"):
        KneeDetector(**bad)


@pytest.mark.parametrize("bins", [3, 7, 8, 9, 16, 21])
def test_no_other_curve_of_the_table_fits_better(bins: int) -> None:
    """Each is fitted by itself here, with neither of its two parts negative."""
    rng = np.random.default_rng(bins)
    loads = np.sort(rng.uniform(0.1, 3.0, bins))
    means = 1.0 + (loads / 3.2) ** 3 / (1 - loads / 3.2) + rng.uniform(0.0, 0.2, bins)
    weights = rng.uniform(1.0, 100.0, bins)

    def error_of(parts: np.ndarray, columns: np.ndarray) -> float:
        return float(weights @ (columns @ parts - 1) ** 2)

    least = np.inf
    for share in _SHARES:
        x = share * loads / loads.max()
        for power in _POWERS:
            columns = np.stack([1 / means, x**power / (1 - x) / means], axis=1)
            scale = np.sqrt(weights)
            tried = [np.linalg.lstsq(columns * scale[:, None], scale, rcond=None)[0]]
            for only in (0, 1):
                alone = np.zeros(2)
                alone[only] = (weights @ columns[:, only]) / (weights @ columns[:, only] ** 2)
                tried.append(alone)
            least = min(least, *(error_of(parts, columns) for parts in tried if (parts >= 0).all()))
    curve, error, flat_error = _fit(loads, means, weights)
    found = float(weights @ (np.array([curve.latency_s(load) for load in loads.tolist()]) / means - 1) ** 2)
    assert error == pytest.approx(least, rel=1e-6)
    assert error == pytest.approx(found, rel=1e-6)
    assert flat_error >= error
