"""Conformance kit for shelves: tiers beside the pool's memory, with an index of their own.

A test module of the implementer's own:

    class TestMine(ShelfConformance):
        @pytest.fixture
        def shelf(self):
            with closing(MyShelf(self.spec, self.capacity_bytes)) as shelf:
                yield shelf

        def reopen(self, shelf):              # where it is durable
            shelf.close()
            return MyShelf(self.spec, self.capacity_bytes)

A shelf that is not filled by `keep` overrides `fill` and sets `takes_records` to False.
"""

from __future__ import annotations

import threading
from contextlib import closing
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pytest

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, ShelfRefusedError
from kvstore.events import Changes, RemovedWhy
from kvstore.limits import RECORD_ALIGN_BYTES
from kvstore.placement.ends import Ends
from kvstore.placement.shelf import Shelf
from kvstore.pool import Hold
from kvstore.pool.index import LASTING_US
from kvstore.pool.search import Query
from kvstore.record import which_intact
from kvstore.spec import WHOLE, ChunkGrid, Coverage, ReuseRule, Shard
from kvstore.store import open_store
from kvstore.testing.resources import Background
from kvstore.testing.specs import hybrid, put_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from kvstore.placement.shelf import ShelfHold
    from kvstore.pool import Prompt
    from kvstore.pool.rows import Rows
    from kvstore.spec import ModelSpec
    from kvstore.store import Store

TEST_S = 30.0
FAR_US = 1 << 55
"""A moment far in the future, by any clock."""
SLACK_US = 3_600_000_000
"""What a shelf's clock may run on while it is opened again."""


class Landing:
    """Host memory for records, aligned as a load needs it.

    Attributes:
        addresses: where each record goes, `[n]`.
    """

    def __init__(self, rows: Rows, numbers: npt.NDArray[np.int64]) -> None:
        sizes = np.array(rows.slot_sizes, np.int64)[numbers]
        self._memory = np.full(int(sizes.sum()) + RECORD_ALIGN_BYTES, 0xA5, np.uint8)
        begin = -self._memory.ctypes.data % RECORD_ALIGN_BYTES
        ends = begin + sizes.cumsum()
        self._ranges = list(zip((ends - sizes).tolist(), ends.tolist(), strict=True))
        self.addresses = (ends - sizes + self._memory.ctypes.data).astype(np.uint64)

    def record(self, position: int) -> memoryview:
        begin, end = self._ranges[position]
        return self._memory.data[begin:end]

    def is_untouched(self, position: int) -> bool:
        return bool((np.frombuffer(self.record(position), np.uint8) == 0xA5).all())


def query_of(spec: ModelSpec, prompt: Prompt, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None) -> Query:
    """What `Pool.match` asks an index for a prompt that is wanted as deep as possible."""
    return Query(spec, prompt, prompt.path, len(prompt) - 1, shard, grid)


def intact(rows: Rows, numbers: npt.NDArray[np.int64], addresses: npt.NDArray[np.uint64]) -> bool:
    """Whether each record is what its row says, checksums included."""
    layouts, headers = rows.layouts(), rows.headers()
    return all(
        which_intact(layouts[number], addresses[at : at + 1], [headers[number]])[0]
        for at, number in enumerate(numbers.tolist())
    )


def _replayed(told: Sequence[Changes]) -> dict[tuple[bytes, bool], int]:
    """What is there after these changes: bytes by key, and whether they are states."""
    known: dict[tuple[bytes, bool], int] = {}
    for changes in told:
        for block in changes.blocks:
            place = block.key, block.is_state
            if changes.why is None:
                known[place] = known.get(place, 0) + block.size_bytes
            else:
                assert known.pop(place) == block.size_bytes, "something left that nobody was told of"
    return known


class ShelfConformance:
    """The cases; a subclass gives the shelf, open and empty, with `capacity_bytes` of room for records of `spec`.

    Attributes:
        spec: whose records are kept; hybrid, with blocks of 4 tokens.
        capacity_bytes: the shelf's room, of which the cases use a part; `test_makes_room` fills it several times.
        takes_records: whether `keep` takes records; else `fill` brings them there.
        evicts: whether it makes room by itself when `keep` needs some.
    """

    spec: ClassVar[ModelSpec] = hybrid(4)
    capacity_bytes: ClassVar[int] = 2 << 20
    takes_records: ClassVar[bool] = True
    evicts: ClassVar[bool] = True

    @pytest.fixture
    def shelf(self) -> Iterator[Shelf]:
        """The shelf under test."""
        raise NotImplementedError("override the fixture `shelf`")

    def reopen(self, shelf: Shelf) -> Shelf:
        """Close it, and open what is durable anew."""
        raise NotImplementedError("override `reopen` where the shelf is durable")

    def fill(self, shelf: Shelf, hold: Hold) -> int:
        """Bring a resume point to the shelf; the bytes that it took of it."""
        return shelf.keep(hold.path, hold.salt, hold.placed).result(TEST_S)

    @pytest.fixture
    def source(self) -> Iterator[Store]:
        """A store in host memory: what is kept comes from there."""
        with open_store(self.spec, dram="4MiB") as store:
            yield store

    # What cases are made of

    def write(
        self,
        source: Store,
        ids: Sequence[int],
        *,
        salt: bytes = b"",
        resume_at: Sequence[int] | None = None,
        grid: ChunkGrid | None = None,
    ) -> Hold:
        """Write a prompt into the source and hold it; at its end, or at the last of `resume_at`."""
        prompt = source.prompt(ids, salt=salt)
        with source.write(prompt, resume_at=resume_at, grid=grid) as writer:
            put_all(writer)
            writer.commit()
        return self.held(source, ids, salt=salt, tokens=None if resume_at is None else resume_at[-1])

    def held(self, source: Store, ids: Sequence[int], *, salt: bytes = b"", tokens: int | None = None) -> Hold:
        """Hold what the source has of a prompt."""
        found = source.match((*ids, 0), salt=salt)
        assert found.best is not None
        best = found.best if tokens is None else found.at(tokens).best
        assert best is not None
        hold = source.pool.hold(best.path)
        assert isinstance(hold, Hold)
        return hold

    def lengths(self, shelf: Shelf, source: Store, ids: Sequence[int], **asked: object) -> list[int]:
        """Where the prompt can be resumed from the shelf, deepest first."""
        salt = asked.pop("salt", b"")
        assert isinstance(salt, bytes)
        prompt = source.prompt((*ids, 0), salt=salt)
        found = shelf.find(query_of(self.spec, prompt, **asked))  # type: ignore[arg-type]
        return [tokens for _, tokens, _ in found.candidates]

    def assert_loads(self, shelf: Shelf, original: Hold) -> None:
        """The resume point is there, bit for bit."""
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None, "the shelf does not have what it found"
        try:
            self.assert_same(hold, original)
        finally:
            hold.release()

    def assert_same(self, hold: ShelfHold, original: Hold) -> None:
        assert hold.path == original.path
        assert hold.salt == original.salt
        assert hold.rows.names() == original.placed.rows.names()
        assert hold.rows.headers() == original.placed.rows.headers()
        numbers = np.arange(len(hold.rows))[::-1].copy()
        landing = Landing(hold.rows, numbers)
        load = hold.load(numbers, landing.addresses)
        assert list(load.wait(len(numbers), Deadline.after(TEST_S))) == []
        for position, number in enumerate(numbers.tolist()):
            size_bytes = hold.rows.layouts()[number].record_bytes
            there = original.placed.memories[number]
            assert landing.record(position)[:size_bytes] == there[:size_bytes]
        assert intact(hold.rows, numbers, landing.addresses)

    # Empty

    def test_begins_empty(self, shelf: Shelf, source: Store) -> None:
        found = shelf.statistics()
        assert found.name == shelf.name
        assert shelf.name
        assert found.committed_bytes == found.kept_bytes == found.loaded_bytes == found.damaged_records == 0
        assert found.capacity_bytes == self.capacity_bytes
        assert not found.trouble
        assert self.lengths(shelf, source, range(20)) == []
        assert shelf.hold(source.prompt(range(20)).path, shard=WHOLE) is None
        assert shelf.evict(bytes(32)) == 0
        shelf.condemn(bytes(32), is_state=True)
        shelf.check()

    # Keeping

    def test_what_is_kept_is_found_and_loads(self, shelf: Shelf, source: Store) -> None:
        hold = self.write(source, range(21), resume_at=[8, 16, 21])
        kept_bytes = self.fill(shelf, hold)
        assert kept_bytes == hold.placed.slots.size_bytes
        assert self.lengths(shelf, source, range(21)) == [21]
        self.assert_loads(shelf, hold)
        found = shelf.statistics()
        assert found.committed_bytes == kept_bytes
        assert 0 < found.committed_bytes <= found.used_bytes
        assert found.index_bytes > 0
        if self.takes_records:
            assert found.kept_bytes == kept_bytes
            assert found.written_bytes >= kept_bytes
        assert found.loaded_bytes == kept_bytes
        shelf.check()

    def test_only_what_is_lacking_is_taken(self, shelf: Shelf, source: Store) -> None:
        first = self.write(source, range(8))
        second = self.write(source, range(14))
        first_bytes = self.fill(shelf, first)
        assert self.fill(shelf, first) == 0
        assert self.fill(shelf, second) == second.placed.slots.size_bytes - sum(
            layout.slot_bytes
            for name, layout in zip(second.placed.rows.names(), second.placed.rows.layouts(), strict=True)
            if name.node < 2
        )
        assert self.lengths(shelf, source, range(14)) == [14, 8]
        self.assert_loads(shelf, first)
        self.assert_loads(shelf, second)
        assert shelf.statistics().committed_bytes > first_bytes
        shelf.check()

    def test_checkpoints_of_one_prompt(self, shelf: Shelf, source: Store) -> None:
        last = self.write(source, range(24), resume_at=[8, 16, 24])
        for tokens in (8, 16):
            self.fill(shelf, self.held(source, range(24), tokens=tokens))
        self.fill(shelf, last)
        assert self.lengths(shelf, source, range(24)) == [24, 16, 8]
        for tokens in (24, 16, 8):
            self.assert_loads(shelf, self.held(source, range(24), tokens=tokens))
        shelf.check()

    def test_salts_are_apart(self, shelf: Shelf, source: Store) -> None:
        ours, theirs = self.write(source, range(9)), self.write(source, range(9), salt=b"other")
        self.fill(shelf, theirs)
        assert self.lengths(shelf, source, range(9)) == []
        assert self.lengths(shelf, source, range(9), salt=b"other") == [9]
        self.fill(shelf, ours)
        self.assert_loads(shelf, ours)
        self.assert_loads(shelf, theirs)

    def test_grids_are_asked_for(self, shelf: Shelf, source: Store) -> None:
        grid = ChunkGrid.every(4, upto=16)
        self.fill(shelf, self.write(source, range(16), grid=grid))
        assert self.lengths(shelf, source, range(16), grid=ChunkGrid.every(4, upto=20)) == [16]
        assert self.lengths(shelf, source, range(16), grid=ChunkGrid.every(8, upto=24)) == []
        path = source.prompt(range(16)).path
        assert shelf.hold(path, shard=WHOLE, grid=ChunkGrid.every(8, upto=16)) is None
        hold = shelf.hold(path, shard=WHOLE, grid=grid)
        assert hold is not None
        hold.release()

    def test_chunkings_are_beside_each_other(self, shelf: Shelf, source: Store) -> None:
        """One prompt computed with other chunk boundaries is another variant: both are kept, and not mixed."""
        if not self.takes_records:
            pytest.skip("this shelf is not filled by `keep`")
        prompt = source.prompt(range(16))
        grids = [ChunkGrid.every(tokens, upto=16) for tokens in (4, 16)]
        originals = []
        for grid in grids:
            with source.write(prompt, grid=grid) as writer:
                put_all(writer)
                writer.commit()
            original = source.pool.hold(prompt.path, grid=grid)
            assert isinstance(original, Hold)
            assert self.fill(shelf, original) > 0, "a second variant was not taken"
            originals.append(original)
        for grid, original in zip(grids, originals, strict=True):
            assert self.lengths(shelf, source, range(16), grid=grid) == [16]
            hold = shelf.hold(prompt.path, shard=WHOLE, grid=grid)
            assert hold is not None
            self.assert_same(hold, original)
            hold.release()
        shelf.check()

    def test_shards_are_asked_for(self, shelf: Shelf, source: Store) -> None:
        """A worker's share is found in whole records, and a share alone does not serve who needs all."""
        self.fill(shelf, self.write(source, range(12)))
        assert self.lengths(shelf, source, range(12), shard=Shard(1, 2)) == [12]
        prompt = source.prompt(range(50, 62))
        with source.write(prompt, shard=Shard(0, 2)) as writer:
            put_all(writer)
            writer.commit()
        hold = source.pool.hold(prompt.path, shard=Shard(0, 2))
        assert isinstance(hold, Hold)
        self.fill(shelf, hold)
        assert self.lengths(shelf, source, range(50, 62), shard=Shard(0, 2)) == [12]
        assert self.lengths(shelf, source, range(50, 62)) == []

    def test_sparse_is_refused(self, shelf: Shelf, source: Store) -> None:
        if not self.takes_records:
            pytest.skip("this shelf is not filled by `keep`")
        ids = range(12)
        layer = self.spec.groups[self.spec.attention_groups[0]].layers[0]
        mask = np.ones(12, np.bool_)
        mask[5] = False
        prompt = source.prompt(ids, coverage=Coverage.of_masks({layer: mask}))
        with source.write(prompt) as writer:
            put_all(writer)
            writer.commit()
        hold = source.pool.hold(prompt.path)
        assert isinstance(hold, Hold)
        with pytest.raises(ShelfRefusedError) as refused:
            shelf.keep(hold.path, hold.salt, hold.placed).result(TEST_S)
        assert shelf.statistics().refused == {refused.value.reason: 1}
        assert shelf.statistics().committed_bytes == 0
        shelf.check()

    def test_makes_room(self, shelf: Shelf, source: Store) -> None:
        """More than it holds: it stays within its capacity, and what it finds it has."""
        if not (self.takes_records and self.evicts):
            pytest.skip("this shelf does not evict by itself")
        kept_bytes, number = 0, 0
        while kept_bytes < 3 * self.capacity_bytes:
            ids = range(number * 1000, number * 1000 + 40)
            hold = self.write(source, ids)
            try:
                kept_bytes += self.fill(shelf, hold)
            except ShelfRefusedError:
                kept_bytes += hold.placed.slots.size_bytes
            hold.release()
            number += 1
            found = shelf.statistics()
            assert found.used_bytes <= found.capacity_bytes
        assert shelf.statistics().evicted_records > 0
        shelf.check()
        still_there = 0
        for each in range(number):
            ids = range(each * 1000, each * 1000 + 40)
            if self.lengths(shelf, source, ids):
                again = shelf.hold(source.prompt(ids).path, shard=WHOLE)
                assert again is not None
                numbers = np.arange(len(again.rows))
                landing = Landing(again.rows, numbers)
                assert list(again.load(numbers, landing.addresses).wait(len(numbers), Deadline.after(TEST_S))) == []
                assert intact(again.rows, numbers, landing.addresses)
                again.release()
                still_there += 1
        assert still_there
        shelf.check()

    def test_what_is_larger_than_it_is_refused(self, shelf: Shelf) -> None:
        if not self.takes_records:
            pytest.skip("this shelf is not filled by `keep`")
        blocks = self.capacity_bytes // RECORD_ALIGN_BYTES
        with open_store(self.spec, dram=4 * self.capacity_bytes) as large:
            hold = self.write(large, range(blocks * self.spec.block_tokens))
            assert hold.placed.slots.size_bytes > self.capacity_bytes
            with pytest.raises(ShelfRefusedError) as refused:
                shelf.keep(hold.path, hold.salt, hold.placed).result(TEST_S)
            assert shelf.statistics().refused == {refused.value.reason: 1}
        shelf.check()

    # Holding and loading

    def test_a_hold_keeps_what_it_names(self, shelf: Shelf, source: Store) -> None:
        """Neither eviction nor damage that somebody reports takes the bytes from under a hold."""
        original = self.write(source, range(10))
        self.fill(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        first = original.path.key(0)
        assert shelf.evict(first) == 0
        assert shelf.evict(original.path.key(len(original.path) - 1), states_only=True) == 0
        shelf.condemn(first, is_state=False)
        assert self.lengths(shelf, source, range(10)) == []
        self.assert_same(hold, original)
        shelf.check()
        hold.release()
        hold.release()
        assert shelf.statistics().committed_bytes == 0
        shelf.check()

    def test_part_of_it_in_another_order(self, shelf: Shelf, source: Store) -> None:
        original = self.write(source, range(13))
        self.fill(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        numbers = np.array([2, 0, len(hold.rows) - 1], np.int64)
        landing = Landing(hold.rows, numbers)
        load = hold.load(numbers, landing.addresses)
        assert list(load.wait(1, Deadline.after(TEST_S))) == []
        size_bytes = hold.rows.layouts()[2].record_bytes
        assert landing.record(0)[:size_bytes] == original.placed.memories[2][:size_bytes]
        assert list(load.wait(3, Deadline.after(TEST_S))) == []
        assert intact(hold.rows, numbers, landing.addresses)
        load.cancel()
        load.cancel()
        hold.release()
        shelf.check()

    def test_a_cancelled_load_moves_nothing_more(self, shelf: Shelf, source: Store) -> None:
        """After `cancel` the memory is the caller's again: what counts as arrived has arrived, the rest has failed."""
        original = self.write(source, range(40))
        self.fill(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        load = hold.load(numbers, landing.addresses)
        load.cancel()
        before = bytes(landing.record(0)), bytes(landing.record(len(numbers) - 1))
        failed = set(load.wait(len(numbers), Deadline.after(TEST_S)))
        arrived = np.array([number for number in numbers.tolist() if number not in failed], np.int64)
        assert intact(hold.rows, arrived, landing.addresses[arrived])
        hold.release()
        assert before == (bytes(landing.record(0)), bytes(landing.record(len(numbers) - 1)))
        self.assert_loads(shelf, original)
        shelf.check()

    def test_loads_beside_each_other(self, shelf: Shelf, source: Store) -> None:
        original = self.write(source, range(30))
        self.fill(shelf, original)
        running = [Background(lambda: self.assert_loads(shelf, original)) for _ in range(4)]
        for each in running:
            each.result(TEST_S)
        shelf.check()

    def test_keeping_and_loading_beside_each_other(self, shelf: Shelf, source: Store) -> None:
        """Several threads keep one prompt and others; readers meet nothing unfinished."""
        if not self.takes_records:
            pytest.skip("this shelf is not filled by `keep`")
        holds = [self.write(source, [*range(8), *range(100 * number, 100 * number + 9)]) for number in range(4)]
        may_go = threading.Barrier(len(holds) * 2)

        def keep(hold: Hold) -> None:
            may_go.wait(TEST_S)
            self.fill(shelf, hold)
            self.assert_loads(shelf, hold)

        running = [Background(lambda hold=hold: keep(hold)) for hold in holds * 2]  # type: ignore[misc]
        for each in running:
            each.result(TEST_S)
        for hold in holds:
            self.assert_loads(shelf, hold)
        assert shelf.statistics().committed_bytes == sum(
            hold.placed.slots.size_bytes - (number > 0) * self._shared_bytes(hold) for number, hold in enumerate(holds)
        )
        shelf.check()

    @staticmethod
    def _shared_bytes(hold: Hold) -> int:
        names, layouts = hold.placed.rows.names(), hold.placed.rows.layouts()
        return sum(layout.slot_bytes for name, layout in zip(names, layouts, strict=True) if name.node < 2)

    # Losing

    def test_condemned_attention_takes_what_hangs_on_it(self, shelf: Shelf, source: Store) -> None:
        last = self.write(source, range(16), resume_at=[4, 8, 16])
        for tokens in (4, 8):
            self.fill(shelf, self.held(source, range(16), tokens=tokens))
        self.fill(shelf, last)
        shelf.condemn(last.path.key(1), is_state=False)
        assert self.lengths(shelf, source, range(16)) == [4]
        assert shelf.statistics().damaged_records == 1
        shelf.check()
        self.fill(shelf, last)
        self.assert_loads(shelf, last)

    def test_condemned_states_leave_the_rest(self, shelf: Shelf, source: Store) -> None:
        last = self.write(source, range(16), resume_at=[8, 16])
        self.fill(shelf, self.held(source, range(16), tokens=8))
        self.fill(shelf, last)
        lost_before = shelf.lost_records
        shelf.condemn(last.path.key(1), is_state=True)
        assert shelf.lost_records > lost_before
        assert self.lengths(shelf, source, range(16)) == [16]
        self.assert_loads(shelf, last)
        shelf.check()

    def test_condemned_too_late_is_nothing(self, shelf: Shelf, source: Store) -> None:
        """The damaged record has left meanwhile, and another one lies in its place."""
        original = self.write(source, range(8))
        self.fill(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        numbers = [name.node for name in hold.rows.names()]
        row = next(
            number
            for number, name in enumerate(hold.rows.names())
            if self.spec.groups[name.group].rule is ReuseRule.ATTENTION
        )
        slot = hold.rows.slots()[row]
        key = original.path.key(numbers[row])
        hold.release()
        assert shelf.evict(key) > 0
        self.fill(shelf, original)
        shelf.condemn(key, is_state=False, slot=slot)
        self.assert_loads(shelf, original)

    def test_evict(self, shelf: Shelf, source: Store) -> None:
        last = self.write(source, range(16), resume_at=[8, 16])
        self.fill(shelf, self.held(source, range(16), tokens=8))
        self.fill(shelf, last)
        assert shelf.lost_records == 0
        assert shelf.evict(last.path.key(3), states_only=True) > 0
        lost_before = shelf.lost_records
        assert lost_before > 0
        assert self.lengths(shelf, source, range(16)) == [8]
        assert shelf.evict(last.path.key(0)) > 0
        assert shelf.lost_records > lost_before
        assert self.lengths(shelf, source, range(16)) == []
        assert shelf.statistics().committed_bytes == 0
        shelf.check()

    # Telling

    def test_what_it_tells_adds_up(self, shelf: Shelf, source: Store) -> None:
        """A listener knows what is there, whatever happens to it; one that comes later is told."""
        if type(shelf).watch is Shelf.watch:
            pytest.skip(f"{type(shelf).__name__} tells nobody of its changes")
        told: list[tuple[str, Changes]] = []

        def tell(tier: str, changes: Changes) -> bool:
            told.append((tier, changes))
            return True

        def known() -> dict[tuple[bytes, bool], int]:
            return _replayed([changes for _, changes in told])

        assert list(shelf.watch(tell)) == []
        last = self.write(source, range(22), resume_at=[8, 16, 22], salt=b"tenant")
        self.fill(shelf, self.held(source, range(22), salt=b"tenant", tokens=8))
        self.fill(shelf, last)
        path = last.path
        assert {key for key, _ in known()} == set(path.node_keys)
        assert {key for key, is_state in known() if is_state} == {path.key(1), path.key(len(path) - 1)}
        assert sum(known().values()) == shelf.statistics().committed_bytes
        assert {(tier, changes.salt) for tier, changes in told} == {(shelf.name, b"tenant")}
        late = shelf.watch(lambda tier, changes: False)
        assert _replayed([changes for _, changes in late]) == known()
        shelf.condemn(path.key(3), is_state=False)
        shelf.evict(path.key(1), states_only=True)
        assert known().keys() == {(path.key(node), False) for node in range(3)}
        assert sum(known().values()) == shelf.statistics().committed_bytes
        shelf.close()
        assert known() == {}
        whys = [changes.why for _, changes in told if changes.why is not None]
        assert whys == [RemovedWhy.DAMAGED, RemovedWhy.DROPPED, RemovedWhy.CLOSED]

    # Ends

    def test_close(self, shelf: Shelf, source: Store) -> None:
        original = self.write(source, range(30))
        self.fill(shelf, original)
        hold = shelf.hold(original.path, shard=WHOLE)
        assert hold is not None
        numbers = np.arange(len(hold.rows))
        landing = Landing(hold.rows, numbers)
        load = hold.load(numbers, landing.addresses)
        shelf.close()
        shelf.close()
        try:
            load.wait(len(numbers), Deadline.after(TEST_S))
        except DeadlineError:
            pytest.fail("a load went on after its shelf was closed")
        hold.release()
        assert self.lengths(shelf, source, range(30)) == []
        assert shelf.hold(original.path, shard=WHOLE) is None
        with pytest.raises(KVStoreError):
            shelf.keep(original.path, original.salt, original.placed).result(TEST_S)

    def test_what_is_durable_is_there_again(self, shelf: Shelf, source: Store) -> None:
        if not shelf.is_durable:
            pytest.skip("this shelf is not durable")
        holds = [self.write(source, range(21), resume_at=[21]), self.write(source, range(8), salt=b"other")]
        holds.append(self.write(source, [*range(12), 77, 78], grid=None))
        for hold in holds:
            self.fill(shelf, hold)
        shelf.evict(holds[1].path.key(0))
        committed_bytes = shelf.statistics().committed_bytes
        with closing(self.reopen(shelf)) as again:
            assert again.statistics().committed_bytes == committed_bytes
            self.assert_loads(again, holds[0])
            self.assert_loads(again, holds[2])
            assert self.lengths(again, source, range(8), salt=b"other") == []
            again.check()

    # Time to live

    def wanted(self, hold: Hold, ends_us: int) -> Ends:
        """A prompt that is wanted until a moment."""
        ends = Ends.lasting(hold.path)
        ends.table[ends.table == LASTING_US] = ends_us
        return ends

    def keep_until(self, shelf: Shelf, hold: Hold, ends_us: int) -> None:
        shelf.keep(hold.path, hold.salt, hold.placed, self.wanted(hold, ends_us)).result(TEST_S)

    def test_what_has_ended_is_not_found_held_or_not(self, shelf: Shelf, source: Store) -> None:
        if not self.takes_records:
            pytest.skip("this shelf is not filled by keep")
        short, long = self.write(source, range(8)), self.write(source, [*range(8), 50, 51, 52, 53])
        self.keep_until(shelf, short, FAR_US + 10)
        self.keep_until(shelf, long, FAR_US + 20)
        assert shelf.next_end_us <= FAR_US + 10
        assert shelf.ends_of(short.path)[-1].tolist() == [FAR_US + 20, FAR_US + 10, FAR_US + 10]
        assert shelf.expire(FAR_US + 9) == 0
        assert self.lengths(shelf, source, range(8)) == [8]
        held = shelf.hold(short.path, shard=WHOLE)
        assert held is not None
        assert shelf.lost_records == 0
        assert shelf.expire(FAR_US + 10) > 0
        assert shelf.lost_records > 0
        assert self.lengths(shelf, source, range(8)) == []
        assert self.lengths(shelf, source, [*range(8), 50, 51, 52, 53]) == [12]
        self.assert_same(held, short)
        held.release()
        shelf.check()
        assert shelf.expire(FAR_US + 20) > 0
        found = shelf.statistics()
        assert found.committed_bytes == 0
        assert found.expired_records > 0
        assert shelf.next_end_us == LASTING_US
        shelf.check()
        self.keep_until(shelf, long, FAR_US + 30)
        self.assert_loads(shelf, long)

    def test_keeping_again_prolongs_a_life_and_never_shortens_it(self, shelf: Shelf, source: Store) -> None:
        if not self.takes_records:
            pytest.skip("this shelf is not filled by keep")
        original = self.write(source, range(8))
        for ends_us, known_us in ((10, 10), (30, 30), (20, 30)):
            self.keep_until(shelf, original, FAR_US + ends_us)
            assert shelf.ends_of(original.path)[-1].tolist() == [FAR_US + known_us] * 3
        shelf.keep(original.path, original.salt, original.placed).result(TEST_S)
        assert shelf.expire(FAR_US + 100) == 0
        self.assert_loads(shelf, original)
        shelf.check()

    def test_an_end_can_be_set(self, shelf: Shelf, source: Store) -> None:
        system, talk = self.write(source, range(8)), self.write(source, [*range(8), 50, 51, 52, 53])
        for hold in (system, talk):
            self.fill(shelf, hold)
        assert shelf.stored_tokens(talk.path) == 12
        shelf.set_end(talk.path, FAR_US + 10, after_tokens=1 << 20, meant_tokens=16)  # another tier has more of it
        shelf.expire(FAR_US + 10)
        assert self.lengths(shelf, source, range(8)) == [8]
        shelf.set_end(talk.path, FAR_US + 20, after_tokens=0, meant_tokens=12)
        assert shelf.expire(FAR_US + 19) == 0
        shelf.expire(FAR_US + 20)
        assert shelf.stored_tokens(talk.path) == 0
        assert self.lengths(shelf, source, range(8)) == []
        shelf.check()

    def test_ends_are_there_again(self, shelf: Shelf, source: Store) -> None:
        if not shelf.is_durable:
            pytest.skip("this shelf is not durable")
        timed, lasting = self.write(source, range(8)), self.write(source, range(100, 108))
        self.keep_until(shelf, timed, FAR_US)
        self.fill(shelf, lasting)
        before = shelf.ends_of(timed.path).astype(np.int64)
        with closing(self.reopen(shelf)) as again:
            after = again.ends_of(timed.path).astype(np.int64)
            assert (abs(after - before) < SLACK_US).all()
            again.expire(FAR_US - SLACK_US)
            self.assert_loads(again, timed)
            assert again.expire(FAR_US + SLACK_US) > 0
            assert self.lengths(again, source, range(8)) == []
            self.assert_loads(again, lasting)
            again.check()
