"""Pages of windows that a load fills in part, and that the engine must not find by their hash.

The store keeps as much of a window as is needed to go on after a resume point; its first token may lie inside a page.
vLLM drops windows by whole pages, so to it this page is complete: when the load has ended it gives it the hash of all
its tokens. A prompt that leaves this one somewhat earlier would find the page, and zeros where its own window begins.
Read in vLLM 0.32: `v1/core/single_type_kv_cache_manager.py`, `Scheduler._update_waiting_for_remote_kv`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from kvstore.adapters.vllm.metadata import NULL_PAGE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.adapters.paged import EngineGroup


class HashedPages(Protocol):
    """Of vLLM's `BlockPool` what is needed: pages by their ids, with `block_hash`, and how to take hashes away."""

    blocks: Sequence[Any]

    def evict_blocks(self, block_ids: set[int]) -> None: ...


class PartialPages:
    """Takes the hashes of such pages away before anybody can use them. For the scheduler's thread.

    Args:
        groups: the engine's cache groups.
    """

    def __init__(self, groups: Iterable[EngineGroup] = ()) -> None:
        self._groups = tuple(group for group in groups if group.is_window and group.chunk_tokens is None)
        self._pages: dict[str, set[int]] = {}
        self._pool: HashedPages | None = None

    def bind(self, pool: HashedPages) -> None:
        """The engine's pages."""
        self._pool = pool

    def loading(self, request_id: str, tables: Sequence[Sequence[int]], start: int, tokens: int) -> None:
        """A load of `[start, tokens)` was ordered; `tables` are the request's."""
        pages = {
            tables[group.index][column]
            for group in self._groups
            if (column := _partial_column(group, start, tokens)) is not None
        }
        pages.discard(NULL_PAGE)
        if pages:
            self._pages[request_id] = pages

    def hide(self) -> bool:
        """Take away what hashes they have been given; whether there were any, so that a hit may have used them."""
        if not self._pages or self._pool is None:
            return False
        found = {
            page for pages in self._pages.values() for page in pages if self._pool.blocks[page].block_hash is not None
        }
        if found:
            self._pool.evict_blocks(found)
        return bool(found)

    def forget(self, request_id: str) -> None:
        """They get no hash any more: its load failed, it computes already, or its pages are given back."""
        self._pages.pop(request_id, None)


def _partial_column(group: EngineGroup, start: int, tokens: int) -> int | None:
    """The page that a load fills from its middle to its end, with further ones behind it; None if there is none.

    A hit that ends at `tokens` or later needs nothing of a page before the loaded window. So does every hit in which
    the page in question is the last one.
    """
    first = group.first_needed(tokens)
    column = first // group.page_tokens
    if first <= start or first % group.page_tokens == 0 or (column + 1) * group.page_tokens >= tokens:
        return None
    return column
