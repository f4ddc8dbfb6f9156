"""From times to a profile, without a model: rounds, medians, what is refused."""

from __future__ import annotations

from collections import Counter
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import DeadlineError, ProfileError
from kvstore.limits import PROFILE_FILE_BYTES_MAX, PROFILE_POINTS_MAX
from kvstore.profile import KvSize, MeasuredCurve
from kvstore.profiles import load_profile, write_profile
from kvstore.profiles.files import profile_from_text, profile_to_text
from kvstore.profiles.measuring import MeasuringSettings, Subject, measure
from kvstore.profiles.measuring.timings import Timing, curve_of, never_falling

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class ScriptedSubject(Subject):
    """Takes the seconds that a test says, and keeps what it was asked."""

    name = "scripted"
    origin = "nothing real"
    kv = KvSize(1000, 10)
    tokens_max = 100_000
    accelerators = 4

    def __init__(
        self,
        prefill_s: Callable[[int, int], float] = lambda tokens, _: tokens * 1e-3,
        step_s: Callable[[int, int], float] = lambda requests, _: 0.01 + requests * 1e-3,
        held_share: float = 1.0,
    ) -> None:
        self._prefill_s = prefill_s
        self._step_s = step_s
        self._held_share = held_share
        self._times: Counter[tuple[str, int]] = Counter()
        self.asked: list[tuple[str, int]] = []

    def prefill_s(self, tokens: int) -> float:
        return self._prefill_s(tokens, self._next("prefill", tokens))

    def cache_bytes(self, tokens: int) -> int:
        self.asked.append(("cache", tokens))
        return round(self.kv.total_bytes(tokens) * self._held_share)

    def decode_steps_s(self, requests: int, context_tokens: int, steps: int) -> tuple[float, ...]:
        time = self._next("decode", requests)
        return tuple(self._step_s(requests, time) for _ in range(steps))

    def _next(self, what: str, amount: int) -> int:
        self.asked.append((what, amount))
        self._times[what, amount] += 1
        return self._times[what, amount] - 1


SETTINGS = MeasuringSettings(lengths=(100, 1000), batches=(1, 8), rounds=3, context_tokens=64, decode_steps=2)


def test_a_measurement_is_a_profile_of_medians() -> None:
    slow_once = {0: 1.0, 1: 9.0, 2: 1.1}
    subject = ScriptedSubject(
        prefill_s=lambda tokens, time: tokens * 1e-3 * slow_once[time],
        step_s=lambda requests, time: requests * 0.01 + (5.0 if time == 0 else 0.0),
    )
    measured = measure(subject, SETTINGS, source="here, today")
    profile = measured.profile
    assert isinstance(profile.prefill, MeasuredCurve)
    assert profile.prefill.xs == (100.0, 1000.0)
    assert profile.prefill.ys == pytest.approx((0.11, 1.1))
    assert profile.decode_step == MeasuredCurve((1.0, 8.0), (0.01, 0.08)), "the warm-up does not count"
    assert profile.kv == subject.kv
    assert (profile.decode_batch_max, profile.accelerators, profile.tokens_max) == (8, 4, 1000)
    assert profile.source == "here, today; nothing real"
    assert [what for what, _ in profile.inferred] == ["decode_batch_max"]
    assert [len(timing.seconds) for timing in measured.decode] == [6, 6]
    assert measured.details["prefill_s"][1] == {
        "tokens": 1000,
        "times": 3,
        "fastest": 1.0,
        "quartiles": [1.05, 5.05],
        "median": 1.1,
        "slowest": 9.0,
    }
    assert measured.details["cache_bytes"][0] == {"tokens": 100, "held": 2000, "spec": 2000}
    assert profile_from_text(profile_to_text(profile, details=measured.details)) == profile


def test_rounds_go_over_everything_after_a_warm_up() -> None:
    subject = ScriptedSubject()
    told: list[str] = []
    measure(subject, SETTINGS, source="x", tick=told.append)
    lengths, batches = [("prefill", 100), ("prefill", 1000)], [("decode", 1), ("decode", 8)]
    assert subject.asked == [("cache", 100), ("cache", 1000), *lengths * 3, *batches, *batches * 3]
    assert len(told) == SETTINGS.forwards
    assert told[0] == "prefill of 100 tokens, warm-up"
    assert told[-1] == "decoding 8 at once, round 3 of 3"


def test_what_falls_is_refused_after_it_was_shown() -> None:
    subject = ScriptedSubject(prefill_s=lambda tokens, _: 0.5 if tokens == 100 else 0.4)
    shown: list[Any] = []
    with pytest.raises(ProfileError, match=r"prefill takes 0.5 s at 100 and 0.4 s at 1000, 20.0% less.*--isotonic"):
        measure(subject, SETTINGS, source="x", show=lambda *timings: shown.append(timings))
    assert [timing.median_s for timing in shown[0][0]] == [0.5, 0.4]


def test_averages_of_what_falls_are_named() -> None:
    subject = ScriptedSubject(step_s=lambda requests, _: 0.5 if requests == 1 else 0.4)
    settings = MeasuringSettings((100, 1000), (1, 8), may_repair=True)
    profile = measure(subject, settings, source="x").profile
    assert profile.decode_step == MeasuredCurve((1.0, 8.0), (0.45, 0.45))
    note = dict(profile.inferred)["decode_step"]
    assert note.startswith("isotonic: 1 of 2 medians fell")
    assert "20.0% less" in note
    assert "prefill" not in dict(profile.inferred)


def test_the_longest_measurement_fits_into_a_file(tmp_path: Path) -> None:
    settings = MeasuringSettings(
        tuple(range(1, PROFILE_POINTS_MAX + 1)), tuple(range(1, PROFILE_POINTS_MAX + 1)), rounds=20, decode_steps=50
    )
    measured = measure(ScriptedSubject(), settings, source="x")
    write_profile(measured.profile, tmp_path / "long.json", details=measured.details)
    assert load_profile(tmp_path / "long.json") == measured.profile
    assert (tmp_path / "long.json").stat().st_size < PROFILE_FILE_BYTES_MAX // 2


def test_a_cache_that_holds_something_else_is_refused() -> None:
    with pytest.raises(
        ProfileError, match=r"a cache of 100 tokens of scripted holds 2100 bytes, its model spec says 2000"
    ):
        measure(ScriptedSubject(held_share=1.05), SETTINGS, source="x")


def test_a_measurement_ends() -> None:
    told: list[str] = []
    with pytest.raises(DeadlineError, match="prefill of 100 tokens, warm-up"):
        measure(ScriptedSubject(), MeasuringSettings((100,), (1,), deadline_s=1e-9), source="x", tick=told.append)
    assert not told


def test_longer_than_the_model_takes() -> None:
    with pytest.raises(ProfileError, match="scripted takes at most 100000 tokens, not 200000"):
        measure(ScriptedSubject(), MeasuringSettings((200_000,), (1,)), source="x")
    with pytest.raises(ProfileError, match="not 100016"):
        measure(ScriptedSubject(), MeasuringSettings((5,), (1,), context_tokens=100_000), source="x")


def test_spread_is_that_of_the_middle_half() -> None:
    assert Timing(1, (1.0, 2.0, 3.0, 4.0, 500.0)).spread == pytest.approx(2 / 3), (
        "one that was interrupted hardly counts"
    )
    assert Timing(1, (5.0,)).spread == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lengths": ()}, "lengths must be 1 to 256"),
        ({"lengths": (2, 1)}, "ascending numbers, not 2, 1"),
        ({"batches": (4, 4)}, "batches must be"),
        ({"lengths": (0, 1)}, "lengths=0 is outside"),
        ({"lengths": (1, 1 << 40)}, "lengths=1099511627776 is outside"),
        ({"batches": tuple(range(1, 300))}, "batches must be 1 to 256"),
        ({"rounds": 0}, "rounds=0"),
        ({"context_tokens": 0}, "context_tokens=0"),
        ({"decode_steps": 5000}, "decode_steps=5000"),
        ({"deadline_s": 0.0}, "deadline_s=0"),
        ({"deadline_s": float("nan")}, "deadline_s=nan"),
    ],
)
def test_settings_have_limits(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        MeasuringSettings(**{"lengths": (1,), "batches": (1,), **fields})


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_repaired_medians_never_fall_and_change_only_where_they_must(values: list[float]) -> None:
    found = never_falling(values)
    assert len(found) == len(values)
    assert all(before <= after for before, after in pairwise(found))
    assert sum(found) == pytest.approx(sum(values))
    if all(before <= after for before, after in pairwise(values)):
        assert found == pytest.approx(values)
    # The nearest by squares: none of these simpler candidates is nearer.
    tops = [max(values[: i + 1]) for i in range(len(values))]
    error = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
    assert error <= sum((a - b) ** 2 for a, b in zip(tops, values, strict=True)) * (1 + 1e-9) + 1e-9


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=10))
def test_a_curve_is_as_measured_or_refused_or_named(values: list[float]) -> None:
    timings = [Timing(amount, (value,)) for amount, value in zip(count(1), values, strict=False)]
    repaired, note = curve_of(timings, "prefill", may_repair=True)
    if any(after < before for before, after in pairwise(values)):
        assert note.startswith("isotonic")
        with pytest.raises(ProfileError, match="medians fall"):
            curve_of(timings, "prefill", may_repair=False)
    else:
        assert note == ""
        assert curve_of(timings, "prefill", may_repair=False) == (repaired, "")
        assert repaired.ys == tuple(values)
