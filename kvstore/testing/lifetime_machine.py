"""`StoreMachine` under a clock of its own: records that end, prompts that are not wanted any more, and pins.

    TestLives = LifetimeMachine.for_spec(hybrid(4), dram_bytes=16 << 20).TestCase

What must be gone at a moment, and what must still be there, is known beforehand, of every record.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from kvstore.errors import PinLimitError
from kvstore.spec import WHOLE, ReuseRule
from kvstore.testing.store_machine import LIVE_MAX, MANY, StoreMachine
from kvstore.testing.store_model import Prefix, StoreModel, prefixes

if TYPE_CHECKING:
    from kvstore.pool import Pin

TTLS_S = (None, None, 5.0, 20.0)

Part = tuple[Prefix, ReuseRule]
"""A prefix's attention, or its states."""


@dataclass
class Lives:
    """Until when every part of a model is wanted, and every prompt that somebody wrote."""

    model: StoreModel
    parts: dict[Part, float] = field(default_factory=dict)
    prompts: dict[Prefix, float] = field(default_factory=dict)

    def tidy(self) -> None:
        """Forget what is not there any more."""
        self.parts = {part: at for part, at in self.parts.items() if self.model.copies(*part)}
        self.prompts = {prefix: at for prefix, at in self.prompts.items() if prefix in self.model.records}

    def live_on(self, part: Part, ends_s: float) -> None:
        if self.model.copies(*part):
            self.parts[part] = max(self.parts.get(part, 0.0), ends_s)

    def set_end(self, path: list[Prefix], ends_s: float, after_tokens: int | None) -> int:
        """As `Store.expire`, by the rules of docs/limits.md."""
        self.tidy()
        deepest = max((number for number, prefix in enumerate(path) if prefix in self.model.records), default=-1)
        if deepest < 0:
            return 0
        for number, prefix in enumerate(path[: deepest + 1]):
            if number == deepest or (after_tokens is not None and len(prefix[1]) > after_tokens):
                if self.model.copies(prefix, ReuseRule.STATE):
                    self.parts[prefix, ReuseRule.STATE] = ends_s
                if number == deepest or prefix in self.prompts:
                    self.prompts[prefix] = ends_s
        for prefix in reversed(path[: deepest + 1]):
            if not self.model.copies(prefix, ReuseRule.ATTENTION):
                break
            below = self.model.below(prefix)
            hanging = [
                at for part, at in self.parts.items() if part[0] in below and part != (prefix, ReuseRule.ATTENTION)
            ]
            self.parts[prefix, ReuseRule.ATTENTION] = max(ends_s, self.prompts.get(prefix, 0.0), *hanging, 0.0)
        return len(path[deepest][1])


@dataclass
class LivePin:
    pin: Pin
    path: list[Prefix]


class LifetimeMachine(StoreMachine):
    """One store whose clock passes when a rule says so."""

    def __init__(self) -> None:
        super().__init__()
        self.lives = Lives(self.model)
        self.pins: list[LivePin] = []

    def _draw_ttl(self, data: st.DataObject) -> float | None:
        return data.draw(st.sampled_from(TTLS_S), label="ttl")

    def _before_commit(self) -> None:
        self.lives.tidy()

    def _after_commit(
        self, path: list[Prefix], lengths: tuple[int, ...], ttl_s: float | None, *, is_final: bool
    ) -> None:
        ends_s = math.inf if ttl_s is None else self.now_s + ttl_s
        for prefix in path:
            self.lives.live_on((prefix, ReuseRule.ATTENTION), ends_s)
            if len(prefix[1]) in lengths:
                self.lives.live_on((prefix, ReuseRule.STATE), ends_s)
        if is_final and path[-1] in self.model.records:
            self.lives.prompts[path[-1]] = max(self.lives.prompts.get(path[-1], 0.0), ends_s)

    def _is_held(self, prefix: Prefix, rule_: ReuseRule) -> bool:
        if super()._is_held(prefix, rule_):
            return True
        return any(
            prefix in (live.path if rule_ is ReuseRule.ATTENTION else live.path[-1:])
            for live in self.pins
            if not live.pin.is_closed
        )

    def _let_end(self) -> None:
        """What the store has let go of by now goes from the model."""
        self.lives.tidy()
        written = {prefix for live in self.writers for prefix in live.path}
        for (prefix, rule_), ends_s in list(self.lives.parts.items()):
            if ends_s > self.now_s or (rule_ is ReuseRule.ATTENTION and prefix in written):
                continue
            self.condemned.add(prefix)  # who holds its node held it before, and will hold what may come there
            resumed = [writer.resume for writer in self.writers if writer.resume is not None]
            for live in (*self.leases, *resumed):
                path = prefixes(live.salt, live.ids, self.spec.block_tokens)
                live.has_ended |= prefix in (path if rule_ is ReuseRule.ATTENTION else path[-1:])
            kept = [copy for copy in self.model.records.get(prefix, ()) if copy not in self.model.copies(prefix, rule_)]
            if kept:
                self.model.records[prefix] = kept
            else:
                self.model.records.pop(prefix, None)
        self.lives.tidy()

    @rule(seconds=st.sampled_from((1.0, 5.0, 19.0)))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self._let_end()
        self.pins = [live for live in self.pins if not live.pin.is_closed]

    @precondition(lambda self: self.model.records)
    @rule(data=st.data(), ttl_s=st.sampled_from((None, 0.0, 5.0)))
    def expire(self, data: st.DataObject, ttl_s: float | None) -> None:
        ids = self._draw_ids(data)
        salt = data.draw(st.sampled_from((b"", b"other")), label="salt")
        after_tokens = data.draw(st.one_of(st.none(), st.integers(0, len(ids))), label="after")
        ends_s = math.inf if ttl_s is None else self.now_s + ttl_s
        expected = self.lives.set_end(prefixes(salt, ids, self.spec.block_tokens), ends_s, after_tokens)
        assert self.store.expire(ids, ttl_s, salt=salt, after_tokens=after_tokens) == expected
        self._let_end()

    @precondition(lambda self: self.model.records and len(self.pins) < LIVE_MAX)
    @rule(data=st.data(), salt=st.sampled_from((b"", b"other")), ttl_s=st.sampled_from((None, 5.0)))
    def pin(self, data: st.DataObject, salt: bytes, ttl_s: float | None) -> None:
        ids = self._draw_ids(data)
        match = self._match(ids, salt, WHOLE, None)
        if not match:
            return
        try:
            pin = self.store.pin(match, ttl_s=ttl_s)
        except PinLimitError:
            return
        self.pins.append(LivePin(pin, prefixes(salt, ids[: pin.tokens], self.spec.block_tokens)))

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.pins))
        self.pins.remove(live)
        live.pin.close()

    @precondition(
        lambda self: len(self.model.records) > MANY and not self.writers and not self.leases and not self.pins
    )
    @rule()
    def evict_everything(self) -> None:
        super().evict_everything()

    @invariant()
    def budget_is_exact(self) -> None:
        self._let_end()
        super().budget_is_exact()
        self.evicted = self.store.statistics().evicted_records
        statistics = self.store.statistics()
        assert statistics.pins == len([live for live in self.pins if not live.pin.is_closed])
        assert statistics.pinned_bytes <= self.limits.pinned_fraction * self.dram_bytes

    @invariant()
    def nothing_unfinished_is_seen(self) -> None:
        self._let_end()
        super().nothing_unfinished_is_seen()

    def teardown(self) -> None:
        for live in self.pins:
            live.pin.close()
        super().teardown()
