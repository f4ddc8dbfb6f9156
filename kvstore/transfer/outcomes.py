"""How transfers ended, remembered for a while so that COMMIT is idempotent."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.limits import OUTCOME_GRACE_S, OUTCOMES_MAX

if TYPE_CHECKING:
    from kvstore.clock import Deadline
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.messages import Abort, Committed


FORGET_EVERY_S = 1.0
"""All are looked through for those that have expired this often at most."""


@dataclass(frozen=True)
class Outcome:
    """The last word about one transfer: `COMMITTED` or `ABORT`."""

    answer: Committed | Abort
    expires_s: float


class Outcomes:
    """The outcomes of a node's incoming transfers. Any thread.

    Each is kept until the transfer's own deadline plus a grace time; beyond `outcomes_max` the oldest goes.
    """

    def __init__(self, grace_s: float = OUTCOME_GRACE_S, outcomes_max: int = OUTCOMES_MAX) -> None:
        self._grace_s = grace_s
        self._outcomes_max = outcomes_max
        self._lock = threading.Lock()
        self._outcomes: OrderedDict[TransferId, Outcome] = OrderedDict()
        self._forget_at_s = 0.0

    def __len__(self) -> int:
        with self._lock:
            return len(self._outcomes)

    def record(self, transfer: TransferId, answer: Committed | Abort, deadline: Deadline) -> None:
        """Remember an outcome. The first one of a transfer stands."""
        now = time.monotonic()
        with self._lock:
            known = self._outcomes.get(transfer)
            if known is None or known.expires_s <= now:
                self._outcomes[transfer] = Outcome(answer, max(now, deadline.at_s) + self._grace_s)
            if now >= self._forget_at_s:
                self._forget_at_s = now + FORGET_EVERY_S
                for each in [each for each, outcome in self._outcomes.items() if outcome.expires_s <= now]:
                    del self._outcomes[each]
            while len(self._outcomes) > self._outcomes_max:
                self._outcomes.popitem(last=False)

    def get(self, transfer: TransferId) -> Committed | Abort | None:
        """How it ended, if that is still known."""
        with self._lock:
            outcome = self._outcomes.get(transfer)
            if outcome is None or outcome.expires_s <= time.monotonic():
                return None
            return outcome.answer
