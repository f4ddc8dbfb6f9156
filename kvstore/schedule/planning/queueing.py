"""How long requests wait that come at random: closed forms.

Arrivals are Poisson, the queue is one for all servers and first come, first served. Exact: the means of M/M/1, M/M/c,
M/D/1, M/D/c and M/G/1, the share that waits in all of them, and the distribution of M/M/c. Approximate, and said so:
M/G/c, and the tails of what is not M/M/c.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, pi
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import PlanError
from kvstore.limits import INSTANCES_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROOT_STEPS_MAX = 200


@dataclass(frozen=True)
class Waiting:
    """Seconds in the queue, before service.

    Attributes:
        waits_share: of the requests, those that wait at all.
        mean_s: over all requests, those that do not wait included.
        used_share: rho, of the servers' time.
    """

    waits_share: float
    mean_s: float
    used_share: float

    def share_above(self, wait_s: float) -> float:
        """P(W > wait_s), as if who waits did so for an exponential time: exact for M/M/c, an approximation else."""
        if wait_s < 0:
            return 1.0
        if self.mean_s <= 0:
            return 0.0
        return self.waits_share * exp(-wait_s * self.waits_share / self.mean_s)


def mmc(rate_per_s: float, service_s: float, servers: int) -> Waiting:
    """M/M/c: Erlang's C formula; with one server rho / (1 - rho) service times.

    Raises:
        PlanError: the load is unstable, or a number is out of its limits; so do all others here.
    """
    offered = _offered(rate_per_s, service_s, servers)
    blocked = 1.0
    for server in range(1, servers + 1):
        blocked = offered * blocked / (server + offered * blocked)
    used = offered / servers
    waits = blocked / (1 - used * (1 - blocked))
    return Waiting(waits, waits * service_s / (servers - offered), used)


def mdc(rate_per_s: float, service_s: float, servers: int) -> Waiting:
    """M/D/c, exact, by the roots of z^c = exp(a (z - 1)) within the unit circle, a the offered load.

    How many are there from one service time to the next is a Markov chain Q' = max(Q - c, 0) + Poisson(a). Its
    generating function has c - 1 zeros z_k besides 1 (Crommelin 1932; Bailey 1954), which give
    E[Q] - a = Σ 1 / (1 - z_k) - (c (c - 1) - a²) / (2 (c - a)) and P(Q < c) = (c - a) / Π (1 - z_k).
    """
    offered = _offered(rate_per_s, service_s, servers)
    if offered == 0:
        return Waiting(0.0, 0.0, 0.0)
    spare = servers - offered
    gaps = 1 - _roots(offered / servers, servers)
    queued = float(np.sum(1 / gaps).real) - (servers * (servers - 1) - offered**2) / (2 * spare)
    free = spare * float(np.exp(-np.sum(np.log(gaps))).real)
    # What is nearly nothing is a difference of large numbers.
    waits, mean_s = min(max(1 - free, 0.0), 1.0), max(queued / rate_per_s, 0.0)
    if servers * 1e-13 * servers > queued:
        return Waiting(waits, min(mean_s, mmc(rate_per_s, service_s, servers).mean_s), offered / servers)
    return Waiting(waits, mean_s, offered / servers)


def mg1(rate_per_s: float, service_s: float, service_square_s2: float) -> Waiting:
    """M/G/1: Pollaczek and Khinchine, W = λ E[S²] / (2 (1 - rho)).

    Args:
        service_square_s2: E[S²].
    """
    used = _offered(rate_per_s, service_s, 1)
    _check_square(service_s, service_square_s2)
    return Waiting(used, rate_per_s * service_square_s2 / (2 * (1 - used)), used)


def mgc(rate_per_s: float, service_s: float, service_square_s2: float, servers: int) -> Waiting:
    """M/G/c, approximated between M/D/c and M/M/c by the squared coefficient of variation v of the service time.

    W = (1 - v) W(M/D/c) + v W(M/M/c), and so for the share that waits. Exact for c = 1, v = 0 and v = 1; else within a
    few per cent for v <= 1 (Tijms, "Stochastic Models", 1994, section 4.3).
    """
    _check_square(service_s, service_square_s2)
    if servers == 1:
        return mg1(rate_per_s, service_s, service_square_s2)
    variation = max(service_square_s2 / service_s**2 - 1, 0.0)
    regular, random = mdc(rate_per_s, service_s, servers), mmc(rate_per_s, service_s, servers)
    mean_s = (1 - variation) * regular.mean_s + variation * random.mean_s
    waits = (1 - variation) * regular.waits_share + variation * random.waits_share
    return Waiting(min(max(waits, 0.0), 1.0), max(mean_s, 0.0), regular.used_share)


def _roots(used: float, servers: int) -> NDArray[np.complex128]:
    """The zeros of z^c = exp(c rho (z - 1)) inside of the unit circle, but for 1: z = ω_k exp(rho (z - 1))."""
    turns = np.exp(2j * pi * np.arange(1, servers) / servers)
    roots: NDArray[np.complex128] = turns * exp(-used)
    for _ in range(_ROOT_STEPS_MAX):
        image = turns * np.exp(used * (roots - 1))
        # Newton's step on z - ω exp(rho (z - 1)), whose slope is 1 - rho * image.
        step = (roots - image) / (1 - used * image)
        roots = roots - step
        if np.abs(step).max(initial=0.0) < 1e-15:
            break
    return roots


def _offered(rate_per_s: float, service_s: float, servers: int) -> float:
    if not (isfinite(rate_per_s) and rate_per_s >= 0 and isfinite(service_s) and service_s > 0):
        raise PlanError(f"a queue needs a rate and a service time, not {rate_per_s} requests/s of {service_s} s")
    if not 1 <= servers <= INSTANCES_MAX:
        raise PlanError(f"a queue has 1 to {INSTANCES_MAX} servers, not {servers}")
    offered = rate_per_s * service_s
    if offered >= servers:
        raise PlanError(
            f"the load is unstable: {rate_per_s:g} requests/s of {service_s:g} s keep {offered:g} servers busy, and "
            f"there are {servers}; waiting would grow without end. Lower the rate, or add servers"
        )
    return offered


def _check_square(service_s: float, service_square_s2: float) -> None:
    if not (isfinite(service_square_s2) and service_square_s2 >= service_s**2 * (1 - 1e-9)):
        raise PlanError(
            f"the mean square {service_square_s2} s² of a service time is below the square of its mean {service_s} s"
        )
