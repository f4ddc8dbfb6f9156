"""The store: a pool of this process, or one that another process owns, and what engines do with it."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kvstore.clock import Deadline
from kvstore.errors import (
    KVStoreError,
    LeaseError,
    LeaseGoneError,
    LoadFailedError,
    PoolError,
    PoolFullError,
    QuarantineFullError,
    SpecError,
    StoreClosedError,
    UnavailableError,
    WriteError,
)
from kvstore.events import EVENT_KINDS
from kvstore.limits import EVENTS_CAPACITY_DEFAULT, FLUSH_DEADLINE_S, LOAD_DEADLINE_S, PROMPT_TOKENS_MAX
from kvstore.pool import BasePool, HandOver, JointName, Match, NodePath, PoolStatistics, Prompt
from kvstore.spec import WHOLE, ReuseRule
from kvstore.store.arguments import (
    check_coverage,
    check_deadline,
    check_joint,
    check_lease,
    check_match,
    check_position,
    check_ttl,
)
from kvstore.store.devices import DeviceCopies
from kvstore.store.lease import Lease
from kvstore.store.nodes import NodeOperations
from kvstore.store.waiters import Waiters
from kvstore.store.write_plan import check_continues, check_grid, checkpoints, names_written, written_path
from kvstore.store.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from kvstore.attached import Owner
    from kvstore.events import Event, EventStream
    from kvstore.handle import Handle
    from kvstore.keys import ExtraInput
    from kvstore.metrics import StoreMetrics
    from kvstore.placement.gpu.page_shelf import PageShelf
    from kvstore.pool import BaseHold, BaseTransaction, Pin
    from kvstore.pool.explanation import Explanation
    from kvstore.pool.observer import Observer
    from kvstore.pool.path import RecordPlace
    from kvstore.spec import ChunkGrid, Coverage, ModelSpec, Shard


@dataclass(frozen=True)
class Arrival:
    """A prompt that was handed over to this process.

    Attributes:
        handover: the first sampled token and what came with it.
        match: the resume point, which ends at the prompt's very end.
        lease: on the very records that were handed over; they stay until it is released. Restore, then decode on.
    """

    handover: HandOver
    match: Match
    lease: Lease


class Store(NodeOperations):
    """Finds, reads, writes and sends the cache of prefixes. Any thread may call; a context manager.

    After a fork the child's store is closed: use spawn, or open another store there.
    """

    def __init__(self, pool: BasePool, owner: Owner | None = None, *, pages: PageShelf | None = None) -> None:
        super().__init__(pool)
        self._owner = owner
        self._pages = pages
        self.spec: ModelSpec = pool.spec
        self._waiters = Waiters(pool)
        self.devices = DeviceCopies()
        """Copies to and from tensors of devices."""
        self._lock = threading.Lock()
        self._copied_bytes = 0
        self._copied_s = 0.0
        self.observer: Observer = pool.observer
        _OPEN_STORES.add(self)

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pages(self) -> PageShelf:
        """The engine's pages that the store was opened with, as `gpu=`: say what lies there, and take it back.

        Raises:
            UnavailableError: it was opened without.
        """
        if self._pages is None:
            raise UnavailableError("the store was opened without an engine's pages; pass kvstore.Pages(...) as gpu=")
        return self._pages

    def prompt(
        self,
        token_ids: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        coverage: Coverage | None = None,
    ) -> Prompt:
        """Compute a prompt's keys once, for use in several calls.

        Raises:
            TokenError: no ids, negative, huge or too many ids, or a salt or extra input past its limit.
            SpecError: a coverage of another length, or of layers without attention.
        """
        check_coverage(coverage)
        return Prompt.of(self.spec, token_ids, salt=salt, adapter=adapter, extras=extras, coverage=coverage)

    def _as_prompt(
        self,
        prompt: Any,
        salt: bytes,
        adapter: str,
        extras: Iterable[ExtraInput],
        coverage: Coverage | None = None,
    ) -> Prompt:
        if isinstance(prompt, Prompt):
            if salt or adapter or tuple(extras) or coverage is not None:
                raise WriteError(
                    "a Prompt has its salt, adapter, extras and coverage already; pass them to Store.prompt only"
                )
            if not prompt.is_of(self.spec):
                raise SpecError("this Prompt was made for another model spec; make it with this store's prompt()")
            return prompt
        return self.prompt(prompt, salt=salt, adapter=adapter, extras=extras, coverage=coverage)

    # Reading

    def match(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        coverage: Coverage | None = None,
        accept_coverage: bool = False,
    ) -> Match:
        """How much of a prompt is there: a resume point, or a falsy match that says why not.

        What a sparse prefill wrote is found only by who asks for it; see `Match.is_exact`.

        Args:
            prompt: token ids, or a `Prompt`. At most one token less than it has can match.
            salt, adapter, extras: what it is cached under.
            shard: the tensor-parallel position whose share is asked for.
            grid: insist on these chunk boundaries (strict numerics); None takes any.
            coverage: take what holds just these tokens, too.
            accept_coverage: take whatever tokens the layers hold; of equal lengths what holds all comes first.

        Raises:
            TokenError, SpecError: as `prompt`. SpecError: `shard` or `grid` is of another type. StoreClosedError:
            closed.
        """
        check_position(shard, grid)
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)
        began_s = time.perf_counter()
        found = self.pool.match(target, shard=shard, grid=grid, accept_coverage=accept_coverage)
        self.observer.matched(target, found, time.perf_counter() - began_s)
        return found if self._copied_s == 0.0 else found.timed(self._copied_s / self._copied_bytes)

    def read(
        self, match: Match, *, verify: bool = False, layered: bool = False, deadline_s: float = LOAD_DEADLINE_S
    ) -> Lease:
        """Pin the records of a match and read them. What another tier has is loaded and verified first.

        If that fails (damaged there, or not readable), or there is no room in memory for it, the next best candidate
        of the match is read instead: look at the lease's `tokens`.

        Args:
            verify: recompute every checksum of what lies in memory, too. Damaged records leave the index, and the next
                best candidate is read instead.
            layered: return as soon as there is space for what must be loaded; `lease.layer` and iteration wait for
                the layer, and raise `LoadFailedError` if it does not come. In an attached process everything is loaded
                first.
            deadline_s: for loading; with `layered` for each layer.

        Raises:
            LeaseGoneError: it was evicted since; match again. LoadFailedError: nothing of the match could be loaded.
            PoolFullError: what lies in other tiers finds no room in memory, since what is there is leased or being
            written; end leases, or open the store with more memory. QuarantineFullError: nor while dropped writers
            have so much of it. DeadlineError: it is still being loaded, which goes
            on; read again. LeaseError: the match is a miss, or is none.
        """
        check_match(match)
        began_s = time.perf_counter()
        check_deadline(deadline_s, LeaseError)
        deadline = Deadline.after(deadline_s)
        refusal: KVStoreError | None = None
        waiting = deque(match.candidates)
        was_damaged: set[int] = set()
        while waiting:
            candidate = waiting.popleft()
            try:
                hold = self.pool.hold(
                    candidate.path,
                    shard=match.shard,
                    grid=match.grid,
                    grids=match.grids,
                    layered=layered and not verify,
                    deadline=deadline,
                )
            except (LoadFailedError, PoolFullError, QuarantineFullError) as error:
                refusal = refusal or error
                continue
            except LeaseGoneError:
                if verify or refusal is not None:
                    continue
                raise
            lease = Lease(self.spec, hold, match.shard, self._copied, self.devices, wait_s=deadline_s)
            damaged = lease.verify() if verify else []
            if not damaged:
                self.observer.meters.loaded(time.perf_counter() - began_s)
                return lease
            lease.release()
            for held in damaged:
                is_state = self.spec.groups[held.name.group].rule is ReuseRule.STATE
                self.pool.condemn(candidate.path.key(held.name.node), is_state=is_state, slot=held.slot)
            if id(candidate) not in was_damaged:
                # Only what lies in memory has gone: another tier may have it sound.
                was_damaged.add(id(candidate))
                waiting.appendleft(candidate)
        raise refusal or LeaseGoneError("every resume point of this match was damaged or evicted; match again")

    def _copied(self, size_bytes: int, seconds: float) -> None:
        with self._lock:
            self._copied_bytes += size_bytes
            self._copied_s += seconds

    # Writing

    def write(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        resume_at: Sequence[int] | None = None,
        resume: Lease | None = None,
        grid: ChunkGrid | None = None,
        shard: Shard = WHOLE,
        joint: str | None = None,
        coverage: Coverage | None = None,
        ttl_s: float | None = None,
    ) -> Writer:
        """Reserve space for what the store lacks of a prompt, and write it while it is computed.

        Args:
            prompt: token ids, or a `Prompt`.
            salt, adapter, extras: what it is cached under.
            resume_at: lengths at which states will be stored: block boundaries, or the prompt's end, which
                alone stores the tokens past the last whole block too. By default the prompt's end.
            resume: the lease that the engine continues from; nothing before its end need be put again.
            grid: the chunk boundaries that the engine computes with; needed for strict matches later.
            shard: the tensor-parallel position whose share is written.
            joint: name of a commit that the writers of all `shard.count` positions make together, in whichever process:
                their shares become visible in one step, or none does. A name stands for one attempt.
            coverage: which tokens of each attention layer will be put, where a sparse or pruned prefill leaves some
                out. What is written is then found by readers that accept coverage only. If the store has all of the
                prompt whole, nothing is written.
            ttl_s: how long after its commit this is wanted, in seconds; then it is not matched any more, and its space
                is given back. What other prompts share with it lives as long as they do. None: while there is room.

        Raises:
            PoolFullError: there is no room, and nothing more can be evicted; nothing was changed. QuotaError: nor can
            enough be evicted of this salt, which has used up its quota.
            WriteError: a length in `resume_at` is impossible, or `resume` is no lease of this store on this prompt.
            LeaseError: `resume` was released. LeaseGoneError: it was found damaged since it was leased.
            TokenError: as `prompt`. SpecError: a `Prompt` of another spec; `shard` or `grid` is of another type, or the
            spec cannot be split so. JointCommitError: another party of `joint`
            has failed already.
        """
        try:
            target = self._as_prompt(prompt, salt, adapter, extras, coverage)
            return self._write(target, resume_at, resume, grid, shard, joint, ttl_s)
        except KVStoreError as error:
            self.observer.meters.refused(error)
            raise

    def _write(
        self,
        target: Prompt,
        resume_at: Sequence[int] | None,
        resume: Lease | None,
        grid: ChunkGrid | None,
        shard: Shard,
        joint: str | None,
        ttl_s: float | None,
    ) -> Writer:
        check_position(shard, grid)
        check_lease(resume)
        check_joint(joint)
        check_ttl(ttl_s)
        if resume is not None:
            resume.check_current()
            if not resume.continues_in(self.pool, target):
                raise WriteError(
                    f"the lease of {resume.tokens} tokens is not of this store and the beginning of this prompt; "
                    "resume from a lease on a match of the same token ids, salt, adapter and extras"
                )
            check_continues(self.spec, resume, shard, grid)
        start = resume.tokens if resume is not None else 0
        lengths = checkpoints(self.spec, target, resume_at, start, grid)
        if grid is not None:
            check_grid(target, grid)
        name = JointName(joint, shard.index, shard.count) if joint is not None else None
        transaction = None
        if target.masks and name is None and (resume is None or resume.is_exact):
            transaction = self._begin_whole(target.exact, lengths, resume, grid, shard, ttl_s)
        if transaction is None:
            transaction = self._begin(target, lengths, resume, grid, shard, name, ttl_s)
        writer = Writer(self, target, transaction, lengths, shard, target.path.coverage(self.spec))
        try:
            if target.masks:
                writer.fill_uncovered()
            if resume is not None:
                writer.resume_from(resume)
        except BaseException:
            writer.abort("what is there at its begin could not be filled in")
            raise
        return writer

    def _begin(
        self,
        target: Prompt,
        lengths: tuple[int, ...],
        resume: Lease | None,
        grid: ChunkGrid | None,
        shard: Shard,
        joint: JointName | None,
        ttl_s: float | None,
    ) -> BaseTransaction:
        path = written_path(target, lengths)
        first = resume.tokens // self.spec.block_tokens if resume is not None else 0
        return self.pool.begin(
            path,
            names_written(self.spec, path, lengths, first, shard),
            salt=target.salt,
            grid=grid,
            resume_nodes=[node for length in lengths if (node := path.node_at(length)) is not None],
            basis=resume.records if resume is not None else (),
            joint=joint,
            ttl_s=ttl_s,
        )

    def _begin_whole(
        self,
        exact: Prompt,
        lengths: tuple[int, ...],
        resume: Lease | None,
        grid: ChunkGrid | None,
        shard: Shard,
        ttl_s: float | None,
    ) -> BaseTransaction | None:
        """A transaction that writes nothing, if all of a prompt that is to be held in part is there whole."""
        path = written_path(exact, lengths)
        if self.pool.missing(path, names_written(self.spec, path, lengths, 0, shard), grid):
            return None
        transaction = self._begin(exact, lengths, resume, grid, shard, None, ttl_s)
        if transaction.records:
            # Evicted in this moment. Nothing that holds part of the tokens may ever be written here.
            transaction.abort("a sparse prefill writes no whole records")
            return None
        return transaction

    # Keeping

    def pin(self, match: Match, *, ttl_s: float | None = None) -> Pin:
        """Keep a match's resume point from being evicted, without holding its memory as a lease does.

        How much pins may keep, of the tier and of each salt's quota, is limited (`StoreLimits.pinned_fraction`).

        Args:
            match: the resume point is its first candidate; `Match.at` chooses another.
            ttl_s: the pin ends after so many seconds by itself; None: when it is closed or dropped.

        Raises:
            PinLimitError: pins keep too much already. LeaseGoneError: it was evicted since it was matched.
            LeaseError: the match is a miss, or is none. WriteError: `ttl_s` is no time. UnavailableError: this process
            is attached to a pool that another one owns; pin there.
        """
        check_match(match)
        check_ttl(ttl_s)
        return self.pool.pin(match.candidates[0].path, shard=match.shard, grid=match.grid, ttl_s=ttl_s)

    def expire(
        self,
        prompt: Any,
        ttl_s: float | None = 0.0,
        *,
        after_tokens: int | None = None,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        coverage: Coverage | None = None,
    ) -> int:
        """How long a prompt that is stored is wanted from now on: by default no longer.

        Afterwards it is not matched any more, and its space is given back, at once or when its leases end. What other
        prompts share with it, longer or shorter ones, lives as long as they do.

        Args:
            prompt, salt, adapter, extras, coverage: which; its deepest prefix that is stored is meant.
            ttl_s: seconds from now; None: while there is room.
            after_tokens: shorter resume points and prompts on its path, past this length, end then, too: 0 for a whole
                conversation, the system prompt's length for all of it but that.

        Returns:
            The length of the prefix that was stored; 0 if there is none.

        Raises:
            WriteError: `ttl_s` is no time, or `after_tokens` no length. TokenError, SpecError: as `prompt`.
            UnavailableError: this process is attached to a pool that another one owns.
        """
        check_ttl(ttl_s, may_be_over=True)
        if after_tokens is not None and not (isinstance(after_tokens, int) and 0 <= after_tokens <= PROMPT_TOKENS_MAX):
            raise WriteError(f"after_tokens={after_tokens!r} is no length; give one from 0 on, or None")
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)
        return self.pool.expire(target.path, ttl_s, after_tokens=after_tokens)

    # Waiting

    def accept(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        coverage: Coverage | None = None,
        accept_coverage: bool = False,
    ) -> Handle[Arrival]:
        """Take over a prompt that another process prefills: resolves once its hand-over is committed here.

        Each hand-over is taken once. Block with `.result(deadline_s)`, poll, or `await`; a wait that timed out
        goes on and may still take the hand-over, so `cancel` what is not wanted any more. Release the
        arrival's lease after reading. `coverage` and `accept_coverage` are as in `match`.
        """
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)

        def attempt() -> Arrival | None:
            paths = [target.path]
            if accept_coverage:
                found = self.pool.match(target, cap_tokens=len(target), accept_coverage=True)
                paths.extend(each.path for each in found.candidates if each.tokens == len(target))
            for path in dict.fromkeys(paths):
                accepted = self.pool.accept_handover(path)
                if accepted is not None:
                    return arrive(path, *accepted)
            return None

        def arrive(path: NodePath, handover: HandOver, grids: Mapping[RecordPlace, bytes], hold: BaseHold) -> Arrival:
            lease = Lease(self.spec, hold, WHOLE, self._copied, self.devices)
            match = self.pool.match(target, cap_tokens=len(target), accept_coverage=accept_coverage)
            chosen = tuple(each for each in match.candidates if each.tokens < len(target) or each.path == path)
            return Arrival(handover, replace(match, candidates=chosen, grids=grids), lease)

        def undo(arrival: Arrival) -> None:
            self.pool.return_handover(arrival.lease.path, arrival.handover, arrival.match.grids or {})
            arrival.lease.release()

        return self._waiters.add(f"the hand-over of a prompt of {len(target)} tokens", attempt, undo)

    def when_ready(
        self,
        prompt: Any,
        tokens: int,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        coverage: Coverage | None = None,
        accept_coverage: bool = False,
    ) -> Handle[Match]:
        """Resolves once a resume point of at least `tokens` tokens is there; see `Match.pending_tokens`."""
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)

        def attempt() -> Match | None:
            match = self.pool.match(target, shard=shard, grid=grid, accept_coverage=accept_coverage)
            return match if match.tokens >= tokens else None

        return self._waiters.add(f"a resume point of {tokens} tokens", attempt)

    # The store itself

    @property
    def attached_process_count(self) -> int:
        """Processes on this store's pool, those included that are gone and may still write."""
        return 0 if self._owner is None else len(self._owner.processes())

    def statistics(self) -> PoolStatistics:
        """Counters, and what the budget is used for."""
        return self.pool.statistics()

    def flush(self, deadline_s: float = FLUSH_DEADLINE_S) -> None:
        """Wait until everything that was committed before is durable: there again after a crash of this machine.

        What was handed over with a tail, and what a sparse prefill wrote, is not kept by design.

        Raises:
            UnavailableError: no tier of this store is durable; open it with `ssd=`. DeadlineError: not by then; it goes
            on. ShelfRefusedError: something that was committed since the last flush was not kept; the message counts
            why. StoreClosedError: closed.
        """
        check_deadline(deadline_s, PoolError)
        self.pool.flush(deadline_s)

    # Watching

    def events(
        self,
        capacity: int = EVENTS_CAPACITY_DEFAULT,
        *,
        kinds: Iterable[type[Event]] = EVENT_KINDS,
        contents: bool = False,
    ) -> EventStream:
        """What happens from here on: blocks stored and removed in every tier, matches that hit and missed.

        A stream that nobody refers to any more costs nothing; `close` it, or use it as a context manager.

        Args:
            capacity: events that wait for the subscriber at most; then the oldest are dropped, and counted.
            kinds: `Stored`, `Removed`, `Hit`, `Missed` of `kvstore.events`.
            contents: also say what is there already: `EventStream.contents`.

        Raises:
            ValueError: a capacity out of range, or a kind that is none. StoreClosedError: the store is closed.
            AttachError: `Stored` or `Removed`, which only the process that opened the pool is told.
        """
        self.check_open()
        return self.observer.open(self.pool, capacity, kinds, with_contents=contents)

    def explain(
        self,
        prompt: Any,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        coverage: Coverage | None = None,
    ) -> Explanation:
        """Why `match` finds what it finds: what each tier has of each group, and what a deeper hit would take.

        A value to look into, and to print. It counts as no match and changes nothing. Arguments are as in `match`; of
        a prompt with `coverage`, what holds just these tokens is explained.

        Raises:
            TokenError, SpecError, StoreClosedError: as `match`.
        """
        check_position(shard, grid)
        target = self._as_prompt(prompt, salt, adapter, extras, coverage)
        explanation = self.pool.explain(target, shard=shard, grid=grid)
        return explanation if self._copied_s == 0.0 else explanation.timed(self._copied_s / self._copied_bytes)

    def metrics(self) -> StoreMetrics:
        """Everything that is counted and measured, at this moment; `kvstore.metrics` says how Prometheus gets it."""
        statistics = self.statistics()
        streams = self.observer.streams
        with self._lock:
            read_bytes, read_s = self._copied_bytes, self._copied_s
        return self.observer.meters.snapshot(
            statistics,
            shelves=tuple(getattr(statistics, "shelves", ())),
            devices=self.devices.statistics(),
            read_bytes=read_bytes,
            read_s=read_s,
            streams=len(streams),
            dropped_events=sum(stream.dropped for stream in streams),
        )

    def close(self) -> None:
        """Cancel transfers, close endpoints, end waits, release memory. Idempotent.

        Open leases and writers become unusable.

        Raises:
            DeadlineError: a drive of a tier does not answer. The store is closed, and what that drive may still write
                to or read from stays allocated until this process ends.
        """
        with ExitStack() as last:
            last.callback(_OPEN_STORES.discard, self)
            last.callback(self.observer.close)
            last.callback(self.pool.close)
            if self._owner is not None:
                last.callback(self._owner.close)
            last.callback(self._waiters.close)
            last.callback(self.devices.close)
            for end in reversed(self._end_transfers()):
                last.callback(end)

    def _close_in_child(self) -> None:
        self._lock = threading.Lock()
        self.devices.forget()
        self._forget_transfers()
        self._waiters = Waiters(self.pool)
        if self._owner is not None:
            self._owner.close_in_child()
        self.observer.close_in_child()
        self.pool.close_in_child()

    @property
    def is_closed(self) -> bool:
        return self.pool.is_closed

    def check_open(self) -> None:
        """Raise `StoreClosedError` if the store was closed, or belongs to the parent of a fork."""
        if self._is_closing or self.is_closed:
            raise StoreClosedError("the store is closed; open it again")


_OPEN_STORES: weakref.WeakSet[Store] = weakref.WeakSet()


def _close_in_child() -> None:
    # Threads and locks do not survive a fork; a store that only looks alive would hang or lie.
    for store in list(_OPEN_STORES):
        store._close_in_child()


os.register_at_fork(after_in_child=_close_in_child)
