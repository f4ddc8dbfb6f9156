"""The prefix nodes that one prompt passes through."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kvstore.errors import WriteError
from kvstore.keys import KEY_BYTES, sparse_key
from kvstore.limits import HANDOVER_PAYLOAD_BYTES_MAX, TOKEN_ID_MAX
from kvstore.spec import Coverage
from kvstore.spec.coverage import is_block_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.spec import ModelSpec, UnitRange

PackedPath: TypeAlias = tuple[bytes, int, bytes, "bytes | None", bytes]
"""Root, tokens per block, all keys, the tail's key, the tail's ids as 32-bit integers: what native calls take."""


@dataclass(frozen=True)
class SparseNode:
    """A node of which some attention layers hold only some tokens. Its key covers which (docs/keys.md).

    Attributes:
        node: its number in the path.
        whole_key: the key that it would have if every layer held all of it.
        mask: which tokens each attention layer holds, as `Coverage.block_masks` gives it.
    """

    node: int
    whole_key: bytes
    mask: bytes


@dataclass(frozen=True)
class NodePath:
    """Names of a prompt's prefix nodes, in order: whole blocks, then possibly a tail.

    Attributes:
        root: the key from which the chain starts; covers fingerprint, salt and adapter.
        block_tokens: tokens per whole block.
        keys: prefix key of each whole block.
        tail_key: key of the tail node, None when the prompt ends at a block boundary.
        tail_ids: the tail's token ids.
        sparse: the nodes that are not held whole, ascending.
    """

    root: bytes
    block_tokens: int
    keys: tuple[bytes, ...]
    tail_key: bytes | None = None
    tail_ids: tuple[int, ...] = ()
    sparse: tuple[SparseNode, ...] = ()

    def __len__(self) -> int:
        return len(self.keys) + (self.tail_key is not None)

    @property
    def tokens(self) -> int:
        """Length of the prefix at the last node."""
        return len(self.keys) * self.block_tokens + len(self.tail_ids)

    @property
    def is_exact(self) -> bool:
        """Whether every layer holds every token."""
        return not self.sparse

    @cached_property
    def masks(self) -> dict[int, bytes]:
        """Of the sparse nodes, by number."""
        return {each.node: each.mask for each in self.sparse}

    def coverage(self, spec: ModelSpec) -> Coverage | None:
        """Which tokens each attention layer holds; None if all."""
        return Coverage.of_blocks(spec, self.tokens, self.masks) if self.sparse else None

    @cached_property
    def packed(self) -> PackedPath:
        """The path as the native index takes it."""
        tail_ids = np.array(self.tail_ids, np.uint32).tobytes()
        return self.root, self.block_tokens, b"".join(self.keys), self.tail_key, tail_ids

    @property
    def node_keys(self) -> tuple[bytes, ...]:
        """Key of each node."""
        return self.keys if self.tail_key is None else (*self.keys, self.tail_key)

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
        sparse = tuple(each for each in self.sparse if each.node < nodes)
        path = NodePath(self.root, self.block_tokens, self.keys[:nodes], sparse=sparse)
        # Cut from this path's bytes rather than joined anew.
        path.__dict__["packed"] = (self.root, self.block_tokens, self.packed[2][: nodes * KEY_BYTES], None, b"")
        return path

    def continued(self, keys: tuple[bytes, ...], sparse_last: SparseNode | None = None) -> NodePath:
        """The path of whole blocks with these keys, which begin with this path's own."""
        sparse = self.sparse if sparse_last is None else (*self.sparse, sparse_last)
        return NodePath(self.root, self.block_tokens, keys, sparse=sparse)

    def with_tail(
        self, nodes: int, tail_key: bytes, tail_ids: tuple[int, ...], sparse_tail: SparseNode | None = None
    ) -> NodePath:
        """The path of the first `nodes` whole blocks and a tail."""
        sparse = tuple(each for each in self.sparse if each.node < nodes)
        if sparse_tail is not None:
            sparse += (sparse_tail,)
        return NodePath(self.root, self.block_tokens, self.keys[:nodes], tail_key, tail_ids, sparse)


def wrong_sparse(spec: ModelSpec, path: NodePath, sparse: Sequence[SparseNode]) -> str | None:
    """What is wrong with sparse nodes that somebody else names for a path of this model; None if nothing is."""
    numbers = [each.node for each in sparse]
    if numbers != sorted(set(numbers)) or (numbers and numbers[-1] >= len(path)):
        return f"names sparse nodes that are not ascending nodes of its path of {len(path)}"
    for each in sparse:
        tokens = path.end_tokens(each.node) - each.node * path.block_tokens
        if not is_block_mask(spec, each.mask, tokens):
            return f"names a coverage of node {each.node} that is none of {tokens} tokens, or covers all of them"
        if path.key(each.node) != sparse_key(each.whole_key, each.mask):
            return f"names a coverage of node {each.node} that its key is not of"
    return None


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
