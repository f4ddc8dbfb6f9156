"""One cluster of a simulation: its instances, its cache, and how it looks to a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.schedule.policies.snapshot import ClusterState
from kvstore.simulate.decode import DecodeInstances
from kvstore.simulate.prefill import PrefillInstances

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.schedule.deployment import Cluster
    from kvstore.simulate.cache import ClusterCache
    from kvstore.simulate.events import Events
    from kvstore.simulate.job import Job


class Site:
    """A cluster at work. Not thread-safe.

    Attributes:
        number: of the cluster in the deployment.
        stores: times that something was stored in the cache.
        cache: None where there is none.
    """

    def __init__(
        self,
        number: int,
        cluster: Cluster,
        cache: ClusterCache | None,
        events: Events,
        *,
        start: Callable[[Job, int], None],
        placed: Callable[[Job], None],
        finished: Callable[[Job], None],
    ) -> None:
        self.number = number
        self.cluster = cluster
        self.name = cluster.name
        self.profile = cluster.profile
        self.cache = cache
        self.stores = 0
        self.prefill = PrefillInstances(events, cluster.prefill_instances, start)
        self.decode = DecodeInstances(events, cluster.profile, cluster.decode_instances, placed, finished)
        self._prefills = 0
        self._latency_s = 0.0
        self._measured = (0.0, 0.0)

    def prefilled(self, latency_s: float) -> None:
        """A prompt is through, so long after it asked for an instance."""
        self._prefills += 1
        self._latency_s += latency_s

    def measure(self, passed_s: float) -> None:
        """A telemetry interval ends."""
        self.prefill.estimate()
        mean_s = self._latency_s / self._prefills if self._prefills else 0.0
        self._measured = (self._prefills / passed_s if passed_s > 0 else 0.0, mean_s)
        self._prefills = 0
        self._latency_s = 0.0

    def state(self) -> ClusterState:
        """How it is doing: queues as they are, since the router itself fills them; rates as of the last telemetry."""
        prefill, decode = self.prefill, self.decode
        return ClusterState(
            self.cluster,
            prefill.instances,
            prefill.waiting,
            prefill.wait_s(),
            decode.instances,
            decode.running,
            decode.waiting,
            decode.tpot_s(),
            0.0,
            *self._measured,
            decode.expected,
        )
