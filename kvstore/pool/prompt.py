"""A prompt with its keys computed once: what match, read and write take."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvstore.keys import ExtraInput, KeyChain, root_key, token_array
from kvstore.pool.path import NodePath

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt

    from kvstore.spec import ModelSpec


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids, the identity they are cached under, and their prefix nodes.

    Attributes:
        token_ids: `[tokens]`.
        salt: isolates tenants.
        adapter: the adapter's name.
        extras: inputs that are not tokens.
        path: the prompt's nodes, a tail last if it does not end at a block boundary.
    """

    token_ids: npt.NDArray[np.uint32]
    salt: bytes
    adapter: str
    extras: tuple[ExtraInput, ...]
    path: NodePath

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        token_ids: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
    ) -> Prompt:
        """Check the ids and compute the keys; about a microsecond per block.

        Raises:
            TokenError: as `kvstore.keys.token_array`, `root_key` and `KeyChain.extend`.
        """
        ids = token_array(token_ids).copy()  # the caller's own array may change
        ids.flags.writeable = False
        inputs = tuple(extras)
        chain = KeyChain(root_key(spec.fingerprint, salt=salt, adapter=adapter), spec.block_tokens)
        chain.extend(ids, inputs)
        path = NodePath(
            chain.root, spec.block_tokens, tuple(chain.block_keys), chain.tail_key(), tuple(chain.tail_ids.tolist())
        )
        _ = path.packed  # joined with the keys' making, rather than in the first match
        return cls(ids, salt, adapter, inputs, path)

    def __len__(self) -> int:
        return int(self.token_ids.size)

    def is_of(self, spec: ModelSpec) -> bool:
        """Whether its keys are those of a model spec."""
        root = root_key(spec.fingerprint, salt=self.salt, adapter=self.adapter)
        return self.path.root == root and self.path.block_tokens == spec.block_tokens

    @cached_property
    def _extras_by_block(self) -> dict[int, list[ExtraInput]]:
        by_block: dict[int, list[ExtraInput]] = {}
        for extra in self.extras:
            by_block.setdefault(extra.position // self.path.block_tokens, []).append(extra)
        return by_block

    def tail_key(self, blocks: int, end_tokens: int) -> bytes:
        """Key of the tail node that this prompt would have if it ended inside the block after `blocks`."""
        start = blocks * self.path.block_tokens
        parent = self.path.keys[blocks - 1] if blocks else self.path.root
        chain = KeyChain(parent, self.path.block_tokens)
        extras = [
            ExtraInput(extra.position - start, extra.data)
            for extra in self._extras_by_block.get(blocks, ())
            if extra.position < end_tokens
        ]
        chain.extend(self.token_ids[start:end_tokens], extras)
        key = chain.tail_key()
        assert key is not None
        return key
