"""What a request is cached under: tenants, adapters and images never mix."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.adapters.paged import (
    NotCached,
    RequestIdentity,
    adapter_digest,
    adapter_name,
    check_hash_root,
    identify,
)
from kvstore.errors import ConfigError
from kvstore.keys import KeyChain, root_key
from kvstore.limits import SALT_BYTES_MAX

if TYPE_CHECKING:
    from pathlib import Path

FINGERPRINT = bytes(32)
IDS = list(range(40))


def last_key(identity: RequestIdentity | NotCached) -> bytes:
    """The key of the whole prompt."""
    assert isinstance(identity, RequestIdentity)
    chain = KeyChain(root_key(FINGERPRINT, salt=identity.salt, adapter=identity.adapter), 16)
    chain.extend(IDS, identity.extras)
    return chain.key_at(len(IDS))


def test_nothing_mixes() -> None:
    image = (4, 10, "image", "a" * 64)
    identities = [
        identify(tokens=40),
        identify(tokens=40, cache_salt="a"),
        identify(tokens=40, cache_salt="b"),
        identify(tokens=40, cache_salt="a" * 2000),
        identify(tokens=40, cache_salt="a" * 2001),
        identify(tokens=40, adapter=adapter_name("a", "/one")),
        identify(tokens=40, adapter=adapter_name("b", "/one")),
        identify(tokens=40, adapter=adapter_name("a", "/two")),
        identify(tokens=40, adapter=adapter_name("a", "/one", "ff")),
        identify(tokens=40, adapter=adapter_name("a", "/one", "fe")),
        identify(tokens=40, adapter=adapter_name("a", "/one", variant="3d")),
        identify(tokens=40, cache_salt="a", adapter=adapter_name("a", "/one")),
        identify(tokens=40, inputs=[image]),
        identify(tokens=40, inputs=[(4, 10, "image", "b" * 64)]),
        identify(tokens=40, inputs=[(5, 10, "image", "a" * 64)]),
        identify(tokens=40, inputs=[(4, 11, "image", "a" * 64)]),
        identify(tokens=40, inputs=[(4, 10, "audio", "a" * 64)]),
        identify(tokens=40, inputs=[image, (20, 10, "image", "a" * 64)]),
        identify(tokens=40, inputs=[(4, 10, "image", "b" * 64), (20, 10, "image", "a" * 64)]),
        identify(tokens=40, inputs=[image, (20, 10, "image", "b" * 64)]),
    ]
    keys = [last_key(identity) for identity in identities]
    for (first, one), (second, other) in combinations(enumerate(keys), 2):
        assert one != other, f"{identities[first]} and {identities[second]}"


def test_what_is_equal_is_found() -> None:
    inputs = [(4, 10, "image", "a" * 64), (20, 10, "image", "b" * 64)]
    assert last_key(identify(tokens=40, inputs=inputs)) == last_key(identify(tokens=40, inputs=inputs[::-1]))
    assert identify(tokens=40, cache_salt="") == identify(tokens=40)
    # An adapter that two hosts have under other names and paths, by its bytes.
    assert adapter_name("a", "/one", "ff") == adapter_name("b", "/two", "ff")


def test_tokens_before_an_image_are_shared() -> None:
    """The image is hashed into the block that it stands in, not before."""
    with_image = identify(tokens=40, inputs=[(20, 10, "image", "a" * 64)])
    assert isinstance(with_image, RequestIdentity)
    chain = KeyChain(root_key(FINGERPRINT), 16)
    chain.extend(IDS, with_image.extras)
    plain = KeyChain(root_key(FINGERPRINT), 16)
    plain.extend(IDS)
    assert chain.key_at(16) == plain.key_at(16)
    assert chain.key_at(32) != plain.key_at(32)


@given(st.text(), st.text())
def test_salts_are_injective(one: str, other: str) -> None:
    found = [identify(tokens=1, cache_salt=salt) for salt in (one, other)]
    assert (found[0] == found[1]) == (one == other)
    assert all(isinstance(each, RequestIdentity) and len(each.salt) <= SALT_BYTES_MAX for each in found)


def test_a_long_salt_cannot_be_forged() -> None:
    """A salt that looks like the digest of a long one is hashed, too."""
    long = identify(tokens=1, cache_salt="x" * 5000)
    assert isinstance(long, RequestIdentity)
    forged = identify(tokens=1, cache_salt=long.salt.decode("latin-1"))
    assert isinstance(forged, RequestIdentity)
    assert forged.salt != long.salt
    assert len(forged.salt) == len(long.salt)


def test_what_has_no_identity_is_not_cached() -> None:
    for identity, reason in (
        (identify(tokens=40, has_embeddings=True), "prompt embeddings"),
        (identify(tokens=40, inputs=[(4, 10, "image", "")]), "has no digest"),
        (identify(tokens=40, inputs=[(40, 10, "image", "a")]), "outside of it"),
        (identify(tokens=40, inputs=[(-1, 10, "image", "a")]), "outside of it"),
    ):
        assert isinstance(identity, NotCached)
        assert reason in identity.reason


def test_the_digest_of_an_adapter(tmp_path: Path) -> None:
    assert adapter_digest(tmp_path / "none") == ""
    assert adapter_digest(tmp_path) == ""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"r": 8}')
        (tmp_path / name / "adapter_model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "README.md").write_text(name)
    first = adapter_digest(tmp_path / "one")
    assert len(first) == 64
    assert adapter_digest(str(tmp_path / "two")) == first
    (tmp_path / "two" / "adapter_config.json").write_text('{"r": 16}')
    assert adapter_digest(tmp_path / "two") != first
    (tmp_path / "one" / "adapter_model.safetensors").rename(tmp_path / "one" / "other.safetensors")
    assert adapter_digest(tmp_path / "one") != first


def test_hash_roots() -> None:
    for algorithm in ("sha256", "sha256_cbor"):
        check_hash_root(algorithm=algorithm, python_hash_seed="0")
    for algorithm, seed, message in (
        ("xxhash", "0", "collisions can be made"),
        ("builtin", "0", "collisions can be made"),
        ("sha256", None, "PYTHONHASHSEED is None"),
        ("sha256", "random", "set it to one number"),
        ("sha256_cbor", "", "set it to one number"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_hash_root(algorithm=algorithm, python_hash_seed=seed)
