"""Clusters and links of a scenario's file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kvstore.limits import BYTES_PER_S_MAX, INSTANCES_MAX, ROUND_TRIP_S_MAX, SCENARIO_LINK_BYTES_PER_S_MIN
from kvstore.profiles import load_profile
from kvstore.scenario.table import REQUIRED
from kvstore.schedule.deployment import CacheSize, Cluster, Deployment, Link
from kvstore.schedule.prefill_service import WHOLE, PrefillServiceModel, ServiceKind

if TYPE_CHECKING:
    from kvstore.profile import Profile
    from kvstore.scenario.table import Table


def deployment_of(top: Table, base: Path) -> Deployment:
    """Clusters and links of a file, and how they prefill.

    Args:
        top: the whole file.
        base: paths of profiles are relative to it.

    Raises:
        ScenarioError: something in them cannot be used; the message names file and key.
    """
    clusters = tuple(_cluster(table, base) for table in top.tables("clusters"))
    links = tuple(_link(table) for table in top.tables("links"))
    service = PrefillServiceModel(top.choice("prefill_service", get_args(ServiceKind), WHOLE.kind))
    with top.checked():
        return Deployment(clusters, links, service)


def _cluster(table: Table, base: Path) -> Cluster:
    name = table.text("name")
    profile = _profile(table, base)
    with table.checked():
        cluster = Cluster(
            name=name,
            profile=profile,
            prefill_instances=table.whole("prefill_instances", least=0, most=INSTANCES_MAX),
            decode_instances=table.whole("decode_instances", least=0, most=INSTANCES_MAX),
            egress_bytes_per_s=_bytes_per_s(table, "egress_bytes_per_s", None),
            ingress_bytes_per_s=_bytes_per_s(table, "ingress_bytes_per_s", None),
            cache=_cache(table.table("cache")),
            convertible=table.flag("convertible", False),
            conversion_s=table.number("conversion_s", 60.0, least=0),
        )
    table.end()
    return cluster


def _bytes_per_s(table: Table, name: str, default: Any = REQUIRED) -> Any:
    value = table.number(name, default)
    if value is not default and not SCENARIO_LINK_BYTES_PER_S_MIN <= value <= BYTES_PER_S_MAX:
        limits = f"{SCENARIO_LINK_BYTES_PER_S_MIN:g} to {BYTES_PER_S_MAX:g}"
        raise table.wrong(name, value, f"a number of bytes per second from {limits}; 100 Gbps are 12.5e9")
    return value


def _profile(table: Table, base: Path) -> Profile:
    name: str = table.text("profile")
    is_path = name.endswith(".json") or Path(name).name != name
    with table.checked():
        return load_profile(str(base / name) if is_path else name)


def _cache(table: Table) -> CacheSize:
    default = CacheSize()
    cache = CacheSize(
        dram_bytes=table.size("dram_bytes", default.dram_bytes),
        ssd_bytes=table.size("ssd_bytes", default.ssd_bytes),
        ssd_read_bytes_per_s=table.number("ssd_read_bytes_per_s", default.ssd_read_bytes_per_s, above=0),
    )
    table.end()
    return cache


def _link(table: Table) -> Link:
    with table.checked():
        link = Link(
            source=table.text("source"),
            target=table.text("target"),
            bytes_per_s=_bytes_per_s(table, "bytes_per_s"),
            round_trip_s=table.number("round_trip_s", 0.0, least=0, most=ROUND_TRIP_S_MAX),
            loss=table.number("loss", 0.0, least=0, below=1),
        )
    table.end()
    return link
