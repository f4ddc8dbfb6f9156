"""The prefix nodes that one prompt passes through."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kvstore.errors import WriteError
from kvstore.keys import KEY_BYTES
from kvstore.limits import HANDOVER_PAYLOAD_BYTES_MAX, TOKEN_ID_MAX

if TYPE_CHECKING:
    from kvstore.spec import UnitRange

PackedPath: TypeAlias = tuple[bytes, int, bytes, "bytes | None", bytes]
"""Root, tokens per block, all keys, the tail's key, the tail's ids as 32-bit integers: what native calls take."""


@dataclass(frozen=True)
class NodePath:
    """Names of a prompt's prefix nodes, in order: whole blocks, then possibly a tail.

    Attributes:
        root: the key from which the chain starts; covers fingerprint, salt and adapter.
        block_tokens: tokens per whole block.
        keys: prefix key of each whole block.
        tail_key: key of the tail node, None when the prompt ends at a block boundary.
        tail_ids: the tail's token ids.
    """

    root: bytes
    block_tokens: int
    keys: tuple[bytes, ...]
    tail_key: bytes | None = None
    tail_ids: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keys) + (self.tail_key is not None)

    @property
    def tokens(self) -> int:
        """Length of the prefix at the last node."""
        return len(self.keys) * self.block_tokens + len(self.tail_ids)

    @cached_property
    def packed(self) -> PackedPath:
        """The path as the native index takes it."""
        tail_ids = np.array(self.tail_ids, np.uint32).tobytes()
        return self.root, self.block_tokens, b"".join(self.keys), self.tail_key, tail_ids

    def is_tail(self, node: int) -> bool:
        return node >= len(self.keys)

    def key(self, node: int) -> bytes:
        if node < len(self.keys):
            return self.keys[node]
        if node == len(self.keys) and self.tail_key is not None:
            return self.tail_key
        raise IndexError(f"the path has {len(self)} nodes, not {node + 1}")

    def parent(self, node: int) -> bytes:
        """Key of the node before; the root for the first."""
        return self.keys[node - 1] if node else self.root

    def end_tokens(self, node: int) -> int:
        return self.tokens if self.is_tail(node) else (node + 1) * self.block_tokens

    def node_at(self, tokens: int) -> int | None:
        """The node that ends exactly at a length."""
        if tokens == self.tokens and len(self):
            return len(self) - 1
        if tokens > 0 and tokens % self.block_tokens == 0 and tokens <= len(self.keys) * self.block_tokens:
            return tokens // self.block_tokens - 1
        return None

    def prefix(self, nodes: int) -> NodePath:
        """The path of the first `nodes` nodes."""
        if nodes >= len(self):
            return self
        path = NodePath(self.root, self.block_tokens, self.keys[:nodes])
        # Cut from this path's bytes rather than joined anew.
        path.__dict__["packed"] = (self.root, self.block_tokens, self.packed[2][: nodes * KEY_BYTES], None, b"")
        return path

    def with_tail(self, nodes: int, tail_key: bytes, tail_ids: tuple[int, ...]) -> NodePath:
        """The path of the first `nodes` whole blocks and a tail."""
        return NodePath(self.root, self.block_tokens, self.keys[:nodes], tail_key, tail_ids)


@dataclass(frozen=True, order=True)
class RecordName:
    """One record of a path: which node, and which group, layer span and shard units."""

    node: int
    group: int
    span: int
    units: UnitRange


RecordPlace: TypeAlias = tuple[int, int, int]
"""Node in a path, group, layer span: a record's name but for the units."""


@dataclass(frozen=True)
class HandOver:
    """What a decode process needs beyond the cache, because the states exist at n and not at n - 1.

    Attributes:
        first_token: the token sampled from the prompt's last position.
        payload: whatever else should travel, such as that position's logits.

    Raises:
        WriteError: the token is no token id, or the payload is over `HANDOVER_PAYLOAD_BYTES_MAX`.
    """

    first_token: int
    payload: bytes = b""

    def __post_init__(self) -> None:
        if not 0 <= self.first_token <= TOKEN_ID_MAX:
            raise WriteError(f"the first token of a hand-over, {self.first_token}, is outside 0 to {TOKEN_ID_MAX}")
        if len(self.payload) > HANDOVER_PAYLOAD_BYTES_MAX:
            raise WriteError(
                f"a hand-over's payload of {len(self.payload)} bytes is over the limit of "
                f"{HANDOVER_PAYLOAD_BYTES_MAX}; send less with it"
            )
