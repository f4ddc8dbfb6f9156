"""Closed forms of waiting: known values, one another, and queues played through."""

from __future__ import annotations

from heapq import heappop, heappush
from math import exp, factorial, inf, nan

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.schedule.planning.queueing import Waiting, mdc, mg1, mgc, mmc


def test_one_server_is_the_textbook() -> None:
    assert mmc(0.8, 1.0, 1) == Waiting(pytest.approx(0.8), pytest.approx(4.0), 0.8)  # type: ignore[arg-type]
    assert mdc(0.8, 1.0, 1) == Waiting(pytest.approx(0.8), pytest.approx(2.0), 0.8)  # type: ignore[arg-type]


def test_erlang_c_is_its_sum() -> None:
    servers, offered = 5, 4.0
    below = sum(offered**n / factorial(n) for n in range(servers))
    full = offered**servers / factorial(servers) * servers / (servers - offered)
    waiting = mmc(offered / 3.0, 3.0, servers)
    assert waiting.waits_share == pytest.approx(full / (below + full), rel=1e-12)
    assert waiting.mean_s == pytest.approx(waiting.waits_share * 3.0 / (servers - offered), rel=1e-12)


@pytest.mark.parametrize("servers", [1, 2, 5, 20])
@pytest.mark.parametrize("used", [0.3, 0.7, 0.95])
def test_mdc_is_the_chain_solved_step_by_step(servers: int, used: float) -> None:
    """Q' = max(Q - c, 0) + Poisson(a), iterated until it stands."""
    offered = used * servers
    size = int(servers + 60 * servers / (servers * (1 - used)) + 40)
    arrivals = np.zeros(size)
    arrivals[0] = exp(-offered)
    for number in range(1, size):
        arrivals[number] = arrivals[number - 1] * offered / number
    matrix = np.zeros((size, size))
    for state in range(size):
        left = max(state - servers, 0)
        matrix[state, left:] = arrivals[: size - left]
    matrix[:, -1] += 1 - matrix.sum(axis=1)
    system = matrix.T - np.eye(size)
    system[-1] = 1.0
    chance = np.linalg.solve(system, np.append(np.zeros(size - 1), 1.0))
    waiting = mdc(offered, 1.0, servers)
    queued = float(np.maximum(np.arange(size) - servers, 0) @ chance)
    assert waiting.mean_s == pytest.approx(queued / offered, rel=1e-6, abs=1e-9)
    assert waiting.waits_share == pytest.approx(float(chance[servers:].sum()), rel=1e-6, abs=1e-9)


def play(rate: float, services: np.ndarray, servers: int, seed: int) -> np.ndarray:
    """Waits of one queue, first come first served."""
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(services)))
    free: list[float] = [0.0] * servers
    waits = np.empty(len(services))
    for number, (arrival, service) in enumerate(zip(arrivals.tolist(), services.tolist(), strict=True)):
        begin = max(arrival, heappop(free))
        waits[number] = begin - arrival
        heappush(free, begin + service)
    return waits[len(waits) // 10 :]


@pytest.mark.parametrize(("servers", "used", "off"), [(1, 0.7, 0.05), (4, 0.8, 0.08), (9, 0.85, 0.1)])
def test_general_service_times_are_close_to_a_queue_played_through(servers: int, used: float, off: float) -> None:
    random = np.random.default_rng(5)
    services = random.lognormal(0.0, 0.7, 120_000)
    mean, square = float(services.mean()), float((services**2).mean())
    waiting = mgc(used * servers / mean, mean, square, servers)
    waits = play(used * servers / mean, services, servers, 6)
    assert waiting.mean_s == pytest.approx(float(waits.mean()), rel=off)
    assert waiting.waits_share == pytest.approx(float((waits > 0).mean()), abs=0.03)
    assert waiting.share_above(3 * waiting.mean_s) == pytest.approx(
        float((waits > 3 * waiting.mean_s).mean()), abs=0.03
    )


@settings(max_examples=100, deadline=None)
@given(
    servers=st.integers(1, 400), used=st.floats(0.0, 0.999), service_s=st.floats(1e-3, 1e3), variation=st.floats(0, 4)
)
def test_forms_agree_with_one_another(servers: int, used: float, service_s: float, variation: float) -> None:
    rate = used * servers / service_s
    regular, random = mdc(rate, service_s, servers), mmc(rate, service_s, servers)
    slack = 1e-9 * service_s
    assert random.mean_s / 2 * (1 - 1e-6) - slack <= regular.mean_s <= random.mean_s + slack
    general = mgc(rate, service_s, service_s**2 * (1 + variation), servers)
    assert 0 <= general.waits_share <= 1
    assert general.mean_s >= 0
    if servers == 1:
        assert general.mean_s == pytest.approx((1 + variation) / 2 * mmc(rate, service_s, 1).mean_s, abs=slack)
    assert mgc(rate, service_s, service_s**2, servers).mean_s == pytest.approx(regular.mean_s, abs=slack)
    assert mgc(rate, service_s, 2 * service_s**2, servers).mean_s == pytest.approx(random.mean_s, abs=slack)
    # Two halves of the time are one queue in other units.
    assert mdc(2 * rate, service_s / 2, servers).mean_s == pytest.approx(regular.mean_s / 2, rel=1e-9, abs=slack)


@pytest.mark.parametrize("rate", [5.0, 6.0])
def test_an_unstable_load_is_an_error(rate: float) -> None:
    for form in (lambda: mmc(rate, 1.0, 5), lambda: mdc(rate, 1.0, 5), lambda: mgc(rate, 1.0, 1.5, 5)):
        with pytest.raises(PlanError, match=r"unstable.*there are 5"):
            form()


def test_numbers_out_of_their_limits_are_errors() -> None:
    for rate, service in ((-1.0, 1.0), (1.0, 0.0), (nan, 1.0), (1.0, inf)):
        with pytest.raises(PlanError, match="needs a rate and a service time"):
            mmc(rate, service, 1)
    with pytest.raises(PlanError, match="servers, not 0"):
        mmc(1.0, 0.1, 0)
    with pytest.raises(PlanError, match="below the square"):
        mg1(0.5, 1.0, 0.5)
    assert mdc(0.0, 1.0, 3) == Waiting(0.0, 0.0, 0.0)
    assert mmc(0.0, 1.0, 1).share_above(0.0) == 0.0
