"""What a worker knows of the engine's requests: their token ids, and what they are cached under."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from kvstore.errors import WriteError

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvstore.adapters.vllm.metadata import MoreTokens, NewPrompt
    from kvstore.pool import Prompt
    from kvstore.store import Store


class _Known:
    """One request."""

    def __init__(self, new: NewPrompt) -> None:
        self.new = new
        self._ids = np.array(new.token_ids, np.uint32)
        self._count = len(self._ids)

    def extend(self, start: int, token_ids: npt.NDArray[Any]) -> None:
        end = start + len(token_ids)
        if end > len(self._ids):
            # Twice as large, since decoding adds one at a time. Views of the old one stay what they are.
            grown = np.empty(max(end, 2 * len(self._ids)), np.uint32)
            grown[: self._count] = self._ids[: self._count]
            self._ids = grown
        self._ids[start:end] = token_ids
        self._count = end

    @property
    def token_ids(self) -> npt.NDArray[Any]:
        return self._ids[: self._count]


class KnownPrompts:
    """The requests that orders may name. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, _Known] = {}

    def __len__(self) -> int:
        return len(self._known)

    def add(self, new: NewPrompt) -> None:
        with self._lock:
            self._known[new.request_id] = _Known(new)

    def extend(self, more: MoreTokens) -> None:
        """Token ids that were decoded since.

        Raises:
            WriteError: the request is not known, or ids between are missing.
        """
        with self._lock:
            known = self._known.get(more.request_id)
            if known is None or more.start > len(known.token_ids):
                there = "is not known" if known is None else f"has {len(known.token_ids)} tokens here"
                raise WriteError(f"request {more.request_id} {there}, and tokens from {more.start} on follow")
            known.extend(more.start, more.token_ids)

    def forget(self, request_id: str) -> None:
        with self._lock:
            self._known.pop(request_id, None)

    def prefix(self, request_id: str, tokens: int, store: Store) -> Prompt:
        """The first tokens of a request as a prompt of a store.

        Raises:
            WriteError: the request is not known, or has fewer tokens here.
        """
        with self._lock:
            known = self._known.get(request_id)
            if known is None or tokens > len(known.token_ids):
                there = "is not known" if known is None else f"has {len(known.token_ids)} tokens here"
                raise WriteError(f"request {request_id} {there}, and {tokens} are asked for")
            token_ids = known.token_ids[:tokens].copy()
        new = known.new
        extras = tuple(extra for extra in new.extras if extra.position < tokens)
        return store.prompt(token_ids, salt=new.salt, adapter=new.adapter, extras=extras)
