"""Names of foreign objects: by the page's grammar, by the vectors, and as prompts of the store."""

from __future__ import annotations

import json
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from kvstore.foreign import ForeignNamespace
from kvstore.foreign.namespace import chunk_bytes_for
from kvstore.foreign.objects import ObjectPaths
from kvstore.keys import ExtraInput
from kvstore.pool import Prompt

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "foreign.json").read_text())


def namespace_of(vector: dict[str, Any]) -> ForeignNamespace:
    given = dict(vector["namespace"])
    given["hash_root"] = bytes.fromhex(given["hash_root"])
    given["groups"] = tuple((name, size) for name, size in given["groups"])
    given["layout"] = tuple((name, value) for name, value in given["layout"])
    return ForeignNamespace(**given)


def by_the_page(namespace: ForeignNamespace, group: str, key: bytes) -> bytes:
    def u32(number: int) -> bytes:
        return number.to_bytes(4, "little")

    def field(data: bytes | str) -> bytes:
        plain = data.encode() if isinstance(data, str) else data
        return u32(len(plain)) + plain

    said = b"kvstore.foreign.object.v1\0" + field(namespace.spec.fingerprint)
    said += field(namespace.engine) + field(namespace.version) + field(namespace.hash_algorithm)
    said += field(namespace.hash_root or b"") + u32(namespace.rank) + u32(namespace.ranks) + u32(len(namespace.layout))
    for name, value in namespace.layout:
        said += field(name) + field(value)
    return sha256(said + field(group) + field(key)).digest()


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["case"])
def test_vectors(vector: dict[str, Any]) -> None:
    namespace = namespace_of(vector)
    assert namespace.spec.fingerprint.hex() == vector["fingerprint"]
    key = bytes.fromhex(vector["key"])
    name = namespace.object_key(vector["group"], key)
    assert name.hex() == vector["name"]
    assert name == by_the_page(namespace, vector["group"], key)
    salt = bytes.fromhex(vector["salt"])
    path = ObjectPaths(namespace.spec.fingerprint, namespace.chunk_bytes, salt).path(name, vector["size_bytes"])
    assert [each.hex() for each in path.keys] == vector["record_keys"]


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["case"])
def test_an_object_is_a_prompt(vector: dict[str, Any]) -> None:
    namespace = namespace_of(vector)
    name, salt = bytes.fromhex(vector["name"]), bytes.fromhex(vector["salt"])
    paths = ObjectPaths(namespace.spec.fingerprint, namespace.chunk_bytes, salt)
    quick = paths.prompt(name, vector["size_bytes"])
    ids = [vector["size_bytes"]] + [0] * (len(vector["record_keys"]) - 1)
    prompt = Prompt.of(namespace.spec, ids, salt=salt, extras=[ExtraInput(0, name)])
    assert quick.path == prompt.path
    assert quick.token_ids.tolist() == ids
    assert quick.is_of(namespace.spec)


def test_everything_that_tells_namespaces_apart_is_in_the_name() -> None:
    vector = VECTORS["vectors"][0]
    first = namespace_of(vector)
    others = {
        "model": "other", "weights": "other", "engine": "other", "version": "other", "hash_algorithm": "sha512",
        "hash_root": b"other", "rank": 0, "ranks": 9, "layout": (("dtype", "other"),), "chunk_bytes": 8192,
    }  # fmt: skip
    assert {*others, "groups"} == {each.name for each in fields(ForeignNamespace)}
    known = {each.name: getattr(first, each.name) for each in fields(ForeignNamespace)}
    names = {first.object_key(vector["group"], b"key")}
    for changed, value in others.items():
        assert known[changed] != value
        names.add(ForeignNamespace(**{**known, changed: value}).object_key(vector["group"], b"key"))
    assert len(names) == 1 + len(others)
    # Sizes of groups are no part of it: an object says its own size.
    same = ForeignNamespace(**{**known, "groups": (*first.groups, ("more", 4096))})
    assert same.object_key(vector["group"], b"key") == first.object_key(vector["group"], b"key")


@pytest.mark.parametrize(
    ("sizes", "chunk_bytes"),
    [([4096], 4096), ([2 << 20], 2 << 20), ([16 << 20], 8 << 20), ([65536, 2 << 20], 65536), ([100_003], 100_003)],
)
def test_chunks_suit_the_sizes(sizes: list[int], chunk_bytes: int) -> None:
    assert chunk_bytes_for(sizes) == chunk_bytes
