"""Pages that a load within a step left unfilled, and those computed from them: the engine must not find them by hash.

What such a load is to fill, and what its step computes behind it, vLLM enters into its prefix cache when the step is
scheduled. When the load fails it computes all of it again, and leaves the hashes: a request that is preempted or
aborted before that is done would leave pages to be found that hold nothing. Read in vLLM 0.32:
`Scheduler._handle_invalid_blocks`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvstore.adapters.vllm.metadata import LoadOrder
    from kvstore.adapters.vllm.partial_pages import HashedPages

logger = logging.getLogger(__name__)


class UnfilledPages:
    """Takes the hashes of such pages away before the next step is scheduled. For the scheduler's thread.

    Args:
        page_tokens: of the engine's only cache group.
    """

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._pool: HashedPages | None = None
        self._filled: dict[tuple[str, int], frozenset[int]] = {}
        self._tables: list[tuple[int, ...]] = []

    def bind(self, pool: HashedPages) -> None:
        """The engine's pages."""
        self._pool = pool

    def step(self, loads: Iterable[LoadOrder], tables: Mapping[str, Sequence[Sequence[int]]]) -> None:
        """A step was scheduled.

        Args:
            loads: its loads.
            tables: of all requests that it computes.
        """
        size = self._page_tokens
        self._filled = {
            (order.request_id, order.attempt): frozenset(
                order.tables[0][order.start // size : -(-order.tokens // size)]
            )
            for order in loads
        }
        self._tables = [tuple(each[0]) for each in tables.values()]

    def failed(self, request_id: str, attempt: int) -> None:
        """A load of the step has failed."""
        unfilled = self._filled.pop((request_id, attempt), frozenset())
        pages: set[int] = set(unfilled)
        for table in self._tables:
            column = next((column for column, page in enumerate(table) if page in unfilled), len(table))
            pages.update(table[column:])
        if self._pool is None:
            logger.error("vLLM's pages are not known: a page that a load left unfilled may be found by its hash")
        elif pages:
            self._pool.evict_blocks(pages)
