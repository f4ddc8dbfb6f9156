"""Connections that wait, greeted, for the next transfer to the same receiver."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.limits import IDLE_CONNECTIONS_MAX

if TYPE_CHECKING:
    from collections.abc import Hashable

    from kvstore.transfer.connector import GreetedLink

CLOSE_DEADLINE_S = 5.0
IDLE_FRACTION = 0.25
"""A link waits this share of its no-progress deadline for the next transfer."""


@dataclass(frozen=True, eq=False)
class _Idle:
    key: Hashable
    greeted: GreetedLink
    until: Deadline


class IdleLinks:
    """Keeps greeted links between transfers, a bounded number for a bounded time. Any thread.

    A link waits for a quarter of its no-progress deadline, within which a receiver expects to hear something. One
    thread closes what nobody has taken by then; it runs only while links wait.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._idle: list[_Idle] = []
        """The ones that were kept last are at the end."""
        self._keeper: threading.Thread | None = None
        self._is_closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._idle)

    def take(self, key: Hashable) -> GreetedLink | None:
        """The link that was kept last under this key and still stands, or None. The caller closes it."""
        while True:
            with self._changed:
                found = next((idle for idle in reversed(self._idle) if idle.key == key), None)
                if found is None:
                    return None
                self._idle.remove(found)
            native = found.greeted.link.native
            if native is not None and native.is_connected and not found.until.has_passed:
                return found.greeted
            found.greeted.link.close()

    def keep(self, key: Hashable, greeted: GreetedLink) -> None:
        """Keep a link on which nothing is under way. Closes it, or the oldest one, where that would be too many."""
        link = greeted.link
        dropped: list[_Idle] = []
        until = Deadline.after(link.progress_deadline_s * IDLE_FRACTION)
        with self._changed:
            # Only a socket says, without being read, whether it still stands.
            is_kept = not self._is_closed and link.native is not None and self._has_keeper()
            if is_kept:
                self._idle.append(_Idle(key, greeted, until))
                excess = len(self._idle) - IDLE_CONNECTIONS_MAX
                if excess > 0:
                    dropped, self._idle = self._idle[:excess], self._idle[excess:]
                self._changed.notify_all()
        if not is_kept:
            link.close()
        for idle in dropped:
            idle.greeted.link.close()

    def _has_keeper(self) -> bool:
        """Start the thread unless it runs; False if the system has none for it. Call with the condition held."""
        if self._keeper is None:
            keeper = threading.Thread(target=self._run, name="kvstore-idle-connections", daemon=True)
            try:
                keeper.start()
            except RuntimeError:
                return False
            self._keeper = keeper
        return True

    def _run(self) -> None:
        while True:
            with self._changed:
                expired = [idle for idle in self._idle if idle.until.has_passed]
                self._idle = [idle for idle in self._idle if not idle.until.has_passed]
                if not expired and not self._idle:
                    self._keeper = None
                    return
                if not expired:
                    nearest_s = min(idle.until.at_s for idle in self._idle)
                    self._changed.wait(max(0.0, nearest_s - time.monotonic()))
            for idle in expired:
                idle.greeted.link.close()

    def close(self) -> None:
        """Close what waits; from here on nothing is kept. Idempotent."""
        with self._changed:
            self._is_closed = True
            idle, self._idle = self._idle, []
            keeper = self._keeper
            self._changed.notify_all()
        for each in idle:
            each.greeted.link.close()
        if keeper is not None:
            keeper.join(CLOSE_DEADLINE_S)
