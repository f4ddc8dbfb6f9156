"""Whether equal ids of a trace mean equal prefixes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.errors import TraceError
from kvstore.limits import TRACE_IDS_MAX

if TYPE_CHECKING:
    from numpy.typing import NDArray


class IdChain:
    """Remembers behind which id each id stands. An id behind two different ones names no prefix."""

    def __init__(self) -> None:
        self._before: dict[int, int] = {}
        self._last = np.empty(0, np.uint64)

    def check(self, ids: NDArray[np.uint64], where: str) -> None:
        """Take the ids of another prompt.

        Raises:
            TraceError: one of them stood behind another id before, or there are too many.
        """
        before = self._before
        # Mostly a prompt begins like the one before it, whose ids have been looked at.
        shared = min(len(ids), len(self._last))
        differs = np.flatnonzero(ids[:shared] != self._last[:shared])
        begin = int(differs[0]) if len(differs) else shared
        previous = int(ids[begin - 1]) if begin else -1
        for each in ids[begin:].tolist():
            known = before.setdefault(each, previous)
            if known != previous:
                raise TraceError(
                    f"{where}: block {each} stands behind {_named(previous)}, and behind {_named(known)} before; equal "
                    "ids must mean equal prefixes: the trace has a hole, or counts blocks without what precedes them"
                )
            previous = each
        if len(before) > TRACE_IDS_MAX:
            raise TraceError(f"{where}: more than {TRACE_IDS_MAX} different block ids; cut the trace")
        self._last = ids


def _named(block: int) -> str:
    return "nothing" if block < 0 else f"block {block}"
