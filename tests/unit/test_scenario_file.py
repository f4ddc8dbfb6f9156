"""Scenarios from TOML: every entry arrives, and what is wrong is named with file and key."""

from __future__ import annotations

import copy
import tomllib
from contextlib import suppress
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import ScenarioError
from kvstore.paper.case_study import TRAFFIC
from kvstore.profiles import load_profile, write_profile
from kvstore.scenario import (
    Arrivals,
    LinkFault,
    NodeFault,
    PolicyChoice,
    Scenario,
    Workload,
    read_scenario,
    scenario_names,
    scenario_of,
)
from kvstore.scenario.scenario import Scenario as ScenarioValue
from kvstore.schedule.deployment import CacheSize, Cluster, Deployment, Link, Slo
from kvstore.schedule.planning.plan import plan_of
from kvstore.schedule.planning.throughput import throughput
from kvstore.schedule.prefill_service import PrefillServiceModel
from kvstore.simulate.simulation import simulate
from kvstore.workload.sources import requests_of

FULL = """
name = "everything"
seed = 7
block_tokens = 64
telemetry_s = 0.5
warmup_s = 10
duration_s = 100.0
prefill_service = "chunked"
slo = { ttft_s = 5, tpot_s = 0.05, share = 0.95 }
policy = { name = "threshold", settings = { threshold_tokens = 19400, band = 0.1 } }

[[clusters]]
name = "prfaas"
profile = "paper-1t-h200"
prefill_instances = 4
decode_instances = 0
egress_bytes_per_s = 10e9
ingress_bytes_per_s = 5e9
cache = { dram_bytes = "1TiB", ssd_bytes = 2e12, ssd_read_bytes_per_s = 4e9 }

[[clusters]]
name = "pd"
profile = "own/profile.json"
prefill_instances = 3
decode_instances = 5
convertible = true
conversion_s = 30

[[links]]
source = "prfaas"
target = "pd"
bytes_per_s = 12.5e9
round_trip_s = 0.01
loss = 1e-4

[workload]
kind = "mooncake"
path = "traces/conversation.jsonl"
requests_max = 1000
arrivals = { kind = "burst", rate_per_s = 3, burst_factor = 4, period_s = 60 }

[[link_faults]]
source = "prfaas"
target = "pd"
from_s = 1
until_s = 2
share = 0.5

[[node_faults]]
cluster = "pd"
role = "decode"
instances = 2
from_s = 3
until_s = 4

[[cross_traffic]]
source = "prfaas"
target = "pd"
share = 0.25
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "own").mkdir()
    write_profile(load_profile("paper-1t-h20"), tmp_path / "own" / "profile.json")
    return tmp_path


def test_every_entry_arrives(directory: Path) -> None:
    path = directory / "full.toml"
    path.write_text(FULL)
    scenario = read_scenario(path)
    prfaas, pd = scenario.deployment.clusters
    assert prfaas == Cluster(
        "prfaas", load_profile("paper-1t-h200"), 4, 0, 10e9, 5e9, CacheSize(float(1 << 40), 2e12, 4e9)
    )
    assert pd == Cluster("pd", load_profile("paper-1t-h20"), 3, 5, convertible=True, conversion_s=30.0)
    assert scenario == Scenario(
        name="everything",
        deployment=scenario.deployment,
        workload=Workload(
            "mooncake",
            str(directory / "traces" / "conversation.jsonl"),
            (),
            Arrivals("burst", 3.0, 4.0, 60.0),
            1000,
        ),
        slo=Slo(5.0, 0.05, 0.95),
        policy=PolicyChoice("threshold", (("band", 0.1), ("threshold_tokens", 19400.0))),
        faults=(LinkFault("prfaas", "pd", 1.0, 2.0, 0.5), NodeFault("pd", "decode", 2, 3.0, 4.0)),
        cross_traffic=(("prfaas", "pd", 0.25),),
        telemetry_s=0.5,
        warmup_s=10.0,
        duration_s=100.0,
        block_tokens=64,
        seed=7,
    )
    assert scenario.deployment.prefill_service == PrefillServiceModel("chunked")
    assert scenario.deployment.links == (Link("prfaas", "pd", 12.5e9, 0.01, 1e-4),)


def test_the_file_above_leaves_no_entry_out() -> None:
    """An entry that a scenario has and a file cannot say would go unnoticed."""
    said = set(tomllib.loads(FULL))
    has = {field.name for field in fields(ScenarioValue)} - {"deployment", "faults"}
    deployment = {field.name for field in fields(Deployment)}
    assert said == has | deployment | {"link_faults", "node_faults"}


def test_defaults_are_those_of_the_values() -> None:
    table = tomllib.loads(FULL)
    del table["policy"], table["link_faults"], table["node_faults"], table["cross_traffic"]
    for name in ("seed", "block_tokens", "telemetry_s", "warmup_s", "duration_s", "prefill_service"):
        del table[name]
    table["clusters"][1]["profile"] = "paper-1t-h20"
    table["workload"] = {"kind": "mooncake"}
    table["slo"] = {"ttft_s": 5.0, "tpot_s": 0.05}
    scenario = scenario_of(table, ".")
    deployment = Deployment(scenario.deployment.clusters, scenario.deployment.links)
    assert scenario == Scenario("everything", deployment, Workload("mooncake"), Slo(5.0, 0.05))


WRONG: list[tuple[str, Any, str]] = [
    ("name", None, "'name' is missing"),
    ("name", 3, "name=3 is not text"),
    ("seeed", 3, "no entry 'seeed'; did you mean 'seed'"),
    ("seed", -1, "seed=-1 is not a whole number of at least 0"),
    ("seed", 1.5, "seed=1.5 is not a whole number"),
    ("telemetry_s", 0, "telemetry_s=0 is not a number of at least 0.001"),
    ("telemetry_s", 1e-9, "telemetry_s=1e-09 is not a number of at least 0.001"),
    ("slo.ttft_s", 1.7e308, r"slo.ttft_s=1.7e\+308 is not a number from 1e-12 to 1e\+18 in size, or 0"),
    ("workload.arrivals.rate_per_s", 5e-324, "rate_per_s=5e-324 is not a number from 1e-12"),
    ("links.0.bytes_per_s", 100, r"links\[0\].bytes_per_s=100.0 is not .*100 Gbps are 12.5e9"),
    ("links.0.bytes_per_s", 1e16, r"links\[0\].bytes_per_s=1e\+16 is not .* to 1e\+15"),
    ("links.0.round_trip_s", 5e-324, "from 1e-12"),
    ("clusters.0.egress_bytes_per_s", 0, r"clusters\[0\].egress_bytes_per_s=0.0 is not a number of bytes per second"),
    ("clusters.0.ingress_bytes_per_s", 1.7e15, "is not a number of bytes per second"),
    ("telemetry_s", True, "telemetry_s=True is not"),
    ("telemetry_s", float("nan"), "telemetry_s=nan is not"),
    ("telemetry_s", 10**400, "telemetry_s=1000"),
    ("warmup_s", 100, "below duration_s"),
    ("prefill_service", "magic", "is not one of whole, chunked, layered"),
    ("slo", 3, "slo is 3, not a table"),
    ("slo.share", 1.5, "slo.share=1.5 is not a number above 0 and at most 1"),
    ("slo.ttft_s", None, "'slo.ttft_s' is missing"),
    ("clusters", {}, "is not a list of at most"),
    ("clusters", [], "1 to 64 clusters"),
    ("clusters.0.profile", "nothing", r"clusters\[0\]: no profile is named 'nothing'"),
    ("clusters.0.profile", "own/none.json", r"clusters\[0\]: the profile .*none.json cannot be read"),
    ("clusters.0.cache.dram_bytes", "lots", r"clusters\[0\].cache.dram_bytes='lots' is not a size"),
    ("clusters.0.cache.dram_bytes", -1, "is not a size"),
    ("clusters.0.prefill_instances", 0, r"clusters\[0\]: cluster 'prfaas' has no instances"),
    ("clusters.1.decode_instances", 0, "no cluster has decode instances"),
    ("clusters.1.name", "prfaas", "cluster names repeat"),
    ("clusters.1.convertible", 1, "is not true or false"),
    ("links.0.target", "nowhere", "a link goes from 'prfaas' to 'nowhere'"),
    ("links.0.loss", 1, r"links\[0\].loss=1 is not a number of at least 0 and below 1"),
    ("workload.kind", "nothing", "workload.kind='nothing' is not one of mooncake"),
    (
        "workload.kind",
        "lognormal",
        "workload.path='traces/conversation.jsonl' is not for a workload of kind 'lognormal'",
    ),
    ("workload.settings", {"mu": 9.9}, "is not for a workload of kind 'mooncake', which is read"),
    ("workload.arrivals.rate_per_s", None, "'workload.arrivals.rate_per_s' is missing"),
    ("workload.arrivals.burst_factor", 0.5, "is not a number of at least 1"),
    ("policy.settings.band", "wide", "policy.settings.band='wide' is not a number"),
    ("link_faults.0.until_s", 1, r"link_faults\[0\].until_s=1.0 is not later than from_s=1"),
    ("link_faults.0.source", "pd", "is not the end of a link from 'pd'; there are prfaas to pd"),
    ("link_faults.0.share", 2, r"link_faults\[0\].share=2 is not"),
    ("node_faults.0.cluster", "none", "is not one of prfaas, pd"),
    ("node_faults.0.instances", 6, r"node_faults\[0\].instances=6 is not a whole number of at least 1 and at most 5"),
    ("cross_traffic.0.share", 1, r"cross_traffic\[0\].share=1 is not"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{key}={value}"[:60] for key, value, _ in WRONG])
def test_what_is_wrong_is_named(directory: Path, key: str, value: Any, message: str) -> None:
    table: Any = tomllib.loads(FULL)
    place = table
    *way, last = key.split(".")
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(ScenarioError, match=message) as caught:
        scenario_of(table, directory, file="my.toml")
    assert str(caught.value).startswith("my.toml: ")


def test_node_faults_need_instances(directory: Path) -> None:
    table = tomllib.loads(FULL)
    table["node_faults"][0]["cluster"] = "prfaas"
    with pytest.raises(ScenarioError, match="role='decode' is not one that cluster 'prfaas' has instances for"):
        scenario_of(table, directory)


def test_cross_traffic_stands_once(directory: Path) -> None:
    table = tomllib.loads(FULL)
    table["cross_traffic"].append(dict(table["cross_traffic"][0]))
    with pytest.raises(ScenarioError, match=r"cross_traffic\[1\].target='pd' is not a link that stands here for"):
        scenario_of(table, directory)


def test_generated_workloads_have_no_times_of_their_own(directory: Path) -> None:
    table = tomllib.loads(FULL)
    table["workload"] = {"kind": "lognormal", "arrivals": {"kind": "trace"}}
    with pytest.raises(ScenarioError, match="it has no times of its own"):
        scenario_of(table, directory)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.data(),
)
def test_garbage_is_an_error_or_a_scenario(value: object, data: st.DataObject) -> None:
    """Whatever stands anywhere in the file: a scenario or a named error, nothing else."""
    table: Any = tomllib.loads(FULL)
    table["clusters"][1]["profile"] = "paper-1t-h20"
    place: Any = table
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], (dict, list)) or not place[key] or data.draw(st.booleans()):
            place[key] = copy.deepcopy(value)
            break
        place = place[key]
    with suppress(ScenarioError):
        assert isinstance(scenario_of(table, "."), Scenario)


def test_unusable_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("name = ")
    with pytest.raises(ScenarioError, match=r"broken\.toml is not a TOML file"):
        read_scenario(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ScenarioError, match=r"broken\.toml is not a TOML file"):
        read_scenario(broken)
    broken.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(ScenarioError, match=r"larger than 1\.00 MiB"):
        read_scenario(broken)
    with pytest.raises(ScenarioError, match=r"none.toml cannot be read: No such file"):
        read_scenario(tmp_path / "none.toml")
    with pytest.raises(ScenarioError, match=r"'\\x00\.toml' is no path"):
        read_scenario("\0.toml")
    with pytest.raises(ScenarioError, match="no scenario is named 'nothing'; there are dense, paper-adaptive"):
        read_scenario("nothing")


@pytest.mark.parametrize("name", scenario_names())
def test_ready_made_scenarios_can_be_read(name: str) -> None:
    scenario = read_scenario(name)
    assert scenario.name == name
    assert scenario == read_scenario(name)


def test_the_ready_made_ones_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "scenarios.md").read_text()
    assert set(scenario_names()) == {
        "dense", "paper-adaptive", "paper-homogeneous", "paper-naive", "paper-prfaas", "three-clusters",
    }  # fmt: skip
    for name in scenario_names():
        assert f"`{name}`" in page


@pytest.mark.parametrize("name", scenario_names())
def test_ready_made_scenarios_name_what_exists(name: str) -> None:
    """Policies and generators know their settings; the file's reader does not."""
    scenario = read_scenario(name)
    assert simulate(replace(scenario, duration_s=5.0)).end_s > 0
    requests = list(islice(requests_of(scenario.workload, block_tokens=scenario.block_tokens, seed=scenario.seed), 50))
    assert len(requests) == 50


def test_the_dense_model_is_too_large_for_its_link() -> None:
    deployment = read_scenario("dense").deployment
    result = throughput(deployment, plan_of((("pd",), ("prfaas",)), (19_400,)), TRAFFIC)
    assert result.binding == ("link prfaas to pd",)
    assert result.requests_per_s == pytest.approx(2.2, abs=0.05)
