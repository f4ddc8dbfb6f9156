"""The in-process transport: `memory://name`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvstore.abc import Availability, Connection, Listener, Transport, TransportOptions
from kvstore.errors import AddressError, UnavailableError
from transports.memory.listener import find_listener, open_listener

if TYPE_CHECKING:
    from kvstore.clock import Deadline

NAME_CHARACTERS_MAX = 128
_ADDRESS = re.compile(rf"memory://[A-Za-z0-9._-]{{1,{NAME_CHARACTERS_MAX}}}")


class MemoryTransport(Transport):
    """One-sided connections between threads of one process. Any thread may call any method.

    Names are the process's, not the instance's: two instances see the same listeners.
    """

    @property
    def scheme(self) -> str:
        return "memory"

    def availability(self) -> Availability:
        return Availability(True, "inside one process only; one-sided reads")

    def listen(self, address: str, options: TransportOptions) -> Listener:
        _check(address, options)
        return open_listener(address)

    def connect(self, address: str, options: TransportOptions, deadline: Deadline) -> Connection:
        _check(address, options)
        return find_listener(address).connect(deadline)


def _check(address: str, options: TransportOptions) -> None:
    if not _ADDRESS.fullmatch(address):
        raise AddressError(
            f"{address!r} is not a memory address: write memory://NAME, up to {NAME_CHARACTERS_MAX} letters, digits, "
            "dots, dashes and underscores"
        )
    if options != TransportOptions():
        raise UnavailableError(
            f"{address} is memory, which has no pacing, congestion control or interfaces; leave these options out or "
            "use tcp"
        )
