"""What is deployed: clusters of instances, and the links between them."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

from kvstore.errors import DeploymentError
from kvstore.limits import BYTES_PER_S_MAX, BYTES_PER_S_MIN, CLUSTERS_MAX, INSTANCES_MAX, ROUND_TRIP_S_MAX
from kvstore.schedule.prefill_service import WHOLE, PrefillServiceModel

if TYPE_CHECKING:
    from kvstore.profile import Profile


@dataclass(frozen=True)
class CacheSize:
    """The prefix cache of one cluster; 0 bytes: there is none.

    Attributes:
        ssd_read_bytes_per_s: at which a prefix comes from SSD.

    Raises:
        DeploymentError: a size is negative or not finite, or nothing would ever come from SSD.
    """

    dram_bytes: float = 0.0
    ssd_bytes: float = 0.0
    ssd_read_bytes_per_s: float = 2e9

    def __post_init__(self) -> None:
        for what in ("dram_bytes", "ssd_bytes"):
            value = getattr(self, what)
            if not (isfinite(value) and value >= 0):
                raise DeploymentError(f"a cache of {what}={value} cannot be; give a number of bytes, or 0 for none")
        if not (isfinite(self.ssd_read_bytes_per_s) and self.ssd_read_bytes_per_s > 0):
            raise DeploymentError(f"ssd_read_bytes_per_s={self.ssd_read_bytes_per_s} of a cache must be positive")


@dataclass(frozen=True)
class Cluster:
    """Instances of one kind in one place, with one prefix cache.

    Attributes:
        profile: of one instance.
        prefill_instances: that prefill, one prompt at a time.
        decode_instances: that decode; 0 in a cluster that only prefills for others (PrfaaS).
        egress_bytes_per_s: what may leave the cluster over all links together; None for what the links carry.
        ingress_bytes_per_s: what may enter it.
        cache: of the whole cluster.
        convertible: whether instances may change between prefill and decode.
        conversion_s: how long an instance does neither while it changes.

    Raises:
        DeploymentError: a number is out of its limits; the message names the cluster.
    """

    name: str
    profile: Profile
    prefill_instances: int
    decode_instances: int
    egress_bytes_per_s: float | None = None
    ingress_bytes_per_s: float | None = None
    cache: CacheSize = CacheSize()
    convertible: bool = False
    conversion_s: float = 60.0

    def __post_init__(self) -> None:
        for what in ("prefill_instances", "decode_instances"):
            if not 0 <= getattr(self, what) <= INSTANCES_MAX:
                raise DeploymentError(
                    f"cluster {self.name!r}: {what}={getattr(self, what)} is outside 0 to {INSTANCES_MAX}"
                )
        if self.prefill_instances + self.decode_instances == 0:
            raise DeploymentError(f"cluster {self.name!r} has no instances; leave it out, or give it some")
        for what in ("egress_bytes_per_s", "ingress_bytes_per_s"):
            value = getattr(self, what)
            if value is not None and not BYTES_PER_S_MIN <= value <= BYTES_PER_S_MAX:
                raise DeploymentError(
                    f"cluster {self.name!r}: {what}={value} is outside {BYTES_PER_S_MIN:g} to {BYTES_PER_S_MAX:g}; "
                    "leave it out for no limit"
                )

    @property
    def instances(self) -> int:
        return self.prefill_instances + self.decode_instances

    @property
    def decodes(self) -> bool:
        return self.decode_instances > 0


@dataclass(frozen=True)
class Link:
    """One direction between two clusters.

    Attributes:
        bytes_per_s: what it carries without loss.
        round_trip_s: to the other cluster and back.
        loss: share of packets that are lost.

    Raises:
        DeploymentError: a number is out of its limits.
    """

    source: str
    target: str
    bytes_per_s: float
    round_trip_s: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        name = f"link {self.source!r} to {self.target!r}"
        if not BYTES_PER_S_MIN <= self.bytes_per_s <= BYTES_PER_S_MAX:
            raise DeploymentError(
                f"{name}: bytes_per_s={self.bytes_per_s} is outside {BYTES_PER_S_MIN:g} to {BYTES_PER_S_MAX:g}; leave "
                "a dead link out"
            )
        if not (0 <= self.round_trip_s <= ROUND_TRIP_S_MAX and 0 <= self.loss < 1):
            raise DeploymentError(
                f"{name}: round_trip_s={self.round_trip_s} must be from 0 to {ROUND_TRIP_S_MAX:g}, loss={self.loss} be "
                "in [0, 1)"
            )


@dataclass(frozen=True)
class Deployment:
    """Clusters and links.

    Attributes:
        prefill_service: how all clusters prefill a prompt.

    Raises:
        DeploymentError: names repeat, a link names an unknown cluster or stands twice, nobody prefills or nobody
            decodes, or a prefill cluster reaches nobody who decodes.
    """

    clusters: tuple[Cluster, ...]
    links: tuple[Link, ...] = ()
    prefill_service: PrefillServiceModel = WHOLE

    def __post_init__(self) -> None:
        names = [cluster.name for cluster in self.clusters]
        if not 1 <= len(names) <= CLUSTERS_MAX:
            raise DeploymentError(f"a deployment has 1 to {CLUSTERS_MAX} clusters, not {len(names)}")
        if len(set(names)) < len(names):
            raise DeploymentError(f"cluster names repeat: {', '.join(sorted(names))}; give each a name of its own")
        pairs = [(link.source, link.target) for link in self.links]
        for source, target in pairs:
            if source not in names or target not in names or source == target:
                raise DeploymentError(f"a link goes from {source!r} to {target!r}; it joins two of {', '.join(names)}")
        if len(set(pairs)) < len(pairs):
            raise DeploymentError("a link between the same clusters in the same direction stands twice; join them")
        if not any(cluster.prefill_instances for cluster in self.clusters):
            raise DeploymentError("no cluster has prefill instances; give prefill_instances to one")
        if not any(cluster.decodes for cluster in self.clusters):
            raise DeploymentError("no cluster has decode instances; give decode_instances to one")
        for cluster in self.clusters:
            if not cluster.decodes and not any(
                self.cluster(link.target).decodes for link in self.links_from(cluster.name)
            ):
                raise DeploymentError(
                    f"cluster {cluster.name!r} only prefills and has no link to one that decodes; add a link from it"
                )

    def cluster(self, name: str) -> Cluster:
        for cluster in self.clusters:
            if cluster.name == name:
                return cluster
        raise DeploymentError(
            f"there is no cluster {name!r}; there are {', '.join(each.name for each in self.clusters)}"
        )

    def links_from(self, name: str) -> tuple[Link, ...]:
        return tuple(link for link in self.links if link.source == name)

    def link(self, source: str, target: str) -> Link | None:
        """The link in this direction; None where there is none."""
        return next((each for each in self.links if (each.source, each.target) == (source, target)), None)


@dataclass(frozen=True)
class Slo:
    """What a request must meet to count as good (DistServe, "goodput").

    Attributes:
        ttft_s: time to first token, at most.
        tpot_s: time per output token after the first, at most.
        share: of the requests that must meet both.

    Raises:
        DeploymentError: a limit is not positive and finite, or the share not in (0, 1].
    """

    ttft_s: float
    tpot_s: float
    share: float = 0.9

    def __post_init__(self) -> None:
        for what in ("ttft_s", "tpot_s"):
            value = getattr(self, what)
            if not (isfinite(value) and value > 0):
                raise DeploymentError(f"the limit {what}={value} must be positive; it is in seconds")
        if not 0 < self.share <= 1:
            raise DeploymentError(f"share={self.share} of the requests must be in (0, 1], such as 0.9 for 90 %")
