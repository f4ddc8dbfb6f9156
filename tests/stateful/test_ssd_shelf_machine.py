"""The SSD tier under keeps, evictions, damage, failing disks and power cuts.

Nothing that was durable is lost, and whatever is found is right. `KVSTORE_STATEFUL_EXAMPLES=2000` looks much longer.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.clock import Deadline
from kvstore.errors import ShelfRefusedError
from kvstore.placement.ssd import SsdOptions, SsdPlace, open_ssd
from kvstore.pool import Hold
from kvstore.record import which_intact
from kvstore.spec import WHOLE
from kvstore.store import open_store
from kvstore.testing.forgetful_disk import Fault, ForgetfulDisk
from kvstore.testing.shelf import Landing, query_of
from kvstore.testing.specs import hybrid, put_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvstore.placement.ssd import SsdShelf

SPEC = hybrid(4)
TEST_S = 30.0
SOURCE_BYTES = 16 << 20


def prompts() -> list[tuple[tuple[int, ...], bytes]]:
    """Token ids and salts: some that share their beginnings, and many that do not."""
    stem = tuple(range(12))
    listed = [(stem, b""), ((*stem, *range(50, 60)), b""), ((*stem, *range(70, 75)), b""), (stem[:6], b"")]
    listed += [(stem, b"tenant"), ((7,), b""), ((*stem, *range(50, 53)), b"tenant")]
    listed += [(tuple(range(1000 * number, 1000 * number + 20)), b"") for number in range(1, 24)]
    return listed


@lru_cache(maxsize=1)
def originals() -> tuple[Hold, ...]:
    """Every prompt's records in host memory, for the rest of the process."""
    store = open_store(SPEC, dram=SOURCE_BYTES)
    holds: list[Hold] = []
    for ids, salt in prompts():
        with store.write(store.prompt(ids, salt=salt)) as writer:
            put_all(writer)
            writer.commit()
        best = store.match((*ids, 0), salt=salt).best
        assert best is not None
        assert best.tokens == len(ids)
        hold = store.pool.hold(best.path)
        assert isinstance(hold, Hold)
        holds.append(hold)
    return tuple(holds)


class SsdMachine(RuleBasedStateMachine):
    """One shelf over some disks, whose power goes off.

    Attributes:
        promised: prompts that were reported durable, and were neither evicted nor found damaged since.
    """

    drives: ClassVar[int] = 1
    capacity_bytes: ClassVar[int] = 64 << 20
    is_ample: ClassVar[bool] = True
    """There is room for everything, so that nothing is dropped to make some."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf: SsdShelf | None = None
        self.promised: set[int] = set()

    @initialize(seed=st.integers(0, 1 << 16))
    def begin(self, seed: int) -> None:
        self.disks = {f"disk {number}": ForgetfulDisk(seed=seed + number) for number in range(self.drives)}
        self.shelf = self.opened()

    def opened(self) -> SsdShelf:
        places = tuple(SsdPlace(name, self.capacity_bytes // self.drives) for name in self.disks)
        # Small batches, so that a resume point often takes several.
        options = SsdOptions(places, batch_bytes=40 << 10)
        return open_ssd(SPEC, options, make_files=lambda place, _: self.disks[place.path].files())

    @property
    def open_shelf(self) -> SsdShelf:
        assert self.shelf is not None
        return self.shelf

    def teardown(self) -> None:
        if self.shelf is not None:
            self.shelf.close()

    # What comes and goes

    @rule(chosen=st.lists(st.integers(0, len(prompts()) - 1), min_size=1, max_size=4))
    def keep(self, chosen: list[int]) -> None:
        """Several at once, so that some become durable together."""
        holds = [originals()[number] for number in chosen]
        handles = [self.open_shelf.keep(hold.path, hold.salt, hold.placed) for hold in holds]
        for number, handle in zip(chosen, handles, strict=True):
            try:
                handle.result(TEST_S)
            except ShelfRefusedError:
                continue
            if self.is_ample:
                self.promised.add(number)

    @rule(number=st.integers(0, len(prompts()) - 1), node=st.integers(0, 5), states_only=st.booleans())
    def evict(self, number: int, node: int, states_only: bool) -> None:
        path = originals()[number].path
        key = path.key(min(node, len(path) - 1))
        self.open_shelf.evict(key, states_only=states_only)
        self.no_longer(key, states_only=states_only)

    @rule(number=st.integers(0, len(prompts()) - 1), node=st.integers(0, 5), is_state=st.booleans())
    def condemn(self, number: int, node: int, is_state: bool) -> None:
        path = originals()[number].path
        key = path.key(min(node, len(path) - 1))
        self.open_shelf.condemn(key, is_state=is_state)
        self.no_longer(key, states_only=is_state)

    def no_longer(self, key: bytes, *, states_only: bool) -> None:
        """What passes through a node, or ends there, may be gone; a power cut may bring it back."""
        for number in tuple(self.promised):
            path = originals()[number].path
            nodes = [len(path) - 1] if states_only else range(len(path))
            if any(path.key(node) == key for node in nodes):
                self.promised.discard(number)

    @rule(chosen=st.lists(st.integers(0, len(prompts()) - 1), min_size=1, max_size=4))
    def read(self, chosen: list[int]) -> None:
        for number in chosen:
            self.check_loads(number)

    # What happens to disks

    @rule(
        what=st.sampled_from(["write", "sync", "create", "sync_names", "remove", "truncate"]),
        number=st.sampled_from([errno.EIO, errno.ENOSPC, errno.EROFS]),
        name=st.sampled_from(["", "journal", "segment"]),
        skip=st.integers(0, 6),
        is_short=st.booleans(),
        disk=st.integers(0, 1),
    )
    def fault(self, what: str, number: int, name: str, skip: int, is_short: bool, disk: int) -> None:
        faults = list(self.disks.values())[disk % self.drives].faults
        faults.append(Fault(what, number, name, skip, is_short=is_short and what == "write"))

    @rule(after=st.integers(0, 40))
    def cut_power_soon(self, after: int) -> None:
        """In the middle of what the next rules do. All disks of a machine lose it together, as they notice it."""
        list(self.disks.values())[after % self.drives].cut_after(after + 1)

    @rule()
    def cut_power(self) -> None:
        for disk in self.disks.values():
            disk.cut_power()
        self.reopen()

    @rule()
    def restart(self) -> None:
        self.reopen()

    def reopen(self) -> None:
        """Whatever the disks are like: what was promised is there."""
        self.open_shelf.close()
        for disk in self.disks.values():
            disk.faults.clear()
            # A cut that was to come does not come while the tier is being opened: that is another test's.
            disk.cut_after(1 << 40)
        self.shelf = self.opened()
        assert not self.shelf.statistics().trouble
        for number in self.promised:
            assert self.check_loads(number), f"prompt {number} was durable and is lost"

    # What must hold

    def check_loads(self, number: int) -> bool:
        """Load the prompt's deepest resume point, if there is one, and compare it; whether it was all of it."""
        shelf, original = self.open_shelf, originals()[number]
        ids, salt = prompts()[number]
        store_prompt = _prompt((*ids, 0), salt)
        found = shelf.find(query_of(SPEC, store_prompt)).candidates
        for blocks, _, tail in found:
            path = original.path if tail is not None else original.path.prefix(blocks)
            if tail is not None and tail != original.path.tail_key:
                continue  # another prompt's tail, whose ids this one continues
            hold = shelf.hold(path, shard=WHOLE)
            assert hold is not None, "what was found is not there"
            with ExitStack() as ending:
                ending.callback(hold.release)
                self.check_hold(hold, original)
        return any(tokens == len(ids) for _, tokens, _ in found)

    def check_hold(self, hold: Any, original: Hold) -> None:
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        load = hold.load(numbers, landing.addresses)
        failed = set(load.wait(len(numbers), Deadline.after(TEST_S)))
        originals_by_name = dict(zip(original.placed.rows.names(), original.placed.memories, strict=True))
        layouts, headers, names = hold.rows.layouts(), hold.rows.headers(), hold.rows.names()
        for position, name in enumerate(names):
            at = landing.addresses[position : position + 1]
            is_intact = position not in failed and which_intact(layouts[position], at, [headers[position]])[0]
            if not is_intact:
                self.note_bad(hold, position)
            elif name in originals_by_name:
                size_bytes = layouts[position].record_bytes
                there = landing.record(position)[:size_bytes]
                assert there == originals_by_name[name][:size_bytes], f"{name} holds something else"

    def note_bad(self, hold: Any, position: int) -> None:
        """No disk was damaged; a read fails once the power is off only."""
        assert self.is_off(), "a record was found that is not intact"

    def is_off(self) -> bool:
        return any(disk.boots for disk in self.disks.values())

    @invariant()
    def holds_together(self) -> None:
        if self.shelf is not None:
            self.shelf.check()
            found = self.shelf.statistics()
            assert found.used_bytes <= found.capacity_bytes
            assert found.committed_bytes <= found.used_bytes


@cache
def _prompt(ids: Sequence[int], salt: bytes) -> Any:
    return _prompts().prompt(ids, salt=salt)


@lru_cache(maxsize=1)
def _prompts() -> Any:
    return open_store(SPEC, dram="1MiB")


class StripedSsdMachine(SsdMachine):
    drives: ClassVar[int] = 2


class FullSsdMachine(SsdMachine):
    """There is room for a part only, and bits flip."""

    capacity_bytes: ClassVar[int] = 1 << 20
    is_ample: ClassVar[bool] = False

    @precondition(lambda self: self.shelf is not None)
    @rule(bit=st.integers(0, 1 << 40), which=st.integers(0, 1 << 16))
    def flip(self, bit: int, which: int) -> None:
        disk = next(iter(self.disks.values()))
        segments = sorted(name for name in disk.names if name.startswith("segment"))
        if segments:
            name = segments[which % len(segments)]
            size_bytes = len(disk.peek(name))
            if size_bytes:
                disk.flip(name, bit % (8 * size_bytes))

    def note_bad(self, hold: Any, position: int) -> None:
        name = hold.rows.names()[position]
        is_state = name.group in SPEC.state_groups
        self.open_shelf.condemn(hold.path.key(name.node), is_state=is_state, slot=hold.rows.slots()[position])


MACHINE = settings(
    max_examples=int(os.environ.get("KVSTORE_STATEFUL_EXAMPLES", "25")),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

TestSsdMachine = SsdMachine.TestCase
TestSsdMachine.settings = MACHINE
TestStripedSsdMachine = StripedSsdMachine.TestCase
TestStripedSsdMachine.settings = MACHINE
TestFullSsdMachine = FullSsdMachine.TestCase
TestFullSsdMachine.settings = MACHINE
