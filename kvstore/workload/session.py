"""What readers and generators give: sessions of calls, before they are numbered and have a place in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kvstore.errors import SimulationError
from kvstore.limits import SESSION_KEY_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a session.

    Attributes:
        prompt_tokens, output_tokens, keys, end_keys: as in `Request`.
        after: place in its session of the call, an earlier one, before whose end this one does not come; None for one
            that waits for nobody.
        wait_s: since the end of that call; without one since the session's beginning.
    """

    prompt_tokens: int
    output_tokens: int
    keys: bytes
    end_keys: bytes = b""
    after: int | None = None
    wait_s: float = 0.0


Session: TypeAlias = tuple[Call, ...]
"""Calls of one user or agent; the first waits for nobody."""


class SessionKeys:
    """Counts the keys of a session while it is made: each call names its prompt from the beginning."""

    def __init__(self) -> None:
        self._size_bytes = 0

    def add(self, call: Call) -> Call:
        """The call, if there is room for its keys.

        Raises:
            SimulationError: the session has too many.
        """
        self._size_bytes += len(call.keys) + len(call.end_keys)
        if self._size_bytes > SESSION_KEY_BYTES_MAX:
            raise SimulationError(
                f"the prefix keys of one session take more than {SESSION_KEY_BYTES_MAX} bytes; choose larger blocks, "
                "or shorter prompts or fewer calls in a session"
            )
        return call
