"""How full decode batches are, how long a request waits for a place in one, and how fast its tokens come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import PlanError
from kvstore.limits import DECODE_PLACES_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvstore.profile import Profile


@dataclass(frozen=True)
class DecodeLoad:
    """The decode instances of one cluster under a steady load.

    Requests are spread evenly over the instances and share them: with n of them each step takes
    T_decode(n / instances). For Poisson arrivals the number of requests is then that of a processor-sharing queue,
    whatever the distribution of output lengths, as long as nobody waits; beyond that, as if they were exponential.

    Attributes:
        used_share: of the requests per second that full batches could serve.
        waits_share: of the requests, those that find all places taken.
        wait_s: mean over all requests.
        batch: mean number of requests in a batch.
    """

    used_share: float
    waits_share: float
    wait_s: float
    batch: float
    _seen: NDArray[np.float64]
    _tpot_s: NDArray[np.float64]

    @classmethod
    def of(cls, profile: Profile, instances: int, rate_per_s: float, output_tokens: float) -> DecodeLoad:
        """Under this rate.

        Raises:
            PlanError: the rate is not below what full batches serve.
        """
        limit = instances * profile.decode_requests_per_s(output_tokens)
        if not 0 <= rate_per_s < limit:
            raise PlanError(
                f"the load is unstable: {rate_per_s:g} requests/s to decode, and {instances} instances decode "
                f"{limit:g}; lower the rate, or add decode instances"
            )
        places = instances * profile.decode_batch_max
        if places > DECODE_PLACES_MAX:
            raise PlanError(
                f"{instances} instances that decode {profile.decode_batch_max} requests each have {places:,} places, "
                f"over the limit of {DECODE_PLACES_MAX:,} that latency is computed for; plan for fewer instances"
            )
        number = np.arange(1, places + 1, dtype=np.float64)
        steps_s = profile.decode_step.many(np.maximum(number / instances, 1.0))
        leaving = number / (steps_s * output_tokens)
        if rate_per_s == 0:
            return cls(0.0, 0.0, 0.0, 0.0, np.array([1.0]), steps_s[:1])
        weights = np.concatenate(([0.0], np.cumsum(np.log(rate_per_s) - np.log(leaving))))
        chance = np.exp(weights - weights.max())
        used = rate_per_s / limit
        # All places taken: the number who wait besides falls by `used` with each.
        beyond = chance[-1] * used / (1 - used)
        total = chance.sum() + beyond
        waits = float((chance[-1] + beyond) / total)
        running = float((np.arange(places + 1) @ chance + places * beyond) / total)
        seen = chance / total
        seen[-1] += beyond / total
        return cls(
            used_share=used,
            waits_share=waits,
            wait_s=waits / (limit - rate_per_s),
            batch=running / instances,
            _seen=seen,
            # Who comes when n are there decodes among n + 1.
            _tpot_s=np.append(steps_s, steps_s[-1]),
        )

    @property
    def tpot_mean_s(self) -> float:
        """Of a request that comes: the step of the batch that it joins."""
        return float(self._seen @ self._tpot_s)

    def tpot_share(self, limit_s: float) -> float:
        """P(TPOT <= limit), by the batch that a request joins."""
        return float(min(self._seen[self._tpot_s <= limit_s].sum(), 1.0))
