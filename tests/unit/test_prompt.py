"""Prompts: ids, identity and prefix nodes, checked once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.errors import SpecError, TokenError, WriteError
from kvstore.keys import ExtraInput, KeyChain, root_key
from kvstore.limits import EXTRA_BYTES_MAX, PROMPT_TOKENS_MAX, SALT_BYTES_MAX, TOKEN_ID_MAX
from kvstore.pool import Prompt
from kvstore.store import Store, open_store
from kvstore.testing.specs import hybrid

SPEC = hybrid(16)


def test_nodes_of_a_prompt() -> None:
    prompt = Prompt.of(SPEC, range(40), salt=b"s", adapter="a")
    path = prompt.path
    chain = KeyChain(root_key(SPEC.fingerprint, salt=b"s", adapter="a"), 16)
    chain.extend(range(40))
    assert (len(prompt), len(path), path.tokens) == (40, 3, 40)
    assert [path.key(node) for node in range(3)] == [*chain.block_keys, chain.tail_key()]
    assert [path.parent(node) for node in range(3)] == [path.root, *chain.block_keys]
    assert [path.end_tokens(node) for node in range(3)] == [16, 32, 40]
    assert path.tail_ids == tuple(range(32, 40))
    assert [path.node_at(tokens) for tokens in (0, 16, 17, 32, 39, 40, 48)] == [None, 0, None, 1, None, 2, None]
    assert path.prefix(2).tokens == 32
    assert path.prefix(3) is path
    with pytest.raises(IndexError):
        path.key(3)


def test_a_shorter_prompt_is_a_tail_only() -> None:
    path = Prompt.of(SPEC, [1, 2, 3]).path
    assert (len(path), path.tokens, path.keys) == (1, 3, ())
    assert path.parent(0) == path.root


def test_tail_keys_are_those_of_shorter_prompts() -> None:
    extras = [ExtraInput(3, b"a"), ExtraInput(35, b"b"), ExtraInput(37, b"c")]
    prompt = Prompt.of(SPEC, range(64), extras=extras)
    for end in range(33, 48):
        shorter = Prompt.of(SPEC, range(end), extras=[extra for extra in extras if extra.position < end])
        assert prompt.tail_key(2, end) == shorter.path.tail_key
    assert Prompt.of(SPEC, range(64)).tail_key(2, 36) != prompt.tail_key(2, 36)


def test_the_callers_array_may_change() -> None:
    ids = np.arange(20, dtype=np.uint32)
    prompt = Prompt.of(SPEC, ids)
    ids[17] = 99
    assert prompt.token_ids[17] == 17
    with pytest.raises(ValueError, match="read-only"):
        prompt.token_ids[0] = 1


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token ids"),
        ([1, -1], "-1"),
        ([TOKEN_ID_MAX + 1], str(TOKEN_ID_MAX)),
        ([1 << 70], "outside"),
        ([-(1 << 70)], "outside"),
        ([0.5], "integers"),
        ("text", "tokenize"),
        ([[1, 2], [3, 4]], "shape"),
        (np.zeros(PROMPT_TOKENS_MAX + 1, np.uint8), str(PROMPT_TOKENS_MAX)),
    ],
    ids=["empty", "negative", "huge", "beyond 64 bits", "far negative", "fraction", "text", "matrix", "too many"],
)
def test_ids_that_are_none(ids: Any, message: str) -> None:
    with open_store(SPEC, dram="1MiB") as store:
        for call in (store.prompt, store.match, store.write, store.accept):
            with pytest.raises(TokenError, match=message):
                call(ids)
        assert store.statistics().nodes == 0


@pytest.mark.parametrize(
    "identity",
    [
        {"salt": b"x" * (SALT_BYTES_MAX + 1)},
        {"salt": "text"},
        {"adapter": "x" * (SALT_BYTES_MAX + 1)},
        {"adapter": b"bytes"},
        {"extras": [ExtraInput(2, b"past the end")]},
        {"extras": [ExtraInput(0, bytes(EXTRA_BYTES_MAX)), ExtraInput(1, b"x")]},
    ],
)
def test_identities_past_their_limits(identity: dict[str, Any]) -> None:
    with open_store(SPEC, dram="1MiB") as store, pytest.raises(TokenError):
        store.match([1, 2], **identity)


def test_a_prompt_is_of_one_spec() -> None:
    """Other weights of the same shape, and other block sizes, are other caches."""
    with open_store(SPEC, dram="1MiB") as store:
        prompt = store.prompt(range(20))
        store.match(prompt)
        for other in (hybrid(16, weights="seed 1"), hybrid(4)):
            with open_store(other, dram="1MiB") as foreign:
                _refuses(foreign, prompt, SpecError, "another model spec")


def test_a_prompt_has_its_identity_already() -> None:
    with open_store(SPEC, dram="1MiB") as store:
        prompt = store.prompt(range(20), salt=b"a")
        for identity in ({"salt": b"a"}, {"adapter": "a"}, {"extras": [ExtraInput(0, b"")]}):
            with pytest.raises(WriteError, match="already"):
                store.match(prompt, **identity)  # type: ignore[arg-type]


def _refuses(store: Store, prompt: Prompt, error: type[Exception], message: str) -> None:
    for call in (store.match, store.write, store.accept):
        with pytest.raises(error, match=message):
            call(prompt)
    with pytest.raises(error, match=message):
        store.when_ready(prompt, 1)
