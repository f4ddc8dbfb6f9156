"""Whole scenarios: those that ship with the package run, and settings that are none are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kvstore.errors import KVStoreError, SimulationError
from kvstore.scenario import PolicyChoice, Scenario
from kvstore.scenario.reading import read_scenario, scenario_names
from kvstore.simulate.result import Outcome
from kvstore.simulate.simulation import simulate


def short(name: str, duration_s: float = 120.0) -> Scenario:
    return replace(read_scenario(name), duration_s=duration_s, warmup_s=0.0)


@pytest.mark.parametrize("name", scenario_names())
def test_scenarios_that_ship_run(name: str) -> None:
    result = simulate(short(name))
    table = result.requests
    assert len(table) > 50
    assert (table.outcome == Outcome.DONE).all()
    assert np.allclose(table.parts.sum(axis=1), table.ttft_s)
    assert (table.cached_tokens <= table.possible_tokens).all()


def test_equal_scenarios_give_equal_results_and_other_seeds_others() -> None:
    first, second = simulate(short("three-clusters")), simulate(short("three-clusters"))
    other = simulate(replace(short("three-clusters"), seed=1))
    for name in first.requests.__dataclass_fields__:
        assert getattr(first.requests, name).tobytes() == getattr(second.requests, name).tobytes()
    assert first.caches == second.caches
    assert first.requests.arrival_s.tobytes() != other.requests.arrival_s.tobytes()


def test_progress_is_told() -> None:
    told: list[float] = []
    simulate(short("paper-prfaas", 60.0), progress=told.append)
    assert told == sorted(told)
    assert told


def test_admission_is_switched_on_by_a_setting() -> None:
    busy = short("paper-homogeneous", 600.0)
    busy = replace(busy, workload=replace(busy.workload, arrivals=replace(busy.workload.arrivals, rate_per_s=4.0)))
    choice = PolicyChoice(busy.policy.name, (*busy.policy.settings, ("admission", 1.0)))
    strict = simulate(replace(busy, policy=choice))
    done = strict.requests.outcome == Outcome.DONE
    assert not simulate(busy).is_stable
    assert strict.is_stable
    assert 0 < done.sum() < len(done)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ((("admission_slack", 2.0),), "admission is off"),
        ((("admission", 0.5),), "admission = 0.5"),
        ((("admission", 1.0), ("admission_patience", 1.0)), "admission_patience"),
        ((("conversion", 1.0), ("conversion_deployment", 1.0)), "conversion_deployment"),
    ],
)
def test_settings_that_are_none_are_refused(settings: tuple[tuple[str, float], ...], what: str) -> None:
    scenario = short("paper-homogeneous")
    with pytest.raises(SimulationError, match=what):
        simulate(replace(scenario, policy=PolicyChoice("local", settings)))


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(KVStoreError, match="nonsense"):
        simulate(replace(short("paper-homogeneous"), policy=PolicyChoice("nonsense")))
