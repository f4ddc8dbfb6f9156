"""What a plan says, and what it is made for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import TYPE_CHECKING, Literal, TypeAlias

from kvstore.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.lengths import LengthDistribution

Convention: TypeAlias = Literal["at-mean", "mean"]
"""What stands for the service time and the bytes of a range of lengths. `at-mean`: those of its mean length,
T(E[L | range]), as the paper writes it. `mean`: their mean, E[T(L) | range], which is what a queue sees."""

CONVENTIONS: tuple[Convention, ...] = ("at-mean", "mean")


@dataclass(frozen=True)
class PrefixMove:
    """A prefix that is moved between clusters before prefill: the reverse direction, while bandwidth is abundant.

    Attributes:
        source, target: clusters; the link between them carries it.
        request_bytes: mean over all requests that `target` prefills, those without such a prefix included.
    """

    source: str
    target: str
    request_bytes: float


@dataclass(frozen=True)
class Traffic:
    """What comes.

    Attributes:
        lengths: tokens that must be prefilled: those of the prompt that no cache has.
        output_tokens: mean per request.
        moves: prefixes that cross between clusters.

    Raises:
        PlanError: a number is out of its limits.
    """

    lengths: LengthDistribution
    output_tokens: float
    moves: tuple[PrefixMove, ...] = ()

    def __post_init__(self) -> None:
        if not (isfinite(self.output_tokens) and self.output_tokens > 0):
            raise PlanError(
                f"output_tokens={self.output_tokens} must be positive: a request has at least its first token"
            )
        for move in self.moves:
            if not (isfinite(move.request_bytes) and move.request_bytes >= 0):
                raise PlanError(f"{move}: request_bytes must be finite and not negative")


@dataclass(frozen=True)
class Band:
    """Lengths above `above_tokens`, up to and including `upto_tokens`, and who prefills them.

    Attributes:
        clusters: they share the band as serves the rate best.
    """

    above_tokens: float
    upto_tokens: float
    clusters: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """How a cluster's instances are divided."""

    cluster: str
    prefill_instances: int
    decode_instances: int


@dataclass(frozen=True)
class Plan:
    """Who prefills what, and with how many instances.

    Attributes:
        bands: ascending, each begins where the one before ends, the first at 0 and the last without end.
        splits: of clusters that are divided otherwise than the deployment says.

    Raises:
        PlanError: bands leave a gap, overlap, or name a cluster twice.
    """

    bands: tuple[Band, ...]
    splits: tuple[Split, ...] = ()

    def __post_init__(self) -> None:
        names = [name for band in self.bands for name in band.clusters]
        if not self.bands or not all(band.clusters for band in self.bands):
            raise PlanError("a plan has a band of lengths, and each band a cluster that prefills it")
        if len(set(names)) < len(names):
            raise PlanError(f"a cluster stands twice in {', '.join(names)}; each prefills one range of lengths")
        edges = [0.0, *(band.upto_tokens for band in self.bands)]
        for begin, band in zip(edges, self.bands, strict=False):
            if band.above_tokens != begin or not band.upto_tokens >= begin:
                raise PlanError(
                    f"a band above {band.above_tokens:g} up to {band.upto_tokens:g} tokens follows one that ends at "
                    f"{begin:g}; bands ascend from 0 and meet"
                )
        if edges[-1] != inf:
            raise PlanError(
                f"the last band ends at {edges[-1]:g} tokens; it takes all longer prompts: set it to infinity"
            )
        split_names = [split.cluster for split in self.splits]
        if len(set(split_names)) < len(split_names):
            raise PlanError(f"a cluster is divided twice: {', '.join(split_names)}")

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Where one band ends and the next begins."""
        return tuple(band.upto_tokens for band in self.bands[:-1])


def plan_of(groups: Iterable[Iterable[str]], thresholds: Iterable[float] = (), splits: Iterable[Split] = ()) -> Plan:
    """The plan in which each group of clusters prefills the lengths between two thresholds, the shortest first.

    Raises:
        PlanError: thresholds do not ascend, or are not one fewer than the groups.
    """
    members, cuts = [tuple(group) for group in groups], list(thresholds)
    if len(cuts) != len(members) - 1:
        raise PlanError(f"{len(members)} groups of clusters need {len(members) - 1} thresholds, not {len(cuts)}")
    edges = [0.0, *cuts, inf]
    return Plan(tuple(Band(edges[at], edges[at + 1], group) for at, group in enumerate(members)), tuple(splits))


def divided(deployment: Deployment, splits: Iterable[Split]) -> Deployment:
    """The deployment with its instances divided so.

    Raises:
        PlanError: a split has more or fewer instances than its cluster.
        DeploymentError: an unknown cluster, or nobody is left who prefills, or who decodes.
    """
    by_name = {split.cluster: split for split in splits}
    for name, split in by_name.items():
        has = deployment.cluster(name).instances
        if split.prefill_instances + split.decode_instances != has:
            raise PlanError(f"{split} does not add up to the {has} instances of cluster {name!r}")
    if not by_name:
        return deployment
    clusters = tuple(
        replace(
            cluster,
            prefill_instances=by_name[cluster.name].prefill_instances,
            decode_instances=by_name[cluster.name].decode_instances,
        )
        if cluster.name in by_name
        else cluster
        for cluster in deployment.clusters
    )
    return replace(deployment, clusters=clusters)
