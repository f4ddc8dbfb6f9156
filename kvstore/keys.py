"""Prefix keys: a chained SHA-256 over a root and token ids, one digest per block.

The bytes that are hashed are specified in `docs/keys.md`, so that an engine or a router in any
language can compute the same keys.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from struct import Struct
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from kvstore.errors import SpecError, TokenError
from kvstore.limits import (
    BLOCK_TOKENS_MAX,
    BLOCK_TOKENS_MIN,
    EXTRA_BYTES_MAX,
    PROMPT_TOKENS_MAX,
    SALT_BYTES_MAX,
    TOKEN_ID_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PrefixKey: TypeAlias = bytes
"""The name of one prefix under one root: 32 bytes."""

KEY_BYTES = 32
ROOT_DOMAIN = b"kvstore.keys.root.v1\0"
BLOCK_DOMAIN = b"kvstore.keys.block.v1\0"
COVERAGE_DOMAIN = b"kvstore.keys.coverage.v1\0"

_U32 = Struct("<I")
_EXTRA_HEADER = Struct("<II")
_ID_TYPE = np.dtype("<u4")
_NO_EXTRAS = _U32.pack(0)


@dataclass(frozen=True)
class ExtraInput:
    """Input that is not a token id (the digest of an image, say) and changes what follows.

    Attributes:
        position: index of the token that it stands at, counted from the start of the prompt. It is
            hashed with the block that holds this token.
        data: what distinguishes this input from others; a digest is enough.

    Raises:
        TokenError: the position is outside a prompt, or the data are no bytes or too long.
    """

    position: int
    data: bytes

    def __post_init__(self) -> None:
        if not isinstance(self.position, int) or not 0 <= self.position < PROMPT_TOKENS_MAX:
            raise TokenError(f"extra input at position {self.position!r}: allowed are 0 to {PROMPT_TOKENS_MAX - 1}")
        _check_bytes("the data of an extra input", self.data, EXTRA_BYTES_MAX, "pass a digest of them")


def root_key(fingerprint: bytes, *, salt: bytes = b"", adapter: str = "") -> PrefixKey:
    """The root of every key chain of one model, tenant and adapter.

    Args:
        fingerprint: `ModelSpec.fingerprint`, 32 bytes.
        salt: isolates tenants: prefixes under different salts never match. Empty means none.
        adapter: name of the LoRA adapter or the like that was active; empty means none.

    Raises:
        SpecError: the fingerprint is not 32 bytes.
        TokenError: salt or adapter is of the wrong type or longer than `SALT_BYTES_MAX`.
    """
    if not isinstance(fingerprint, bytes) or len(fingerprint) != KEY_BYTES:
        raise SpecError(f"a fingerprint is {KEY_BYTES} bytes, got {fingerprint!r}; pass ModelSpec.fingerprint")
    _check_bytes("the salt", salt, SALT_BYTES_MAX, "pass a digest of it")
    if not isinstance(adapter, str):
        raise TokenError(f"the adapter is named by a str, not by {type(adapter).__name__}")
    try:
        name = adapter.encode()
    except UnicodeEncodeError as error:
        raise TokenError(f"the adapter name {adapter!r} has no UTF-8 form: {error}") from error
    _check_bytes("the adapter name", name, SALT_BYTES_MAX, "use a shorter one")
    fields = (fingerprint, bytes(salt), name)
    return sha256(ROOT_DOMAIN + b"".join(_U32.pack(len(field)) + field for field in fields)).digest()


def token_array(token_ids: Any) -> NDArray[np.uint32]:
    """Checked token ids as a contiguous little-endian uint32 array of shape [tokens].

    Args:
        token_ids: a sequence of integers, or a NumPy or torch array of an integer type, of shape
            [tokens] or [1, tokens]. May be returned itself when it already has the right form.

    Raises:
        TokenError: no ids, too many, one that is negative or above `TOKEN_ID_MAX`, not integers, or
            another shape.
    """
    if hasattr(token_ids, "detach"):
        token_ids = token_ids.detach().cpu().numpy()
    try:
        ids = np.asarray(token_ids)
    except (ValueError, TypeError, OverflowError) as error:
        raise TokenError(f"token ids must be a flat sequence of integers: {error}") from error
    if ids.ndim == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if isinstance(token_ids, str | bytes) or token_ids is None:
        raise TokenError(f"token ids are numbers, not {type(token_ids).__name__}; tokenize the prompt first")
    if ids.ndim != 1:
        raise TokenError(f"token ids have shape {list(ids.shape)}; pass one prompt, as [tokens] or [1, tokens]")
    if ids.size == 0:
        raise TokenError("there are no token ids; a prefix has at least one")
    if ids.size > PROMPT_TOKENS_MAX:
        raise TokenError(f"{ids.size} token ids are more than the limit of {PROMPT_TOKENS_MAX}")
    if ids.dtype == np.object_:
        # NumPy keeps integers beyond 64 bits as objects.
        if all(isinstance(value, int) for value in ids):
            raise TokenError(f"a token id lies outside 0 to {TOKEN_ID_MAX}: between {min(ids)} and {max(ids)}")
        raise TokenError("token ids must be integers")
    if ids.dtype.kind not in "iu":
        raise TokenError(f"token ids must be integers, not {ids.dtype}")
    if ids.dtype != _ID_TYPE:
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most > TOKEN_ID_MAX:
            raise TokenError(f"token id {least if least < 0 else most} is outside 0 to {TOKEN_ID_MAX}")
    return np.ascontiguousarray(ids, dtype=_ID_TYPE)


def prefix_keys(
    root: PrefixKey, token_ids: Any, block_tokens: int, extras: Iterable[ExtraInput] = ()
) -> list[PrefixKey]:
    """The keys of every whole block of a prompt, in order; see `KeyChain` for tails.

    Raises:
        TokenError: as `token_array` and `KeyChain.extend`.
    """
    chain = KeyChain(root, block_tokens)
    chain.extend(token_ids, extras)
    return chain.block_keys


def sparse_key(whole_key: PrefixKey, mask: bytes) -> PrefixKey:
    """The key of a block or tail of which some layers hold only some tokens.

    Args:
        whole_key: its key if every layer held all of it.
        mask: which tokens each attention layer holds, as `kvstore.spec.Coverage.block_masks` gives it.
    """
    return sha256(COVERAGE_DOMAIN + whole_key + _U32.pack(len(mask)) + mask).digest()


class KeyChain:
    """The keys of a growing prompt. A block more costs one digest, whatever came before.

    Not for use by several threads at once; give each its own `fork()`.

    Attributes:
        root: the key of the empty prefix, from `root_key`.
        block_tokens: tokens per block.
    """

    __slots__ = ("_keys", "_tail", "_tail_extras", "_tail_key", "block_tokens", "root")

    def __init__(self, root: PrefixKey, block_tokens: int) -> None:
        """Start an empty chain.

        Raises:
            TokenError: the root is not a key, or `block_tokens` is outside its limits.
        """
        if not isinstance(root, bytes) or len(root) != KEY_BYTES:
            raise TokenError(f"a root is {KEY_BYTES} bytes, got {root!r}; make one with root_key")
        if not BLOCK_TOKENS_MIN <= block_tokens <= BLOCK_TOKENS_MAX:
            raise TokenError(f"block_tokens={block_tokens} is outside {BLOCK_TOKENS_MIN} to {BLOCK_TOKENS_MAX}")
        self.root = root
        self.block_tokens = block_tokens
        self._keys: list[PrefixKey] = []
        self._tail: NDArray[np.uint32] = np.empty(0, _ID_TYPE)
        self._tail_extras: tuple[ExtraInput, ...] = ()
        self._tail_key: PrefixKey | None = None

    def __repr__(self) -> str:
        return f"KeyChain(tokens={self.tokens}, blocks={len(self._keys)}, tail={self._tail.size})"

    @property
    def tokens(self) -> int:
        """Number of tokens so far."""
        return len(self._keys) * self.block_tokens + self._tail.size

    @property
    def block_keys(self) -> list[PrefixKey]:
        """Keys of the whole blocks. The chain's own list, which grows with it: copy before changing it."""
        return self._keys

    @property
    def tail_ids(self) -> NDArray[np.uint32]:
        """Ids past the last whole block: 0 to block_tokens - 1 of them, read-only."""
        return self._tail

    def extend(self, token_ids: Any, extras: Iterable[ExtraInput] = ()) -> None:
        """Append tokens, and the extra inputs that stand at these tokens.

        Their order does not matter. Nothing is changed when this raises.

        Raises:
            TokenError: as `token_array`; the prompt would exceed `PROMPT_TOKENS_MAX`; an extra input
                stands at none of these tokens; or a block has more than `EXTRA_BYTES_MAX` of them.
        """
        ids = token_array(token_ids)
        start, block = self.tokens, self.block_tokens
        end = start + ids.size
        if end > PROMPT_TOKENS_MAX:
            raise TokenError(f"a prompt of {end} tokens is longer than the limit of {PROMPT_TOKENS_MAX}")
        added = tuple(extras)
        for extra in added:
            if not start <= extra.position < end:
                raise TokenError(
                    f"extra input at token {extra.position} is outside the appended tokens [{start}, {end}); "
                    "pass it together with the token that it stands at"
                )
        by_block = _extras_by_block((*self._tail_extras, *added), block)

        if self._tail.size:
            ids = np.concatenate((self._tail, ids))
        whole = ids.size // block
        self._append_blocks(ids[: whole * block].reshape(whole, block), by_block)
        tail = ids[whole * block :].copy()
        tail.flags.writeable = False
        self._tail = tail
        self._tail_extras = tuple(by_block.get(len(self._keys), ()))
        self._tail_key = None

    def _append_blocks(self, ids: NDArray[np.uint32], by_block: dict[int, list[ExtraInput]]) -> None:
        whole, block = ids.shape
        bodies = np.empty((whole, block + 2), _ID_TYPE)
        bodies[:, 0] = block
        bodies[:, 1:-1] = ids
        bodies[:, -1] = 0
        data, step = bodies.tobytes(), (block + 2) * _ID_TYPE.itemsize
        keys, parent = self._keys, self._keys[-1] if self._keys else self.root
        for offset in range(0, whole * step, step):
            body = data[offset : offset + step]
            extras = by_block.get(len(keys)) if by_block else None
            if extras:
                body = body[: -len(_NO_EXTRAS)] + _extras_bytes(extras, block)
            parent = sha256(BLOCK_DOMAIN + parent + body).digest()
            keys.append(parent)

    def tail_key(self) -> PrefixKey | None:
        """Key of the tail, which is the digest of a block of so few tokens; None without a tail."""
        if self._tail.size == 0:
            return None
        if self._tail_key is None:
            parent = self._keys[-1] if self._keys else self.root
            ids = _U32.pack(self._tail.size) + self._tail.tobytes()
            extras = _extras_bytes(self._tail_extras, self.block_tokens)
            self._tail_key = sha256(BLOCK_DOMAIN + parent + ids + extras).digest()
        return self._tail_key

    def key_at(self, length: int) -> PrefixKey:
        """Key of the first `length` tokens: a block boundary, or all tokens; the root for 0.

        Raises:
            TokenError: the chain has no key at this length.
        """
        blocks, rest = divmod(length, self.block_tokens)
        if length == 0:
            return self.root
        if rest == 0 and 0 < blocks <= len(self._keys):
            return self._keys[blocks - 1]
        if length == self.tokens:
            tail = self.tail_key()
            assert tail is not None
            return tail
        raise TokenError(
            f"there is no key at length {length}: keys are at multiples of {self.block_tokens} and at the end, "
            f"{self.tokens}"
        )

    def fork(self) -> KeyChain:
        """An independent copy, to be extended in another way."""
        copy = KeyChain(self.root, self.block_tokens)
        copy._keys = self._keys.copy()
        copy._tail = self._tail
        copy._tail_extras = self._tail_extras
        copy._tail_key = self._tail_key
        return copy


def _extras_by_block(extras: tuple[ExtraInput, ...], block_tokens: int) -> dict[int, list[ExtraInput]]:
    """Extra inputs by block number, each list in hashing order."""
    by_block: defaultdict[int, list[ExtraInput]] = defaultdict(list)
    for extra in sorted(extras, key=lambda extra: (extra.position, extra.data)):
        by_block[extra.position // block_tokens].append(extra)
    for number, members in by_block.items():
        size = sum(len(extra.data) for extra in members)
        if size > EXTRA_BYTES_MAX:
            raise TokenError(
                f"block {number} has {size} bytes of extra inputs, the limit is {EXTRA_BYTES_MAX}; pass digests"
            )
    return dict(by_block)


def _extras_bytes(extras: Iterable[ExtraInput], block_tokens: int) -> bytes:
    parts = [_EXTRA_HEADER.pack(extra.position % block_tokens, len(extra.data)) + extra.data for extra in extras]
    return _U32.pack(len(parts)) + b"".join(parts)


def _check_bytes(name: str, value: object, limit: int, remedy: str) -> None:
    if not isinstance(value, bytes):
        raise TokenError(f"{name} must be bytes, not {type(value).__name__}")
    if len(value) > limit:
        raise TokenError(f"{name} takes {len(value)} bytes, the limit is {limit}; {remedy}")
