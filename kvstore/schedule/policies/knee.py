"""Where saturation begins: the knee of latency over load, found while requests come.

The knee is the load at which one percent more load costs one percent more latency: the elasticity of latency,
(dT/dλ)·λ/T, reaches 1 there, and load ÷ latency ("power", Kleinrock 1979) is the largest. It needs no threshold of
anybody's traffic: multiplying all loads or all latencies by a constant moves it by just that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, isfinite, log2, sqrt
from typing import NamedTuple

import numpy as np

from kvstore.errors import PlanError

_BINS_PER_OCTAVE = 8
_BINS_MAX = 128
"""Sixteen octaves of load below the highest that was seen."""
_TINY, _HUGE = 1e-15, 1e15
_SHARES = np.array([0.05, *np.linspace(0.1, 0.9, 33), *(1 - 0.1 * 0.85 ** np.arange(1, 24))])
"""Candidates for the highest observed load as a share of the capacity."""
_POWERS = np.geomspace(1.0, 16.0, 25)
"""Candidates for how late the rise begins: sqrt(2(c + 1)) - 1 for c servers is 1 for one and 10.4 for 64."""


@dataclass(frozen=True, slots=True)
class LoadCurve:
    """Latency by load of a queue: T(λ) = service_s + wait_s · x**power / (1 - x) with x = λ / capacity.

    It is exact for M/M/1 (power 1, wait_s = service_s) and Sakasegawa's approximation of M/M/c with
    power = sqrt(2(c + 1)) - 1 and wait_s = service_s / c.
    """

    service_s: float
    wait_s: float
    power: float
    capacity: float

    @classmethod
    def of_servers(cls, service_s: float, servers: int) -> LoadCurve:
        """That of `servers` alike, with Poisson arrivals and exponential services, in requests per second."""
        return cls(service_s, service_s / servers, sqrt(2 * (servers + 1)) - 1, servers / service_s)

    def latency_s(self, load: float) -> float:
        """Mean latency at a load below the capacity; at or above it, that of the last thousandth below."""
        x = self._share(load)
        return self.service_s + float(self.wait_s * x**self.power / (1 - x))

    def elasticity(self, load: float) -> float:
        """By how many percent the latency grows with one percent more load; 1 at the knee."""
        x = self._share(load)
        wait_s = self.wait_s * x**self.power / (1 - x)
        return float(wait_s * (self.power + x / (1 - x)) / (self.service_s + wait_s))

    def knee(self) -> float:
        """The load at which the elasticity is 1; the capacity where it does not get there before."""
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            if self.elasticity(middle * self.capacity) < 1:
                low = middle
            else:
                high = middle
        return high * self.capacity

    def _share(self, load: float) -> float:
        return min(max(load / self.capacity, 0.0), 0.999)


@dataclass(frozen=True, slots=True)
class Knee:
    """What is known of the knee, and by what.

    Attributes:
        curve: fitted to what was observed; None before anything was.
        load: of the knee; None while it was not seen.
        latency_s: there.
        highest_load: the highest mean of a bin that was observed.
        improvement: by how much the sum of squared standard errors falls when latency may depend on load at all.
        why: the rule that decided whether it is seen, in a few words.
    """

    curve: LoadCurve | None
    load: float | None
    latency_s: float | None
    highest_load: float
    improvement: float
    why: str


class _Bin(NamedTuple):
    """Observations of about one load: decayed sums."""

    observations: float
    load: float
    latency_s: float
    latency_squared: float


@dataclass(frozen=True, slots=True)
class KneeMemory:
    """What was observed, by the load's place on a scale of eighths of an octave."""

    bins: tuple[tuple[int, _Bin], ...] = ()


@dataclass(frozen=True)
class KneeDetector:
    """Fits a `LoadCurve` to observations of (load, latency). Pure; any thread may call.

    Observations are forgotten with a half-life, so that the knee follows when instances come and go. They are kept as
    sums by load, which bounds the memory whatever comes.

    Attributes:
        half_life: observations after which one counts half.
        certainty: how many standard errors latency must have risen by, for a knee to be seen.

    Raises:
        PlanError: a number is out of its limits.
    """

    half_life: float = 1000.0
    certainty: float = 3.0

    def __post_init__(self) -> None:
        if not (isfinite(self.half_life) and self.half_life >= 1 and isfinite(self.certainty) and self.certainty > 0):
            raise PlanError(
                f"half_life={self.half_life} must be at least one observation, certainty={self.certainty} positive"
            )

    def begin(self) -> KneeMemory:
        return KneeMemory()

    def observe(self, memory: KneeMemory, load: float, latency_s: float) -> KneeMemory:
        """What to remember after a stretch of time in which so much load was served with this mean latency.

        Args:
            load: that was *served*, per second: requests, tokens, or seconds of work. Served load never exceeds the
                capacity for long, so an overload says where the capacity is; offered load would hide it.
            latency_s: mean of what was served.
        """
        # Nothing was served, or a clock or a counter is broken.
        if not (_TINY < load < _HUGE and _TINY < latency_s < _HUGE):
            return memory
        keep = float(0.5 ** (1 / self.half_life))
        place = floor(log2(load) * _BINS_PER_OCTAVE)
        sums = {at: _Bin(b.observations * keep, b.load * keep, b.latency_s * keep, b.latency_squared * keep)
                for at, b in memory.bins}  # fmt: skip
        old = sums.get(place, _Bin(0.0, 0.0, 0.0, 0.0))
        sums[place] = _Bin(
            old.observations + 1,
            old.load + load,
            old.latency_s + latency_s,
            old.latency_squared + latency_s * latency_s,
        )
        lowest = max(sums) - _BINS_MAX
        return KneeMemory(tuple(sorted((at, b) for at, b in sums.items() if at > lowest and b.observations > 1e-3)))

    def knee(self, memory: KneeMemory) -> Knee:
        """The knee as far as it was seen: about a millisecond of work, so ask every few seconds, not per request."""
        # A bin with less than two observations has no scatter of its own to be judged by.
        bins = [each for _, each in memory.bins if each.observations >= 2]
        if len(bins) < 3:
            return Knee(None, None, None, 0.0, 0.0, f"{len(bins)} of at least 3 different loads were observed")
        counts = np.array([each.observations for each in bins])
        loads = np.array([each.load for each in bins]) / counts
        means = np.array([each.latency_s for each in bins]) / counts
        squares = np.array([each.latency_squared for each in bins]) / counts
        scatter = np.maximum(squares / means**2 - 1, 0.0)
        pooled = max(float(counts @ scatter / counts.sum()), 1e-6)
        # Relative variance of each bin's mean; the pooled scatter counts like two observations of the bin's own.
        variance = (counts * scatter + 2 * pooled) / (counts + 2) / counts
        curve, error, flat_error = _fit(loads, means, 1 / variance)
        highest = float(loads.max())
        improvement = flat_error - error
        knee = curve.knee()
        if improvement < self.certainty**2:
            why = f"latency does not rise by {self.certainty:g} standard errors up to load {highest:.3g}"
            return Knee(curve, None, None, highest, improvement, why)
        if knee > highest:
            why = f"the knee would be at {knee:.3g}, above the highest load served, {highest:.3g}"
            return Knee(curve, None, None, highest, improvement, why)
        why = f"elasticity reaches 1 at {knee:.3g}, within the loads served, up to {highest:.3g}"
        return Knee(curve, knee, curve.latency_s(knee), highest, improvement, why)


def _fit(
    loads: np.ndarray[tuple[int], np.dtype[np.float64]],
    means: np.ndarray[tuple[int], np.dtype[np.float64]],
    weights: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[LoadCurve, float, float]:
    """The curve of least weighted squared relative error, that error, and the one of the best constant."""
    # For a given capacity and power the curve is linear in service_s and wait_s: two normal equations each. Tables are
    # by power, bin and share: what numpy runs through in one go is then long.
    x = (loads / loads.max())[:, None] * _SHARES
    ones, weight = 1 / means[:, None], weights[:, None]
    rise = (x.reshape(1, -1) ** _POWERS[:, None]).reshape(len(_POWERS), *x.shape)
    rise /= 1 - x
    rise /= means[:, None]
    a = float(weights @ (1 / means * (1 / means)))
    u = float(weights @ (1 / means))
    weighted = weight * ones * rise
    b = weighted.sum(axis=1)
    np.multiply(weight, rise, out=weighted)
    v = weighted.sum(axis=1)
    weighted *= rise
    d = weighted.sum(axis=1)
    determinant = np.maximum(a * d - b * b, 1e-300)
    wait = (a * v - b * u) / determinant
    service = (d * u - b * v) / determinant
    # Neither may be negative: on the border the other one alone is fitted.
    wait_alone = v / np.maximum(d, 1e-300)
    service, wait = np.where(service < 0, 0.0, service), np.where(service < 0, wait_alone, wait)
    service, wait = np.where(wait < 0, u / a, service), np.where(wait < 0, 0.0, wait)
    rise *= wait[:, None]
    rise += service[:, None] * ones
    rise -= 1
    rise *= rise
    rise *= weight
    # Of equal errors that of the least share counts, then that of the least power.
    errors = rise.sum(axis=1).T
    share, power = np.unravel_index(int(np.argmin(errors)), errors.shape)
    curve = LoadCurve(
        float(service[power, share]),
        float(wait[power, share]),
        float(_POWERS[power]),
        float(loads.max() / _SHARES[share]),
    )
    flat_error = float(weights @ (1 / means * (u / a) - 1) ** 2)
    return curve, float(errors[share, power]), flat_error
