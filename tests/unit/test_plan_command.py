"""`kvstore plan`: a scenario in, a plan out, as text and as JSON; bad input."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from kvstore.cli.main import app
from kvstore.errors import KVStoreError, PlanError
from kvstore.keys import KEY_BYTES
from kvstore.profiles import load_profile
from kvstore.profiles.files import profile_to_text
from kvstore.scenario import Arrivals, Workload, scenario_names
from kvstore.schedule.planning.lengths import PointMasses, TruncatedLogNormal
from kvstore.workload import seen
from kvstore.workload.request import Request
from kvstore.workload.traffic import traffic_of, traffic_of_requests

if TYPE_CHECKING:
    from pathlib import Path


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def document(*arguments: str) -> dict:
    return json.loads(plan(*arguments, "--json"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_the_default_is_the_papers_deployment() -> None:
    found = document()
    assert found["scenario"] == "paper-prfaas"
    assert found["requests_per_s"] == pytest.approx(3.24, rel=0.03)
    assert found["bands"][0]["clusters"] == ["pd"]
    assert found["bands"][0]["upto_tokens"] == pytest.approx(19_400, rel=0.03)
    assert found["bands"][1]["upto_tokens"] is None
    assert sum(band["share"] for band in found["bands"]) == pytest.approx(1.0)
    assert [(each["prefill_instances"], each["decode_instances"]) for each in found["clusters"]] == [(4, 0), (3, 5)]
    assert 0 < found["goodput"]["requests_per_s"] < found["stable_requests_per_s"] < found["requests_per_s"]
    means = [each["ttft_mean_s"] for each in found["latency"]]
    assert means == sorted(means)
    assert any(each["requests_per_s"] == 2.6 for each in found["latency"]), "the scenario's own rate is shown"


@pytest.mark.parametrize("name", scenario_names())
def test_every_scenario_of_the_package_has_a_plan(name: str) -> None:
    found = document(name)
    assert found["requests_per_s"] > 0
    assert found["binding"]
    assert all(part["used_share"] <= 1 + 1e-6 for part in found["parts"])


def test_text_says_the_same() -> None:
    text = plan("--divide", "pd", "--rate", "2")
    assert "3.2 requests/s at most, ended by prefill of pd" in text
    assert "12.1" in text
    assert "Goodput: 2." in text


def test_a_plan_has_the_prefill_that_is_served_and_shows_the_others(tmp_path: Path) -> None:
    data = resources.files("kvstore.scenario").joinpath("data", "paper-prfaas.toml").read_text()
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(f'prefill_service = "chunked"\n{data}')
    whole, chunked = document(), document(str(scenario))
    assert (whole["prefill_service"], chunked["prefill_service"]) == ("whole", "chunked")
    assert chunked["requests_per_s"] < whole["requests_per_s"] / 3
    for found in (whole, chunked):
        shown = {(each["cluster"], each["prefill_service"]): each for each in found["prefill_services"]}
        assert len(shown) == 6, "three ways for each of two clusters"
        for flow in found["flows"]:
            one, pieces, layers = (shown[flow["prefill"], kind] for kind in ("whole", "chunked", "layered"))
            served = shown[flow["prefill"], found["prefill_service"]]
            assert flow["prefill_s"] == pytest.approx(served["prefill_s"])
            assert one["prefill_s"] == layers["prefill_s"] < pieces["prefill_s"]
            assert max(layers["piece_s"], pieces["piece_s"]) < one["piece_s"] == one["prefill_s"]
            assert layers["states_from_s"] == 0 < pieces["states_from_s"] < pieces["prefill_s"]
            for each in (one, pieces, layers):
                assert each["decode_step_s"] > each["piece_s"]
                assert each["prefill_beside_decode_s"] >= each["prefill_s"]
    assert "this plan has chunked" in plan(str(scenario))


def test_a_rate_above_the_limit_is_labelled() -> None:
    assert "30 requests/s is unstable: queues grow without end." in plan("--rate", "30")
    found = document("--rate", "30")
    assert found["unstable_requests_per_s"] == 30
    assert all(each["requests_per_s"] < found["stable_requests_per_s"] for each in found["latency"])


def test_a_profile_that_was_measured_at_shorter_lengths_is_named(tmp_path: Path) -> None:
    profile = json.loads(profile_to_text(load_profile("paper-1t-h200")))
    (tmp_path / "short.json").write_text(json.dumps({**profile, "tokens_max": 100_000}))
    data = resources.files("kvstore.scenario").joinpath("data", "paper-prfaas.toml").read_text()
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(data.replace('"paper-1t-h200"', '"short.json"'))
    assert document(str(scenario))["extrapolated"] == ["prfaas"]
    assert "Extrapolated: prfaas get prompts longer than the tokens_max" in plan(str(scenario))
    assert document()["extrapolated"] == []
    assert "Extrapolated" not in plan()


def test_dividing_finds_the_papers_division_and_fixing_keeps_another(tmp_path: Path) -> None:
    file = tmp_path / "other.toml"
    file.write_text(
        """
        name = "other"
        [slo]
        ttft_s = 10
        tpot_s = 0.03
        [[clusters]]
        name = "prfaas"
        profile = "paper-1t-h200"
        prefill_instances = 4
        decode_instances = 0
        [[clusters]]
        name = "pd"
        profile = "paper-1t-h20"
        prefill_instances = 1
        decode_instances = 7
        [[links]]
        source = "prfaas"
        target = "pd"
        bytes_per_s = 25e9
        [[cross_traffic]]
        source = "prfaas"
        target = "pd"
        share = 0.5
        [workload]
        kind = "lognormal"
        [workload.arrivals]
        rate_per_s = 1
        """
    )
    kept = document(str(file), "--fixed")
    assert kept["clusters"][1]["prefill_instances"] == 1
    best = document(str(file), "--divide", "pd")
    tried = document(str(file), "--divide", "pd", "--exhaustive")
    for found in (best, tried):
        assert found["clusters"][1]["prefill_instances"] == 3
        assert found["requests_per_s"] > kept["requests_per_s"]
    assert best["requests_per_s"] == pytest.approx(tried["requests_per_s"], rel=0.01)
    # What others send leaves half of the link.
    link = next(part for part in best["parts"] if part["part"].startswith("link"))
    assert link["used_share"] == pytest.approx(0.12, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no scenario is named 'nowhere'"),
        (["--convention", "median"], "use at-mean or mean"),
        (["--rate", "nan"], "must be positive"),
        (["--rate", "-1"], "must be positive"),
        (["--divide", "moon"], "moon may be divided and is no cluster"),
        (["--fixed", "--divide", "pd"], "use one"),
    ],
)
def test_bad_input_is_an_error(arguments: list[str], message: str) -> None:
    with pytest.raises(KVStoreError, match=message):
        CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)


def key(text: str) -> bytes:
    return text.encode().ljust(KEY_BYTES, b".")


def test_what_came_before_need_not_be_prefilled(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Request(0, 0.0, 250, 60, key("a") + key("ab"), key("a") + key("ab") + key("abc"))
    again = Request(1, 1.0, 330, 20, key("a") + key("ab") + key("abc"))
    exact = Request(2, 2.0, 200, 10, key("a") + key("ab"))
    other = Request(3, 3.0, 200, 10, key("x") + key("xb"))
    requests = [first, again, exact, other]
    cached = traffic_of_requests(requests, block_tokens=100, is_cached=True)
    assert isinstance(cached.lengths, PointMasses)
    # 250 - 0; 330 - 300; one token at least is computed; the last shares nothing.
    assert cached.lengths.lengths == (1.0, 30.0, 200.0, 250.0)
    assert cached.output_tokens == 25
    monkeypatch.setattr(seen, "SIMULATED_KEYS_MAX", 2)  # the first prompt's keys still come in, none behind them
    bounded = traffic_of_requests(requests, block_tokens=100, is_cached=True)
    assert isinstance(bounded.lengths, PointMasses)
    assert bounded.lengths.lengths == (1.0, 30.0, 200.0, 250.0)
    monkeypatch.setattr(seen, "SIMULATED_KEYS_MAX", 0)
    forgetful = traffic_of_requests(requests, block_tokens=100, is_cached=True)
    assert isinstance(forgetful.lengths, PointMasses)
    assert forgetful.lengths.lengths == (200.0, 250.0, 330.0)
    whole = traffic_of_requests(requests, block_tokens=100, is_cached=False)
    assert isinstance(whole.lengths, PointMasses)
    assert whole.lengths.lengths == (200.0, 250.0, 330.0)
    with pytest.raises(KVStoreError, match="nothing to plan for"):
        traffic_of_requests([], block_tokens=100, is_cached=False)


def test_a_log_normal_stays_one_and_others_are_drawn() -> None:
    arrivals = Arrivals("poisson", 1.0)
    settings = (("mu", 9.0), ("sigma", 0.5), ("tokens_min", 100.0), ("tokens_max", 50_000.0), ("output_tokens", 64.0))
    traffic = traffic_of(Workload("lognormal", None, settings, arrivals), block_tokens=64, seed=1, is_cached=False)
    assert traffic.lengths == TruncatedLogNormal(9.0, 0.5, 100, 50_000)
    assert traffic.output_tokens == 64
    turns = Workload("multiturn", None, (), arrivals, requests_max=300)
    cached, whole = (traffic_of(turns, block_tokens=64, seed=1, is_cached=each) for each in (True, False))
    assert cached.lengths.mean() < 0.9 * whole.lengths.mean()
    assert cached.output_tokens == whole.output_tokens
    again = traffic_of(turns, block_tokens=64, seed=1, is_cached=True)
    assert again.lengths.mean() == cached.lengths.mean()


def test_an_unknown_convention_is_named_before_anything_is_read() -> None:
    with pytest.raises(PlanError, match="'average' is unknown"):
        CliRunner().invoke(app, ["plan", "nowhere", "--convention", "average"], catch_exceptions=False)
