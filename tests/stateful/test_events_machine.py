"""Who listens knows what is stored: the events add up to the pool's content, after whatever happens to it."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, precondition, rule

from kvstore.events import Event, Hit, Missed, Removed, RemovedWhy, Stored
from kvstore.pool import LRUPolicy
from kvstore.spec import ReuseRule
from kvstore.testing.specs import dense, hybrid
from kvstore.testing.store_machine import StoreMachine

EXAMPLES = int(os.environ.get("KVSTORE_STATEFUL_EXAMPLES", "60")) // 3

pytestmark = pytest.mark.timeout(900 if EXAMPLES <= 100 else 0)

LISTENERS_MAX = 3
BLOCK_TOKENS = 4


class Mirror:
    """What a listener knows from events alone: bytes by key, and whether they are states."""

    def __init__(self, contents: tuple[Stored, ...]) -> None:
        self.known: dict[tuple[bytes, bool], int] = {}
        self.sequence = 0
        for event in contents:
            assert event.sequence == 0
            self._stored(event)

    def follow(self, events: list[Event]) -> None:
        for event in events:
            self.sequence += 1
            assert event.sequence == self.sequence, "nothing was dropped, and still there is a gap"
            if isinstance(event, Stored):
                self._stored(event)
            elif isinstance(event, Removed):
                self._removed(event)
            else:
                assert isinstance(event, (Hit, Missed))

    def _stored(self, event: Stored) -> None:
        for block in event.blocks:
            place = block.key, block.is_state
            if not block.is_state and block.end_tokens > BLOCK_TOKENS:
                assert (block.parent, False) in self.known, "a block was told of before the one that it hangs on"
            self.known[place] = self.known.get(place, 0) + block.size_bytes

    def _removed(self, event: Removed) -> None:
        assert event.why in RemovedWhy
        for block in event.blocks:
            assert self.known.pop((block.key, block.is_state)) == block.size_bytes


class WatchedMachine(StoreMachine):
    """Some listen from the beginning, some come later and are told what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners = [(self.store.events(1 << 16), Mirror(()))]

    @precondition(lambda self: len(self.listeners) < LISTENERS_MAX)
    @rule()
    def listen(self) -> None:
        stream = self.store.events(1 << 16, contents=True)
        self.listeners.append((stream, Mirror(stream.contents)))

    @precondition(lambda self: len(self.listeners) > 1)
    @rule()
    def listen_no_more(self) -> None:
        stream, _ = self.listeners.pop(0)
        stream.close()

    @invariant()
    def events_add_up(self) -> None:
        expected = {
            (self._key(prefix), self.spec.groups[copy.group].rule is ReuseRule.STATE)
            for prefix, copies in self.model.records.items()
            for copy in copies
        }
        for stream, mirror in self.listeners:
            mirror.follow(stream.take())
            assert stream.dropped == 0
            assert set(mirror.known) == expected
            assert sum(mirror.known.values()) == self.store.statistics().committed_bytes

    def teardown(self) -> None:
        super().teardown()
        for stream, mirror in self.listeners:
            events = stream.take()
            mirror.follow(events)
            assert not mirror.known, "the store is closed, and a listener believes that it holds something"
            assert stream.is_ended


def _case(machine: type[StoreMachine]) -> type:
    case = machine.TestCase
    case.settings = settings(
        settings.default,
        max_examples=max(1, EXAMPLES),
        stateful_step_count=40,
        suppress_health_check=list(HealthCheck),
    )
    return case


TestRoomy = _case(WatchedMachine.for_spec(hybrid(BLOCK_TOKENS), dram_bytes=16 << 20))
TestTight = _case(WatchedMachine.for_spec(hybrid(BLOCK_TOKENS), dram_bytes=120 << 10))
TestTightDense = _case(WatchedMachine.for_spec(dense(BLOCK_TOKENS), dram_bytes=120 << 10, policy=LRUPolicy))
