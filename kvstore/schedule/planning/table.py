"""What every range of lengths costs, tabulated once, so that a search can ask for thousands of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

import numpy as np

from kvstore.schedule.planning.capacity import BandLoad
from kvstore.schedule.planning.lengths import PointMasses

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from kvstore.schedule.deployment import Deployment
    from kvstore.schedule.planning.lengths import LengthDistribution
    from kvstore.schedule.planning.plan import Convention


def candidate_thresholds(lengths: LengthDistribution, count: int) -> tuple[float, ...]:
    """Lengths between which a search decides: all that a trace has, if it has no more, else quantiles."""
    if isinstance(lengths, PointMasses) and len(lengths.lengths) <= count:
        return lengths.lengths[:-1]
    quantiles = {lengths.quantile(number / count) for number in range(1, count)}
    return tuple(sorted(quantiles - {lengths.tokens_max}))


@dataclass(frozen=True)
class LengthTable:
    """Share, service time and bytes of the lengths between any two of its thresholds.

    Attributes:
        thresholds: `[edges]`, ascending from 0 to infinity.
        share: `[edges, edges]`: of the requests above one edge and up to another; 0 where the second is not higher.
        prefill_s, request_bytes: `[edges, edges]` for each cluster, by the convention; 0 where there is no request.
    """

    thresholds: NDArray[np.float64]
    share: NDArray[np.float64]
    prefill_s: tuple[NDArray[np.float64], ...]
    request_bytes: tuple[NDArray[np.float64], ...]

    @classmethod
    def of(
        cls,
        lengths: LengthDistribution,
        deployment: Deployment,
        thresholds: Iterable[float],
        convention: Convention,
    ) -> LengthTable:
        """For the clusters of a deployment.

        Args:
            thresholds: in any order; 0 and infinity are added.
        """
        edges = sorted({0.0, inf, *thresholds})
        cells = list(pairwise(edges))
        shares = np.array([lengths.share(*cell) for cell in cells])
        share = _between(shares)

        def cell_means(function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.float64]:
            return np.array(
                [
                    lengths.expected(function, *cell) if each > 0 else 0.0
                    for cell, each in zip(cells, shares, strict=True)
                ]
            )

        is_there = share > 0
        divisor = np.where(is_there, share, 1.0)
        if convention == "at-mean":
            tokens = np.array(
                [lengths.mean(*cell) if each > 0 else 0.0 for cell, each in zip(cells, shares, strict=True)]
            )
            mean = np.where(is_there, _between(shares * tokens) / divisor, 1.0)
        profiles = [cluster.profile for cluster in deployment.clusters]
        by_profile = {}
        for profile in dict.fromkeys(profiles):
            prefill = deployment.prefill_service.curve(profile)
            if convention == "at-mean":
                seconds, sizes = prefill.many(mean), profile.kv.many(mean)
            else:
                seconds = _between(shares * cell_means(prefill.many)) / divisor
                sizes = _between(shares * cell_means(profile.kv.many)) / divisor
            by_profile[profile] = np.where(is_there, seconds, 0.0), np.where(is_there, sizes, 0.0)
        return cls(
            thresholds=np.array(edges),
            share=share,
            prefill_s=tuple(by_profile[profile][0] for profile in profiles),
            request_bytes=tuple(by_profile[profile][1] for profile in profiles),
        )

    def load(self, clusters: Iterable[int], first: int, last: int) -> BandLoad:
        """Of the lengths between two edges, by number, for these clusters."""
        members = tuple(clusters)
        return BandLoad(
            float(self.share[first, last]),
            {number: float(self.prefill_s[number][first, last]) for number in members},
            {number: float(self.request_bytes[number][first, last]) for number in members},
        )


def _between(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sums of the cells between any two edges; 0 where the second is not higher."""
    upto = np.concatenate(([0.0], np.cumsum(cells)))
    sums: NDArray[np.float64] = np.triu(upto[None, :] - upto[:, None], 1)
    # A range without requests has no rounding error for a share.
    counts = np.concatenate(([0], np.cumsum(cells > 0)))
    return np.where(counts[None, :] > counts[:, None], np.maximum(sums, 0.0), 0.0)
