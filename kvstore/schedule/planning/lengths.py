"""How long prompts are: shares and means of any range of lengths, quantiles, expectations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from math import exp, inf, isfinite, log
from statistics import NormalDist
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kvstore.errors import PlanError
from kvstore.limits import LENGTHS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    VectorFunction: TypeAlias = "Callable[[NDArray[np.float64]], NDArray[np.float64]]"

_STANDARD = NormalDist()
_PANELS = 128
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(8)


class LengthDistribution(ABC):
    """Lengths L of prompts, in tokens. A range is always above < L <= upto, so that ranges that meet share nothing.

    Values; any thread may ask.

    Attributes:
        tokens_min, tokens_max: no prompt is shorter or longer.
    """

    tokens_min: float
    tokens_max: float

    @abstractmethod
    def share(self, above: float = 0.0, upto: float = inf) -> float:
        """P(above < L <= upto)."""

    @abstractmethod
    def quantile(self, share: float) -> float:
        """The least length that at least this share of the prompts does not exceed.

        Raises:
            PlanError: the share is not within 0 and 1.
        """

    @abstractmethod
    def expected(self, function: VectorFunction, above: float = 0.0, upto: float = inf) -> float:
        """E[f(L) | above < L <= upto].

        Args:
            function: of an array of lengths, such as `MeasuredCurve.many`; same shape.

        Raises:
            PlanError: no prompt is in the range.
        """

    def mean(self, above: float = 0.0, upto: float = inf) -> float:
        """E[L | above < L <= upto].

        Raises:
            PlanError: no prompt is in the range.
        """
        return self._within(self.expected(lambda lengths: lengths, above, upto), above, upto)

    def _within(self, mean_tokens: float, above: float, upto: float) -> float:
        """A mean lies in its range, whatever rounding says."""
        return min(max(mean_tokens, above, self.tokens_min), upto, self.tokens_max)

    def nothing_between(self, above: float, upto: float) -> PlanError:
        """The error of a range that holds no prompt."""
        return PlanError(
            f"no prompt is longer than {above:g} and at most {upto:g} tokens; lengths go from {self.tokens_min:g} to "
            f"{self.tokens_max:g}: choose a threshold between them"
        )


@dataclass(frozen=True)
class TruncatedLogNormal(LengthDistribution):
    """exp of a normal variable, given that it lies within limits; continuous, without rounding to whole tokens.

    Attributes:
        mu, sigma: mean and standard deviation of log L before truncation.
        tokens_min, tokens_max: the limits.

    Raises:
        PlanError: a number is out of its limits, or nearly all of the distribution lies outside of the limits.
    """

    mu: float
    sigma: float
    tokens_min: float
    tokens_max: float
    _z_min: float = field(init=False, repr=False, compare=False)
    _z_max: float = field(init=False, repr=False, compare=False)
    _mass: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (isfinite(self.mu) and isfinite(self.sigma) and self.sigma > 0):
            raise PlanError(
                f"a log-normal needs a finite mu and a positive sigma, not mu={self.mu}, sigma={self.sigma}"
            )
        if not (0 < self.tokens_min < self.tokens_max and isfinite(self.tokens_max)):
            raise PlanError(
                f"lengths from {self.tokens_min} to {self.tokens_max} are no range; give 0 < tokens_min < tokens_max"
            )
        z_min, z_max = self._z(self.tokens_min), self._z(self.tokens_max)
        mass = _STANDARD.cdf(z_max) - _STANDARD.cdf(z_min)
        if mass < 1e-6:
            raise PlanError(
                f"of a log-normal with mu={self.mu}, sigma={self.sigma} hardly anything lies between {self.tokens_min} "
                f"and {self.tokens_max} tokens; exp(mu) is the median before truncation"
            )
        object.__setattr__(self, "_z_min", z_min)
        object.__setattr__(self, "_z_max", z_max)
        object.__setattr__(self, "_mass", mass)

    def share(self, above: float = 0.0, upto: float = inf) -> float:
        low, high = self._range(above, upto)
        return max(_STANDARD.cdf(high) - _STANDARD.cdf(low), 0.0) / self._mass

    def quantile(self, share: float) -> float:
        _check_share(share)
        at = _STANDARD.cdf(self._z_min) + share * self._mass
        z = _STANDARD.inv_cdf(at) if 0 < at < 1 else (self._z_min if at <= 0 else self._z_max)
        return min(max(exp(self.mu + self.sigma * z), self.tokens_min), self.tokens_max)

    def mean(self, above: float = 0.0, upto: float = inf) -> float:
        low, high = self._range(above, upto)
        mass = _STANDARD.cdf(high) - _STANDARD.cdf(low)
        if mass <= 0:
            raise self.nothing_between(above, upto)
        # E[exp(mu + sigma z)] over a range of z is that of the normal shifted by sigma.
        shifted = _STANDARD.cdf(high - self.sigma) - _STANDARD.cdf(low - self.sigma)
        mean = exp(self.mu + self.sigma**2 / 2) * shifted / mass
        return self._within(mean, above, upto)

    def expected(self, function: VectorFunction, above: float = 0.0, upto: float = inf) -> float:
        low, high = self._range(above, upto)
        if high <= low:
            raise self.nothing_between(above, upto)
        edges = np.linspace(low, high, _PANELS + 1)
        half = (edges[1:] - edges[:-1])[:, None] / 2
        z = edges[:-1, None] + half * (1 + _NODES)
        density = np.exp(-z * z / 2) * half * _WEIGHTS
        values = function(np.exp(self.mu + self.sigma * z))
        return float(np.sum(values * density) / np.sum(density))

    def _z(self, tokens: float) -> float:
        return (log(tokens) - self.mu) / self.sigma

    def _range(self, above: float, upto: float) -> tuple[float, float]:
        low = self._z_min if above <= self.tokens_min else self._z(min(above, self.tokens_max))
        high = self._z_max if upto >= self.tokens_max else self._z(max(upto, self.tokens_min))
        return low, high


class PointMasses(LengthDistribution):
    """Single lengths with weights: those of a trace, or a few classes of prompts.

    Args:
        tokens: the lengths, positive, in any order; the same one may come often, and 1 to `LENGTHS_MAX` different ones.
        weights: of each, not negative; None: all alike.

    Raises:
        PlanError: there is no length, a number is out of its limits, or all weights are zero.
    """

    def __init__(self, tokens: Iterable[float], weights: Iterable[float] | None = None) -> None:
        lengths = np.fromiter(tokens, np.float64)
        masses = np.ones_like(lengths) if weights is None else np.fromiter(weights, np.float64)
        if not len(lengths):
            raise PlanError("a distribution of lengths needs at least one length; the trace or the list is empty")
        if len(masses) != len(lengths):
            raise PlanError(f"{len(lengths)} lengths have {len(masses)} weights; give one for each")
        if not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise PlanError("lengths of prompts must be positive and finite; leave empty prompts out")
        if not (np.isfinite(masses).all() and (masses >= 0).all() and masses.any()):
            raise PlanError("weights of lengths must be finite, not negative, and not all zero")
        values, index = np.unique(lengths[masses > 0], return_inverse=True)
        if len(values) > LENGTHS_MAX:
            raise PlanError(f"{len(values)} different lengths are more than {LENGTHS_MAX}; round them to whole blocks")
        sums = np.bincount(index, masses[masses > 0])
        self.tokens_min, self.tokens_max = float(values[0]), float(values[-1])
        self._tokens: NDArray[np.float64] = values
        self._masses: NDArray[np.float64] = sums / sums.sum()
        self._upto: NDArray[np.float64] = np.concatenate(([0.0], np.cumsum(self._masses)))

    @property
    def lengths(self) -> tuple[float, ...]:
        """All different ones, ascending: nothing changes at a threshold between two of them."""
        return tuple(self._tokens.tolist())

    def share(self, above: float = 0.0, upto: float = inf) -> float:
        first, last = self._slice(above, upto)
        return float(min(self._upto[last] - self._upto[first], 1.0)) if last > first else 0.0

    def quantile(self, share: float) -> float:
        _check_share(share)
        # A sum of masses may miss the share that it stands for by a rounding error.
        place = int(np.searchsorted(self._upto[1:], share - 1e-12, side="left"))
        return float(self._tokens[min(place, len(self._tokens) - 1)])

    def expected(self, function: VectorFunction, above: float = 0.0, upto: float = inf) -> float:
        first, last = self._slice(above, upto)
        if last <= first:
            raise self.nothing_between(above, upto)
        masses = self._masses[first:last]
        return float(function(self._tokens[first:last]) @ masses / masses.sum())

    def _slice(self, above: float, upto: float) -> tuple[int, int]:
        first, last = np.searchsorted(self._tokens, (above, upto), side="right")
        return int(first), int(last)


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise PlanError(f"a quantile is asked for by a share within 0 and 1, not {share}")
