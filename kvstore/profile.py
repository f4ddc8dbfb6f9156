"""What a model costs on one instance: seconds of prefill and of decode steps, bytes of KVCache.

Values without I/O, below the pool, so that placement, planning and simulation read the same numbers. Files of them
are read and written by `kvstore.profiles`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, inf, isfinite, log
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from kvstore.errors import ProfileError
from kvstore.limits import PROFILE_NUMBER_MAX, PROFILE_POINTS_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

Interpolation: TypeAlias = Literal["log-log", "linear"]

NEAREST_SHARE = 1e-6
"""Points of a curve lie at least this share of their x apart, so that slopes stay finite."""
INFERABLE = ("prefill", "kv", "decode_step", "decode_batch_max")
"""What of a profile may be inferred rather than measured or printed."""


@dataclass(frozen=True)
class MeasuredCurve:
    """A positive function through measured points, which never falls.

    Between points it is interpolated; outside of them the nearest piece goes on. `log-log` takes log y to be linear in
    log x, so that a power law stays one, and a cost that is nearly constant at short lengths stays positive down to 1.
    Below the first point `linear` is at least the line to the origin, so that nothing is free.

    Attributes:
        xs: ascending, positive.
        ys: positive, never falling.

    Raises:
        ProfileError: a point is missing, not positive or out of order, or ys fall; the message names it.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    interpolation: Interpolation = "log-log"
    _axis: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _values: tuple[float, ...] = field(init=False, repr=False, compare=False)
    _slopes: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_points(self.xs, self.ys)
        if self.interpolation not in ("log-log", "linear"):
            raise ProfileError(f"interpolation {self.interpolation!r} is unknown; use 'log-log' or 'linear'")
        is_log = self.interpolation == "log-log"
        axis = tuple(map(log, self.xs)) if is_log else self.xs
        values = tuple(map(log, self.ys)) if is_log else self.ys
        if any(x1 - x0 <= NEAREST_SHARE * abs(x1) for x0, x1 in pairwise(self.xs)):
            raise ProfileError(f"two of the points {list(self.xs)} of a curve are almost one; leave one of them out")
        slopes = tuple(
            (y1 - y0) / (x1 - x0) for (x0, x1), (y0, y1) in zip(pairwise(axis), pairwise(values), strict=True)
        )
        object.__setattr__(self, "_axis", axis)
        object.__setattr__(self, "_values", values)
        object.__setattr__(self, "_slopes", slopes or (0.0,))

    def __call__(self, x: float) -> float:
        """The value at one positive x.

        Raises:
            ProfileError: x is not positive.
        """
        if not x > 0:
            raise ProfileError(f"a curve is asked for {x}; it has values for positive amounts of work only")
        axis, slopes = self._axis, self._slopes
        # Searched between the second and the last but one, so that the outer pieces go on.
        if self.interpolation == "log-log":
            at = log(x)
            piece = bisect_right(axis, at, 1, len(slopes)) - 1
            return exp(self._values[piece] + (at - axis[piece]) * slopes[piece])
        piece = bisect_right(axis, x, 1, len(slopes)) - 1
        return max(self._values[piece] + (x - axis[piece]) * slopes[piece], self.ys[0] * min(x / self.xs[0], 1.0))

    def many(self, xs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values at many positive xs, same shape.

        Raises:
            ProfileError: an x is not positive.
        """
        if not np.all(xs > 0):
            raise ProfileError(f"a curve is asked for {np.min(xs)}; it has values for positive amounts of work only")
        axis, slopes = np.array(self._axis), np.array(self._slopes)
        at = np.log(xs) if self.interpolation == "log-log" else xs
        piece = np.clip(np.searchsorted(axis, at, side="right") - 1, 0, len(slopes) - 1)
        values: NDArray[np.float64] = np.array(self._values)[piece] + (at - axis[piece]) * slopes[piece]
        if self.interpolation == "log-log":
            return np.exp(values)
        return np.maximum(values, self.ys[0] * np.minimum(xs / self.xs[0], 1.0))


@dataclass(frozen=True)
class PolynomialCurve:
    """A fitted polynomial in x / unit, lowest power first; never falling, since no coefficient is negative.

    Raises:
        ProfileError: a coefficient is negative or not finite, all are zero, or the unit is not positive.
    """

    coefficients: tuple[float, ...]
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not self.coefficients or len(self.coefficients) > PROFILE_POINTS_MAX:
            raise ProfileError(f"a polynomial has 1 to {PROFILE_POINTS_MAX} coefficients, not {len(self.coefficients)}")
        if not all(isfinite(each) and each >= 0 for each in self.coefficients) or not any(self.coefficients):
            raise ProfileError(
                f"coefficients {list(self.coefficients)} must be finite, not negative and not all zero: a fit that may "
                "fall is not one of a cost; give measured points instead"
            )
        if not isfinite(self.unit) or self.unit <= 0:
            raise ProfileError(f"the unit of a polynomial must be positive, not {self.unit}")

    def __call__(self, x: float) -> float:
        """The value at one x."""
        at, value = x / self.unit, 0.0
        for coefficient in reversed(self.coefficients):
            value = value * at + coefficient
        return value

    def many(self, xs: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values at many xs, same shape."""
        values: NDArray[np.float64] = np.asarray(
            np.polynomial.polynomial.polyval(xs / self.unit, self.coefficients), np.float64
        )
        return values


Curve: TypeAlias = MeasuredCurve | PolynomialCurve


@dataclass(frozen=True)
class KvSize:
    """Bytes of KVCache by length: S_kv(l) = state_bytes + token_bytes * l + window_token_bytes * min(l, window_tokens).

    Attributes:
        state_bytes: linear-attention states, whatever the length.
        token_bytes: full-attention blocks of one token.
        window_token_bytes: windowed layers of one token, kept for the last `window_tokens` only.

    Raises:
        ProfileError: something is negative or not finite, or a prompt would have no bytes at all.
    """

    state_bytes: float
    token_bytes: float
    window_token_bytes: float = 0.0
    window_tokens: int = 0

    def __post_init__(self) -> None:
        parts = (self.state_bytes, self.token_bytes, self.window_token_bytes, self.window_tokens)
        if not all(isfinite(each) and each >= 0 for each in parts) or not any(parts):
            raise ProfileError(f"{self}: sizes must be finite, not negative, and not all zero")
        if (self.window_token_bytes > 0) != (self.window_tokens > 0):
            raise ProfileError(
                f"{self}: a window has both a length and bytes per token; set both, or neither for a model without one"
            )

    def total_bytes(self, tokens: float) -> float:
        """S_kv: everything that a prompt of this length leaves behind, states included."""
        return self.resume_bytes(tokens) + self.token_bytes * tokens

    def resume_bytes(self, tokens: float) -> float:
        """What must be there at exactly this length, whatever prefix is there already: states and windows."""
        return self.state_bytes + self.window_token_bytes * min(tokens, self.window_tokens)

    def missing_bytes(self, tokens: float, present_tokens: float) -> float:
        """What must cross to somebody who holds the attention of the first `present_tokens`: rest and whole states.

        States and windows cross even where all attention is there: they are of exactly this length.
        """
        return self.resume_bytes(tokens) + self.token_bytes * max(tokens - present_tokens, 0.0)

    def many(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """`total_bytes` at many lengths, same shape."""
        values: NDArray[np.float64] = self.resume_many(tokens) + self.token_bytes * tokens
        return values

    def resume_many(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """`resume_bytes` at many lengths, same shape."""
        windows: NDArray[np.float64] = self.window_token_bytes * np.minimum(tokens, self.window_tokens)
        return self.state_bytes + windows


@dataclass(frozen=True)
class Profile:
    """One model on one instance.

    Attributes:
        name: what files and reports call it.
        source: where the numbers come from: a paper's table, a measurement with machine and date.
        prefill: T_prefill, seconds by prompt tokens, of an instance that does nothing else.
        kv: S_kv.
        decode_step: T_decode, seconds of one step by the number of requests in it.
        decode_batch_max: BS_max, requests that one instance decodes at once.
        accelerators: accelerators of one instance (P).
        tokens_max: the longest prompt that the numbers speak for.
        inferred: which of `INFERABLE` were inferred rather than measured or printed, and how.

    Raises:
        ProfileError: a number is out of its limits.
    """

    name: str
    source: str
    prefill: Curve
    kv: KvSize
    decode_step: Curve
    decode_batch_max: int
    accelerators: int
    tokens_max: int
    inferred: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for what in ("decode_batch_max", "accelerators", "tokens_max"):
            if getattr(self, what) < 1:
                raise ProfileError(f"profile {self.name!r}: {what} must be at least 1, not {getattr(self, what)}")
        for curve, what, most in (
            (self.prefill, "prefill of {} tokens", self.tokens_max),
            (self.decode_step, "a decode step of {} requests", self.decode_batch_max),
        ):
            for amount in (1, most):
                self._check_seconds(curve, what.format(amount), amount)
        for what, _ in self.inferred:
            if what not in INFERABLE:
                raise ProfileError(
                    f"profile {self.name!r}: {what!r} cannot be inferred; what can is {', '.join(INFERABLE)}"
                )

    def _check_seconds(self, curve: Curve, what: str, amount: int) -> None:
        """Beyond its points a steep curve goes on until float64 has no such number."""
        try:
            seconds = curve(amount)
        except OverflowError:
            seconds = inf
        if not 1 / PROFILE_NUMBER_MAX <= seconds <= PROFILE_NUMBER_MAX:
            raise ProfileError(
                f"profile {self.name!r}: {what} would take {seconds:g} s, outside {1 / PROFILE_NUMBER_MAX:g} to "
                f"{PROFILE_NUMBER_MAX:g}; check its unit, or measure points nearer to this amount"
            )

    def prefill_s(self, tokens: float, present_tokens: float = 0.0) -> float:
        """Seconds to prefill the tokens behind a prefix that is there.

        The paper counts T_prefill of what is not there. Where T grows faster than in proportion those tokens also
        attend to the prefix, and cost T of the whole less T of the prefix; the larger of both is taken, so that a
        prefix is never worth more than either says.

        Args:
            tokens: of the whole prompt.
            present_tokens: of its prefix that need not be computed.
        """
        missing_tokens = tokens - present_tokens
        if missing_tokens <= 0:
            return 0.0
        alone_s = self.prefill(missing_tokens)
        if present_tokens <= 0:
            return alone_s
        return max(alone_s, self.prefill(tokens) - self.prefill(present_tokens))

    def kv_throughput_bytes_per_s(self, tokens: float) -> float:
        """Φ_kv(l) = S_kv(l) / T_prefill(l)."""
        return self.kv.total_bytes(tokens) / self.prefill(tokens)

    def decode_requests_per_s(self, output_tokens: float) -> float:
        """Θ of one decode instance that is full: BS_max / (T_decode * L_out)."""
        return self.decode_batch_max / (self.decode_step(self.decode_batch_max) * output_tokens)


def _check_points(xs: tuple[float, ...], ys: tuple[float, ...]) -> None:
    if len(xs) != len(ys) or not 1 <= len(xs) <= PROFILE_POINTS_MAX:
        raise ProfileError(
            f"a curve has 1 to {PROFILE_POINTS_MAX} points, as many lengths as values; here are {len(xs)} and {len(ys)}"
        )
    for x, y in zip(xs, ys, strict=True):
        if not (isfinite(x) and isfinite(y) and x > 0 and y > 0):
            raise ProfileError(f"the point ({x}, {y}) of a curve is not positive and finite; measure it again")
    for (x0, x1), (y0, y1) in zip(pairwise(xs), pairwise(ys), strict=True):
        if x1 <= x0:
            raise ProfileError(f"the points of a curve ascend; {x1} comes after {x0}")
        if y1 < y0:
            raise ProfileError(
                f"the curve falls from {y0} at {x0} to {y1} at {x1}; more work cannot cost less: measure again with "
                "more rounds, or leave the point out"
            )
