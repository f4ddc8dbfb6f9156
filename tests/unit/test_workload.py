"""Requests of generated workloads and of arrivals: rates, order, prefixes, seeds."""

from __future__ import annotations

from itertools import count, islice
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.errors import SimulationError
from kvstore.keys import KEY_BYTES
from kvstore.scenario import Arrivals, Workload
from kvstore.schedule.planning.lengths import TruncatedLogNormal
from kvstore.workload import session as session_module
from kvstore.workload import sources
from kvstore.workload.arrivals import begin_times
from kvstore.workload.generators import BRANCHING, LOGNORMAL, MULTITURN
from kvstore.workload.sources import requests_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvstore.workload.request import Request

KINDS = ("lognormal", "multiturn", "branching")
SMALL = {
    "lognormal": {"mu": 6.0, "tokens_min": 16.0, "tokens_max": 4000.0, "output_tokens": 50.0, "shared_tokens": 100.0},
    "multiturn": {"mu": 5.0, "tokens_min": 16.0, "tokens_max": 2000.0, "shared_tokens": 100.0, "message_tokens": 60.0},
    "branching": {"shared_tokens": 100.0, "task_tokens": 50.0, "step_tokens": 40.0, "steps": 8.0, "fork_share": 0.3},
}


def taken(kind: Any, count: int = 300, *, seed: int = 0, block_tokens: int = 16, **fields: Any) -> list[Request]:
    fields.setdefault("arrivals", Arrivals("poisson", 10.0))
    fields.setdefault("settings", tuple(SMALL.get(kind, {}).items()))
    return list(requests_of(Workload(kind, requests_max=count, **fields), block_tokens=block_tokens, seed=seed))


def shared_blocks(one: bytes, two: bytes) -> int:
    """How many keys two prompts begin with in common; behind the first that differs none may be equal."""
    ours = [one[at : at + KEY_BYTES] for at in range(0, len(one), KEY_BYTES)]
    theirs = [two[at : at + KEY_BYTES] for at in range(0, len(two), KEY_BYTES)]
    shared = next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    assert not set(ours[shared:]) & set(theirs[shared:]), "a key names two prefixes"
    return shared


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 2**32), st.integers(4, 64))
def test_requests_are_sound(kind: str, seed: int, block_tokens: int) -> None:
    requests = taken(kind, 40, seed=seed, block_tokens=block_tokens)
    assert [each.number for each in requests] == list(range(40))
    last_s = 0.0
    for each in requests:
        assert each.prompt_tokens >= 1
        assert each.output_tokens >= 1
        assert len(each.keys) == each.prompt_tokens // block_tokens * KEY_BYTES
        assert len(each.end_keys) == (each.prompt_tokens + each.output_tokens) // block_tokens * KEY_BYTES
        assert each.end_keys.startswith(each.keys)
        assert each.arrival_s >= 0
        if each.after is None:
            assert each.arrival_s >= last_s
            last_s = each.arrival_s
        else:
            assert each.after < each.number
            if kind == "multiturn":
                assert each.keys.startswith(requests[each.after].end_keys)
    assert taken(kind, 40, seed=seed, block_tokens=block_tokens) == requests
    for one, two in zip(requests[:-1:3], requests[1::3], strict=False):
        shared_blocks(one.end_keys, two.end_keys)


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_brings_other_requests(kind: str) -> None:
    assert taken(kind, 20, seed=1) != taken(kind, 20, seed=2)


@pytest.mark.parametrize("kind", KINDS)
def test_other_arrivals_bring_the_same_prompts(kind: str) -> None:
    """So that policies and loads are compared on the same work."""
    slow, fast = (taken(kind, 50, arrivals=Arrivals("poisson", rate)) for rate in (0.001, 0.002))
    assert sorted(each.keys for each in slow) == sorted(each.keys for each in fast)
    assert [each.prompt_tokens for each in slow] == [each.prompt_tokens for each in fast]
    assert [each.arrival_s for each in slow] != [each.arrival_s for each in fast]


@pytest.mark.parametrize("kind", KINDS)
def test_all_begin_with_what_is_shared(kind: str) -> None:
    requests = [each for each in taken(kind) if each.prompt_tokens >= 100]
    roots = [each for each in requests if each.after is None]
    assert all(shared_blocks(roots[0].keys, each.keys) == 100 // 16 for each in roots[1:])


def test_lengths_are_those_of_the_distribution() -> None:
    requests = taken("lognormal", 20_000, settings=(), block_tokens=512)
    lengths = np.array([each.prompt_tokens for each in requests])
    law = TruncatedLogNormal(9.9, 1.0, 128, 131_072)
    assert lengths.min() >= 128
    assert lengths.max() <= 131_072
    assert lengths.mean() == pytest.approx(law.mean(), rel=0.03)
    assert (lengths > 19_400).mean() == pytest.approx(law.share(above=19_400), abs=0.015)
    assert {each.output_tokens for each in requests} == {1024}


def test_turns_hold_all_that_was_said() -> None:
    requests = taken("multiturn")
    follow = [each for each in requests if each.after is not None]
    assert len(follow) > 100
    for each in follow:
        before = requests[each.after or 0]
        assert each.prompt_tokens > before.prompt_tokens + before.output_tokens
        assert each.prompt_tokens + each.output_tokens <= 2000


@pytest.mark.parametrize("seed", range(4))
def test_no_prompt_is_longer_than_it_may_be(seed: int) -> None:
    """The first of a session, which has what is shared, included."""
    talk = (("mu", 8.0), ("tokens_max", 4000.0), ("shared_tokens", 3000.0))
    assert max(each.prompt_tokens for each in taken("multiturn", settings=talk, seed=seed)) <= 4000
    work = (("shared_tokens", 3000.0), ("task_tokens", 2000.0), ("output_tokens", 500.0), ("tokens_max", 4000.0))
    calls = taken("branching", settings=work, seed=seed)
    assert max(each.prompt_tokens + each.output_tokens for each in calls) <= 4000
    assert min(min(each.prompt_tokens - 3000, each.output_tokens) for each in calls) > 0


def test_what_is_shared_leaves_room() -> None:
    for kind, tokens_max in (("multiturn", 1100.0), ("branching", 1025.0)):
        settings = (("shared_tokens", 1024.0), ("tokens_max", tokens_max))
        with pytest.raises(SimulationError, match=r"shared_tokens=1024 leaves no room .* tokens_max=1"):
            taken(kind, settings=settings)


def test_agents_fork_from_one_context() -> None:
    requests = taken("branching")
    children: dict[int, list[Request]] = {}
    for each in requests:
        if each.after is not None:
            children.setdefault(each.after, []).append(each)
    forks = {parent: several for parent, several in children.items() if len(several) > 1}
    assert forks
    for parent, several in forks.items():
        assert len(several) == 3
        common = requests[parent].end_keys
        assert all(each.keys.startswith(common) for each in several)
        assert shared_blocks(several[0].keys, several[1].keys) == len(common) // KEY_BYTES


@pytest.mark.parametrize("kind", ["poisson", "burst", "diurnal", "trace"])
def test_arrivals_have_the_rate_that_was_asked_for(kind: Any) -> None:
    arrivals = Arrivals(kind, 50.0, burst_factor=2.0, period_s=20.0)
    times = np.array(list(islice(begin_times(arrivals, 50.0, np.random.default_rng(3)), 20_000)))
    assert (np.diff(times) >= 0).all()
    assert 20_000 / times[-1] == pytest.approx(50.0, rel=0.03)


def test_bursts_bring_half_of_the_requests_in_a_share_of_the_time() -> None:
    arrivals = Arrivals("burst", 50.0, burst_factor=4.0, period_s=20.0)
    times = np.array(list(islice(begin_times(arrivals, 50.0, np.random.default_rng(4)), 40_000)))
    is_burst = times % 20.0 >= 20.0 * (1 - 1 / 8)
    assert is_burst.mean() == pytest.approx(0.5, abs=0.02)


def test_a_high_and_short_burst_costs_no_more_than_another() -> None:
    """One draw for each request, whatever the factor: nothing is drawn to be thrown away."""
    rng = np.random.default_rng(6)
    arrivals = Arrivals("burst", 50.0, burst_factor=1e6, period_s=20.0)
    times = np.array(list(islice(begin_times(arrivals, 50.0, rng), 4000)))
    other = np.random.default_rng(6)
    for _ in range(4000):
        other.exponential(1 / 50.0)
    assert rng.random() == other.random()
    is_burst = times % 20.0 >= 20.0 * (1 - 1 / 2e6)
    assert is_burst.mean() == pytest.approx(0.5, abs=0.05)
    assert (np.diff(times) >= 0).all()


def test_a_day_has_its_peak_in_its_first_half() -> None:
    arrivals = Arrivals("diurnal", 50.0, burst_factor=1.8, period_s=100.0)
    times = np.array(list(islice(begin_times(arrivals, 50.0, np.random.default_rng(5)), 40_000)))
    quarter = (times % 100.0 // 25.0).astype(int)
    counts = np.bincount(quarter, minlength=4) / len(times)
    # The mean of a sine over its rising and falling quarter is 2 / pi.
    assert counts[:2].sum() == pytest.approx(0.5 + 0.8 / np.pi, abs=0.02)


@pytest.mark.parametrize("kind", ["multiturn", "branching"])
def test_the_rate_counts_calls_and_not_sessions(kind: str) -> None:
    requests = taken(kind, 4000, arrivals=Arrivals("poisson", 10.0))
    begins = [each.arrival_s for each in requests if each.after is None]
    assert len(begins) < 2000
    assert 4000 / begins[-1] == pytest.approx(10.0, rel=0.15)


def test_what_is_drawn_to_know_the_rate_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def sessions(*_: object) -> Iterator[tuple[None, ...]]:
        for number in count():
            drawn.append(number)
            yield (None,) * 50_000

    monkeypatch.setitem(sources._GENERATORS, "branching", sessions)
    requests_of(Workload("branching", arrivals=Arrivals("poisson", 1.0)), block_tokens=16, seed=0)
    assert len(drawn) == 3


@pytest.mark.parametrize("kind", ["multiturn", "branching", "agentic"])
def test_keys_of_a_session_are_bounded(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call names its prompt from the beginning, so that they grow with the square of the calls."""
    monkeypatch.setattr(session_module, "SESSION_KEY_BYTES_MAX", 20_000)
    with pytest.raises(SimulationError, match="more than 20000 bytes; choose larger blocks"):
        taken(kind, settings=(("tokens_max", 1e5),) if kind != "agentic" else ())
    assert taken(kind, 50, block_tokens=1 << 18, settings=())


def test_a_million_requests_are_made_as_they_are_taken() -> None:
    """Nothing is made ahead: a generator of far more than memory would hold gives its first at once."""
    requests = requests_of(
        Workload("lognormal", arrivals=Arrivals("poisson", 1.0), requests_max=10**12), block_tokens=16, seed=0
    )
    assert next(requests).number == 0
    assert next(requests).number == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"settings": (("sigmma", 1.0),)}, "no setting 'sigmma'; there are mu, sigma"),
        ({"settings": (("sigma", -1.0),)}, "must be from 0.001"),
        ({"settings": (("sigma", 1.0), ("sigma", 2.0))}, "stands twice"),
        ({"settings": (("tokens_min", 500.0), ("tokens_max", 100.0))}, "are no range"),
        ({"settings": (("mu", 0.0),)}, "hardly anything lies between"),
        ({"settings": (("mu", float("nan")),)}, "must be from"),
        ({"arrivals": Arrivals()}, "no times of its own; give its arrivals a rate_per_s"),
        ({"arrivals": Arrivals("poisson")}, "need a rate"),
        ({"arrivals": Arrivals("poisson", 0.0)}, "must be positive"),
        ({"arrivals": Arrivals("poisson", float("inf"))}, "must be positive"),
        ({"arrivals": Arrivals("diurnal", 1.0, burst_factor=2.5)}, "must be from 1 to 2"),
        ({"arrivals": Arrivals("burst", 1.0, burst_factor=0.5)}, "must be from 1"),
        ({"arrivals": Arrivals("burst", 1.0, period_s=0.0)}, "period_s"),
        ({"arrivals": Arrivals("weekly", 1.0)}, "unknown; use trace, poisson, burst or diurnal"),  # type: ignore[arg-type]
        ({"path": "somewhere"}, "leave its path out"),
        ({"count": 0}, "requests_max=0 must be at least 1"),
        ({"block_tokens": 0}, "block_tokens=0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_made(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SimulationError, match=message):
        taken("lognormal", **{"settings": (), **fields})


def test_an_unknown_kind_names_those_that_there_are() -> None:
    with pytest.raises(SimulationError, match="use mooncake, agentic, lognormal, multiturn, branching"):
        requests_of(Workload("sharegpt"), block_tokens=16, seed=0)  # type: ignore[arg-type]
    with pytest.raises(SimulationError, match=r"forks=1\.5.*whole number"):
        taken("branching", settings=(("forks", 1.5),))
    with pytest.raises(SimulationError, match="a trace has no settings"):
        requests_of(Workload("mooncake", settings=(("mu", 1.0),)), block_tokens=16, seed=0)


def test_defaults_are_within_their_limits() -> None:
    for known in (LOGNORMAL, MULTITURN, BRANCHING):
        assert all(each.least <= each.default <= each.most for each in known.values())
    assert exp(LOGNORMAL["mu"].default) < LOGNORMAL["tokens_max"].default


def test_the_page_lists_every_setting_as_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "traces.md").read_text()
    for known in (LOGNORMAL, MULTITURN, BRANCHING):
        for name, each in known.items():
            assert f"| `{name}` | {each.default:g} | {each.least:g} | {each.most:g} | {each.text} |" in page
