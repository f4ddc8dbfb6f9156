"""Measure a subject: warm-up, rounds, medians; a profile, and how it came about."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.errors import ProfileError
from kvstore.profile import Profile
from kvstore.profiles.measuring.timings import Timing, curve_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from kvstore.profiles.measuring.settings import MeasuringSettings
    from kvstore.profiles.measuring.subject import Subject

CACHE_BYTES_SHARE = 0.01
"""By which a cache's bytes may differ from those of its spec."""


@dataclass(frozen=True)
class Measurement:
    """A measured profile.

    Attributes:
        details: how the times spread, and the sizes of real caches; for the profile's file.
    """

    profile: Profile
    prefill: tuple[Timing, ...]
    decode: tuple[Timing, ...]
    details: Mapping[str, Any]


def measure(
    subject: Subject,
    settings: MeasuringSettings,
    *,
    source: str,
    name: str | None = None,
    tick: Callable[[str], None] | None = None,
    show: Callable[[tuple[Timing, ...], tuple[Timing, ...]], None] | None = None,
) -> Measurement:
    """Time prefill by length and decode steps by batch.

    Every amount is run once untimed. Then rounds go over all amounts, so that a machine that becomes slower or faster
    meanwhile does so for all of them; of each the median counts.

    Args:
        source: where and when, for the profile.
        name: of the profile; by default the subject's.
        tick: told what comes next, `settings.forwards` times.
        show: told prefill and decode times as soon as all are there, before a curve is made of them.

    Raises:
        ProfileError: something does not fit, medians fall, or the spec's sizes are not those of real caches.
        DeadlineError: the settings' deadline passed.
    """
    longest = max(settings.lengths[-1], settings.context_tokens + 2 * settings.decode_steps)
    if longest > subject.tokens_max:
        raise ProfileError(
            f"{subject.name} takes at most {subject.tokens_max} tokens, not {longest}; choose shorter lengths, less "
            "context or fewer steps"
        )
    deadline = Deadline.after(settings.deadline_s)

    def begin(what: str) -> None:
        deadline.check(what)
        if tick is not None:
            tick(what)

    sizes = _checked_sizes(subject, settings.lengths, begin)
    prefill = _rounds(
        settings,
        settings.lengths,
        lambda tokens: (subject.prefill_s(tokens),),
        lambda round_, tokens: begin(f"prefill of {tokens} tokens, round {round_} of {settings.rounds}"),
    )

    def decode(requests: int) -> tuple[float, ...]:
        return subject.decode_steps_s(requests, settings.context_tokens, settings.decode_steps)

    for requests in settings.batches:
        begin(f"decoding {requests} at once, warm-up")
        decode(requests)
    steps = _rounds(
        settings,
        settings.batches,
        decode,
        lambda round_, requests: begin(f"decoding {requests} at once, round {round_} of {settings.rounds}"),
    )
    if show is not None:
        show(prefill, steps)
    prefill_curve, prefill_note = curve_of(prefill, "prefill", may_repair=settings.may_repair)
    decode_curve, decode_note = curve_of(steps, "a decode step", may_repair=settings.may_repair)
    notes = [("prefill", prefill_note), ("decode_step", decode_note)]
    notes.append(
        ("decode_batch_max", "the largest batch that was measured; memory or a limit on latency may set another")
    )
    profile = Profile(
        name=name or subject.name,
        source=f"{source}; {subject.origin}",
        prefill=prefill_curve,
        kv=subject.kv,
        decode_step=decode_curve,
        decode_batch_max=settings.batches[-1],
        accelerators=subject.accelerators,
        tokens_max=settings.lengths[-1],
        inferred=tuple((what, note) for what, note in notes if note),
    )
    details = {
        "rounds": settings.rounds,
        "prefill_s": _documents(prefill, "tokens"),
        "decode_context_tokens": settings.context_tokens,
        "decode_step_s": _documents(steps, "requests"),
        "cache_bytes": sizes,
    }
    return Measurement(profile, prefill, steps, details)


def _rounds(
    settings: MeasuringSettings,
    amounts: Iterable[int],
    run: Callable[[int], tuple[float, ...]],
    begin: Callable[[int, int], None],
) -> tuple[Timing, ...]:
    seconds: dict[int, list[float]] = {amount: [] for amount in amounts}
    for round_ in range(1, settings.rounds + 1):
        for amount, found in seconds.items():
            begin(round_, amount)
            found.extend(run(amount))
    return tuple(Timing(amount, tuple(found)) for amount, found in seconds.items())


def _checked_sizes(subject: Subject, lengths: tuple[int, ...], begin: Callable[[str], None]) -> list[dict[str, float]]:
    """Bytes of real caches beside those of the spec; their prefills are the warm-up.

    A profile whose S_kv is not what the model keeps would make every later plan wrong, so that it is refused.
    """
    found = []
    for tokens in lengths:
        begin(f"prefill of {tokens} tokens, warm-up")
        held, expected = subject.cache_bytes(tokens), subject.kv.total_bytes(tokens)
        if abs(held - expected) > CACHE_BYTES_SHARE * expected:
            raise ProfileError(
                f"a cache of {tokens} tokens of {subject.name} holds {held} bytes, its model spec says {expected:.0f}: "
                "the model keeps something else than its configuration says; write kv_bytes of the profile by hand"
            )
        found.append({"tokens": tokens, "held": held, "spec": expected})
    return found


def _documents(timings: tuple[Timing, ...], unit: str) -> list[dict[str, Any]]:
    """Of bounded size, however many rounds there were."""
    return [
        {
            unit: timing.amount,
            "times": len(timing.seconds),
            "fastest": min(timing.seconds),
            "quartiles": list(timing.quartiles_s),
            "median": timing.median_s,
            "slowest": max(timing.seconds),
        }
        for timing in timings
    ]
