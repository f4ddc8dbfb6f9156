"""Why something left a tier, and why nothing deeper was found: few words, which label counters."""

from __future__ import annotations

from enum import StrEnum


class RemovedWhy(StrEnum):
    """Why blocks left a tier."""

    EVICTED = "evicted"
    """To make room."""
    DROPPED = "dropped"
    """By request: `evict`."""
    DAMAGED = "damaged"
    """A checksum did not hold; with it went what it alone made reachable."""
    EXPIRED = "expired"
    """Their time to live had passed."""
    HANDED_OVER = "handed over"
    """A tail that was there for a hand-over only, which was taken."""
    CLOSED = "closed"
    """The tier was closed."""


class MissReason(StrEnum):
    """Why no deeper resume point of a prompt serves: the one to look at first."""

    PENDING = "pending"
    """A running writer will commit one."""
    OTHER_CHUNKS = "other chunk boundaries"
    """It is there, computed on other chunk boundaries than the reader insists on."""
    OTHER_SHARD = "other shard"
    """It is there, for other shard units than the reader needs."""
    DAMAGED = "damaged"
    """It was found damaged."""
    EXPIRED = "expired"
    """Its time to live has passed."""
    EVICTED = "evicted"
    """It was there, as far as the index remembers."""
    NO_CHECKPOINT = "no checkpoint"
    """Attention reaches further, but no states were stored there."""
    NEVER_STORED = "never stored"
    """As far as the index knows. What lies under another salt is not revealed: it looks like this."""
