"""Whether a run was in balance, or only as long as it was."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kvstore.simulate.result import RequestTable

_GROWTH_SHARE = 0.02
_GROWTH_DEVIATIONS = 4.0


def is_stable(requests: RequestTable) -> bool:
    """Whether the backlog, requests that came and have no first token, is one that a steady system might have.

    Judged at the last arrival, since the backlog only falls behind it. Two things must hold: the backlog is no more
    than what came in the last tenth of the time; and over the second half it grew by no more than 2 % of what came in
    that half, or 4 standard deviations of a Poisson count, whichever is more. Requests turned away or lost are no
    backlog, and neither is one request.
    """
    waits = np.isin(requests.outcome, (0, 1)) | ~np.isnan(requests.ttft_s)
    arrival_s = requests.arrival_s[waits]
    if not len(arrival_s):
        return True
    first_s = np.where(np.isnan(requests.ttft_s[waits]), np.inf, arrival_s + requests.ttft_s[waits])
    begin_s, end_s = float(arrival_s.min()), float(arrival_s.max())
    middle_s = (begin_s + end_s) / 2

    def backlog(at_s: float) -> int:
        return int(np.count_nonzero(arrival_s <= at_s) - np.count_nonzero(first_s <= at_s))

    came_last = int(np.count_nonzero(arrival_s > end_s - (end_s - begin_s) / 10))
    came_half = int(np.count_nonzero(arrival_s > middle_s))
    grown = backlog(end_s) - backlog(middle_s)
    allowed = max(_GROWTH_SHARE * came_half, _GROWTH_DEVIATIONS * sqrt(came_half))
    return backlog(end_s) <= max(came_last, _GROWTH_DEVIATIONS * sqrt(came_half), 1) and grown <= allowed
