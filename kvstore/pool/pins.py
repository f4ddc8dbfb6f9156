"""Resume points that are kept from being evicted without being read."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from kvstore.errors import PinLimitError
from kvstore.limits import PINS_MAX
from kvstore.pool.store_limits import shown_salt

if TYPE_CHECKING:
    from types import TracebackType

    from kvstore._native import HeldRows
    from kvstore.abc import SlotRows
    from kvstore.pool.path import NodePath
    from kvstore.pool.pool import Pool
    from kvstore.pool.store_limits import StoreLimits


class Pin:
    """A resume point that is not evicted before `close`, or before its time is over. Any thread; a context manager.

    It exposes no memory: read it as any other match. It keeps records from being evicted, and from nothing else: found
    damaged, or at the end of their time to live, they go all the same. A pin with a time of its own may be dropped and
    holds on until then; any other ends when it is dropped.

    Attributes:
        path: the resume point's prefix nodes.
        salt: whose prefix it is.
        size_bytes: of its records. Those that several pins share count once against the limits.
    """

    def __init__(self, pool: Pool, path: NodePath, salt: bytes, held: HeldRows, slots: SlotRows, ends_s: float) -> None:
        self.path = path
        self.salt = salt
        self.size_bytes = slots.size_bytes
        self.held = held
        self.slots = slots
        self.ends_s = ends_s
        self._pool = pool
        self._lock = threading.Lock()
        self._is_closed = False

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokens(self) -> int:
        """Length of the resume point."""
        return self.path.tokens

    @property
    def is_closed(self) -> bool:
        """Whether it keeps nothing any more: closed, over, or its store was closed."""
        return self._is_closed or self._pool.is_closed or self._pool.now_s() >= self.ends_s

    def close(self) -> None:
        """Let the records be evicted again. Idempotent."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        if not self._pool.is_closed:
            self._pool.unpin(self)

    def __del__(self) -> None:
        if not getattr(self, "_is_closed", True):
            self._pool.settle_later(self.close)


class PinBudget:
    """What pins keep, all together and by salt. The pool holds its lock."""

    def __init__(self, limits: StoreLimits, capacity_bytes: int) -> None:
        self._limits = limits
        self._capacity_bytes = capacity_bytes
        self._pins_by_slot: dict[tuple[int, int], int] = {}
        self._bytes_by_salt: dict[bytes, int] = {}
        self.count = 0
        self.size_bytes = 0

    def check(self, salt: bytes, slots: SlotRows) -> None:
        """Refuse a pin that would keep too much.

        Raises:
            PinLimitError: the message says of what.
        """
        if self.count >= PINS_MAX:
            raise PinLimitError(f"{PINS_MAX} resume points are pinned, which is the limit; close some pins")
        fraction = self._limits.pinned_fraction
        more_bytes = sum(slot.size_bytes for slot in slots if (slot.index, slot.generation) not in self._pins_by_slot)
        quota_bytes = self._limits.quota_of(salt)
        for whose, held_bytes, whole_bytes in (
            ("the tier", self.size_bytes, self._capacity_bytes),
            (f"the quota of {shown_salt(salt)}", self._bytes_by_salt.get(salt, 0), quota_bytes),
        ):
            if whole_bytes is not None and held_bytes + more_bytes > fraction * whole_bytes:
                raise PinLimitError(
                    f"this pin keeps {more_bytes} bytes, {held_bytes} are pinned already and the limit is "
                    f"{int(fraction * whole_bytes)}, {fraction:g} of {whose}; close other pins, pin a shorter resume "
                    "point, or open the store with a larger StoreLimits.pinned_fraction"
                )

    def add(self, salt: bytes, slots: SlotRows) -> None:
        self.count += 1
        for slot in slots:
            name = (slot.index, slot.generation)
            pins = self._pins_by_slot.get(name, 0)
            self._pins_by_slot[name] = pins + 1
            if not pins:
                self._count_bytes(salt, slot.size_bytes)

    def remove(self, salt: bytes, slots: SlotRows) -> None:
        self.count -= 1
        for slot in slots:
            name = (slot.index, slot.generation)
            pins = self._pins_by_slot.pop(name)
            if pins > 1:
                self._pins_by_slot[name] = pins - 1
            else:
                self._count_bytes(salt, -slot.size_bytes)

    def _count_bytes(self, salt: bytes, more_bytes: int) -> None:
        self.size_bytes += more_bytes
        left = self._bytes_by_salt.get(salt, 0) + more_bytes
        if left:
            self._bytes_by_salt[salt] = left
        else:
            self._bytes_by_salt.pop(salt, None)
