"""A Hypothesis state machine that compares a store with plain dictionaries (`kvstore.testing.store_model`).

    TestRoomy = StoreMachine.for_spec(hybrid(4), dram_bytes=16 << 20).TestCase
    TestTight = StoreMachine.for_spec(hybrid(4), dram_bytes=160 << 10).TestCase

Writers of any interleaving, chunk order, grid and shard, commits in part, aborts and drops; matches whose every
candidate is known beforehand; leases read again after everything else has happened; evictions, damage, hand-overs
and memory pressure. All cache contents check themselves (`kvstore.testing.specs`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.errors import LeaseError, LeaseGoneError, PoolFullError, QuarantineFullError, QuotaError, WriteError
from kvstore.pool import HandOver, Pool, RecordName, StoreLimits, Transaction
from kvstore.spec import UNKNOWN_GRID, WHOLE, ChunkGrid, ReuseRule, Shard, UnitRange
from kvstore.store import open_store
from kvstore.testing.specs import check_lease, put_states, put_tokens, tensors_of
from kvstore.testing.store_model import Copy, Ids, Prefix, StoreModel, bounds_of, prefixes

if TYPE_CHECKING:
    from kvstore.abc import EvictionPolicy
    from kvstore.pool import BaseTransaction, Match, Prompt
    from kvstore.spec import ModelSpec
    from kvstore.store import Lease, Writer

Put = tuple[int, int, int]
"""Layer, and the tokens [start, stop) of its attention; of a state, start is -1 and stop the length."""

LIVE_MAX = 4
"""Writers, and leases, that are open at once."""
FEW, MANY = 3, 10
"""Prefixes with records before single ones, or all, are evicted: an empty store shows little."""
ROOMY_BYTES_MIN = 16 << 20
"""With so much nothing is evicted for want of room."""
GRIDS = (None, None, 2, 4)
SHARDS = (WHOLE, WHOLE, Shard(0, 2), Shard(1, 2))


@dataclass
class LiveWriter:
    """A writer, and what its commit will make of the model."""

    writer: Writer
    salt: bytes
    ids: Ids
    path: list[Prefix]
    reserved: list[tuple[Prefix, Copy]]
    todo: list[Put]
    done: list[Put] = field(default_factory=list)
    resume: LiveLease | None = None
    ttl_s: float | None = None


@dataclass
class LiveLease:
    lease: Lease
    salt: bytes
    ids: Ids
    prompt: Prompt
    is_damaged: bool = False
    has_ended: bool = False


class StoreMachine(RuleBasedStateMachine):
    """One store; use `for_spec` to say of which spec and size."""

    spec: ClassVar[ModelSpec]
    dram_bytes: ClassVar[int]
    policy: ClassVar[type[EvictionPolicy] | None]
    limits: ClassVar[StoreLimits] = StoreLimits()
    patience_s: ClassVar[float] = 0.0
    """How long what one call brings about for another may take: nothing, within one process."""

    @classmethod
    def for_spec(
        cls,
        spec: ModelSpec,
        *,
        dram_bytes: int,
        policy: type[EvictionPolicy] | None = None,
        limits: StoreLimits | None = None,
    ) -> type[StoreMachine]:
        """A machine for a spec; small blocks make many nodes of few tokens. Without room it tests eviction.

        Args:
            policy: ranks victims; by default the index's own order of use does.
            limits: quotas of the salts `b""` and `b"other"`, and the like.
        """
        members = {"spec": spec, "dram_bytes": dram_bytes, "policy": policy, "limits": limits or StoreLimits()}
        return type(f"{cls.__name__}_{spec.model}_{dram_bytes}", (cls,), members)

    def __init__(self) -> None:
        super().__init__()
        eviction = self.policy() if self.policy is not None else None
        self.now_s = 1000.0
        self.store = open_store(
            self.spec, dram=self.dram_bytes, eviction=eviction, limits=self.limits, clock=lambda: self.now_s
        )
        self.model = StoreModel(self.spec)
        self.writers: list[LiveWriter] = []
        self.leases: list[LiveLease] = []
        self.prompts: list[Ids] = [(0,)]
        self.condemned: set[Prefix] = set()
        self.evicted = 0

    # What a rule works on

    def _draw_ids(self, data: st.DataObject) -> Ids:
        """A new prompt, or one that shares its beginning with an earlier one."""
        base = data.draw(st.sampled_from(self.prompts), label="base")
        kept = data.draw(st.one_of(st.just(len(base)), st.integers(0, len(base))), label="kept")
        more = data.draw(st.lists(st.integers(0, 1), max_size=9), label="more")
        ids = (*base[:kept], *more) or (1,)
        if ids not in self.prompts:
            self.prompts.append(ids)
        return ids

    @staticmethod
    def _draw_grid(data: st.DataObject, length: int) -> ChunkGrid | None:
        chunk = data.draw(st.sampled_from(GRIDS), label="chunk")
        return None if chunk is None else ChunkGrid.every(chunk, upto=length)

    def _possible_checkpoints(self, ids: Ids, start: int, grid: ChunkGrid | None) -> list[int]:
        return [
            end
            for end in range(start + 1, len(ids) + 1)
            if (end % self.spec.block_tokens == 0 or end == len(ids)) and (grid is None or end in grid.boundaries)
        ]

    def _candidates(self, match: Match) -> list[int]:
        return [candidate.tokens for candidate in match.candidates]

    def _is_held(self, prefix: Prefix, rule_: ReuseRule) -> bool:
        for live in self.writers:
            if prefix in live.path:
                return True
        for lease in self.leases:
            path = prefixes(lease.salt, lease.ids, self.spec.block_tokens)
            if prefix in (path if rule_ is ReuseRule.ATTENTION else path[-1:]):
                return True
        return False

    # Writing

    @precondition(lambda self: len(self.writers) < LIVE_MAX)
    @rule(data=st.data(), salt=st.sampled_from((b"", b"", b"other")), shard=st.sampled_from(SHARDS))
    def begin(self, data: st.DataObject, salt: bytes, shard: Shard) -> None:
        ids = self._draw_ids(data)
        possible_leases = [None, *(live for live in self.leases if live.lease.shard == shard)]
        resume: LiveLease | None = data.draw(st.sampled_from(possible_leases), label="resume")
        if resume is not None:
            salt, ids = resume.salt, (*resume.ids, *ids)[: len(resume.ids) + 9]
            self.prompts.append(ids)
        grid = self._draw_grid(data, len(ids))
        start = len(resume.ids) if resume is not None else 0
        possible = self._possible_checkpoints(ids, start, grid)
        lengths = data.draw(st.lists(st.sampled_from(possible), unique=True, max_size=3)) if possible else []
        self._begin(data, ids, salt, shard, grid, tuple(sorted(lengths)), resume)

    def _begin(
        self,
        data: st.DataObject,
        ids: Ids,
        salt: bytes,
        shard: Shard,
        grid: ChunkGrid | None,
        lengths: tuple[int, ...],
        resume: LiveLease | None,
    ) -> None:
        block = self.spec.block_tokens
        path = prefixes(salt, ids, block)
        if len(ids) not in lengths and len(ids) % block:
            path.pop()
        start = len(resume.ids) if resume is not None else 0
        named = self._named(path, lengths, start, shard, grid)
        before = {prefix: list(copies) for prefix, copies in self.model.records.items()}
        prompt = self.store.prompt(ids, salt=salt)
        lease = resume.lease if resume is not None else None
        ttl_s = self._draw_ttl(data)
        try:
            writer = self.store.write(prompt, resume_at=lengths, resume=lease, grid=grid, shard=shard, ttl_s=ttl_s)
        except QuotaError:
            assert self.limits.quota_of(salt) is not None, "a salt without a quota has used it up"
            assert not self._vanished(), "a refused write evicted something"
            assert self.model.records == before
            return
        except (PoolFullError, QuarantineFullError):
            assert not self._vanished(), "a refused write evicted something"
            assert self.model.records == before
            return
        except WriteError:
            is_off_grid = resume is not None and grid is not None and self._is_off_grid(resume.lease, grid)
            assert not path or is_off_grid, "a possible write was refused"
            return
        except LeaseGoneError:
            assert resume is not None
            assert resume.is_damaged or resume.has_ended, "a good lease was refused"
            return
        assert path, "there was nothing to write"
        is_good = resume is None or not (resume.is_damaged or resume.has_ended)
        assert is_good, "a writer builds on damaged records, or on what has ended"
        others = [item for item in self.model.items() if item[0][0] != salt]
        self._accept_evictions()
        if self.dram_bytes >= ROOMY_BYTES_MIN:
            assert others == [item for item in self.model.items() if item[0][0] != salt], "another salt made room"
        reserved = [(prefix, copy) for prefix, copy in named if not self.model.find(prefix, copy)]
        found = {(r.header.end_tokens, r.name.group, r.name.units) for r in writer.transaction.records}
        assert found == {(len(prefix[1]), copy.group, copy.units) for prefix, copy in reserved}
        todo = self._cut(data, ids, lengths, start)
        self.writers.append(LiveWriter(writer, salt, ids, path, reserved, todo, resume=resume, ttl_s=ttl_s))

    def _draw_ttl(self, data: st.DataObject) -> float | None:
        """How long a write's records are to live."""
        del data
        return None

    def _before_commit(self) -> None:
        """Records are about to appear in the model."""

    def _after_commit(
        self, path: list[Prefix], lengths: tuple[int, ...], ttl_s: float | None, *, is_final: bool
    ) -> None:
        """A writer has committed these prefixes, with states at these lengths, whoever provided the records."""

    def _named(
        self, path: list[Prefix], lengths: tuple[int, ...], start: int, shard: Shard, grid: ChunkGrid | None
    ) -> list[tuple[Prefix, Copy]]:
        """The records that a writer provides, ancestors first."""
        named = []
        for number, prefix in enumerate(path):
            for index, group in enumerate(self.spec.groups):
                units = group.units_written_by(shard)
                is_state = group.rule is ReuseRule.STATE
                wanted = len(prefix[1]) in lengths if is_state else number >= start // self.spec.block_tokens
                if units is not None and wanted:
                    named.append((prefix, Copy(index, bounds_of(grid, len(prefix[1]), group.rule), units)))
        return named

    @staticmethod
    def _is_off_grid(lease: Lease, grid: ChunkGrid) -> bool:
        """Whether a lease's records were not all computed on this grid."""
        if lease.tokens not in grid.boundaries and lease.spec.state_groups:
            return True
        for held in lease.records:
            bounds = bounds_of(grid, held.header.end_tokens, held.layout.group.rule)
            expected = UNKNOWN_GRID if bounds is None else ChunkGrid(bounds).digest_at(bounds[-1])
            if held.header.grid != expected:
                return True
        return False

    def _cut(self, data: st.DataObject, ids: Ids, lengths: tuple[int, ...], start: int) -> list[Put]:
        """The puts of a writer: each layer's tokens in chunks of its own, all in random order."""
        puts: list[Put] = []
        for layer, _ in tensors_of(self.spec, ReuseRule.ATTENTION):
            cuts = data.draw(st.sets(st.integers(start + 1, len(ids) - 1), max_size=2)) if len(ids) > start + 1 else ()
            ends = [start, *sorted(cuts), len(ids)]
            puts.extend((layer, a, b) for a, b in pairwise(ends) if a < b)
        puts.extend((layer, -1, at) for layer, _ in tensors_of(self.spec, ReuseRule.STATE) for at in lengths)
        return data.draw(st.permutations(puts), label="order")

    @precondition(lambda self: any(live.todo for live in self.writers))
    @rule(data=st.data())
    def put_some(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from([live for live in self.writers if live.todo]))
        for _ in range(data.draw(st.integers(1, len(live.todo)), label="puts")):
            self._put_next(live)

    def _put_next(self, live: LiveWriter) -> None:
        self._put(live, live.todo[-1])
        live.done.append(live.todo.pop())

    @staticmethod
    def _put(live: LiveWriter, put: Put) -> None:
        layer, start, stop = put
        if start < 0:
            put_states(live.writer, stop, layer=layer)
        else:
            put_tokens(live.writer, start, stop, layer=layer)

    @precondition(lambda self: any(live.done for live in self.writers))
    @rule(data=st.data())
    def put_twice(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from([live for live in self.writers if live.done]))
        try:
            self._put(live, data.draw(st.sampled_from(live.done)))
        except WriteError:
            return
        raise AssertionError("what was put before was taken again")

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def commit_part(self, data: st.DataObject) -> None:
        live = data.draw(st.sampled_from(self.writers))
        self._commit(live, data.draw(st.integers(0, len(live.ids)), label="upto"))

    @rule(data=st.data(), salt=st.sampled_from((b"", b"", b"other")), shard=st.sampled_from(SHARDS))
    def write_whole(self, data: st.DataObject, salt: bytes, shard: Shard) -> None:
        ids = self._draw_ids(data)
        grid = self._draw_grid(data, len(ids))
        every = self._possible_checkpoints(ids, 0, grid)
        lengths = every if data.draw(st.booleans(), label="every checkpoint") else every[-1:]
        self._write(data, ids, salt, shard, grid, tuple(lengths), None)

    @precondition(lambda self: self.leases and len(self.writers) < LIVE_MAX)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        """A turn more: the engine continues from a lease, often inside a block."""
        resume = data.draw(st.sampled_from(self.leases), label="from")
        ids = (*resume.ids, *data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=9), label="more"))
        self.prompts.append(ids)
        self._write(data, ids, resume.salt, resume.lease.shard, None, (len(ids),), resume)

    def _write(
        self,
        data: st.DataObject,
        ids: Ids,
        salt: bytes,
        shard: Shard,
        grid: ChunkGrid | None,
        lengths: tuple[int, ...],
        resume: LiveLease | None,
    ) -> None:
        before = len(self.writers)
        self._begin(data, ids, salt, shard, grid, lengths, resume)
        if len(self.writers) > before:
            self._finish(self.writers[-1])

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self._finish(data.draw(st.sampled_from(self.writers)))

    def _finish(self, live: LiveWriter) -> None:
        while live.todo:
            self._put_next(live)
        self._commit(live, None)

    def _commit(self, live: LiveWriter, upto: int | None) -> None:
        end = len(live.path[-1][1])
        limit = end if upto is None else upto
        ready = [(prefix, copy) for prefix, copy in live.reserved if len(prefix[1]) <= limit]
        if any(not self._is_complete(live, prefix, copy) for prefix, copy in ready):
            try:
                live.writer.commit(upto)
            except WriteError:
                return
            raise AssertionError("an incomplete record was committed")
        is_damaged = live.resume is not None and live.resume.is_damaged
        try:
            live.writer.commit(upto)
        except LeaseGoneError:
            assert is_damaged or (live.resume is not None and live.resume.has_ended), "a good write was refused"
            self.writers.remove(live)
            return
        assert not is_damaged, "what was computed from damaged records was committed"
        self._before_commit()
        for prefix, copy in ready:
            if not self.model.find(prefix, copy) and self._is_reachable(live.path, prefix, copy):
                self.model.add(prefix, copy)
        live.reserved = [item for item in live.reserved if item not in ready]
        committed = live.path if limit >= end else live.path[: limit // self.spec.block_tokens]
        self._after_commit(committed, live.writer.resume_at, live.ttl_s, is_final=limit >= end)
        if limit >= end:
            self.writers.remove(live)
            assert not live.writer.transaction.is_open

    @precondition(lambda self: len(self.writers) > 1)
    @rule(data=st.data(), is_unfinished=st.booleans())
    def finish_together(self, data: st.DataObject, is_unfinished: bool) -> None:
        """Several writers, of one prompt or of others, become visible in one step or not at all."""
        chosen = data.draw(st.lists(st.sampled_from(self.writers), min_size=2, unique_by=id), label="together")
        for live in chosen[is_unfinished:]:
            while live.todo:
                self._put_next(live)
        pool = self.store.pool
        assert isinstance(pool, Pool), "writers of other processes become parties by name"
        transactions = [live.writer.transaction for live in chosen]
        commits = [(each, None, None) for each in transactions if isinstance(each, Transaction)]
        is_damaged = any(live.resume is not None and live.resume.is_damaged for live in chosen)
        is_complete = all(self._is_complete(live, *item) for live in chosen for item in live.reserved)
        try:
            pool.commit_together(commits)
        except WriteError:
            assert not is_complete, "complete writers were refused"
            return
        except LeaseGoneError:
            ended = [live for live in chosen if live.resume is not None and live.resume.has_ended]
            assert is_damaged or ended, "good writers were refused"
            self.writers = [live for live in self.writers if live.writer.transaction.is_open]
            return
        assert is_complete
        assert not is_damaged
        self._before_commit()
        for live in chosen:
            for prefix, copy in live.reserved:
                if not self.model.find(prefix, copy) and self._is_reachable(live.path, prefix, copy):
                    self.model.add(prefix, copy)
            self._after_commit(live.path, live.writer.resume_at, live.ttl_s, is_final=True)
            self.writers.remove(live)
            assert not live.writer.transaction.is_open

    def _is_complete(self, live: LiveWriter, prefix: Prefix, copy: Copy) -> bool:
        end = len(prefix[1])
        group = self.spec.groups[copy.group]
        if group.rule is ReuseRule.STATE:
            return not any(start < 0 and at == end and layer in group.layers for layer, start, at in live.todo)
        begin = (end - 1) // self.spec.block_tokens * self.spec.block_tokens
        return not any(0 <= start < end and begin < stop and layer in group.layers for layer, start, stop in live.todo)

    def _is_reachable(self, path: list[Prefix], prefix: Prefix, copy: Copy) -> bool:
        number = path.index(prefix)
        if number == 0 or self.spec.groups[copy.group].rule is ReuseRule.STATE:
            return True
        return self.model.covers(path[number - 1], copy.group, range(*_span(copy)), None)

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), is_dropped=st.booleans())
    def give_up(self, data: st.DataObject, is_dropped: bool) -> None:
        live = data.draw(st.sampled_from(self.writers))
        self.writers.remove(live)
        if is_dropped:
            live.writer.__del__()  # what the garbage collector does, but now
        else:
            live.writer.abort("the test wants it so")
            live.writer.abort("twice")

    # Reading

    @rule(data=st.data(), salt=st.sampled_from((b"", b"", b"other", b"unused")), shard=st.sampled_from(SHARDS))
    def match(self, data: st.DataObject, salt: bytes, shard: Shard) -> None:
        ids = self._draw_ids(data)
        self._match(ids, salt, shard, self._draw_grid(data, len(ids)))

    def _match(self, ids: Ids, salt: bytes, shard: Shard, grid: ChunkGrid | None) -> Match:
        found = self.store.match(ids, salt=salt, shard=shard, grid=grid)
        expected = self.model.resume_points(salt, ids, len(ids) - 1, shard, grid)
        assert self._candidates(found) == expected, f"{self._candidates(found)} instead of {expected}"
        pending = [
            end
            for live in self.writers
            for end in live.writer.resume_at
            if live.salt == salt and max(expected, default=0) < end < len(ids) and live.ids[:end] == ids[:end]
        ]
        assert found.pending_tokens == max(pending, default=0)
        assert found.missing.reasons
        assert all(found.tokens < length <= len(ids) for length in found.suggested)
        return found

    @precondition(lambda self: len(self.leases) < LIVE_MAX)
    @rule(data=st.data(), salt=st.sampled_from((b"", b"", b"other")), shard=st.sampled_from(SHARDS))
    def read(self, data: st.DataObject, salt: bytes, shard: Shard) -> None:
        ids = self._draw_ids(data)
        grid = self._draw_grid(data, len(ids))
        found = self._match(ids, salt, shard, grid)
        if not found:
            with suppress(LeaseError):
                self.store.read(found)
                raise AssertionError("a miss was read")
            return
        tokens = data.draw(st.sampled_from(self._candidates(found)), label="at")
        lease = self.store.read(found.at(tokens), verify=data.draw(st.booleans(), label="verify"))
        assert lease.tokens == tokens
        for held in lease.records:
            if grid is not None:
                bounds = bounds_of(grid, held.header.end_tokens, held.layout.group.rule)
                assert bounds is not None
                assert held.header.grid == ChunkGrid(bounds).digest_at(bounds[-1])
        live = LiveLease(lease, salt, ids[:tokens], self.store.prompt(ids[:tokens], salt=salt))
        check_lease(lease, live.prompt)
        self.leases.append(live)

    @precondition(lambda self: self.leases)
    @rule()
    def read_again(self) -> None:
        for live in self.leases:
            check_lease(live.lease, live.prompt)
            assert live.lease.verify() == []

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), is_dropped=st.booleans())
    def release(self, data: st.DataObject, is_dropped: bool) -> None:
        live = data.draw(st.sampled_from(self.leases))
        self.leases.remove(live)
        if is_dropped:
            live.lease.__del__()
        else:
            live.lease.release()
            live.lease.release()

    # Losing

    @precondition(lambda self: len(self.model.records) > FEW)
    @rule(data=st.data(), rule_=st.sampled_from(ReuseRule))
    def evict(self, data: st.DataObject, rule_: ReuseRule) -> None:
        prefix = self._draw_prefix(data)
        expected = self._evictable(prefix, rule_)
        freed = self.store.pool.evict(self._key(prefix), states_only=rule_ is ReuseRule.STATE)
        if not any(other in self.condemned for other in self.model.below(prefix)):
            assert (freed > 0) == expected, "evicted what was held, or did not evict what was not"
        if freed:
            self.model.drop(prefix, rule_)
        self.evicted = self.store.statistics().evicted_records

    def _evictable(self, prefix: Prefix, rule_: ReuseRule) -> bool:
        if rule_ is ReuseRule.STATE:
            return bool(self.model.copies(prefix, rule_)) and not self._is_held(prefix, rule_)
        below = self.model.below(prefix)
        return bool(below) and not self._is_held(prefix, rule_)

    def _draw_prefix(self, data: st.DataObject) -> Prefix:
        return data.draw(st.sampled_from(sorted(self.model.records)), label="prefix")

    def _key(self, prefix: Prefix) -> bytes:
        path = self.store.prompt(prefix[1], salt=prefix[0]).path
        return path.key(len(path) - 1)

    @precondition(lambda self: len(self.model.records) > FEW)
    @rule(data=st.data(), rule_=st.sampled_from(ReuseRule))
    def condemn(self, data: st.DataObject, rule_: ReuseRule) -> None:
        """Damage was found: held or not, it goes, with all that it made reachable."""
        prefix = self._draw_prefix(data)
        self.condemned.update(self.model.below(prefix))
        is_hit = bool(self.model.below(prefix) if rule_ is ReuseRule.ATTENTION else self.model.copies(prefix, rule_))
        resumed = [writer.resume for writer in self.writers if writer.resume is not None]
        for live in {id(live): live for live in (*self.leases, *resumed)}.values():
            path = prefixes(live.salt, live.ids, self.spec.block_tokens)
            live.is_damaged |= is_hit and prefix in (path if rule_ is ReuseRule.ATTENTION else path[-1:])
        self.store.pool.condemn(self._key(prefix), is_state=rule_ is ReuseRule.STATE)
        self.model.drop(prefix, rule_)
        self.evicted = self.store.statistics().evicted_records

    def _vanished(self) -> list[tuple[Prefix, Copy]]:
        """Records of the model that the store does not have any more."""
        gone = []
        for prefix, copy in self.model.items():
            path = self.store.prompt(prefix[1], salt=prefix[0]).path
            grid = None if copy.bounds is None else ChunkGrid(copy.bounds)
            names = [RecordName(len(path) - 1, copy.group, span.index, copy.units) for span in self._spans(copy)]
            if self.store.pool.missing(path, names, grid):
                gone.append((prefix, copy))
        return gone

    def _spans(self, copy: Copy) -> tuple[Any, ...]:
        return self.spec.spans[copy.group]

    def _accept_evictions(self) -> None:
        """The store chose what to evict: what was held must still be there, and nothing hang in the air."""
        evicted = self.store.statistics().evicted_records
        if evicted == self.evicted:
            return
        self.evicted = evicted
        for prefix, copy in self._vanished():
            rule_ = self.spec.groups[copy.group].rule
            assert prefix in self.condemned or not self._is_held(prefix, rule_), "what is held was evicted"
            self.model.records[prefix].remove(copy)
            if not self.model.records[prefix]:
                del self.model.records[prefix]

    # Handing over

    @rule(data=st.data(), payload=st.binary(max_size=8))
    def hand_over(self, data: st.DataObject, payload: bytes) -> None:
        """A prompt arrives from another store, is accepted and decoded; its tail is gone afterwards."""
        ids = self._draw_ids(data)
        path = prefixes(b"", ids, self.spec.block_tokens)
        if any(path[-1] in live.path for live in self.writers) or path[-1] in self.condemned:
            return
        prompt = self.store.prompt(ids)
        waiting = self.store.accept(prompt)
        with open_store(self.spec, dram=1 << 20) as source:
            with source.write(prompt, resume_at=(len(ids),)) as writer:
                put_tokens(writer, 0, len(ids))
                put_states(writer, len(ids))
                writer.commit()
            with source.read(source.match((*ids, 0))) as lease:
                try:
                    transaction = self.store.pool.begin(
                        prompt.path,
                        [held.name for held in lease.records],
                        salt=b"",
                        resume_nodes=[len(prompt.path) - 1],
                        is_transient=True,
                    )
                except (PoolFullError, QuarantineFullError):
                    waiting.cancel()
                    return
                self._accept_evictions()
                receive(lease, transaction)
        was_there = path[-1] in self.model.records
        assert not waiting.done()
        transaction.commit(handover=HandOver(ids[-1], payload))
        arrival = waiting.result(self.patience_s)
        assert arrival.handover == HandOver(ids[-1], payload)
        named = self._named(path, (len(ids),), 0, WHOLE, None)
        with arrival.lease as lease:
            assert lease.tokens == len(ids)
            check_lease(lease, prompt)
            self._before_commit()
            for prefix, copy in named:
                if not self.model.find(prefix, copy):
                    self.model.add(prefix, copy)
            self._after_commit(path, (len(ids),), None, is_final=True)
        if len(ids) % self.spec.block_tokens and not was_there:
            del self.model.records[path[-1]]
        self.evicted = self.store.statistics().evicted_records

    # Always

    @invariant()
    def budget_is_exact(self) -> None:
        self.store.pool.check()
        statistics = self.store.statistics()
        assert statistics.committed_bytes == self.model.slot_bytes()
        if not self.writers:
            assert statistics.reserved_bytes == 0
            if not self.leases:
                assert statistics.quarantined_bytes == 0
        for salt, size_bytes in statistics.bytes_by_salt.items():
            quota_bytes = self.limits.quota_of(salt)
            assert quota_bytes is None or size_bytes <= quota_bytes, "a salt has more than its quota"

    @invariant()
    def nothing_unfinished_is_seen(self) -> None:
        for live in self.writers:
            self._match((*live.ids, 0), live.salt, WHOLE, None)

    @precondition(lambda self: len(self.model.records) > MANY and not self.writers and not self.leases)
    @rule()
    def evict_everything(self) -> None:
        for prefix in sorted(self.model.records, key=lambda prefix: len(prefix[1])):
            for rule_ in ReuseRule:
                self.store.pool.evict(self._key(prefix), states_only=rule_ is ReuseRule.STATE)
        self.model.records.clear()
        statistics = self.store.statistics()
        self.evicted = statistics.evicted_records
        assert statistics.committed_bytes == 0
        assert not statistics.bytes_by_salt

    def teardown(self) -> None:
        for live in self.writers:
            live.writer.abort("the test is over")
        for lease in self.leases:
            lease.lease.release()
        self.store.close()


def receive(lease: Lease, transaction: BaseTransaction) -> None:
    """Fill a transaction from a lease of another store, as a transfer does, and seal every record."""
    records = {held.name: held for held in lease.records}
    with transaction.moving():
        for index, record in enumerate(transaction.records):
            record.memory[:] = records[record.name].memory
            transaction.seal(index)


def _span(copy: Copy) -> tuple[int, int]:
    units: UnitRange = copy.units
    return units.start, units.stop
