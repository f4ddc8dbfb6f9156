"""Whole, chunked and layered prefill: what they cost the prompt, those who wait, and those who decode beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import PlanError
from kvstore.profile import KvSize, PolynomialCurve
from kvstore.schedule.prefill_service import PrefillServiceModel, ServiceKind
from tests.unit.schedule.snapshots import PROFILE

KINDS: tuple[ServiceKind, ...] = ("whole", "chunked", "layered")
TOKENS = st.integers(1, 131072)


def test_whole_is_the_profile() -> None:
    service = PrefillServiceModel().service(PROFILE, 32768, 8192)
    assert service.prefill_s == service.piece_s == PROFILE.prefill_s(32768, 8192)
    assert (service.pieces, service.decode_step_s) == (1, 0.0)


def test_chunks_cost_what_the_profile_says_of_each() -> None:
    service = PrefillServiceModel("chunked", piece_tokens=8192).service(PROFILE, 32768)
    chunks = [PROFILE.prefill_s(end, end - 8192) for end in (8192, 16384, 24576, 32768)]
    assert service.pieces == 4
    assert service.prefill_s == pytest.approx(sum(chunks))
    assert service.piece_s == pytest.approx(max(chunks))
    assert service.states_from_s == pytest.approx(sum(chunks[:-1])), "a linear state is final with the last chunk"


def test_layers_cost_nothing_more_and_states_leave_from_the_beginning() -> None:
    service = PrefillServiceModel("layered", piece_tokens=8192).service(PROFILE, 32768)
    assert service.pieces == 4
    assert service.prefill_s == PROFILE.prefill(32768)
    assert service.piece_s == PROFILE.prefill(32768) / 4
    assert service.states_from_s == 0.0


def test_decodes_stand_still_behind_a_whole_prompt_and_go_on_between_pieces() -> None:
    whole, chunked, layered = (PrefillServiceModel(kind, 2048).service(PROFILE, 65536, 0, 16) for kind in KINDS)
    whole_s, step_s = PROFILE.prefill(65536), PROFILE.decode_step(16)
    assert whole.decode_step_s == whole_s + step_s
    assert chunked.decode_step_s < whole.decode_step_s / 4
    assert layered.decode_step_s == pytest.approx(whole_s / 16 + step_s)
    assert layered.prefill_s == pytest.approx(whole_s + 15 * step_s)


@given(st.sampled_from(KINDS), TOKENS, st.floats(0, 1), st.integers(0, 20), st.integers(16, 8192), st.integers(1, 64))
def test_no_way_of_cutting_is_faster_than_not_cutting(
    kind: ServiceKind, tokens: int, present_share: float, batch: int, piece_tokens: int, groups: int
) -> None:
    present_tokens = int(tokens * present_share)
    service = PrefillServiceModel(kind, piece_tokens, groups).service(PROFILE, tokens, present_tokens, batch)
    if present_tokens == tokens:
        assert (service.pieces, service.prefill_s, service.piece_s) == (0, 0.0, 0.0)
        return
    whole_s = PROFILE.prefill_s(tokens, present_tokens)
    assert service.pieces >= 1
    assert service.prefill_s >= whole_s - 1e-9
    assert 0 < service.piece_s <= service.prefill_s * (1 + 1e-12)
    assert service.piece_s * service.pieces >= whole_s * (1 - 1e-9)
    assert 0 <= service.states_from_s < service.prefill_s
    assert service.decode_step_s >= (PROFILE.decode_step(batch) if batch else 0.0)
    if kind == "layered":
        assert service.piece_s <= whole_s, "layers never make others wait longer"


@given(st.sampled_from(KINDS), st.lists(TOKENS, min_size=1, max_size=8), st.integers(16, 8192), st.floats(0, 1))
def test_the_curve_is_what_a_prompt_alone_costs(
    kind: ServiceKind, lengths: list[int], piece_tokens: int, fixed_s: float
) -> None:
    """What plans are made with is what the simulator charges, whatever the profile costs at nearly no tokens."""
    for curve in (PROFILE.prefill, PolynomialCurve((fixed_s, 1e-5, 1e-10))):
        profile = replace(PROFILE, prefill=curve)
        model = PrefillServiceModel(kind, piece_tokens)
        expected = [model.service(profile, tokens).prefill_s for tokens in lengths]
        found = model.curve(profile).many(np.array([lengths, lengths], np.float64))
        assert found == pytest.approx(np.array([expected, expected]), rel=1e-9)
        assert model.curve(profile)(lengths[0]) == pytest.approx(expected[0], rel=1e-9)


def test_only_chunks_have_a_curve_of_their_own() -> None:
    for kind in ("whole", "layered"):
        assert PrefillServiceModel(kind).curve(PROFILE) is PROFILE.prefill
    assert PrefillServiceModel("chunked").curve(PROFILE).many(np.array([])).shape == (0,)


def test_states_are_held_back_by_chunks_alone() -> None:
    kv = KvSize(5e6, 100.0, 10.0, 4096)
    tokens = np.array([[1.0, 4096.0], [50_000.0, 7.0]])
    assert kv.resume_many(tokens) == pytest.approx(np.vectorize(kv.resume_bytes)(tokens))
    for kind in KINDS:
        expected = kv.resume_many(tokens) if kind == "chunked" else np.zeros_like(tokens)
        assert np.array_equal(PrefillServiceModel(kind).held_bytes(kv, tokens), expected)


@given(TOKENS, st.integers(16, 8192), st.integers(0, 20))
def test_a_chunk_of_the_whole_prompt_is_whole_prefill(tokens: int, piece_tokens: int, batch: int) -> None:
    whole = PrefillServiceModel("whole").service(PROFILE, tokens, 0, batch)
    chunked = PrefillServiceModel("chunked", max(tokens, 16)).service(PROFILE, tokens, 0, batch)
    layered = PrefillServiceModel("layered", piece_tokens, layer_groups_max=1).service(PROFILE, tokens, 0, batch)
    for other in (chunked, layered):
        assert (other.prefill_s, other.piece_s, other.decode_step_s) == (
            whole.prefill_s,
            whole.piece_s,
            whole.decode_step_s,
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PrefillServiceModel("sliced"), "unknown"),  # type: ignore[arg-type]
        (lambda: PrefillServiceModel("chunked", 8), "fewer than 16"),
        (lambda: PrefillServiceModel("layered", 512, 0), "at least 1"),
    ],
)
def test_bad_models_are_refused(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()  # type: ignore[operator]
