"""A prompt with its keys computed once: what match, read and write take."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvstore.keys import ExtraInput, KeyChain, root_key, sparse_key, token_array
from kvstore.pool.path import NodePath, SparseNode
from kvstore.spec.coverage import first_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np
    import numpy.typing as npt

    from kvstore.spec import Coverage, ModelSpec


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids, the identity they are cached under, and their prefix nodes.

    Attributes:
        token_ids: `[tokens]`.
        salt: isolates tenants.
        adapter: the adapter's name.
        extras: inputs that are not tokens.
        path: the prompt's nodes, a tail last if it does not end at a block boundary.
        masks: of each block that is not held whole, which tokens each attention layer holds; by number.
    """

    token_ids: npt.NDArray[np.uint32]
    salt: bytes
    adapter: str
    extras: tuple[ExtraInput, ...]
    path: NodePath
    masks: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        token_ids: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        coverage: Coverage | None = None,
    ) -> Prompt:
        """Check the ids and compute the keys; about a microsecond per block.

        Raises:
            TokenError: as `kvstore.keys.token_array`, `root_key` and `KeyChain.extend`.
            SpecError: a coverage of another length, or of layers without attention.
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
        prompt = cls(ids, salt, adapter, inputs, path)
        if coverage is None:
            return prompt
        coverage.check(spec, len(prompt))
        masks = {number: mask for number, mask in enumerate(coverage.block_masks(spec)) if mask is not None}
        return prompt.with_masks(masks) if masks else prompt

    def __len__(self) -> int:
        return int(self.token_ids.size)

    @cached_property
    def exact(self) -> Prompt:
        """The same prompt held whole."""
        if not self.masks:
            return self
        chain = KeyChain(self.path.root, self.path.block_tokens)
        chain.extend(self.token_ids, self.extras)
        path = replace(self.path, keys=tuple(chain.block_keys), tail_key=chain.tail_key(), sparse=())
        return Prompt(self.token_ids, self.salt, self.adapter, self.extras, path)

    def with_masks(self, masks: Mapping[int, bytes]) -> Prompt:
        """This prompt, of which blocks are not held whole. Keys up to the first of them stay."""
        exact, block = self.exact.path, self.path.block_tokens
        first = min(masks)
        keys, sparse = list(exact.keys[:first]), []
        tail_key = None
        for number in range(first, len(exact)):
            parent = keys[-1] if keys else exact.root
            end_tokens = min((number + 1) * block, len(self))
            key = whole_key = self.whole_key(parent, number, end_tokens)
            if number in masks:
                key = sparse_key(whole_key, masks[number])
                sparse.append(SparseNode(number, whole_key, masks[number]))
            if number < len(exact.keys):
                keys.append(key)
            else:
                tail_key = key
        path = NodePath(exact.root, block, tuple(keys), tail_key, exact.tail_ids, tuple(sparse))
        prompt = Prompt(self.token_ids, self.salt, self.adapter, self.extras, path, dict(masks))
        prompt.__dict__["exact"] = self.exact
        return prompt

    def is_of(self, spec: ModelSpec) -> bool:
        """Whether its keys are those of a model spec."""
        known = self.__dict__
        if known.get("_fingerprint") != spec.fingerprint:  # every match asks; the root is hashed once
            if self.path.root != root_key(spec.fingerprint, salt=self.salt, adapter=self.adapter):
                return False
            known["_fingerprint"] = spec.fingerprint
        return self.path.block_tokens == spec.block_tokens

    @cached_property
    def _extras_by_block(self) -> dict[int, list[ExtraInput]]:
        by_block: dict[int, list[ExtraInput]] = {}
        for extra in self.extras:
            by_block.setdefault(extra.position // self.path.block_tokens, []).append(extra)
        return by_block

    def prefix(self, tokens: int) -> NodePath:
        """The nodes of the prompt's first `tokens` tokens, at least one."""
        blocks, rest = divmod(tokens, self.path.block_tokens)
        if not rest:
            return self.path.prefix(blocks)
        key, sparse = self.tail_node(blocks, tokens)
        return self.path.with_tail(blocks, key, tuple(self.token_ids[tokens - rest : tokens].tolist()), sparse)

    def whole_key(self, parent: bytes, block: int, end_tokens: int) -> bytes:
        """Key of a block, or of the tail that ends inside it, which follows a node and is held whole."""
        start = block * self.path.block_tokens
        chain = KeyChain(parent, self.path.block_tokens)
        extras = [
            ExtraInput(extra.position - start, extra.data)
            for extra in self._extras_by_block.get(block, ())
            if extra.position < end_tokens
        ]
        chain.extend(self.token_ids[start:end_tokens], extras)
        return chain.key_at(end_tokens - start)

    def tail_node(self, blocks: int, end_tokens: int) -> tuple[bytes, SparseNode | None]:
        """The tail node that this prompt would have if it ended inside the block after `blocks`: key, and coverage."""
        parent = self.path.keys[blocks - 1] if blocks else self.path.root
        whole_key = self.whole_key(parent, blocks, end_tokens)
        mask = self.masks.get(blocks)
        if mask is not None:
            mask = first_tokens(mask, self.path.block_tokens, end_tokens - blocks * self.path.block_tokens)
        if mask is None:
            return whole_key, None
        return sparse_key(whole_key, mask), SparseNode(blocks, whole_key, mask)

    def tail_key(self, blocks: int, end_tokens: int) -> bytes:
        """Key of the tail node that this prompt would have if it ended inside the block after `blocks`."""
        return self.tail_node(blocks, end_tokens)[0]
