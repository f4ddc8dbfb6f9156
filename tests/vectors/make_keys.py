"""The second implementation of docs/keys.md, and how `keys.json` was made with it.

Written from the document alone; it imports nothing of kvstore. The vectors are pinned: this script
writes the file only where there is none, and no test calls it. A changed digest is a new version.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

VECTORS = Path(__file__).with_name("keys.json")

Extra = tuple[int, bytes]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def field(data: bytes) -> bytes:
    return u32(len(data)) + data


def digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def root(fingerprint: bytes, salt: bytes, adapter: str) -> bytes:
    return digest(b"kvstore.keys.root.v1\0" + field(fingerprint) + field(salt) + field(adapter.encode("utf-8")))


def block_key(parent: bytes, ids: Sequence[int], extras: Iterable[Extra]) -> bytes:
    ordered = sorted(extras)
    return digest(
        b"kvstore.keys.block.v1\0"
        + parent
        + u32(len(ids))
        + b"".join(u32(token) for token in ids)
        + u32(len(ordered))
        + b"".join(u32(position) + field(data) for position, data in ordered)
    )


def chain(
    parent: bytes, ids: Sequence[int], block_tokens: int, extras: Sequence[Extra] = ()
) -> tuple[list[bytes], bytes | None]:
    """Keys of the whole blocks, and of the tail if there is one."""
    keys: list[bytes] = []
    for start in range(0, len(ids), block_tokens):
        block = ids[start : start + block_tokens]
        inside = [(position - start, data) for position, data in extras if start <= position < start + block_tokens]
        key = block_key(parent, block, inside)
        if len(block) < block_tokens:
            return keys, key
        keys.append(key)
        parent = key
    return keys, None


def grid_digests(boundaries: Sequence[int]) -> list[bytes]:
    digests = [digest(b"kvstore.grid.v1\0")]
    for boundary in boundaries:
        digests.append(digest(b"kvstore.grid.v1\0" + digests[-1] + u32(boundary)))
    return digests


def key_case(
    name: str,
    ids: Iterable[int],
    block_tokens: int,
    *,
    fingerprint: bytes = bytes(range(32)),
    salt: bytes = b"",
    adapter: str = "",
    extras: Sequence[Extra] = (),
) -> dict[str, Any]:
    tokens = list(ids)
    start = root(fingerprint, salt, adapter)
    keys, tail = chain(start, tokens, block_tokens, extras)
    return {
        "name": name,
        "fingerprint": fingerprint.hex(),
        "salt": salt.hex(),
        "adapter": adapter,
        "block_tokens": block_tokens,
        "token_ids": tokens,
        "extras": [{"position": position, "data": data.hex()} for position, data in extras],
        "root": start.hex(),
        "block_keys": [key.hex() for key in keys],
        "tail_key": None if tail is None else tail.hex(),
    }


def grid_case(*boundaries: int) -> dict[str, Any]:
    return {"boundaries": list(boundaries), "digests": [value.hex() for value in grid_digests(boundaries)]}


def document() -> dict[str, Any]:
    spread = [index * 2654435761 % 151936 for index in range(300)]
    return {
        "version": 1,
        "keys": [
            key_case(
                "worked example of docs/keys.md",
                [1, 2, 3, 4, 5, 6],
                4,
                salt=b"tenant-7",
                extras=[(4, bytes.fromhex("8950"))],
            ),
            key_case("no salt, no adapter, one whole block", range(16), 16),
            key_case("empty salt equals no salt", range(16), 16, salt=b""),
            key_case("salt", range(16), 16, salt=b"tenant-7"),
            key_case("salt of one zero byte", range(16), 16, salt=b"\0"),
            key_case("salt of the greatest length", range(16), 16, salt=b"s" * 1024),
            key_case("adapter", range(16), 16, adapter="lora-a"),
            key_case("adapter outside ASCII", range(16), 16, adapter="F\u00e4hre-\u5b50"),
            key_case("salt and adapter", range(16), 16, salt=b"tenant-7", adapter="lora-a"),
            key_case("a byte moved from adapter to salt", range(16), 16, salt=b"tenant-7l", adapter="ora-a"),
            key_case("another fingerprint", range(16), 16, fingerprint=digest(b"kvstore test vector")),
            key_case("ids at the ends of their range", [0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1], 4),
            key_case("one token, blocks of one", [7], 1),
            key_case("three tokens, blocks of one", [7, 8, 9], 1),
            key_case("shorter than a block", [5, 6, 7], 64),
            key_case("one token less than a block", range(100, 163), 64),
            key_case("exactly a block", range(100, 164), 64),
            key_case("one token more than a block", range(100, 165), 64),
            key_case("two blocks and a tail", range(1000, 1135), 64),
            key_case("blocks of 16", spread[:70], 16),
            key_case("blocks of 256", spread, 256),
            key_case("extra in the second block", range(10), 4, extras=[(5, b"image")]),
            key_case("extras out of order", range(10), 4, extras=[(6, b"b"), (6, b"a"), (1, b"zz")]),
            key_case("the same extra twice", range(8), 4, extras=[(2, b"x"), (2, b"x")]),
            key_case("extra without data", range(8), 4, extras=[(2, b"")]),
            key_case("extra in the tail", range(10), 4, extras=[(9, bytes(32))]),
            key_case("extra in a tail only", range(3), 16, extras=[(0, b"\xff" * 40)]),
        ],
        "grids": [
            grid_case(),
            grid_case(512),
            grid_case(512, 1024, 1100),
            grid_case(1, 2, 3),
            grid_case(1 << 24),
        ],
    }


if __name__ == "__main__":
    with VECTORS.open("x", encoding="utf-8") as file:
        json.dump(document(), file, indent=1, ensure_ascii=True)
        file.write("\n")
