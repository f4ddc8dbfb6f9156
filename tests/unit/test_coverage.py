"""Coverage as a value, and the keys that it enters."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import SpecError
from kvstore.keys import sparse_key
from kvstore.pool import Prompt
from kvstore.spec import Coverage
from kvstore.spec.coverage import block_mask_bytes, first_tokens, is_block_mask, span_mask
from kvstore.testing.specs import hybrid, spans

SPEC = hybrid(4)
"""Attention in layers 1 and 3."""


def masks_of(tokens: int) -> st.SearchStrategy[dict[int, list[bool]]]:
    mask = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    return st.fixed_dictionaries({1: mask, 3: mask})


MASKS = st.integers(1, 21).flatmap(masks_of)


def test_a_coverage_has_one_form_per_meaning() -> None:
    by_ranges = Coverage.of_ranges(6, {3: [(4, 6), (0, 1), (1, 2)], 1: [(0, 6)]})
    by_masks = Coverage.of_masks({3: np.array([1, 1, 0, 0, 1, 1], bool)})
    assert by_ranges == by_masks == Coverage(6, ((3, b"\x33"),))
    assert hash(by_ranges) == hash(by_masks)
    assert by_ranges.mask(3).tolist() == [True, True, False, False, True, True]
    assert by_ranges.mask(1).all()
    assert Coverage.of_ranges(6, {}).is_all
    assert Coverage.of_ranges(6, {1: []}).mask(1).tolist() == [False] * 6


@pytest.mark.parametrize(
    ("tokens", "layers"),
    [
        (0, ()),
        (1 << 25, ()),
        (6, ((3, b"\x3f"),)),
        (6, ((3, b"\x73"),)),
        (6, ((3, b"\x33\0"),)),
        (6, ((3, b"\x33"), (1, b"\x33"))),
        (6, ((3, b"\x33"), (3, b"\x31"))),
        (6, ((-1, b"\x33"),)),
    ],
)
def test_other_forms_are_refused(tokens: int, layers: Any) -> None:
    with pytest.raises(SpecError):
        Coverage(tokens, layers)


@pytest.mark.parametrize("masks", [{}, {1: [1, 0]}, {1: [[True]]}, {1: [True], 3: [True, False]}])
def test_masks_of_another_kind_are_refused(masks: Any) -> None:
    with pytest.raises(SpecError):
        Coverage.of_masks(masks)


@pytest.mark.parametrize("held", [[(0, 7)], [(3, 3)], [(-1, 2)]])
def test_ranges_lie_within_the_tokens(held: list[tuple[int, int]]) -> None:
    with pytest.raises(SpecError, match="no range"):
        Coverage.of_ranges(6, {1: held})


def test_only_attention_layers_are_covered() -> None:
    Coverage.of_ranges(6, {1: []}).check(SPEC, 6)
    with pytest.raises(SpecError, match="no attention"):
        Coverage.of_ranges(6, {0: []}).check(SPEC, 6)
    with pytest.raises(SpecError, match="the prompt has 7"):
        Coverage.of_ranges(6, {1: []}).check(SPEC, 7)


@given(MASKS)
def test_blocks_say_what_the_masks_say(masks: dict[int, list[bool]]) -> None:
    tokens = len(masks[1])
    coverage = Coverage.of_masks({layer: np.array(mask) for layer, mask in masks.items()})
    blocks = coverage.block_masks(SPEC)
    assert len(blocks) == -(-tokens // 4)
    for number, mask in enumerate(blocks):
        held = [masks[layer][number * 4 : number * 4 + 4] for layer in (1, 3)]
        if mask is None:
            assert all(map(all, held))
        else:
            assert mask == bytes(sum(bit << at for at, bit in enumerate(bits)) for bits in held)
            assert is_block_mask(SPEC, mask, len(held[0]))
    sparse = {number: mask for number, mask in enumerate(blocks) if mask is not None}
    assert Coverage.of_blocks(SPEC, tokens, sparse) == coverage


@given(MASKS, st.data())
def test_a_coverage_is_cut_and_joined(masks: dict[int, list[bool]], data: st.DataObject) -> None:
    coverage = Coverage.of_masks({layer: np.array(mask) for layer, mask in masks.items()})
    cut = data.draw(st.integers(1, coverage.tokens))
    first = coverage.first(cut)
    assert [first.mask(layer).tolist() for layer in (1, 3)] == [masks[layer][:cut] for layer in (1, 3)]
    if cut < coverage.tokens:
        rest = Coverage.of_masks({layer: np.array(mask[cut:]) for layer, mask in masks.items()})
        assert first.followed_by(rest) == coverage


def test_the_mask_of_a_block_is_cut_to_its_tail() -> None:
    assert first_tokens(b"\x0d\x0f", 4, 3) == b"\x05\x07"
    assert first_tokens(b"\x0d\x0f", 4, 1) is None


def test_a_span_has_its_layers_part_of_the_mask() -> None:
    spec = spans(2)
    parts = [span_mask(spec, b"\1\2\3", 0, span.index) for span in spec.spans[0]]
    assert b"".join(parts) == b"\1\2\3"
    assert [len(part) for part in parts] == [len(span.layers) for span in spec.spans[0]]
    assert block_mask_bytes(spec) == 3


# Keys


def digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def test_coverage_enters_the_key_of_its_block_and_of_all_after_it() -> None:
    """As docs/keys.md has it, by hand."""
    exact = Prompt.of(SPEC, range(10))
    coverage = Coverage.of_ranges(10, {1: [(0, 5), (6, 10)]})
    sparse = Prompt.of(SPEC, range(10), coverage=coverage)
    assert sparse.path.keys[0] == exact.path.keys[0]
    mask = b"\x0d\x0f"
    message = b"kvstore.keys.coverage.v1\0" + exact.path.keys[1] + struct.pack("<I", 2) + mask
    assert sparse.path.keys[1] == digest(message) == sparse_key(exact.path.keys[1], mask)
    tail = b"kvstore.keys.block.v1\0" + sparse.path.keys[1] + struct.pack("<4I", 2, 8, 9, 0)
    assert sparse.path.tail_key == digest(tail)
    assert [(each.node, each.whole_key, each.mask) for each in sparse.path.sparse] == [(1, exact.path.keys[1], mask)]
    assert sparse.exact.path == exact.path
    assert sparse.path.coverage(SPEC) == coverage
    assert sparse.path.prefix(1) == exact.path.prefix(1)


def test_the_worked_example_of_the_document() -> None:
    assert sparse_key(bytes(range(32)), b"\x0d\x0f").hex() == (
        "b089de15458b226925678638a47e5fd770f4ba44f3538eb112c84e4997633f0e"
    )


def test_a_coverage_of_everything_changes_nothing() -> None:
    exact = Prompt.of(SPEC, range(10))
    whole = Prompt.of(SPEC, range(10), coverage=Coverage.of_ranges(10, {1: [(0, 10)]}))
    assert whole.path == exact.path
    assert whole.path.is_exact


def test_keys_of_tails_are_those_of_prompts_that_end_there() -> None:
    held = np.array([1, 1, 0, 1, 1, 0, 1, 0, 1, 1], bool)
    prompt = Prompt.of(SPEC, range(10), coverage=Coverage.of_masks({1: held, 3: ~held}))
    for end in (1, 2, 3, 5, 6, 7, 9):
        shorter = Prompt.of(SPEC, range(end), coverage=Coverage.of_masks({1: held[:end], 3: ~held[:end]}))
        key, node = prompt.tail_node(end // 4, end)
        assert key == shorter.path.tail_key
        assert (node,) == shorter.path.sparse[-1:]
