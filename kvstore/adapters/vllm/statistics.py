"""What the connector counts, in the form in which vLLM logs it and shows it to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
from vllm.v1.metrics.utils import create_metric_per_engine

FAILURES = "failures:"
"""Begins the name of what went wrong, by the class of the error."""
_METRICS = {
    "queries": "Requests that were looked for in the store.",
    "hits": "Requests of which something was loaded.",
    "hit_tokens": "Tokens that were to be loaded.",
    "not_cached": "Requests that nothing names, so they are not cached.",
    "loads": "Loads into the engine's pages.",
    "loads_failed": "Loads that failed; the engine computed instead.",
    "loaded_tokens": "Tokens that were loaded.",
    "loaded_bytes": "Bytes that were loaded.",
    "load_s": "Seconds from the order of a load to its end.",
    "saves": "Steps of requests that were saved.",
    "saves_failed": "Steps of requests that were not saved.",
    "saved_tokens": "Tokens that were saved.",
    "saved_bytes": "Bytes that were saved.",
    "save_s": "Seconds that saving took.",
}


@dataclass
class KVStoreStats(KVConnectorStats):  # type: ignore[misc]
    """Counts since the last report, by name."""

    def reset(self) -> None:
        """Begin anew."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another report."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For the log."""
        return dict(sorted(self.data.items()))

    def is_empty(self) -> bool:
        """Whether nothing was counted."""
        return not self.data


class KVStorePromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """`vllm:kvstore_hits_total` and the like, for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        counter = metric_types[Counter]
        self._counters = {
            name: create_metric_per_engine(
                counter(name=f"vllm:kvstore_{_in_units(name)}", documentation=text, labelnames=labelnames),
                per_engine_labelvalues,
            )
            for name, text in _METRICS.items()
        }
        self._failures = create_metric_per_engine(
            counter(
                name="vllm:kvstore_failures",
                documentation="What went wrong in the store; each was a miss, or was not saved or sent.",
                labelnames=labelnames,
            ),
            per_engine_labelvalues,
        )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Count a report."""
        for name, value in transfer_stats_data.items():
            if name.startswith(FAILURES):
                self._failures[engine_idx].inc(value)
            elif name in self._counters:
                self._counters[name][engine_idx].inc(value)


def _in_units(name: str) -> str:
    return f"{name.removesuffix('_s')}_seconds" if name.endswith("_s") else name
