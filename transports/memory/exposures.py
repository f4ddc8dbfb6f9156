"""Memory that one side of a connection lets the other read."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import DeadlineError, PeerGoneError, TransportError

if TYPE_CHECKING:
    from kvstore.clock import Deadline

EXPOSURES_MAX = 1 << 16
"""Views that one side of a connection may expose at once."""
DESCRIPTOR_BYTES = 16
GET_STEP_BYTES = 4 << 20
"""A get copies this much between two looks at its deadline and at a withdrawal: under a millisecond."""


@dataclass
class _Exposure:
    view: memoryview
    gets_running: int = 0
    is_withdrawn: bool = False


class Exposures:
    """What one side has exposed, by descriptor. The owner exposes and withdraws, the peer gets."""

    def __init__(self, owner_name: str) -> None:
        self._owner_name = owner_name
        self._changed = threading.Condition()
        self._exposures: dict[bytes, _Exposure] = {}
        self._is_closed = False

    def expose(self, view: memoryview) -> bytes:
        """Take over `view` (flat bytes), which is released when the exposure ends.

        Raises:
            PeerGoneError: this side has closed the connection.
            TransportError: too many exposures.
        """
        with self._changed:
            if self._is_closed:
                raise PeerGoneError("nothing can be exposed on a closed connection; connect again")
            if len(self._exposures) >= EXPOSURES_MAX:
                raise TransportError(f"{EXPOSURES_MAX} views are exposed on this connection, the most; withdraw some")
            # Random, so that a descriptor of another connection or of an earlier exposure names nothing.
            descriptor = secrets.token_bytes(DESCRIPTOR_BYTES)
            self._exposures[descriptor] = _Exposure(view)
            return descriptor

    def withdraw(self, descriptor: bytes) -> None:
        """Forget a descriptor; a get that runs stops at its next step. Unknown descriptors are ignored."""
        with self._changed:
            self._end(bytes(descriptor))

    def close(self) -> None:
        """Withdraw everything, for good."""
        with self._changed:
            self._is_closed = True
            for descriptor in list(self._exposures):
                self._end(descriptor)

    def get(self, descriptor: bytes, offset: int, into: memoryview, deadline: Deadline) -> None:
        """Copy `len(into)` bytes at `offset` of an exposure.

        Raises:
            PeerGoneError: the descriptor is unknown, or was withdrawn, also while copying.
            TransportError: the range lies outside the exposure.
            DeadlineError: the copy took too long.
        """
        with self._changed:
            exposure = self._exposures.get(bytes(descriptor))
            if exposure is None or exposure.is_withdrawn:
                raise self._withdrawn()
            if offset < 0 or offset + len(into) > len(exposure.view):
                raise TransportError(
                    f"bytes {offset} to {offset + len(into)} lie outside an exposure of {len(exposure.view)} bytes"
                )
            exposure.gets_running += 1
        try:
            self._copy(exposure, offset, into, deadline)
        finally:
            with self._changed:
                exposure.gets_running -= 1
                self._changed.notify_all()

    def _end(self, descriptor: bytes) -> None:
        exposure = self._exposures.get(descriptor)
        if exposure is None:
            return
        exposure.is_withdrawn = True
        # It stays known until the last get has left, so that whoever withdraws it a second time waits as well.
        self._changed.wait_for(lambda: exposure.gets_running == 0)
        self._exposures.pop(descriptor, None)
        exposure.view.release()

    def _copy(self, exposure: _Exposure, offset: int, into: memoryview, deadline: Deadline) -> None:
        for start in range(0, len(into), GET_STEP_BYTES):
            if exposure.is_withdrawn:
                raise self._withdrawn()
            if deadline.has_passed:
                raise DeadlineError(f"{len(into) - start} of {len(into)} bytes of a get were not copied in time")
            stop = min(start + GET_STEP_BYTES, len(into))
            with into[start:stop] as target, exposure.view[offset + start : offset + stop] as source:
                _copy_bytes(target, source)

    def _withdrawn(self) -> PeerGoneError:
        return PeerGoneError(
            f"{self._owner_name} exposes nothing under this descriptor on this connection: it was withdrawn, or is "
            "another connection's"
        )


def _copy_bytes(target: memoryview, source: memoryview) -> None:
    # NumPy copies without the GIL, so that other threads go on meanwhile; assigning to a view would hold it.
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
