"""Names inside the process, and who listens on them."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from typing import TYPE_CHECKING

from kvstore.abc import Connection, Listener
from kvstore.errors import AddressError, DeadlineError, PeerGoneError
from transports.memory.connection import MemoryConnection, connection_pair

if TYPE_CHECKING:
    from kvstore.clock import Deadline

BACKLOG = 128
"""Connections that wait for `accept` before further ones have to wait themselves."""

_names_lock = threading.Lock()
_listeners: dict[str, MemoryListener] = {}


class MemoryListener(Listener):
    """A queue of connections under a name."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._changed = threading.Condition()
        self._waiting: deque[MemoryConnection] = deque()
        self._numbers = itertools.count(1)
        self._is_closed = False

    def __repr__(self) -> str:
        return f"MemoryListener({self._address}, {'closed' if self._is_closed else 'open'})"

    @property
    def address(self) -> str:
        return self._address

    def accept(self, deadline: Deadline) -> Connection:
        with self._changed:
            timeout_s = min(deadline.remaining_s(), threading.TIMEOUT_MAX)
            if not self._changed.wait_for(lambda: self._waiting or self._is_closed, timeout_s):
                raise DeadlineError(f"nobody connected to {self._address} in time; the listener goes on")
            if self._is_closed:
                raise PeerGoneError(f"the listener on {self._address} was closed")
            connection = self._waiting.popleft()
            self._changed.notify_all()
            return connection

    def connect(self, deadline: Deadline) -> Connection:
        """A new connection, whose other end `accept` will give.

        Raises:
            PeerGoneError: the listener was closed, or its queue stayed full.
        """
        with self._changed:
            timeout_s = min(deadline.remaining_s(), threading.TIMEOUT_MAX)
            has_room = self._changed.wait_for(lambda: len(self._waiting) < BACKLOG or self._is_closed, timeout_s)
            if self._is_closed:
                raise nobody_listens(self._address)
            if not has_room:
                raise PeerGoneError(f"{self._address} has {BACKLOG} connections waiting and accepted none in time")
            near, far = connection_pair(self._address, next(self._numbers))
            self._waiting.append(far)
            self._changed.notify_all()
            return near

    def close(self) -> None:
        with _names_lock:
            if _listeners.get(self._address) is self:
                del _listeners[self._address]
        with self._changed:
            self._is_closed = True
            never_accepted = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for connection in never_accepted:
            connection.close()


def open_listener(address: str) -> MemoryListener:
    """Listen under a name.

    Raises:
        AddressError: somebody listens under it.
    """
    with _names_lock:
        if address in _listeners:
            raise AddressError(f"{address} is in use in this process; close its listener or take another name")
        listener = _listeners[address] = MemoryListener(address)
        return listener


def find_listener(address: str) -> MemoryListener:
    """Who listens under a name.

    Raises:
        PeerGoneError: nobody does.
    """
    with _names_lock:
        listener = _listeners.get(address)
    if listener is None:
        raise nobody_listens(address)
    return listener


def nobody_listens(address: str) -> PeerGoneError:
    """For messages: what to check when a name is not listened on."""
    return PeerGoneError(f"nobody listens on {address} in this process; memory addresses do not reach other processes")
