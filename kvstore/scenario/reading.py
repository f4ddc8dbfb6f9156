"""Scenarios as TOML files: those that ship with the package, and a user's own (docs/scenarios.md)."""

from __future__ import annotations

import os
import tomllib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from kvstore.documents import read_document
from kvstore.errors import ScenarioError
from kvstore.limits import (
    SCENARIO_BLOCK_TOKENS_MAX,
    SCENARIO_BYTES_MAX,
    SCENARIO_REQUESTS_MAX,
    SCENARIO_TELEMETRY_S_MIN,
)
from kvstore.scenario.clusters import deployment_of
from kvstore.scenario.scenario import Arrivals, LinkFault, NodeFault, PolicyChoice, Scenario, Workload
from kvstore.scenario.table import REQUIRED, Table
from kvstore.schedule.deployment import Slo

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvstore.schedule.deployment import Deployment

SUFFIX = ".toml"
SEED_MAX = (1 << 63) - 1
_WORKLOADS = get_args(get_type_hints(Workload)["kind"])
_ARRIVALS = get_args(get_type_hints(Arrivals)["kind"])
_ROLES = get_args(get_type_hints(NodeFault)["role"])
TRACES = ("mooncake", "agentic")
"""Workloads that come from a file."""


def scenario_names() -> tuple[str, ...]:
    """Names of the scenarios that ship with the package, sorted."""
    return tuple(sorted(entry.name.removesuffix(SUFFIX) for entry in _data().iterdir() if entry.name.endswith(SUFFIX)))


def read_scenario(name_or_path: str | os.PathLike[str]) -> Scenario:
    """A scenario that ships with the package, by name, or one in a file.

    What has a directory or ends in `.toml` is a path; anything else a name.

    Raises:
        ScenarioError: there is none of that name, the file cannot be read, or something in it cannot be used; the
            message names file and key.
    """
    table, base_directory, file = scenario_table(name_or_path)
    return scenario_of(table, base_directory, file=file)


def scenario_table(name_or_path: str | os.PathLike[str]) -> tuple[dict[str, Any], Path, str]:
    """What a scenario says, unchecked; the directory of its paths; what messages call it. Arguments of `scenario_of`.

    Raises:
        ScenarioError: there is none of that name, or the file cannot be read.
    """
    text = os.fspath(name_or_path)
    if text.endswith(SUFFIX) or Path(text).name != text:
        return _parsed(_read(Path(text)), text), Path(text).parent, text
    if text not in scenario_names():
        raise ScenarioError(
            f"no scenario is named {text!r}; there are {', '.join(scenario_names())}. A file is given by its path, "
            f"ending in {SUFFIX}"
        )
    file = f"the scenario {text!r} of the package"
    return _parsed(_data().joinpath(text + SUFFIX).read_bytes(), file), Path(), file


def scenario_of(
    table: Mapping[str, Any], base_directory: str | os.PathLike[str], *, file: str = "scenario"
) -> Scenario:
    """The scenario that a table describes.

    Args:
        table: as `tomllib` reads it.
        base_directory: paths of profiles and traces are relative to it.
        file: what messages call the scenario.

    Raises:
        ScenarioError: something in it cannot be used; the message names file and key.
    """
    top = Table(dict(table), file)
    base = Path(base_directory)
    name = top.text("name")
    deployment = deployment_of(top, base)
    scenario = Scenario(
        name=name,
        deployment=deployment,
        workload=_workload(top.table("workload"), base),
        slo=_slo(top.table("slo")),
        policy=_policy(top.table("policy")),
        faults=(*_link_faults(top, deployment), *_node_faults(top, deployment)),
        cross_traffic=_cross_traffic(top, deployment),
        telemetry_s=top.number("telemetry_s", 1.0, least=SCENARIO_TELEMETRY_S_MIN),
        warmup_s=top.number("warmup_s", 0.0, least=0),
        duration_s=top.number("duration_s", None, above=0),
        block_tokens=top.whole("block_tokens", 512, least=1, most=SCENARIO_BLOCK_TOKENS_MAX),
        seed=top.whole("seed", 0, least=0, most=SEED_MAX),
    )
    top.end()
    if scenario.duration_s is not None and scenario.warmup_s >= scenario.duration_s:
        raise top.wrong(
            "warmup_s", scenario.warmup_s, f"below duration_s={scenario.duration_s:g}; nothing would be summarised"
        )
    return scenario


def _workload(table: Table, base: Path) -> Workload:
    kind = table.choice("kind", _WORKLOADS)
    path = table.text("path", None)
    if path is not None and kind not in TRACES:
        raise table.wrong("path", path, f"for a workload of kind {kind!r}, which is generated; leave it out")
    settings = table.table("settings")
    if kind in TRACES and settings.numbers():
        raise table.wrong(
            "settings", dict(settings.numbers()), f"for a workload of kind {kind!r}, which is read; leave them out"
        )
    arrivals = _arrivals(table.table("arrivals"), kind)
    workload = Workload(
        kind=kind,
        path=None if path is None else str(base / path),
        settings=settings.numbers(),
        arrivals=arrivals,
        requests_max=table.whole("requests_max", 1_000_000, least=1, most=SCENARIO_REQUESTS_MAX),
    )
    table.end()
    return workload


def _arrivals(table: Table, workload: str) -> Arrivals:
    kind = table.choice("kind", _ARRIVALS, "trace" if workload in TRACES else "poisson")
    if kind == "trace" and workload not in TRACES:
        raise table.wrong("kind", kind, f"for a workload of kind {workload!r}: it has no times of its own")
    arrivals = Arrivals(
        kind=kind,
        rate_per_s=table.number("rate_per_s", None if kind == "trace" else REQUIRED, above=0),
        burst_factor=table.number("burst_factor", 2.0, least=1, most=1_000),
        period_s=table.number("period_s", 600.0, above=0),
    )
    table.end()
    return arrivals


def _slo(table: Table) -> Slo:
    slo = Slo(
        ttft_s=table.number("ttft_s", above=0),
        tpot_s=table.number("tpot_s", above=0),
        share=table.number("share", 0.9, above=0, most=1),
    )
    table.end()
    return slo


def _policy(table: Table) -> PolicyChoice:
    policy = PolicyChoice(table.text("name", PolicyChoice().name), table.table("settings").numbers())
    table.end()
    return policy


def _times(table: Table) -> tuple[float, float]:
    from_s = table.number("from_s", least=0)
    until_s = table.number("until_s", above=0)
    if until_s <= from_s:
        raise table.wrong("until_s", until_s, f"later than from_s={from_s:g}")
    return from_s, until_s


def _link_faults(top: Table, deployment: Deployment) -> list[LinkFault]:
    faults = []
    for table in top.tables("link_faults"):
        source, target = _link(table, deployment)
        faults.append(LinkFault(source, target, *_times(table), share=table.number("share", least=0, most=1)))
        table.end()
    return faults


def _node_faults(top: Table, deployment: Deployment) -> list[NodeFault]:
    faults = []
    for table in top.tables("node_faults"):
        name = table.choice("cluster", [each.name for each in deployment.clusters])
        role = table.choice("role", _ROLES)
        has = getattr(deployment.cluster(name), f"{role}_instances")
        if not has:
            raise table.wrong("role", role, f"one that cluster {name!r} has instances for")
        instances = table.whole("instances", least=1, most=has)
        faults.append(NodeFault(name, role, instances, *_times(table)))
        table.end()
    return faults


def _cross_traffic(top: Table, deployment: Deployment) -> tuple[tuple[str, str, float], ...]:
    found: dict[tuple[str, str], float] = {}
    for table in top.tables("cross_traffic"):
        pair = _link(table, deployment)
        if pair in found:
            raise table.wrong("target", pair[1], "a link that stands here for the first time")
        found[pair] = table.number("share", least=0, most=0.99)
        table.end()
    return tuple((source, target, share) for (source, target), share in found.items())


def _link(table: Table, deployment: Deployment) -> tuple[str, str]:
    source, target = table.text("source"), table.text("target")
    if deployment.link(source, target) is None:
        links = ", ".join(f"{link.source} to {link.target}" for link in deployment.links) or "none"
        raise table.wrong("target", target, f"the end of a link from {source!r}; there are {links}")
    return source, target


def _data() -> Any:
    return resources.files("kvstore.scenario").joinpath("data")


def _read(path: Path) -> bytes:
    remedy = f"those of the package are {', '.join(scenario_names())}"
    return read_document(path, SCENARIO_BYTES_MAX, "scenario", ScenarioError, remedy=remedy)


def _parsed(data: bytes, file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ScenarioError(f"{file} is not a TOML file: {error}") from error
