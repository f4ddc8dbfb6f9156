"""Metrics: names with units, few labels, values from a snapshot, and a sentence where the extra is missing."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from kvstore.cluster import NodeSnapshot, ReceiverSnapshot
from kvstore.cluster.health import health_routes
from kvstore.cluster.metrics import COUNTER, METRICS, NODE_METRICS, metrics_text
from kvstore.errors import UnavailableError
from kvstore.limits import NODE_ADDRESSES_MAX
from kvstore.metrics import STORE_METRICS, StoreMetrics
from kvstore.pool import PoolStatistics
from kvstore.transfer import InboxStatistics, SenderStatistics, ServingStatistics

REFERENCE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
STATISTICS = PoolStatistics(
    matches=9, hits=4, capacity_bytes=1000, committed_bytes=500, index_bytes=10, bytes_by_salt={b"tenant-7": 1}
)
RECEIVER = ReceiverSnapshot(
    "tcp://127.0.0.1:7400",
    2,
    (),
    InboxStatistics(committed=5, aborted=1, received_bytes=1 << 30, received_s=2.5),
    None,
    3,
    ServingStatistics(queries=8, hits=6, fetches=7, served=3, failed=1, sent_bytes=4096),
)
STARTING = NodeSnapshot("starting", "1.2.3", 7, 0.0, 1.5)
READY = NodeSnapshot(
    "ready",
    "1.2.3",
    7,
    0.0,
    1.5,
    store=StoreMetrics(STATISTICS, missed={"evicted": 2}),
    receivers=(RECEIVER,),
    sent=SenderStatistics(committed=3),
)


def values_of(snapshot: NodeSnapshot) -> dict[tuple[str, str], float]:
    """By name and labels, as a scraper reads them."""
    parser = pytest.importorskip("prometheus_client.parser")
    body, content_type = metrics_text(snapshot)
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    return {
        (sample.name, ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_values() -> None:
    values = values_of(READY)
    assert values["kvstore_build_info", "version=1.2.3"] == 1
    assert values["kvstore_node_ready", ""] == 1
    assert values["kvstore_pool_matches_total", ""] == 9
    assert values["kvstore_pool_used_bytes", "use=committed"] == 500
    assert values["kvstore_pool_salts", ""] == 1
    assert values["kvstore_store_missed_total", "reason=evicted"] == 2
    assert values["kvstore_store_match_seconds_count", ""] == 0
    assert values["kvstore_receive_transfers_total", "address=tcp://127.0.0.1:7400,outcome=committed"] == 5
    assert values["kvstore_receive_bytes_total", "address=tcp://127.0.0.1:7400"] == 1 << 30
    assert values["kvstore_receive_seconds_total", "address=tcp://127.0.0.1:7400"] == 2.5
    assert values["kvstore_serve_active_fetches", "address=tcp://127.0.0.1:7400"] == 3
    assert values["kvstore_serve_queries_total", "address=tcp://127.0.0.1:7400"] == 8
    assert values["kvstore_serve_hits_total", "address=tcp://127.0.0.1:7400"] == 6
    assert values["kvstore_serve_fetches_total", "address=tcp://127.0.0.1:7400,outcome=committed"] == 3
    assert values["kvstore_serve_fetches_total", "address=tcp://127.0.0.1:7400,outcome=failed"] == 1
    assert values["kvstore_serve_bytes_total", "address=tcp://127.0.0.1:7400"] == 4096
    assert values["kvstore_send_transfers_total", "outcome=committed"] == 3
    assert ("process_resident_memory_bytes", "") in values


def test_before_there_is_a_pool() -> None:
    values = values_of(STARTING)
    assert values["kvstore_node_ready", ""] == 0
    assert ("kvstore_pool_capacity_bytes", "") not in values


def test_names_and_labels() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert re.fullmatch(r"kvstore_[a-z_]+[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == COUNTER)
        assert metric.text.endswith(".")
        assert set(metric.labels) <= {"address", "outcome", "use", "version", "tier", "device", "reason"}
        samples = list(metric.samples(READY))
        assert len(samples) <= 4 * NODE_ADDRESSES_MAX
        assert all(len(labels) == len(metric.labels) for labels, _ in samples)


def test_the_reference_lists_every_metric() -> None:
    rows = re.findall(r"^\| `(kvstore_\w+)` \| (counter|gauge) \| ([a-z, ]*) ?\|", REFERENCE, re.M)
    documented = [(name, kind, tuple(filter(None, labels.strip().split(", ")))) for name, kind, labels in rows]
    assert documented == [(metric.name, metric.kind, metric.labels) for metric in NODE_METRICS]
    assert {metric.name for metric in METRICS} == {metric.name for metric in (*NODE_METRICS, *STORE_METRICS)}


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UnavailableError, match=r"pip install 'kvstore\[metrics\]'"):
        metrics_text(READY)
    answer = health_routes(lambda: "ready", lambda: READY)["/metrics"]()
    assert answer.status == 501
    assert answer.body.startswith(b"metrics need prometheus-client: pip install 'kvstore[metrics]'")


@pytest.mark.parametrize(("state", "status"), [("starting", 503), ("ready", 200), ("draining", 503), ("closed", 503)])
def test_readiness(state: str, status: int) -> None:
    routes = health_routes(lambda: state, lambda: STARTING)
    assert (routes["/readyz"]().status, routes["/readyz"]().body) == (status, f"{state}\n".encode())
    assert routes["/healthz"]().status == 200


def test_the_status_names_no_salt() -> None:
    answer = health_routes(lambda: "ready", lambda: READY)["/status"]()
    assert answer.content_type == "application/json"
    document = json.loads(answer.body)
    assert document["pool"]["salts"] == 1
    assert document["receiving"][0]["statistics"]["committed"] == 5
    assert document["serving"][0]["transfers"] == 3
    assert document["serving"][0]["statistics"]["served"] == 3
    assert b"tenant-7" not in answer.body
    assert json.loads(health_routes(lambda: "", lambda: STARTING)["/status"]().body)["pool"] is None
