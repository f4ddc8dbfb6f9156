"""An object as a prompt: as many tokens as it has chunks, of which the first says its size and carries its name.

`docs/keys.md` says what is hashed; this makes the same keys as `kvstore.keys.KeyChain`, for prompts of this form only.
"""

from __future__ import annotations

from hashlib import sha256
from struct import Struct

import numpy as np

from kvstore.keys import BLOCK_DOMAIN, ExtraInput, root_key
from kvstore.pool import NodePath, Prompt

_FIRST = Struct("<III")
"""Tokens in the block, the id of the one token, number of extras."""
_EXTRA = Struct("<II")
_LATER = _FIRST.pack(1, 0, 0)


class ObjectPaths:
    """Makes the prefix nodes of objects. Any thread.

    Args:
        fingerprint: of the store's spec.
        chunk_bytes: bytes of each record.
        salt: whose objects they are.
    """

    def __init__(self, fingerprint: bytes, chunk_bytes: int, salt: bytes) -> None:
        self.root = root_key(fingerprint, salt=salt)
        self.salt = salt
        self._begin = BLOCK_DOMAIN + self.root
        self._chunk_bytes = chunk_bytes

    def chunks(self, size_bytes: int) -> int:
        """Records that an object takes."""
        return -(-size_bytes // self._chunk_bytes)

    def path(self, name: bytes, size_bytes: int) -> NodePath:
        """The nodes of the object of this name and size."""
        first = _FIRST.pack(1, size_bytes, 1) + _EXTRA.pack(0, len(name)) + name
        key = sha256(self._begin + first).digest()
        keys = [key]
        for _ in range(1, self.chunks(size_bytes)):
            key = sha256(BLOCK_DOMAIN + key + _LATER).digest()
            keys.append(key)
        path = NodePath(self.root, 1, tuple(keys))
        path.__dict__["packed"] = (self.root, 1, key if len(keys) == 1 else b"".join(keys), None, b"")
        return path

    def prompt(self, name: bytes, size_bytes: int) -> Prompt:
        """As a prompt, which `BasePool.match` takes."""
        path = self.path(name, size_bytes)
        ids = np.zeros(len(path), np.uint32)
        ids[0] = size_bytes
        return Prompt(ids, self.salt, "", (ExtraInput(0, name),), path)
