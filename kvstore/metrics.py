"""What a store counts and measures, as values, and under which names Prometheus gets it (docs/observability.md).

Live counters are kept by `StoreMeters`; `StoreMetrics` is one frozen look at everything. No label names a tenant, a
peer or a prefix: each takes few values.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

from kvstore.errors import (
    LeaseGoneError,
    PoolFullError,
    QuarantineFullError,
    QuotaError,
    QuotaTooSmallError,
    StoreClosedError,
    UnavailableError,
    WriteTooLargeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from prometheus_client.registry import Collector

    from kvstore.placement import ShelfStatistics
    from kvstore.pool import PoolStatistics
    from kvstore.store import Store
    from kvstore.store.devices import DeviceStatistics

EXTRA = "metrics need prometheus-client: pip install 'kvstore[metrics]'"
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

SHORT_S = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)
"""Upper bounds of what is decided in memory."""
LONG_S = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Upper bounds of what moves bytes."""

REFUSALS: tuple[tuple[type[Exception], str], ...] = (
    (QuotaTooSmallError, "too large"),
    (QuotaError, "quota"),
    (WriteTooLargeError, "too large"),
    (PoolFullError, "full"),
    (QuarantineFullError, "quarantine"),
    (LeaseGoneError, "lease gone"),
    (StoreClosedError, "closed"),
    (ValueError, "misuse"),
)
"""Errors of writers and the words under which they are counted, the first that fits; `other` for the rest."""


@dataclass(frozen=True)
class Histogram:
    """How often a value was at most each bound, and what all of them add up to.

    Attributes:
        bounds: ascending.
        counts: of values in each range, one more than there are bounds: the last is for those above all of them.
        total: sum of the values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0

    @property
    def count(self) -> int:
        return sum(self.counts)

    @property
    def buckets(self) -> list[tuple[str, int]]:
        """Upper bounds and how many values were not above, as Prometheus has them."""
        labels = [*map(repr, self.bounds), "+Inf"]
        return list(zip(labels, accumulate(self.counts), strict=True))


class _Histogram:
    """A histogram that grows. Not thread-safe."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def value(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


def _empty(bounds: tuple[float, ...]) -> Histogram:
    return Histogram(bounds, (0,) * (len(bounds) + 1))


@dataclass(frozen=True)
class StoreMetrics:
    """All that a store has counted, at one moment. What is not of the pool counts what went through this process.

    Attributes:
        pool: the pool's counters and its budget, whoever used it.
        shelves: tiers beside the pool's memory.
        matches: how often this process asked.
        asked_tokens: the lengths that could have been found, summed up.
        hits, hit_tokens: matches that found something, and how much, by tier.
        missed: matches that found less than could have been, by the first obstacle; see `kvstore.events.MissReason`.
        refused: writes and commits that ended with an error, by kind.
        read_bytes, read_s: copied out of leases.
        match_s, commit_s, load_s: how long matches, commits, and reads until their lease was there took.
        devices: copies between the store and tensors of each device.
        streams: event streams that are open.
        dropped_events: that slow subscribers of open streams have lost.
    """

    pool: PoolStatistics
    shelves: tuple[ShelfStatistics, ...] = ()
    matches: int = 0
    asked_tokens: int = 0
    hits: Mapping[str, int] = field(default_factory=dict)
    hit_tokens: Mapping[str, int] = field(default_factory=dict)
    missed: Mapping[str, int] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    read_bytes: int = 0
    read_s: float = 0.0
    match_s: Histogram = field(default_factory=lambda: _empty(SHORT_S))
    commit_s: Histogram = field(default_factory=lambda: _empty(LONG_S))
    load_s: Histogram = field(default_factory=lambda: _empty(LONG_S))
    devices: tuple[DeviceStatistics, ...] = ()
    streams: int = 0
    dropped_events: int = 0


class StoreMeters:
    """Counters of one process's use of a pool. Any thread; each call takes one lock for a microsecond."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked_tokens = 0
        self._hits: dict[str, int] = {}
        self._hit_tokens: dict[str, int] = {}
        self._missed: dict[str, int] = {}
        self._refused: Counter[str] = Counter()
        self._match_s = _Histogram(SHORT_S)
        self._commit_s = _Histogram(LONG_S)
        self._load_s = _Histogram(LONG_S)

    def matched(self, asked_tokens: int, tokens: int, tier: str | None, missed: str | None, seconds: float) -> None:
        """A match was asked for.

        Args:
            tier: where the resume point lies; None for a miss.
            missed: why no more was found; None if that was all that could be.
        """
        with self._lock:
            self._asked_tokens += asked_tokens
            self._match_s.add(seconds)
            if tier is not None:
                self._hits[tier] = self._hits.get(tier, 0) + 1
                self._hit_tokens[tier] = self._hit_tokens.get(tier, 0) + tokens
            if missed is not None:
                self._missed[missed] = self._missed.get(missed, 0) + 1

    def committed(self, seconds: float) -> None:
        with self._lock:
            self._commit_s.add(seconds)

    def loaded(self, seconds: float) -> None:
        """A lease was made, its records loaded if need be."""
        with self._lock:
            self._load_s.add(seconds)

    def refused(self, error: BaseException) -> None:
        """A write or a commit ended with an error."""
        word = next((word for kind, word in REFUSALS if isinstance(error, kind)), "other")
        with self._lock:
            self._refused[word] += 1

    def snapshot(self, pool: PoolStatistics, **others: Any) -> StoreMetrics:
        """One look at these, with what others have counted."""
        with self._lock:
            match_s = self._match_s.value()
            return StoreMetrics(
                pool,
                matches=match_s.count,
                asked_tokens=self._asked_tokens,
                hits=dict(self._hits),
                hit_tokens=dict(self._hit_tokens),
                missed={str(reason): count for reason, count in self._missed.items()},
                refused=dict(self._refused),
                match_s=match_s,
                commit_s=self._commit_s.value(),
                load_s=self._load_s.value(),
                **others,
            )


# Names

Snapshot = TypeVar("Snapshot")
Sample: TypeAlias = "tuple[tuple[str, ...], float | Histogram]"


@dataclass(frozen=True)
class Metric(Generic[Snapshot]):
    """One metric family.

    Attributes:
        name: with its unit; a counter's ends with `_total`.
        kind: `counter`, `gauge` or `histogram`.
        text: what it counts.
        labels: their names.
        samples: label values and value of each, from a snapshot.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...]
    samples: Callable[[Snapshot], Iterable[Sample]]


def one(name: str, kind: str, text: str, value: Callable[[Snapshot], float | Histogram]) -> Metric[Snapshot]:
    """A metric without labels."""
    return Metric(name, kind, text, (), lambda snapshot: [((), value(snapshot))])


def _of_pool(name: str, kind: str, text: str, value: Callable[[PoolStatistics], float]) -> Metric[StoreMetrics]:
    return one(name, kind, text, lambda store: value(store.pool))


def _by(
    name: str, kind: str, text: str, label: str, values: Callable[[StoreMetrics], Mapping[str, float]]
) -> Metric[StoreMetrics]:
    return Metric(
        name, kind, text, (label,), lambda store: [((str(key),), value) for key, value in sorted(values(store).items())]
    )


def _of_tiers(name: str, kind: str, text: str, value: Callable[[ShelfStatistics], float]) -> Metric[StoreMetrics]:
    return _by(name, kind, text, "tier", lambda store: {shelf.name: value(shelf) for shelf in store.shelves})


def _of_devices(name: str, kind: str, text: str, value: Callable[[DeviceStatistics], float]) -> Metric[StoreMetrics]:
    return _by(name, kind, text, "device", lambda store: {each.device: value(each) for each in store.devices})


def _pool_bytes(store: StoreMetrics) -> Mapping[str, float]:
    pool = store.pool
    return {
        "committed": pool.committed_bytes,
        "reserved": pool.reserved_bytes,
        "quarantined": pool.quarantined_bytes,
        "index": pool.index_bytes,
    }


def _tier_refusals(store: StoreMetrics) -> Iterable[Sample]:
    for shelf in store.shelves:
        for reason, count in sorted(shelf.refused.items()):
            yield (shelf.name, reason), count


POOL_METRICS: tuple[Metric[StoreMetrics], ...] = (
    _of_pool("kvstore_pool_capacity_bytes", GAUGE, "What the pool may use.", lambda p: p.capacity_bytes),
    _by("kvstore_pool_used_bytes", GAUGE, "What the pool uses, by use.", "use", _pool_bytes),
    _of_pool("kvstore_pool_nodes", GAUGE, "Prefix nodes in the index.", lambda p: p.nodes),
    _of_pool("kvstore_pool_ghosts", GAUGE, "Prefix nodes whose records are gone.", lambda p: p.ghosts),
    _of_pool("kvstore_pool_salts", GAUGE, "Salts that hold something.", lambda p: len(p.bytes_by_salt)),
    _of_pool("kvstore_pool_matches_total", COUNTER, "Matches asked for.", lambda p: p.matches),
    _of_pool("kvstore_pool_hits_total", COUNTER, "Matches that found a resume point.", lambda p: p.hits),
    _of_pool("kvstore_pool_commits_total", COUNTER, "Writes that became visible.", lambda p: p.commits),
    _of_pool("kvstore_pool_aborts_total", COUNTER, "Writes that were given up.", lambda p: p.aborts),
    _of_pool("kvstore_pool_stored_records_total", COUNTER, "Records that became visible.", lambda p: p.stored_records),
    _of_pool("kvstore_pool_stored_bytes_total", COUNTER, "Bytes of these.", lambda p: p.stored_bytes),
    _of_pool("kvstore_pool_evicted_records_total", COUNTER, "Records evicted.", lambda p: p.evicted_records),
    _of_pool("kvstore_pool_evicted_bytes_total", COUNTER, "Bytes evicted.", lambda p: p.evicted_bytes),
    _of_pool("kvstore_pool_damaged_records_total", COUNTER, "Records found damaged.", lambda p: p.damaged_records),
    _of_pool("kvstore_pool_expired_records_total", COUNTER, "Records that ended.", lambda p: p.expired_records),
    _of_pool("kvstore_pool_expired_leases_total", COUNTER, "Leases held for too long.", lambda p: p.expired_leases),
    _of_pool("kvstore_pool_expired_writers_total", COUNTER, "Writers open for too long.", lambda p: p.expired_writers),
    _of_pool("kvstore_pool_quota_refusals_total", COUNTER, "Writes over a quota.", lambda p: p.quota_refusals),
    _of_pool(
        "kvstore_pool_quota_evicted_records_total",
        COUNTER,
        "Records evicted for one.",
        lambda p: p.quota_evicted_records,
    ),
    _of_pool("kvstore_pool_pins", GAUGE, "Pins that are held.", lambda p: p.pins),
    _of_pool("kvstore_pool_pinned_bytes", GAUGE, "Bytes that they keep.", lambda p: p.pinned_bytes),
    _of_pool("kvstore_pool_pin_refusals_total", COUNTER, "Pins over a limit.", lambda p: p.pin_refusals),
)
"""Of the pool's memory."""

TIER_METRICS: tuple[Metric[StoreMetrics], ...] = (
    _of_tiers("kvstore_tier_capacity_bytes", GAUGE, "What the tier may use.", lambda t: t.capacity_bytes),
    _of_tiers("kvstore_tier_used_bytes", GAUGE, "What it uses, dead space included.", lambda t: t.used_bytes),
    _of_tiers("kvstore_tier_committed_bytes", GAUGE, "Records that a match can find.", lambda t: t.committed_bytes),
    _of_tiers("kvstore_tier_index_bytes", GAUGE, "Host memory of its index.", lambda t: t.index_bytes),
    _of_tiers("kvstore_tier_trouble", GAUGE, "1 while it does not work as it should.", lambda t: bool(t.trouble)),
    _of_tiers("kvstore_tier_kept_bytes_total", COUNTER, "Records it was given and kept.", lambda t: t.kept_bytes),
    _of_tiers("kvstore_tier_written_bytes_total", COUNTER, "Written, all told.", lambda t: t.written_bytes),
    _of_tiers("kvstore_tier_loaded_bytes_total", COUNTER, "Records read from it.", lambda t: t.loaded_bytes),
    _of_tiers("kvstore_tier_evicted_records_total", COUNTER, "Records evicted.", lambda t: t.evicted_records),
    _of_tiers("kvstore_tier_damaged_records_total", COUNTER, "Records found damaged.", lambda t: t.damaged_records),
    _of_tiers("kvstore_tier_expired_records_total", COUNTER, "Records that ended.", lambda t: t.expired_records),
    Metric(
        "kvstore_tier_refused_total", COUNTER, "What it did not take, by reason.", ("tier", "reason"), _tier_refusals
    ),
)
"""Of tiers beside the pool's memory."""

DEVICE_METRICS: tuple[Metric[StoreMetrics], ...] = (
    _of_devices("kvstore_device_put_bytes_total", COUNTER, "Copied from tensors of writers.", lambda d: d.put_bytes),
    _of_devices("kvstore_device_read_bytes_total", COUNTER, "Copied into tensors of readers.", lambda d: d.read_bytes),
    _of_devices(
        "kvstore_device_resident_bytes_total", COUNTER, "Those from the device itself.", lambda d: d.resident_bytes
    ),
    _of_devices("kvstore_device_waiting", GAUGE, "Puts and leases that wait for the device.", lambda d: d.waiting),
    _of_devices("kvstore_device_overdue", GAUGE, "Those past their deadline.", lambda d: d.overdue),
)
"""Of copies between this process's memory and tensors of devices."""

USE_METRICS: tuple[Metric[StoreMetrics], ...] = (
    one("kvstore_store_asked_tokens_total", COUNTER, "Tokens that matches could have found.", lambda s: s.asked_tokens),
    _by("kvstore_store_hits_total", COUNTER, "Matches that found something, by tier.", "tier", lambda s: s.hits),
    _by("kvstore_store_hit_tokens_total", COUNTER, "Tokens that were found.", "tier", lambda s: s.hit_tokens),
    _by("kvstore_store_missed_total", COUNTER, "Matches that found less than all.", "reason", lambda s: s.missed),
    _by("kvstore_store_refused_total", COUNTER, "Writes that ended with an error.", "reason", lambda s: s.refused),
    one("kvstore_store_read_bytes_total", COUNTER, "Copied out of leases.", lambda s: s.read_bytes),
    one("kvstore_store_read_seconds_total", COUNTER, "Seconds of that.", lambda s: s.read_s),
    one("kvstore_store_match_seconds", HISTOGRAM, "Matches.", lambda s: s.match_s),
    one("kvstore_store_commit_seconds", HISTOGRAM, "Commits.", lambda s: s.commit_s),
    one("kvstore_store_load_seconds", HISTOGRAM, "Reads, until their lease was there.", lambda s: s.load_s),
    one("kvstore_store_event_streams", GAUGE, "Event streams that are open.", lambda s: s.streams),
    one("kvstore_store_dropped_events", GAUGE, "Events that open streams have lost.", lambda s: s.dropped_events),
)
"""Of what went through this process."""

STORE_METRICS = POOL_METRICS + TIER_METRICS + DEVICE_METRICS + USE_METRICS


def family_of(metric: Metric[Snapshot], snapshot: Snapshot | None) -> Any:
    """A metric as prometheus-client has it, which must be installed; without a snapshot it has no samples."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    families: dict[str, Any] = {
        COUNTER: CounterMetricFamily,
        GAUGE: GaugeMetricFamily,
        HISTOGRAM: HistogramMetricFamily,
    }
    family = families[metric.kind](metric.name, metric.text, labels=metric.labels)
    for labels, value in () if snapshot is None else metric.samples(snapshot):
        if isinstance(value, Histogram):
            family.add_metric(labels, value.buckets, value.total)
        else:
            family.add_metric(labels, value)
    return family


def prometheus_collector(store: Store) -> Collector:
    """What `prometheus_client` asks for a store's metrics: `REGISTRY.register(prometheus_collector(store))`.

    A registry takes one store; another one needs a registry of its own. A store that was closed has none.

    Raises:
        UnavailableError: prometheus-client is not installed.
    """
    try:
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise UnavailableError(f"{EXTRA} ({error})") from error

    class StoreCollector(Collector):
        def collect(self) -> Iterable[Any]:
            try:
                metrics = store.metrics()
            except StoreClosedError:
                return
            for metric in STORE_METRICS:
                yield family_of(metric, metrics)

        def describe(self) -> Iterable[Any]:
            """Names only: a registry takes one store."""
            return [family_of(metric, None) for metric in STORE_METRICS]

    return StoreCollector()
