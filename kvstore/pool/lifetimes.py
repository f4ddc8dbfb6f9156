"""What ends by itself in a pool: records, pins, leases and writers, by one clock. The pool holds its lock."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from kvstore.pool.endings import Endings
from kvstore.pool.index import LASTING_US

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.pins import Pin
    from kvstore.pool.store_limits import StoreLimits
    from kvstore.pool.transaction import Transaction

US_PER_S = 1_000_000


class Lasting(Protocol):
    """What is held, and since when for too long."""

    ends_s: float

    def expire(self) -> None:
        """It was held for longer than the store bears."""


@dataclass
class Due:
    """What has ended, apart from records: its owner ends it outside the pool's lock."""

    holds: list[Lasting] = field(default_factory=list)
    transactions: list[Transaction] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)


class Lifetimes:
    """When things end. There is no thread for it: the pool looks in each of its calls.

    Attributes:
        next_s: when something ends next; may be read without the lock, since whoever comes a moment late comes late
            anyway.
    """

    def __init__(self, limits: StoreLimits, index: PrefixIndex, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._index = index
        self.clock = clock
        self._holds: Endings[Lasting] = Endings()
        self._writers: Endings[weakref.ref[Transaction]] = Endings()
        self._pins: Endings[Pin] = Endings()
        self.next_s = math.inf

    @property
    def is_due(self) -> bool:
        """Whether something has ended."""
        return self.next_s != math.inf and self.next_s <= self.clock()

    def in_s(self, seconds: float | None) -> float:
        """The moment in so many seconds; infinitely late for None."""
        return math.inf if seconds is None else self.clock() + seconds

    def add_hold(self, hold: Lasting) -> None:
        hold.ends_s = self.in_s(self._limits.lease_max_s)
        if hold.ends_s != math.inf:
            self._holds.add(hold, hold.ends_s)
            self.look()

    def remove_hold(self, hold: Lasting) -> None:
        self._holds.remove(hold)

    def add_writer(self, transaction: Transaction) -> None:
        transaction.ends_s = self.in_s(self._limits.writer_max_s)
        if transaction.ends_s != math.inf:
            # Not the transaction itself: one that is dropped gives back what it has.
            self._writers.add(weakref.ref(transaction), transaction.ends_s)
            self.look()

    def remove_writer(self, transaction: Transaction) -> None:
        if transaction.ends_s != math.inf:
            self._writers.remove(weakref.ref(transaction))

    def add_pin(self, pin: Pin) -> None:
        if pin.ends_s != math.inf:
            self._pins.add(pin, pin.ends_s)
            self.look()

    def remove_pin(self, pin: Pin) -> None:
        self._pins.remove(pin)

    def take_due(self) -> Due:
        """What has ended by now, records apart."""
        now_s = self.clock()
        transactions = [reference() for reference in self._writers.take_due(now_s)]
        living = [transaction for transaction in transactions if transaction is not None]
        return Due(self._holds.take_due(now_s), living, self._pins.take_due(now_s))

    def look(self) -> None:
        """See what ends next, after anything was added or has ended."""
        next_us = self._index.native.next_end_us
        records_s = math.inf if next_us == LASTING_US else next_us / US_PER_S
        self.next_s = min(records_s, self._holds.next_s, self._writers.next_s, self._pins.next_s)

    def moment_us(self, in_s: float | None) -> int:
        """As the index counts: the moment in so many seconds, rounded down; `LASTING_US` for None."""
        return LASTING_US if in_s is None else max(0, int((self.clock() + in_s) * US_PER_S))
