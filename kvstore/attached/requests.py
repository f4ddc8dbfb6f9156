"""What an attached process may ask for, done on the owner's pool on its behalf."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

from kvstore.attached import messages
from kvstore.attached.finding import (
    Accepted,
    HandOverMessage,
    Held,
    HoldRequest,
    MatchRequest,
    pack_match,
    parse_path,
    parse_stored,
)
from kvstore.attached.frames import Kind
from kvstore.attached.tables import PlacedRecord
from kvstore.attached.waits import Waits
from kvstore.attached.writing import AbortRequest, BeginRequest, Begun, CommitRequest, MissingRequest, pack_numbers
from kvstore.clock import Deadline
from kvstore.errors import AttachProtocolError, LeaseError, LeaseGoneError, PoolError, StaleSlotError, WriteError
from kvstore.limits import ATTACHED_LEASES_MAX, ATTACHED_WRITERS_MAX
from kvstore.pool import Hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

    from kvstore.abc import Slot
    from kvstore.attached.term import TermPage
    from kvstore.pool import BaseHold, HeldRecord, Pool, Transaction, TransactionRecord


class Answer(Protocol):
    """Answers one request: with what it asked for, or with an error."""

    def __call__(self, reply: bytes | None, error: BaseException | None) -> None: ...


class Arena(Protocol):
    """A tier whose slots lie in one piece of shared memory."""

    @property
    def name(self) -> str: ...

    @property
    def capacity_bytes(self) -> int: ...

    @property
    def descriptor(self) -> int:
        """Of the memory; open until the tier is closed."""

    def locations(self, slots: Iterable[Slot]) -> npt.NDArray[np.uint64]:
        """Bytes from the start of the memory to each of these pinned slots."""


@dataclass(eq=False)
class _Writing:
    """A writer of the process, and the promise that its slots are not reused while the process may write in them."""

    transaction: Transaction
    moving: ExitStack

    @classmethod
    def of(cls, transaction: Transaction) -> _Writing:
        writing = cls(transaction, ExitStack())
        writing.moves()
        return writing

    def moves(self) -> None:
        """The process may write in the slots."""
        before = self.moving.pop_all()
        self.moving.enter_context(self.transaction.moving())
        before.close()

    def is_still(self) -> None:
        """Nothing moves in the slots any more, and nothing will."""
        self.moving.close()


class Requests:
    """Leases and writers of one process. One thread, that of its session.

    Args:
        page: where the process sees that a term has ended.
        verify: recompute each piece's checksum before a commit.
        later: runs something in the session's thread.
    """

    def __init__(
        self,
        pool: Pool,
        arena: Arena,
        page: TermPage,
        *,
        verify: bool,
        later: Callable[[Callable[[], None]], None],
    ) -> None:
        self._pool = pool
        self._spec = pool.spec
        self._arena = arena
        self._page = page
        self._verify = verify
        self._run_later = later
        self._numbers = count(1)
        self._holds: dict[int, Hold] = {}
        self._held_since_s: dict[int, float] = {}
        self._writers: dict[int, _Writing] = {}
        self._waits = Waits(later)
        self.is_watching = False

    @property
    def lease_count(self) -> int:
        return len(self._holds)

    @property
    def writer_count(self) -> int:
        return len(self._writers)

    @property
    def lease_left_s(self) -> float | None:
        """Until a lease has been held for too long; None while there is no such moment."""
        lease_max_s = self._pool.limits.lease_max_s
        if lease_max_s is None or not self._held_since_s:
            return None
        oldest_s = next(iter(self._held_since_s.values()))
        return max(0.0, oldest_s + lease_max_s - self._pool.now_s())

    @property
    def has_something(self) -> bool:
        """Whether the process has a lease or an open writer, which end when it is silent."""
        return bool(self._holds) or any(writing.transaction.is_open for writing in self._writers.values())

    def handle(self, kind: Kind, message: memoryview, answer: Answer) -> None:
        """Do what is asked; `answer` once, at once or later in the session's thread.

        Raises:
            AttachProtocolError: the message is none. KVStoreError: what the answer is to say instead.
        """
        if kind is Kind.COMMIT:
            self._commit(CommitRequest.parse(message), answer)
            return
        if kind is Kind.HOLD:
            self._hold(HoldRequest.parse(message, self._spec), answer)
            return
        if kind is Kind.FLUSH:
            self._flush(messages.parse_number(message, "FLUSH"), answer)
            return
        act = _ACTIONS.get(kind)
        if act is None:
            raise AttachProtocolError(f"{kind.name} is not expected here")
        answer(act(self, message), None)

    # Reading

    def _match(self, message: memoryview) -> bytes:
        request = MatchRequest.parse(message, self._spec)
        began_s = time.perf_counter()
        found = self._pool.match(
            request.prompt,
            shard=request.shard,
            grid=request.grid,
            cap_tokens=request.cap_tokens,
            accept_coverage=request.accept_coverage,
        )
        self._pool.observer.matched(request.prompt, found, time.perf_counter() - began_s)
        return pack_match(found)

    def _stored(self, message: memoryview) -> bytes:
        return bytes(self._pool.stored(parse_stored(message, self._spec)))

    def _explain(self, message: memoryview) -> bytes:
        request = MatchRequest.parse(message, self._spec)
        return messages.pack_explanation(self._pool.explain(request.prompt, shard=request.shard, grid=request.grid))

    def _hold(self, request: HoldRequest, answer: Answer) -> None:
        """Hold a resume point; what must be loaded first is waited for in another thread, and answered later."""
        self._check_leases()
        asked: dict[str, Any] = {"shard": request.shard, "grid": request.grid, "grids": request.grids}
        try:
            hold = self._pool.hold_now(request.path, **asked)
        except LeaseGoneError:
            if not self._pool.may_load:
                raise
        else:
            answer(self._held(hold).pack(), None)
            return
        deadline = Deadline.after(request.wait_ms / 1000)

        def load() -> BaseHold:
            return self._pool.hold(request.path, **asked, deadline=deadline)

        def loaded(hold: BaseHold) -> bytes:
            assert isinstance(hold, Hold)
            self._check_leases()
            return self._held(hold).pack()

        self._waits.begin(load, loaded, answer, undo=lambda hold: hold.release())

    def _flush(self, wait_ms: int, answer: Answer) -> None:
        self._waits.begin(lambda: self._pool.flush(wait_ms / 1000), lambda _: b"", answer, undo=lambda _: None)

    def _check_leases(self) -> None:
        if len(self._holds) >= ATTACHED_LEASES_MAX:
            raise PoolError(f"this process holds {ATTACHED_LEASES_MAX} leases, which is the limit; release some")

    def _held(self, hold: Hold) -> Held:
        try:
            placed = self._placed(hold.records)
        except BaseException:
            hold.release()
            raise
        number = next(self._numbers)
        self._holds[number] = hold
        if self._pool.limits.lease_max_s is not None:
            # The process has to see that its term is over before anything is reused, so the pool must not end it.
            self._pool.exempt(hold)
            self._held_since_s[number] = self._pool.now_s()
        return Held(number, self._page.term, hold.salt, hold.handover, placed)

    def _placed(self, records: Sequence[HeldRecord | TransactionRecord]) -> tuple[PlacedRecord, ...]:
        try:
            offsets = self._arena.locations([record.slot for record in records]).tolist()
        except StaleSlotError as error:
            raise LeaseGoneError("a record was found damaged while it was being leased; match again") from error
        return tuple(
            PlacedRecord(r.name, r.layout, r.header, r.slot, offset) for r, offset in zip(records, offsets, strict=True)
        )

    def _release(self, message: memoryview) -> bytes:
        number = messages.parse_number(message, "RELEASE")
        self._held_since_s.pop(number, None)
        hold = self._holds.pop(number, None)
        if hold is not None:
            hold.release()
        return b""

    def _check(self, message: memoryview) -> bytes:
        hold = self._holds.get(messages.parse_number(message, "CHECK"))
        if hold is None:
            raise LeaseError("the lease was released or has expired; read the match again")
        self._pool.check_current(hold)
        return b""

    def _accept(self, message: memoryview) -> bytes:
        path = parse_path(message, self._spec, "ACCEPT")
        self._check_leases()
        accepted = self._pool.accept_handover(path)
        if accepted is None:
            return b""
        handover, grids, hold = accepted
        return Accepted(handover, grids, self._held(hold)).pack()

    def _return(self, message: memoryview) -> bytes:
        returned = HandOverMessage.parse(message, self._spec)
        if returned.handover is not None:
            self._pool.return_handover(returned.path, returned.handover, returned.grids or {})
        return b""

    def _take(self, message: memoryview) -> bytes:
        path = parse_path(message, self._spec, "TAKE")
        return HandOverMessage(path, self._pool.take_handover(path)).pack()

    # Writing

    def _missing(self, message: memoryview) -> bytes:
        request = MissingRequest.parse(message, self._spec)
        lacking = set(self._pool.missing(request.path, request.names, request.grid))
        return pack_numbers([number for number, name in enumerate(request.names) if name in lacking])

    def _begin(self, message: memoryview) -> bytes:
        request = BeginRequest.parse(message, self._spec)
        if len(self._writers) >= ATTACHED_WRITERS_MAX:
            raise PoolError(f"this process has {ATTACHED_WRITERS_MAX} writers open, which is the limit; end some")
        transaction = self._pool.begin(
            request.path,
            [name for name, _ in request.names],
            salt=request.salt,
            grid_digests=dict(request.names),
            resume_nodes=request.resume_nodes,
            basis=self._basis(request.basis),
            is_transient=request.is_transient,
            joint=request.joint,
            ttl_s=request.ttl_s,
        )
        try:
            for record in transaction.records:
                # What lay here before must not pass for what is to be written.
                record.memory[: record.layout.header_bytes] = bytes(record.layout.header_bytes)
            reserved, there = self._placed(transaction.records), self._placed(transaction.held)
            writing = _Writing.of(transaction)
        except BaseException as error:
            failure = transaction.joint_failure
            transaction.abort(f"it could not begin: {error}")
            if failure is not None:
                raise failure from error
            raise
        number = next(self._numbers)
        self._writers[number] = writing
        return Begun(number, self._page.term, reserved, there).pack()

    def _basis(self, slots: Sequence[Slot]) -> list[HeldRecord]:
        if not slots:
            return []
        held = {record.slot: record for hold in self._holds.values() for record in hold.records}
        if any(slot not in held for slot in slots):
            raise LeaseGoneError(
                "the resume point to continue from is not leased by this process any more; match again"
            )
        return [held[slot] for slot in slots]

    def _commit(self, request: CommitRequest, answer: Answer) -> None:
        writing = self._writers.get(request.number)
        if writing is None:
            raise WriteError("this writer has ended: its process was silent for too long, or it was aborted")
        transaction = writing.transaction
        try:
            self._accept_seals(request, transaction)
            if request.is_still:
                writing.is_still()
            if transaction.joint is not None:
                self._commit_jointly(request, transaction, answer)
            else:
                transaction.commit(request.upto_tokens, request.handover)
        except BaseException as error:
            if transaction.joint is not None:
                # Its process takes the party for ended: the others need not wait for it.
                transaction.abort(f"its commit was refused: {error}")
                if request.is_still:
                    writing.is_still()
            elif request.is_still and transaction.is_open:
                writing.moves()
            self._drop_if_over(request.number, is_still=request.is_still)
            raise
        if transaction.joint is None:
            self._drop_if_over(request.number, is_still=request.is_still)
            answer(b"", None)

    def _accept_seals(self, request: CommitRequest, transaction: Transaction) -> None:
        for record, cost_us in request.seals:
            if record >= len(transaction.records):
                raise AttachProtocolError(f"COMMIT seals record {record} of {len(transaction.records)}")
            try:
                transaction.accept_seal(record, cost_us, verify=self._verify)
            except WriteError:
                if transaction.joint is None or transaction.is_open:
                    raise
                return  # another party gave up: the joint commit says so

    def _commit_jointly(
        self,
        request: CommitRequest,
        transaction: Transaction,
        answer: Answer,
    ) -> None:
        def end(error: BaseException | None) -> None:
            self._drop_if_over(request.number, is_still=request.is_still)
            answer(b"", error)

        def ended(error: BaseException | None) -> None:
            self._run_later(lambda: end(error))

        if request.upto_tokens is not None and request.upto_tokens < transaction.path.tokens:
            raise WriteError("a party of a joint commit commits its whole prompt, not a part of it")
        transaction.commit_jointly(request.handover, ended)

    def _abort(self, message: memoryview) -> bytes:
        request = AbortRequest.parse(message)
        writing = self._writers.get(request.number)
        if writing is not None:
            if request.is_still:
                writing.is_still()
            writing.transaction.abort(request.reason)
            self._drop_if_over(request.number, is_still=request.is_still)
        return b""

    def _still(self, message: memoryview) -> bytes:
        number = messages.parse_number(message, "STILL")
        writing = self._writers.get(number)
        if writing is not None:
            writing.is_still()
            if writing.transaction.is_open:
                writing.transaction.abort("its process gave it up")
            self._drop_if_over(number, is_still=True)
        return b""

    def _drop_if_over(self, number: int, *, is_still: bool) -> None:
        writing = self._writers.get(number)
        if writing is not None and is_still and not writing.transaction.is_open:
            del self._writers[number]

    # The rest

    def _evict(self, message: memoryview) -> bytes:
        key, states_only, _ = messages.parse_key(message, "EVICT")
        return messages.pack_number(self._pool.evict(key, states_only=states_only))

    def _evict_root(self, message: memoryview) -> bytes:
        return messages.pack_number(self._pool.evict_root(*messages.parse_root(message)))

    def _condemn(self, message: memoryview) -> bytes:
        key, is_state, slot = messages.parse_key(message, "CONDEMN")
        self._pool.condemn(key, is_state=is_state, slot=slot)
        return b""

    def _watch(self, message: memoryview) -> bytes:
        self.is_watching = messages.parse_flag(message, "WATCH")
        return b""

    def _statistics(self, message: memoryview) -> bytes:
        messages.parse_empty(message, "STATISTICS")
        return messages.pack_statistics(self._pool.statistics())

    def _beat(self, message: memoryview) -> bytes:
        messages.parse_empty(message, "BEAT")
        return b""

    def _inspect(self, message: memoryview) -> bytes:
        messages.parse_empty(message, "INSPECT")
        self._pool.check()
        return b""

    # Ends

    def end_term(self, reason: str, *, is_last: bool = False) -> int:
        """End every lease and open writer; writers keep their slots until `let_go`, or until they are said to be still.

        The process sees the new term before anything that it held can be reused.
        """
        term = self._page.end_last_term() if is_last else self._page.end_term()
        if is_last:
            self._waits.close()
        holds, self._holds = self._holds, {}
        self._held_since_s.clear()
        for hold in holds.values():
            hold.release()
        for writing in self._writers.values():
            writing.transaction.abort(reason)
        return term

    def let_go(self) -> None:
        """Nothing of the process can write any more: what waited for that may be reused."""
        writers, self._writers = self._writers, {}
        for writing in writers.values():
            writing.is_still()


_ACTIONS: dict[Kind, Callable[[Requests, memoryview], bytes]] = {
    Kind.MATCH: Requests._match,
    Kind.RELEASE: Requests._release,
    Kind.CHECK: Requests._check,
    Kind.ACCEPT: Requests._accept,
    Kind.RETURN: Requests._return,
    Kind.TAKE: Requests._take,
    Kind.MISSING: Requests._missing,
    Kind.BEGIN: Requests._begin,
    Kind.ABORT: Requests._abort,
    Kind.STILL: Requests._still,
    Kind.EVICT: Requests._evict,
    Kind.CONDEMN: Requests._condemn,
    Kind.WATCH: Requests._watch,
    Kind.STATISTICS: Requests._statistics,
    Kind.BEAT: Requests._beat,
    Kind.INSPECT: Requests._inspect,
    Kind.EXPLAIN: Requests._explain,
    Kind.STORED: Requests._stored,
    Kind.EVICT_ROOT: Requests._evict_root,
}
