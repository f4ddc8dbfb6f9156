"""What a store counts, and how Prometheus gets it."""

from __future__ import annotations

import re
import sys
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from kvstore.errors import PoolError, PoolFullError, QuarantineFullError, UnavailableError, WriteError
from kvstore.events import MissReason
from kvstore.metrics import (
    COUNTER,
    LONG_S,
    SHORT_S,
    STORE_METRICS,
    Histogram,
    StoreMeters,
    StoreMetrics,
    family_of,
    prometheus_collector,
)
from kvstore.placement import ShelfStatistics
from kvstore.pool import PoolStatistics
from kvstore.store import Store, open_store
from kvstore.store.devices import DeviceStatistics
from kvstore.testing.specs import dense, hybrid, put_all

REFERENCE = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()
B = 16
IDS = [(7 * number) % 1000 for number in range(70)]
SSD = ShelfStatistics("ssd", 100, 60, 50, 4, 40, 48, 30, 2, 1, 0, {"budget": 3}, "the disk is full")
GPU = DeviceStatistics("cuda:0", read_bytes=70, resident_bytes=50, put_bytes=30, waiting=2, overdue=1)


def write(store: Store, ids: list[int], resume_at: tuple[int, ...] | None = None) -> None:
    with store.write(ids, resume_at=resume_at) as writer:
        put_all(writer)
        writer.commit()


def test_what_is_counted() -> None:
    with open_store(hybrid(B), dram="8MiB") as store:
        write(store, IDS, (32, 64))
        store.match(IDS)
        store.match(IDS[:65])
        store.match([1, 2])
        with store.read(store.match(IDS)) as lease:
            lease.layer(1).read("keys")
        metrics = store.metrics()
        assert (metrics.matches, metrics.match_s.count) == (4, 4)
        assert metrics.asked_tokens == 69 + 64 + 1 + 69
        assert (metrics.hits, metrics.hit_tokens) == ({"dram": 3}, {"dram": 3 * 64})
        assert metrics.missed == {MissReason.NEVER_STORED: 3}
        assert (metrics.commit_s.count, metrics.load_s.count) == (1, 1)
        assert metrics.read_bytes == 64 * 2 * 4 * 4
        assert metrics.read_s > 0
        assert metrics.pool == store.statistics()
        assert metrics.pool.stored_bytes == metrics.pool.committed_bytes
        assert metrics.pool.stored_records == 4 + 2 * 2
        with pytest.raises(FrozenInstanceError):
            metrics.matches = 0  # type: ignore[misc]


def test_refused_writes_by_kind() -> None:
    with open_store(dense(B), dram="512KiB") as store:
        before = store.metrics().pool.stored_bytes
        with pytest.raises(PoolFullError):
            store.write(list(range(B * 1000)))
        with pytest.raises(WriteError):
            store.write(IDS, resume_at=(71,))
        with store.write(IDS) as writer, pytest.raises(WriteError):
            writer.commit()
        assert store.metrics().refused == {"too large": 1, "misuse": 2}
        assert store.metrics().commit_s.count == 0
        assert store.metrics().pool.stored_bytes == before


def test_words_for_errors() -> None:
    meters = StoreMeters()
    for error in (PoolFullError("x"), QuarantineFullError("x"), PoolError("x"), KeyError("x")):
        meters.refused(error)
    assert meters.snapshot(PoolStatistics()).refused == {"full": 1, "quarantine": 1, "other": 2}


def test_threads_lose_nothing() -> None:
    meters = StoreMeters()

    def count() -> None:
        for _ in range(2000):
            meters.matched(10, 4, "dram", "evicted", 1e-5)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    metrics = meters.snapshot(PoolStatistics())
    assert (metrics.matches, metrics.asked_tokens, metrics.hits, metrics.hit_tokens, metrics.missed) == (
        8000,
        80000,
        {"dram": 8000},
        {"dram": 32000},
        {"evicted": 8000},
    )


def test_a_histogram() -> None:
    meters = StoreMeters()
    for seconds in (0.0, SHORT_S[0], SHORT_S[0] * 1.01, 1e9):
        meters.matched(1, 0, None, None, seconds)
    histogram = meters.snapshot(PoolStatistics()).match_s
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-1]) == (2, 1, 1)
    assert histogram.buckets[0] == ("5e-06", 2)
    assert histogram.buckets[-1] == ("+Inf", 4)
    assert histogram.total == pytest.approx(1e9 + 2.01 * SHORT_S[0])
    assert list(SHORT_S) == sorted(SHORT_S)
    assert list(LONG_S) == sorted(LONG_S)


def samples_of(registry: Any) -> dict[tuple[str, str], float]:
    """By name and labels, as a scraper reads them."""
    prometheus = pytest.importorskip("prometheus_client")
    parser = pytest.importorskip("prometheus_client.parser")
    return {
        (sample.name, ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(prometheus.generate_latest(registry).decode())
        for sample in family.samples
    }


def test_prometheus() -> None:
    prometheus = pytest.importorskip("prometheus_client")
    registry = prometheus.CollectorRegistry()
    with open_store(hybrid(B), dram="8MiB") as store:
        registry.register(prometheus_collector(store))
        write(store, IDS, (64,))
        store.match(IDS)
        store.match([1, 2])
        values = samples_of(registry)
        assert values["kvstore_pool_commits_total", ""] == 1
        assert values["kvstore_pool_used_bytes", "use=committed"] == store.statistics().committed_bytes
        assert values["kvstore_store_hits_total", "tier=dram"] == 1
        assert values["kvstore_store_hit_tokens_total", "tier=dram"] == 64
        assert values["kvstore_store_missed_total", "reason=never stored"] == 2
        assert values["kvstore_store_match_seconds_count", ""] == 2
        assert values["kvstore_store_match_seconds_bucket", "le=+Inf"] == 2
        assert values["kvstore_store_match_seconds_sum", ""] > 0
        with open_store(dense(B), dram="8MiB") as other, pytest.raises(ValueError, match="Duplicated"):
            registry.register(prometheus_collector(other))


def test_tiers_and_devices_are_rows() -> None:
    metrics = StoreMetrics(PoolStatistics(), shelves=(SSD,), devices=(GPU,))
    pytest.importorskip("prometheus_client")
    values = {
        (sample.name, tuple(sample.labels.values())): sample.value
        for metric in STORE_METRICS
        for sample in family_of(metric, metrics).samples
    }
    assert values["kvstore_tier_used_bytes", ("ssd",)] == 60
    assert values["kvstore_tier_written_bytes_total", ("ssd",)] == 48
    assert values["kvstore_tier_trouble", ("ssd",)] == 1
    assert values["kvstore_tier_refused_total", ("ssd", "budget")] == 3
    assert values["kvstore_device_read_bytes_total", ("cuda:0",)] == 70
    assert values["kvstore_device_resident_bytes_total", ("cuda:0",)] == 50
    assert values["kvstore_device_put_bytes_total", ("cuda:0",)] == 30
    assert values["kvstore_device_waiting", ("cuda:0",)] == 2
    assert values["kvstore_device_overdue", ("cuda:0",)] == 1


def test_names_and_labels() -> None:
    assert len({metric.name for metric in STORE_METRICS}) == len(STORE_METRICS)
    metrics = StoreMetrics(
        PoolStatistics(bytes_by_salt={b"secret": 1}), (SSD,), devices=(GPU,), hits={"dram": 1}, missed={"evicted": 1}
    )
    for metric in STORE_METRICS:
        assert re.fullmatch(r"kvstore_(pool|tier|device|store)_[a-z_]+[a-z]", metric.name)
        assert metric.name.endswith("_total") == (metric.kind == COUNTER)
        assert metric.text.endswith(".")
        assert set(metric.labels) <= {"use", "tier", "device", "reason"}
        for labels, value in metric.samples(metrics):
            assert len(labels) == len(metric.labels)
            assert not any("secret" in label for label in labels)
            assert isinstance(value, Histogram) == (metric.kind == "histogram")


def test_the_reference_lists_every_metric() -> None:
    rows = re.findall(r"^\| `(kvstore_\w+)` \| (counter|gauge|histogram) \| ([a-z, ]*) ?\|", REFERENCE, re.M)
    documented = [(name, kind, tuple(filter(None, labels.strip().split(", ")))) for name, kind, labels in rows]
    assert documented == [(metric.name, metric.kind, metric.labels) for metric in STORE_METRICS]


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.registry", None)
    with (
        open_store(dense(B), dram="8MiB") as store,
        pytest.raises(UnavailableError, match=r"pip install 'kvstore\[metrics\]'"),
    ):
        prometheus_collector(store)
