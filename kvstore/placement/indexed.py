"""A shelf whose index lies under one lock: what it answers from the index alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.placement.ends import packed_keys
from kvstore.placement.shelf import Shelf

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy as np
    import numpy.typing as npt

    from kvstore.pool.index import PrefixIndex
    from kvstore.pool.path import NodePath


class IndexedShelf(Shelf):
    """The part of a shelf that its index answers. Subclasses make `_lock` and `_index`."""

    _lock: AbstractContextManager[Any]
    _index: PrefixIndex

    @property
    def lost_records(self) -> int:
        with self._lock:
            return self._index.native.lost_records

    @property
    def next_end_us(self) -> int:
        with self._lock:
            return self._index.native.next_end_us

    def stored_tokens(self, path: NodePath) -> int:
        with self._lock:
            return self._index.native.stored_tokens(path.packed)

    def set_end(self, path: NodePath, ends_at_us: int, *, after_tokens: int, meant_tokens: int) -> None:
        with self._lock:
            self._index.native.set_end(path.packed, ends_at_us, after_tokens, meant_tokens)

    def ends_of(self, path: NodePath) -> npt.NDArray[np.uint64]:
        with self._lock:
            return self._index.native.ends_of(packed_keys(path))
