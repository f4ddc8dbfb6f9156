"""The events of a store: frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvstore.events.changes import Block, Changes
    from kvstore.events.why import MissReason, RemovedWhy


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        sequence: number within its stream, from 1. A number that is left out was dropped.
        time_s: when, in seconds since the epoch.
    """

    sequence: int
    time_s: float


@dataclass(frozen=True)
class _ChangedEvent(Event):
    tier: str
    changes: Changes

    @property
    def salt(self) -> bytes:
        """Whose prefixes these are."""
        return self.changes.salt

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Prefix key of each block; a key that comes twice names attention and states of one node."""
        return self.changes.keys

    @property
    def blocks(self) -> tuple[Block, ...]:
        """Each with its key, its parent's, its length and bytes."""
        return self.changes.blocks

    @property
    def tokens(self) -> int:
        """Length of the longest prefix among them."""
        return max(block.end_tokens for block in self.blocks)

    @property
    def size_bytes(self) -> int:
        """Of all of their records, headers included."""
        return self.changes.size_bytes


@dataclass(frozen=True)
class Stored(_ChangedEvent):
    """Blocks can be found in a tier, or more of them than before (other shard units, other chunk boundaries).

    Parents come before their children.

    Attributes:
        tier: its name: `dram`, `ssd` ...
    """


@dataclass(frozen=True)
class Removed(_ChangedEvent):
    """Blocks cannot be found in a tier any more, whatever they consisted of.

    Attributes:
        tier: its name.
    """

    @property
    def why(self) -> RemovedWhy:
        why = self.changes.why
        assert why is not None
        return why


@dataclass(frozen=True)
class Hit(Event):
    """A match found a resume point.

    Attributes:
        key: its prefix key.
        salt: of the prompt.
        tokens: its length.
        asked_tokens: the deepest length that could have been.
        tier: the slowest tier that any of it lies in.
        size_bytes: what restoring it moves.
    """

    key: bytes
    salt: bytes
    tokens: int
    asked_tokens: int
    tier: str
    size_bytes: int


@dataclass(frozen=True)
class Missed(Event):
    """A match found less than could have been, possibly nothing. Follows the `Hit` of the same match.

    Attributes:
        key: prefix key of the whole prompt.
        salt: of the prompt.
        asked_tokens: the deepest length that could have been.
        matched_tokens: what was found, 0 if nothing.
        reason: the obstacle to look at first; `Store.explain` tells all of it.
    """

    key: bytes
    salt: bytes
    asked_tokens: int
    matched_tokens: int
    reason: MissReason


EVENT_KINDS: tuple[type[Event], ...] = (Stored, Removed, Hit, Missed)
