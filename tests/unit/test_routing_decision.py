"""Decisions say why only when asked, and what crosses is never less than the states."""

from __future__ import annotations

from kvstore.profile import KvSize
from kvstore.schedule.policies.policy import Decision, Explanation


def test_an_explanation_is_made_when_it_is_asked_for_and_once() -> None:
    made = []

    def explain() -> Explanation:
        made.append(1)
        return Explanation("mine", "because", ())

    decision = Decision(None, explain)
    assert not made
    assert decision.explanation.rule == decision.explanation.rule == "because"
    assert len(made) == 1
    assert decision == Decision(None, Explanation("mine", "because", ()))
    assert decision != Decision(None, Explanation("mine", "another reason", ()))


def test_states_cross_even_where_all_attention_is_there() -> None:
    size = KvSize(state_bytes=1000, token_bytes=3, window_token_bytes=2, window_tokens=10)
    assert size.missing_bytes(100, 100) == size.missing_bytes(100, 140) == 1020
    assert size.missing_bytes(100, 90) == 1050
    assert size.missing_bytes(100, 0) == size.total_bytes(100)
    assert KvSize(0, 3).missing_bytes(100, 100) == 0
