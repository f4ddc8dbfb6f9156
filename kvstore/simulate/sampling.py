"""Samples of the system at equal steps, of which there are never too many."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.limits import SIMULATED_SAMPLES_MAX
from kvstore.simulate.result import SAMPLED_BY_CLUSTER, Samples

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvstore.simulate.links import Line
    from kvstore.simulate.site import Site


class Sampler:
    """Takes a sample at each step; when there are `SIMULATED_SAMPLES_MAX`, every other goes and the step doubles."""

    def __init__(self, sites: Iterable[Site], lines: Mapping[tuple[str, str], Line]) -> None:
        self._sites = tuple(sites)
        self._lines = lines
        self._every = 1
        self._steps = 0
        self._at_s: list[float] = []
        self._clusters: list[list[float]] = []
        self._links: list[list[float]] = []
        self._policy: list[Mapping[str, float]] = []

    def take(self, now_s: float, numbers: Mapping[str, float]) -> None:
        """A sample, if it is time for one.

        Args:
            numbers: of what the policy remembers, by name.
        """
        self._steps += 1
        if self._steps % self._every:
            return
        self._at_s.append(now_s)
        row: list[float] = []
        for site in self._sites:
            prefill, decode = site.prefill, site.decode
            row += (
                prefill.queued,
                len(prefill.busy),
                prefill.present,
                decode.running,
                decode.queued,
                decode.present,
            )
        self._clusters.append(row)
        flat: list[float] = []
        for line in self._lines.values():
            flat += (line.delivered(now_s), line.bytes_per_s)
        self._links.append(flat)
        self._policy.append(numbers)
        if len(self._at_s) >= SIMULATED_SAMPLES_MAX:
            self._every *= 2
            # Those stay that the doubled step takes: every second one, ending with the last.
            for samples in (self._at_s, self._clusters, self._links, self._policy):
                del samples[0::2]

    def samples(self) -> Samples:
        clusters = np.array(self._clusters, np.float64).reshape(
            len(self._at_s), len(self._sites), len(SAMPLED_BY_CLUSTER)
        )
        links = np.array(self._links, np.float64).reshape(len(self._at_s), len(self._lines), 2)
        delivered = np.diff(links[:, :, 0], axis=0, prepend=np.zeros((1, len(self._lines)))) if self._at_s else links
        names = sorted({name for numbers in self._policy for name in numbers})
        return Samples(
            at_s=np.array(self._at_s, np.float64),
            **{
                what: {site.name: clusters[:, at, column] for at, site in enumerate(self._sites)}
                for column, what in enumerate(SAMPLED_BY_CLUSTER)
            },
            link_bytes={pair: delivered[:, at].reshape(-1) for at, pair in enumerate(self._lines)},
            link_capacity_bytes_per_s={pair: links[:, at, 1] for at, pair in enumerate(self._lines)},
            policy={name: np.array([each.get(name, np.nan) for each in self._policy]) for name in names},
        )
