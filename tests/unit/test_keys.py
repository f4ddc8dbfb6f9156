"""Prefix keys against pinned vectors, a second implementation, and what must never be equal."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SpecError, TokenError
from kvstore.keys import ExtraInput, KeyChain, prefix_keys, root_key, token_array
from kvstore.limits import EXTRA_BYTES_MAX, PROMPT_TOKENS_MAX, SALT_BYTES_MAX, TOKEN_ID_MAX
from tests.vectors import make_keys as reference

VECTORS = json.loads(reference.VECTORS.read_text(encoding="utf-8"))
FINGERPRINT = bytes(range(32))
ROOT = root_key(FINGERPRINT)

token_ids = st.lists(st.integers(0, TOKEN_ID_MAX), min_size=1, max_size=70)
block_sizes = st.sampled_from([1, 2, 3, 4, 7, 16])


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[ExtraInput]]:
    ids = draw(token_ids)
    extra = st.builds(ExtraInput, st.integers(0, len(ids) - 1), st.binary(max_size=6))
    return ids, draw(st.lists(extra, max_size=5))


def pairs(extras: list[ExtraInput]) -> list[tuple[int, bytes]]:
    return [(extra.position, extra.data) for extra in extras]


@pytest.mark.parametrize("case", VECTORS["keys"], ids=lambda case: case["name"])
def test_pinned_vectors(case: dict) -> None:
    root = root_key(bytes.fromhex(case["fingerprint"]), salt=bytes.fromhex(case["salt"]), adapter=case["adapter"])
    assert root.hex() == case["root"]
    chain = KeyChain(root, case["block_tokens"])
    chain.extend(case["token_ids"], [ExtraInput(e["position"], bytes.fromhex(e["data"])) for e in case["extras"]])
    assert [key.hex() for key in chain.block_keys] == case["block_keys"]
    tail = chain.tail_key()
    assert (tail and tail.hex()) == case["tail_key"]


def test_vectors_cover_what_the_document_promises() -> None:
    cases = {case["name"]: case for case in VECTORS["keys"]}
    assert {case["block_tokens"] for case in VECTORS["keys"]} >= {1, 4, 16, 64, 256}
    assert cases["empty salt equals no salt"]["root"] == cases["no salt, no adapter, one whole block"]["root"]
    roots = [case["root"] for name, case in cases.items() if name != "empty salt equals no salt"]
    unlike = {(c["fingerprint"], c["salt"], c["adapter"]) for c in VECTORS["keys"]}
    assert len(set(roots)) == len(unlike)


def test_worked_example_of_the_document() -> None:
    text = (reference.VECTORS.parents[2] / "docs" / "keys.md").read_text(encoding="utf-8")
    case = VECTORS["keys"][0]
    for value in (case["root"], *case["block_keys"], case["tail_key"]):
        assert value in text


@given(prompts(), block_sizes, st.binary(max_size=8), st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
def test_equals_the_second_implementation(prompt: tuple, block_tokens: int, salt: bytes, adapter: str) -> None:
    ids, extras = prompt
    root = root_key(FINGERPRINT, salt=salt, adapter=adapter)
    assert root == reference.root(FINGERPRINT, salt, adapter)
    chain = KeyChain(root, block_tokens)
    chain.extend(ids, extras)
    assert (chain.block_keys, chain.tail_key()) == reference.chain(root, ids, block_tokens, pairs(extras))


@given(prompts(), block_sizes, st.lists(st.integers(1, 69), max_size=6))
def test_any_split_gives_the_same_chain(prompt: tuple, block_tokens: int, cuts: list[int]) -> None:
    ids, extras = prompt
    whole, split = KeyChain(ROOT, block_tokens), KeyChain(ROOT, block_tokens)
    whole.extend(ids, extras)
    edges = [0, *sorted({cut for cut in cuts if cut < len(ids)}), len(ids)]
    for start, end in pairwise(edges):
        split.extend(ids[start:end], [extra for extra in extras if start <= extra.position < end])
        assert split.tokens == end
        split.tail_key()
    assert split.block_keys == whole.block_keys
    assert split.tail_key() == whole.tail_key()
    assert split.tail_ids.tolist() == ids[len(ids) - len(ids) % block_tokens :]
    assert split.key_at(len(ids)) == whole.key_at(len(ids))


@given(prompts(), block_sizes, st.integers(1, 70))
def test_a_tail_key_is_the_key_of_the_shorter_prompt(prompt: tuple, block_tokens: int, length: int) -> None:
    ids, extras = prompt
    length = min(length, len(ids))
    longer, shorter = KeyChain(ROOT, block_tokens), KeyChain(ROOT, block_tokens)
    longer.extend(ids, extras)
    shorter.extend(ids[:length], [extra for extra in extras if extra.position < length])
    whole = length // block_tokens
    assert shorter.block_keys == longer.block_keys[:whole]
    if length % block_tokens:
        assert shorter.tail_key() == shorter.key_at(length)
        assert shorter.tail_key() not in longer.block_keys
    else:
        assert shorter.tail_key() is None
        assert longer.key_at(length) == shorter.key_at(length)


@given(token_ids, st.integers(0, 69), st.integers(0, TOKEN_ID_MAX), block_sizes)
def test_another_token_changes_every_later_key(ids: list[int], position: int, token: int, block_tokens: int) -> None:
    position %= len(ids)
    other = ids.copy()
    other[position] = token if token != ids[position] else token ^ 1
    first = prefix_keys(ROOT, ids, block_tokens)
    second = prefix_keys(ROOT, other, block_tokens)
    changed = position // block_tokens
    assert first[:changed] == second[:changed]
    assert not set(first[changed:]) & set(second[changed:])


@given(
    st.tuples(st.binary(max_size=5), st.text("ab\0", max_size=5)),
    st.tuples(st.binary(max_size=5), st.text("ab\0", max_size=5)),
)
def test_roots_are_equal_only_for_equal_fields(first: tuple, second: tuple) -> None:
    one = root_key(FINGERPRINT, salt=first[0], adapter=first[1])
    two = root_key(FINGERPRINT, salt=second[0], adapter=second[1])
    assert (one == two) == (first == second)


def test_bytes_moved_between_fields_change_the_key() -> None:
    assert root_key(FINGERPRINT, salt=b"ab", adapter="c") != root_key(FINGERPRINT, salt=b"a", adapter="bc")
    assert root_key(FINGERPRINT, salt=b"a") != root_key(FINGERPRINT, adapter="a")
    assert root_key(FINGERPRINT) != root_key(FINGERPRINT[::-1])

    def key(ids: list[int], *extras: tuple[int, bytes]) -> bytes:
        chain = KeyChain(ROOT, 4)
        chain.extend(ids, [ExtraInput(position, data) for position, data in extras])
        return chain.key_at(len(ids))

    # Each pair has the same bytes once lengths and counts are taken away, or nearly so.
    ambiguous = [
        key([1, 2, 3]),
        key([1, 2, 3, 0]),
        key([1, 2], (0, b"\x03\0\0\0")),
        key([1, 2, 3], (0, b"")),
        key([1, 2, 3], (1, b"")),
        key([1, 2, 3], (0, b"ab")),
        key([1, 2, 3], (0, b"a"), (0, b"b")),
        key([1, 2, 3], (0, b"a"), (1, b"b")),
        key([1, 2, 3], (0, b""), (0, b"")),
    ]
    assert len(set(ambiguous)) == len(ambiguous)


def test_the_order_in_which_extras_are_given_does_not_matter() -> None:
    extras = [ExtraInput(6, b"b"), ExtraInput(6, b"a"), ExtraInput(1, b"z"), ExtraInput(5, b"")]
    for seed in range(5):
        shuffled = extras.copy()
        random.Random(seed).shuffle(shuffled)
        assert prefix_keys(ROOT, range(8), 4, shuffled) == prefix_keys(ROOT, range(8), 4, extras)


def test_an_extra_changes_its_block_and_later_ones_only() -> None:
    plain = prefix_keys(ROOT, range(16), 4)
    marked = prefix_keys(ROOT, range(16), 4, [ExtraInput(5, b"image")])
    assert plain[0] == marked[0]
    assert not set(plain[1:]) & set(marked[1:])


def test_key_at_boundaries_and_end() -> None:
    chain = KeyChain(ROOT, 4)
    chain.extend(range(10))
    assert chain.key_at(0) == ROOT
    assert chain.key_at(4) == chain.block_keys[0]
    assert chain.key_at(8) == chain.block_keys[1]
    assert chain.key_at(10) == chain.tail_key()
    for length in (-4, 3, 9, 11, 12):
        with pytest.raises(TokenError, match="no key at length"):
            chain.key_at(length)


def test_a_fork_is_independent() -> None:
    chain = KeyChain(ROOT, 4)
    chain.extend(range(6), [ExtraInput(5, b"x")])
    left, right = chain.fork(), chain.fork()
    left.extend([7, 8, 9])
    right.extend([8, 8, 9])
    assert chain.tokens == 6
    assert len(chain.block_keys) == 1
    assert left.block_keys[0] == right.block_keys[0] == chain.block_keys[0]
    assert left.block_keys[1] != right.block_keys[1]
    assert left.block_keys == prefix_keys(ROOT, [*range(6), 7, 8, 9], 4, [ExtraInput(5, b"x")])


def test_what_is_hashed_does_not_change_with_the_callers_array() -> None:
    ids = np.arange(6, dtype=np.uint32)
    chain = KeyChain(ROOT, 4)
    chain.extend(ids)
    expected = chain.fork().tail_key()
    ids[:] = 99
    assert chain.tail_ids.tolist() == [4, 5]
    assert chain.tail_key() == expected
    with pytest.raises(ValueError, match="read-only"):
        chain.tail_ids[0] = 1


def test_a_failed_extension_changes_nothing() -> None:
    chain = KeyChain(ROOT, 4)
    chain.extend(range(6))
    before = (chain.tokens, list(chain.block_keys), chain.tail_key())
    for ids, extras in (
        ([1, -1], []),
        ([], []),
        ([1, 2], [ExtraInput(5, b"x")]),
        ([1, 2], [ExtraInput(8, b"x")]),
        ([1, 2], [ExtraInput(6, bytes(EXTRA_BYTES_MAX)), ExtraInput(7, b"x")]),
    ):
        with pytest.raises(TokenError):
            chain.extend(ids, extras)
        assert (chain.tokens, list(chain.block_keys), chain.tail_key()) == before


def test_the_limit_of_extras_counts_those_already_in_the_tail() -> None:
    chain = KeyChain(ROOT, 4)
    chain.extend([1], [ExtraInput(0, bytes(EXTRA_BYTES_MAX))])
    with pytest.raises(TokenError, match=str(EXTRA_BYTES_MAX)):
        chain.extend([2], [ExtraInput(1, b"x")])
    chain.extend([2, 3, 4, 5], [ExtraInput(4, b"x")])


@pytest.mark.parametrize(
    "ids",
    [
        [5, 6, 7],
        (5, 6, 7),
        range(5, 8),
        [[5, 6, 7]],
        np.array([5, 6, 7], np.int64),
        np.array([[5, 6, 7]], np.uint32),
        np.array([5, 0, 6, 0, 7, 0], np.int16)[::2],
        np.array([5, 6, 7], ">u4"),
    ],
)
def test_forms_of_token_ids(ids: object) -> None:
    array = token_array(ids)
    assert array.dtype == np.dtype("<u4")
    assert array.flags.c_contiguous
    assert array.tolist() == [5, 6, 7]


def test_torch_token_ids() -> None:
    torch = pytest.importorskip("torch")
    assert token_array(torch.tensor([[5, 6, 7]])).tolist() == [5, 6, 7]
    assert token_array(torch.tensor([5, 6], dtype=torch.int32)).tolist() == [5, 6]
    with pytest.raises(TokenError, match="integers"):
        token_array(torch.tensor([5.0]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "no token ids"),
        (np.empty((1, 0), np.int64), "no token ids"),
        ([1, -1], "-1"),
        ([TOKEN_ID_MAX + 1], str(TOKEN_ID_MAX + 1)),
        ([2**63], str(2**63)),
        ([2**70], str(2**70)),
        ([-(2**70), 3], str(-(2**70))),
        ([1.0], "integers"),
        ([True, False], "integers"),
        (["1"], "integers"),
        ("123", "tokenize"),
        (7, "shape"),
        ([None], "integers"),
        ([[1, 2], [3, 4]], "one prompt"),
        ([[1, 2], [3]], "integers"),
        (np.zeros((1, 1, 3), np.int64), "one prompt"),
        (np.broadcast_to(np.uint32(1), PROMPT_TOKENS_MAX + 1), str(PROMPT_TOKENS_MAX)),
    ],
)
def test_bad_token_ids(ids: object, message: str) -> None:
    with pytest.raises(TokenError, match=message):
        token_array(ids)


def test_a_prompt_has_a_limit_across_extensions() -> None:
    chain = KeyChain(ROOT, 256)
    chain.extend(np.zeros(PROMPT_TOKENS_MAX, np.uint32))
    with pytest.raises(TokenError, match=str(PROMPT_TOKENS_MAX)):
        chain.extend([1])


def test_bad_roots_and_blocks() -> None:
    for fingerprint in (b"", bytes(31), bytes(33), "x" * 32):
        with pytest.raises(SpecError, match="fingerprint"):
            root_key(fingerprint)  # type: ignore[arg-type]
    with pytest.raises(TokenError, match="salt"):
        root_key(FINGERPRINT, salt=bytes(SALT_BYTES_MAX + 1))
    with pytest.raises(TokenError, match="salt must be bytes"):
        root_key(FINGERPRINT, salt="tenant-7")  # type: ignore[arg-type]
    with pytest.raises(TokenError, match="adapter"):
        root_key(FINGERPRINT, adapter="\u00e4" * (SALT_BYTES_MAX // 2 + 1))
    with pytest.raises(TokenError, match="UTF-8"):
        root_key(FINGERPRINT, adapter="\ud800")
    with pytest.raises(TokenError, match="adapter"):
        root_key(FINGERPRINT, adapter=b"a")  # type: ignore[arg-type]
    for block_tokens in (0, -1, 257):
        with pytest.raises(TokenError, match="block_tokens"):
            KeyChain(ROOT, block_tokens)
    with pytest.raises(TokenError, match="root"):
        KeyChain(b"short", 4)


def test_bad_extras() -> None:
    for position in (-1, PROMPT_TOKENS_MAX, 1.0):
        with pytest.raises(TokenError, match="position"):
            ExtraInput(position, b"")  # type: ignore[arg-type]
    with pytest.raises(TokenError, match=str(EXTRA_BYTES_MAX)):
        ExtraInput(0, bytes(EXTRA_BYTES_MAX + 1))
    with pytest.raises(TokenError, match="must be bytes"):
        ExtraInput(0, "x")  # type: ignore[arg-type]


def test_extending_by_a_block_hashes_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    import kvstore.keys as keys

    hashed: list[int] = []
    real = keys.sha256

    def counting(message: bytes) -> Any:
        hashed.append(len(message))
        return real(message)

    monkeypatch.setattr(keys, "sha256", counting)
    chain = KeyChain(ROOT, 16)
    chain.extend(range(16 * 1000))
    hashed.clear()
    chain.extend(range(16))
    assert len(hashed) == 1
    assert hashed[0] < 200
