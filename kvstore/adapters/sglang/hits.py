"""Up to which lengths a prefix can be restored from what the pools have: decided from flags, without any I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ALL_PAGES = "all_pages"
TRAILING_PAGES = "trailing_pages"
BLOCK_GROUPS = "block_groups"


@dataclass(frozen=True)
class PoolPages:
    """What a pool has of the pages of a span.

    Attributes:
        name: of the pool.
        policy: which of the pages a prefix needs: all of them, or the last `window_pages`. A pool of block groups is
            no condition; its presence is not looked at.
        is_present: of each page, from the first on.
        window_pages: how many pages at the end of a prefix it needs.
    """

    name: str
    policy: str
    is_present: Sequence[bool]
    window_pages: int = 1


@dataclass(frozen=True)
class Restorable:
    """How far a span can be restored.

    Attributes:
        pages: the longest length at which every pool fits; 0: none does.
        lengths: all such lengths, ascending. They need not be contiguous: a state is there at some lengths only.
        pool_pages: of each pool by itself, the longest length at which it fits; without those that fit at none.
    """

    pages: int
    lengths: tuple[int, ...]
    pool_pages: dict[str, int]


def leading(is_present: Sequence[bool]) -> int:
    """How many of the first are there."""
    return next((number for number, present in enumerate(is_present) if not present), len(is_present))


def restorable(anchor: str, anchor_pages: int, pools: Sequence[PoolPages]) -> Restorable:
    """Lengths at which the anchor's pages are all there and each other pool has what its policy asks for.

    A pool's page beyond the anchor's counts for nothing: what hangs on an anchor is not there without it.

    Raises:
        ValueError: a policy is unknown.
    """
    pool_pages = {anchor: anchor_pages} if anchor_pages else {}
    lengths = list(range(1, anchor_pages + 1))
    for pool in pools:
        if pool.policy == BLOCK_GROUPS:
            continue
        fitting = _fitting(pool, anchor_pages)
        if fitting:
            pool_pages[pool.name] = max(fitting)
        lengths = [length for length in lengths if length in fitting]
    return Restorable(lengths[-1] if lengths else 0, tuple(lengths), pool_pages)


def _fitting(pool: PoolPages, anchor_pages: int) -> set[int]:
    present = pool.is_present[:anchor_pages]
    if pool.policy == ALL_PAGES:
        return set(range(1, leading(present) + 1))
    if pool.policy != TRAILING_PAGES:
        raise ValueError(f"pool {pool.name} has the unknown hit policy {pool.policy!r}")
    window = max(1, pool.window_pages)
    fitting, run = set(), 0
    for length, is_present in enumerate(present, start=1):
        run = run + 1 if is_present else 0
        # A window that begins before the span has its first pages where the span's prefix is.
        if run >= min(window, length):
            fitting.add(length)
    return fitting
