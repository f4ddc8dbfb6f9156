"""A node's metrics in Prometheus' text form, made of a snapshot when they are asked for.

Labels have few values: the addresses that the node listens on, outcomes, uses of memory; never peers, salts, transfers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from kvstore.errors import UnavailableError
from kvstore.metrics import COUNTER, EXTRA, GAUGE, STORE_METRICS, Metric, family_of, one

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvstore.cluster.snapshot import NodeSnapshot, ReceiverSnapshot
    from kvstore.metrics import Sample, StoreMetrics

NodeMetric: TypeAlias = "Metric[NodeSnapshot]"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The form that every scraper reads; no name here needs a later one."""


def _of_node(name: str, kind: str, text: str, value: Callable[[NodeSnapshot], float]) -> NodeMetric:
    return one(name, kind, text, value)


def _of_store(metric: Metric[StoreMetrics]) -> NodeMetric:
    """A metric of the node's store: the same name and numbers as in any other process."""

    def samples(node: NodeSnapshot) -> Iterable[Sample]:
        return [] if node.store is None else metric.samples(node.store)

    return Metric(metric.name, metric.kind, metric.text, metric.labels, samples)


def _of_receivers(name: str, kind: str, text: str, value: Callable[[ReceiverSnapshot], float]) -> NodeMetric:
    def samples(node: NodeSnapshot) -> Iterable[Sample]:
        return [((receiver.address,), value(receiver)) for receiver in node.receivers]

    return Metric(name, kind, text, ("address",), samples)


def _received_transfers(node: NodeSnapshot) -> Iterable[Sample]:
    for receiver in node.receivers:
        yield (receiver.address, "committed"), receiver.statistics.committed
        yield (receiver.address, "aborted"), receiver.statistics.aborted


def _served_fetches(node: NodeSnapshot) -> Iterable[Sample]:
    for receiver in node.receivers:
        yield (receiver.address, "committed"), receiver.serving.served
        yield (receiver.address, "failed"), receiver.serving.failed


def _sent_transfers(node: NodeSnapshot) -> Iterable[Sample]:
    if node.sent is not None:
        yield ("committed",), node.sent.committed
        yield ("failed",), node.sent.failed


NODE_METRICS: tuple[NodeMetric, ...] = (
    Metric(
        "kvstore_build_info", GAUGE, "The version that runs; always 1.", ("version",), lambda n: [((n.version,), 1)]
    ),
    _of_node("kvstore_node_ready", GAUGE, "1 while the node takes work.", lambda n: n.state == "ready"),
    _of_node("kvstore_node_draining", GAUGE, "1 while the node drains.", lambda n: n.state == "draining"),
    _of_node("kvstore_node_uptime_seconds", GAUGE, "Since the node was started.", lambda n: n.uptime_s),
    _of_node("kvstore_attached_processes", GAUGE, "Processes on the pool.", lambda n: n.attached_processes),
    _of_receivers("kvstore_receive_connections", GAUGE, "Connections open now.", lambda r: r.connections),
    _of_receivers("kvstore_receive_active_transfers", GAUGE, "Transfers arriving now.", lambda r: len(r.transfers)),
    Metric(
        "kvstore_receive_transfers_total",
        COUNTER,
        "Transfers that have ended, by outcome.",
        ("address", "outcome"),
        _received_transfers,
    ),
    _of_receivers(
        "kvstore_receive_bytes_total", COUNTER, "Bytes of committed transfers.", lambda r: r.statistics.received_bytes
    ),
    _of_receivers(
        "kvstore_receive_seconds_total",
        COUNTER,
        "Seconds of committed transfers, from offer to commit.",
        lambda r: r.statistics.received_s,
    ),
    _of_receivers(
        "kvstore_receive_resumed_total", COUNTER, "Transfers taken up again.", lambda r: r.statistics.resumed
    ),
    _of_receivers("kvstore_receive_full_total", COUNTER, "Offers without room.", lambda r: r.statistics.full),
    _of_receivers(
        "kvstore_receive_damaged_pieces_total",
        COUNTER,
        "Pieces with a checksum that did not hold.",
        lambda r: r.statistics.damaged_pieces,
    ),
    _of_receivers(
        "kvstore_receive_refused_total",
        COUNTER,
        "Peers that broke the protocol or did not match.",
        lambda r: r.statistics.refused,
    ),
    _of_receivers("kvstore_serve_active_fetches", GAUGE, "Fetches leaving now.", lambda r: r.fetches),
    _of_receivers("kvstore_serve_queries_total", COUNTER, "Questions of peers.", lambda r: r.serving.queries),
    _of_receivers("kvstore_serve_hits_total", COUNTER, "Questions that were no miss.", lambda r: r.serving.hits),
    Metric(
        "kvstore_serve_fetches_total",
        COUNTER,
        "Fetches that have ended, by outcome.",
        ("address", "outcome"),
        _served_fetches,
    ),
    _of_receivers("kvstore_serve_bytes_total", COUNTER, "Bytes of committed fetches.", lambda r: r.serving.sent_bytes),
    _of_node("kvstore_send_active_transfers", GAUGE, "Transfers leaving now.", lambda n: n.sending),
    Metric("kvstore_send_transfers_total", COUNTER, "Transfers sent, by outcome.", ("outcome",), _sent_transfers),
    _of_node(
        "kvstore_send_bytes_total",
        COUNTER,
        "Bytes of committed transfers.",
        lambda n: n.sent.sent_bytes if n.sent else 0,
    ),
    _of_node(
        "kvstore_send_seconds_total",
        COUNTER,
        "Seconds of committed transfers, from send to commit.",
        lambda n: n.sent.sent_s if n.sent else 0.0,
    ),
    _of_node(
        "kvstore_send_exposed_seconds_total",
        COUNTER,
        "What transfers added after their producers had finished.",
        lambda n: n.sent.exposed_s if n.sent else 0.0,
    ),
    _of_node(
        "kvstore_send_queued_bytes",
        GAUGE,
        "Wanted by peers, not yet on the wire.",
        lambda n: sum(link.queued_bytes for link in n.links),
    ),
    _of_node(
        "kvstore_send_in_flight_bytes",
        GAUGE,
        "On the wire, not acknowledged.",
        lambda n: sum(link.in_flight_bytes for link in n.links),
    ),
)
"""Of the node itself (docs/operations.md)."""

METRICS: tuple[NodeMetric, ...] = (*NODE_METRICS, *map(_of_store, STORE_METRICS))
"""And those of its store (docs/observability.md)."""


def metrics_text(snapshot: NodeSnapshot) -> tuple[bytes, str]:
    """The metrics, and their content type. Those of the process (`process_*`) come from prometheus-client.

    Raises:
        UnavailableError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise UnavailableError(f"{EXTRA} ({error})") from error

    class SnapshotCollector(Collector):
        def collect(self) -> Iterable[Any]:
            for metric in METRICS:
                yield family_of(metric, snapshot)

    registry = CollectorRegistry()
    registry.register(SnapshotCollector())
    ProcessCollector(registry=registry)
    return generate_latest(registry), CONTENT_TYPE
