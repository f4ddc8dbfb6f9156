"""Deadlines."""

from __future__ import annotations

import math
import time

import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError


def test_remaining_falls_with_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    deadline = Deadline.after(5.0)
    assert deadline.remaining_s() == 5.0
    assert not deadline.has_passed
    now_s = 104.0
    assert deadline.remaining_s() == 1.0
    deadline.check("a thing")


def test_a_passed_deadline_has_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    deadline = Deadline.after(5.0)
    for later_s in (105.0, 1000.0):
        now_s = later_s
        assert deadline.has_passed
        assert deadline.remaining_s() == 0.0
        with pytest.raises(DeadlineError, match="waiting for the answer of decode-3"):
            deadline.check("the answer of decode-3")


def test_negative_and_endless() -> None:
    assert Deadline.after(-1.0).has_passed
    endless = Deadline.after(math.inf)
    assert not endless.has_passed
    assert endless.remaining_s() == math.inf


def test_earlier_takes_the_first() -> None:
    first, second = Deadline(1.0), Deadline(2.0)
    assert first.earlier(second) is first
    assert second.earlier(first) is first
    assert first.earlier(Deadline(1.0)) == first


def test_errors_are_what_people_catch() -> None:
    assert issubclass(DeadlineError, TimeoutError)
    assert issubclass(DeadlineError, KVStoreError)
    assert DeadlineError.retryable
