"""Prefix keys of simulated prompts: four numbers that no other prefix has, since there are no tokens to hash."""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from kvstore.keys import KEY_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray


class KeySpace(IntEnum):
    """Who made a key: keys of two spaces never meet."""

    MOONCAKE = 1
    AGENTIC = 2
    GENERATED = 3


def keys_of_ids(
    space: KeySpace, scope: int, ids: NDArray[np.uint64], id_tokens: int, tokens: int, block_tokens: int
) -> bytes:
    """Keys of a prompt's whole blocks from ids of its prefixes, whatever the two block sizes.

    An id stands for all tokens up to the end of its own block. A boundary within that block is named by the id and by
    how far in it lies: prompts that share the id share the boundary, too. Whether others share a part of the block
    cannot be known, and counts as no.

    Args:
        scope: ids of two scopes never mean the same.
        ids: one for each `id_tokens`, `[ids]`; the last may stand for a partial block.
        tokens: of the prompt; what ids do not cover has no keys.
    """
    blocks = min(tokens, len(ids) * id_tokens) // block_tokens
    ends = np.arange(1, blocks + 1, dtype=np.uint64) * np.uint64(block_tokens)
    places = (ends - np.uint64(1)) // np.uint64(id_tokens)
    rows = np.empty((blocks, 4), "<u8")
    rows[:, 0] = space
    rows[:, 1] = scope
    rows[:, 2] = ids[places.astype(np.int64)]
    rows[:, 3] = ends - places * np.uint64(id_tokens)
    return rows.tobytes()


@lru_cache(maxsize=8)
def _generated_rows(blocks: int) -> NDArray[np.uint64]:
    """Keys of a text's first blocks, but for its number, `[blocks, 4]`."""
    rows = np.zeros((blocks, 4), "<u8")
    rows[:, 0] = KeySpace.GENERATED
    rows[:, 2] = np.arange(blocks)
    return rows


class Text:
    """A text that is generated bit by bit; its forks share what they have in common.

    Attributes:
        tokens: how long it is.
        keys: of its whole blocks.
    """

    __slots__ = ("_block_tokens", "_number", "keys", "tokens")

    def __init__(self, number: int, block_tokens: int, tokens: int = 0, keys: bytes = b"") -> None:
        self._number = number
        self._block_tokens = block_tokens
        self.tokens = tokens
        self.keys = keys

    def grow(self, tokens: int) -> None:
        """So many more tokens that nobody else has."""
        self.tokens += tokens
        begin, end = len(self.keys) // KEY_BYTES, self.tokens // self._block_tokens
        if end > begin:
            rows = _generated_rows(1 << end.bit_length())[begin:end].copy()
            rows[:, 1] = self._number
            self.keys += rows.tobytes()

    def fork(self, number: int, tokens: int | None = None) -> Text:
        """Another text that begins like this one.

        Args:
            number: that no other text has.
            tokens: that they have in common; None for all of this one, and never more.
        """
        tokens = self.tokens if tokens is None else min(tokens, self.tokens)
        keys = self.keys[: tokens // self._block_tokens * KEY_BYTES]
        return Text(number, self._block_tokens, tokens, keys)
