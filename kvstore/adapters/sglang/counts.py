"""What went through a backend."""

from __future__ import annotations

import threading
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLES_MAX = 4096
"""Calls whose size and rate are kept until SGLang asks for them."""


@dataclass(frozen=True)
class BackendStatistics:
    """Counters since the backend was made, in pages of any pool.

    Attributes:
        asked, found: pages of the prefix that were asked after, and those of them that could be restored.
        written, read: pages that were to be written and are in the store now, and those that were copied from it.
        not_written, not_read: pages that were not, by reason: `store` (full, absent, damaged, late: the store's own
            statistics tell these apart), `gone` (there is no store at the moment), `indices` (they are not those of so
            many pages), `anchor` (the page of the prefix that it belongs to is not there), `error`.
    """

    asked: int = 0
    found: int = 0
    written: int = 0
    read: int = 0
    not_written: Mapping[str, int] = field(default_factory=dict)
    not_read: Mapping[str, int] = field(default_factory=dict)


class BackendCounts:
    """Counts them. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failed: dict[str, Counter[str]] = {"not_written": Counter(), "not_read": Counter()}
        self._samples: dict[str, deque[tuple[int, float]]] = {
            "written": deque(maxlen=SAMPLES_MAX), "read": deque(maxlen=SAMPLES_MAX)
        }  # fmt: skip

    def asked(self, pages: int, found: int) -> None:
        """The length of a prefix was asked for."""
        with self._lock:
            self._counts.update(asked=pages, found=found)

    def moved(self, what: str, pages: int, gigabytes_per_s: float) -> None:
        """Pages were `written` or `read` in one call."""
        if pages:
            with self._lock:
                self._counts[what] += pages
                self._samples[what].append((pages, gigabytes_per_s))

    def present(self, pages: int) -> None:
        """Pages were to be written, and were there."""
        with self._lock:
            self._counts["written"] += pages

    def failed(self, what: str, reason: str, pages: int) -> None:
        """Pages were `not_written` or `not_read`."""
        if pages:
            with self._lock:
                self._failed[what][reason] += pages

    def take_samples(self, what: str) -> list[tuple[int, float]]:
        """Pages and GB/s of each call since this was asked last."""
        with self._lock:
            samples = list(self._samples[what])
            self._samples[what].clear()
            return samples

    def snapshot(self) -> BackendStatistics:
        """A copy."""
        with self._lock:
            counts, failed = self._counts, self._failed
            return BackendStatistics(
                asked=counts["asked"],
                found=counts["found"],
                written=counts["written"],
                read=counts["read"],
                not_written=dict(failed["not_written"]),
                not_read=dict(failed["not_read"]),
            )
