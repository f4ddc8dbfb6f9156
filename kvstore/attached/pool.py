"""The pool of another process on this host, as a pool."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

from kvstore.attached.connection import Connection
from kvstore.attached.finding import (
    Accepted,
    HandOverMessage,
    Held,
    HoldRequest,
    MatchRequest,
    pack_stored,
    parse_flags,
    parse_match,
    stored_parts,
)
from kvstore.attached.frames import Kind
from kvstore.attached.hold import AttachedHold
from kvstore.attached.mapping import Mapping
from kvstore.attached.messages import (
    pack_key,
    pack_number,
    pack_root,
    parse_empty,
    parse_explanation,
    parse_number,
    parse_statistics,
)
from kvstore.attached.tables import pack_path
from kvstore.attached.term import TERM_CLOSED, TermView
from kvstore.attached.transaction import AttachedTransaction
from kvstore.attached.writing import BeginRequest, Begun, MissingRequest, parse_numbers
from kvstore.clock import Deadline
from kvstore.errors import (
    AttachError,
    AttachProtocolError,
    DeadlineError,
    KVStoreError,
    LeaseGoneError,
    OwnerGoneError,
    SpecError,
    StoreClosedError,
    UnavailableError,
)
from kvstore.limits import ATTACH_DEADLINE_S, LOAD_DEADLINE_S
from kvstore.pool import BasePool, HeldRecord, TransactionRecord
from kvstore.pool.plan import grid_digest
from kvstore.pool.seam import EVICT_ROOT_MOST
from kvstore.spec.shard import WHOLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from collections.abc import Mapping as ByPlace

    from kvstore.abc import Slot
    from kvstore.attached.tables import PlacedRecord
    from kvstore.events import Changes, Tell
    from kvstore.pool import BaseHold, HandOver, JointName, Match, NodePath, Pin, PoolStatistics, Prompt, RecordName
    from kvstore.pool.explanation import Explanation
    from kvstore.pool.path import RecordPlace
    from kvstore.spec import ChunkGrid, ModelSpec, Shard

T = TypeVar("T")

BEATS_PER_SILENCE = 4
"""Signs of life within the time after which silence is taken for a stopped process."""


class AttachedPool(BasePool):
    """What a store in a worker process stands on. Any thread may call any method.

    The arena is mapped once; requests carry names and places, never bytes of records. A thread tells the owner that
    this process lives while it holds or writes anything, so a lease or writer may take as long as it needs, unless the
    process is stopped.

    Args:
        path: the owner's socket.
        spec: what the owner must serve; None takes whatever it serves.
        deadline_s: an owner that does not answer for so long is gone.

    Attributes:
        silence_s: how long this process may be stopped before it loses its leases and writers.

    Raises:
        AttachError: no owner listens at `path`, or it refuses this process. OwnerGoneError: it does not answer.
        SpecError: it serves another spec.
    """

    def __init__(self, path: str, *, spec: ModelSpec | None = None, deadline_s: float = ATTACH_DEADLINE_S) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._watch_lock = threading.Lock()
        self._open: set[int] = set()
        """Leases and writers by the owner's numbers, and what this process waits for, by numbers below 0."""
        self._last_wait = 0
        self._transactions: WeakValueDictionary[int, AttachedTransaction] = WeakValueDictionary()
        self._listeners: list[Callable[[], None]] = []
        self._dropped: deque[Callable[[], None]] = deque()
        self._settling = threading.local()
        self._settle_lock = threading.Lock()
        self._kick = threading.Event()
        self._has_changed = False
        self._was_busy = False
        self._is_idle = False
        self._beat_s: float | None = None
        self._is_closed = False
        self.deadline_s = deadline_s
        self._connection = Connection(path, None if spec is None else spec.fingerprint, deadline_s)
        try:
            welcome = self._connection.welcome
            assert welcome is not None
            if spec is not None and spec.fingerprint != welcome.spec.fingerprint:
                raise SpecError(
                    f"the owner at {path} serves the spec with fingerprint {welcome.spec.fingerprint.hex()}, this "
                    f"process wants {spec.fingerprint.hex()}; attach with the owner's spec"
                )
            self.spec = spec or welcome.spec
            self.tier_name = welcome.tier
            self.owner_pid = welcome.pid
            self.boot_epoch = welcome.boot_epoch
            self.silence_s = welcome.silence_ms / 1000
            self._arena_bytes = welcome.arena_bytes
            arena, page = self._connection.descriptors
            if os.fstat(arena).st_size < welcome.arena_bytes:
                raise AttachProtocolError(
                    f"the arena has fewer than the {welcome.arena_bytes} bytes that its owner announced"
                )
            self._mapping: Mapping | None = Mapping(arena, welcome.arena_bytes)
            self._arena = self._mapping.memory
            self._term = TermView(page)
        except BaseException:
            self._connection.close_in_child()
            raise
        finally:
            for descriptor in self._connection.descriptors:
                os.close(descriptor)
        self._keeper = threading.Thread(target=self._keep, name="kvstore-attached-keeper", daemon=True)
        self._connection.start(self)
        self._keeper.start()

    @property
    def is_closed(self) -> bool:
        return self._is_closed or self._connection.gone is not None or os.getpid() != self._pid

    @property
    def term(self) -> int:
        """What was held under another term is gone."""
        return self._term.term

    @property
    def silence_reason(self) -> str:
        """Why leases and writers ended with their term."""
        return f"this process was silent for more than {self.silence_s:g} s, and its owner gave up its writers"

    def check_open(self) -> None:
        """Raise `OwnerGoneError` or `StoreClosedError` unless the pool can be used."""
        if os.getpid() != self._pid:
            raise StoreClosedError("the store belongs to the process that forked this one; attach again here")
        if self._is_closed:
            raise StoreClosedError("the store is closed; attach again")
        gone = self._connection.gone
        if gone is None and self._term.term == TERM_CLOSED:  # the page is faster than the socket
            gone = self._connection.lose("it closed the pool, or parted from this process")
        if gone is not None:
            raise OwnerGoneError(str(gone))

    # Requests

    def request(self, kind: Kind, message: bytes) -> memoryview:
        """Ask the owner; raises what it raised, or `OwnerGoneError`."""
        self.check_open()
        return self._connection.request(kind, message, self.deadline_s)

    def _request_long(self, kind: Kind, message: bytes, wait_s: float) -> memoryview:
        """As `request`, of what the owner may take `wait_s` longer for; it is asked meanwhile whether it lives."""
        self.check_open()
        with self._lock:
            self._last_wait -= 1
            wait = self._last_wait
        self._opened(wait)
        try:
            return self._connection.request(kind, message, wait_s + self.deadline_s)
        finally:
            self.forget(wait)

    def flush(self, deadline_s: float) -> None:
        self._settle()
        parse_empty(self._request_long(Kind.FLUSH, pack_number(int(deadline_s * 1000)), deadline_s), "FLUSH")

    def ask(self, kind: Kind, message: bytes, end: Callable[[memoryview | None, KVStoreError | None], None]) -> None:
        """Ask the owner something that may take long; `end` is called by the connection's reader."""
        self.check_open()
        self._connection.ask(kind, message, end, Deadline.after(self.deadline_s))
        self._kick.set()

    def post(self, kind: Kind, message: bytes) -> None:
        """Tell the owner something."""
        self.check_open()
        self._connection.post(kind, message, self.deadline_s)

    def _opened(self, number: int) -> None:
        with self._lock:
            self._open.add(number)
        self._was_busy = True
        if self._is_idle:
            self._kick.set()

    def forget(self, number: int) -> None:
        """A lease or writer has ended: no signs of life are owed for it."""
        with self._lock:
            self._open.discard(number)

    def let_go(self, number: int, *, is_current: bool) -> None:
        """For `AttachedHold`: its records are not read any more."""
        self.forget(number)
        if is_current:
            self.post(Kind.RELEASE, pack_number(number))

    def settle_later(self, end: Callable[[], None]) -> None:
        if not self.is_closed:  # else nobody comes to run it, and it would keep the memory mapped
            self._dropped.append(end)

    def soon(self, end: Callable[[], None]) -> None:
        """Run `end` soon, in a thread that may wait for the owner. Not for finalizers."""
        self._dropped.append(end)
        self._kick.set()

    def _settle(self) -> None:
        if getattr(self._settling, "is_running", False):
            return
        self._settling.is_running = True
        try:
            # Whoever comes while the keeper settles waits for it: what was dropped before a call has ended in it.
            with self._settle_lock:
                while self._dropped:
                    with suppress(StoreClosedError):  # whatever was to end has ended with the pool
                        self._dropped.popleft()()
        finally:
            self._settling.is_running = False

    # Reading

    def match(
        self,
        prompt: Prompt,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        cap_tokens: int | None = None,
        accept_coverage: bool = False,
    ) -> Match:
        self._settle()
        request = MatchRequest(prompt, shard, grid, cap_tokens, accept_coverage)
        answer = self.request(Kind.MATCH, request.pack())
        return self._understood(lambda: parse_match(answer, request, self.spec))

    def stored(self, paths: Sequence[NodePath]) -> list[bool]:
        self._settle()
        found: list[bool] = []
        for part in stored_parts(paths):
            answer = self.request(Kind.STORED, pack_stored(part))
            found += self._understood(lambda answer=answer, part=part: parse_flags(answer, len(part), "STORED"))  # type: ignore[misc]
        return found

    def _understood(self, parse: Callable[[], T]) -> T:
        """What the owner answered; one that does not speak the protocol is as good as gone."""
        try:
            return parse()
        except AttachProtocolError as error:
            self._connection.lose(f"it broke the protocol: {error}")
            raise

    def hold(
        self,
        path: NodePath,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        grids: ByPlace[RecordPlace, bytes] | None = None,
        layered: bool = False,
        deadline: Deadline | None = None,
    ) -> AttachedHold:
        """As `BasePool.hold`. `layered` changes nothing: the owner answers once everything is there."""
        self._settle()
        deadline = deadline or Deadline.after(LOAD_DEADLINE_S)
        try:
            answer = self.request(Kind.HOLD, HoldRequest(path, shard, grid, grids).pack())
        except DeadlineError:
            # It must be loaded, which the owner has begun. An owner that is stopped would have been noticed by now.
            wait_s = deadline.remaining_s()
            request = HoldRequest(path, shard, grid, grids, int(wait_s * 1000))
            answer = self._request_long(Kind.HOLD, request.pack(), wait_s)
        return self._held(path, self._understood(lambda: Held.parse(answer, self.spec, path, self._arena_bytes)))

    def _held(self, path: NodePath, held: Held) -> AttachedHold:
        hold = AttachedHold(self, path, held, self._held_records(held.records))
        self._opened(held.number)
        return hold

    def _held_records(self, records: Sequence[PlacedRecord]) -> tuple[HeldRecord, ...]:
        return tuple(HeldRecord(r.name, r.layout, self._memory(r).toreadonly(), r.header, r.slot) for r in records)

    def _memory(self, record: PlacedRecord) -> memoryview:
        return self._arena[record.offset : record.offset + record.slot.size_bytes]

    def check_current(self, hold: BaseHold) -> None:
        hold.check()
        if not isinstance(hold, AttachedHold) or hold.pool is not self:
            raise LeaseGoneError("the lease is of another store")
        parse_empty(self.request(Kind.CHECK, pack_number(hold.number)), "CHECK")

    def accept_handover(self, path: NodePath) -> tuple[HandOver, ByPlace[RecordPlace, bytes], AttachedHold] | None:
        self._settle()
        answer = self.request(Kind.ACCEPT, pack_path(path))
        accepted = self._understood(lambda: Accepted.parse(answer, self.spec, path, self._arena_bytes))
        if accepted is None:
            return None
        return accepted.handover, accepted.grids, self._held(path, accepted.held)

    def return_handover(self, path: NodePath, handover: HandOver, grids: ByPlace[RecordPlace, bytes]) -> None:
        parse_empty(self.request(Kind.RETURN, HandOverMessage(path, handover, grids).pack()), "RETURN")

    def take_handover(self, path: NodePath) -> HandOver | None:
        self._settle()
        answer = self.request(Kind.TAKE, pack_path(path))
        return HandOverMessage.parse(answer, self.spec).handover

    # Writing

    def missing(self, path: NodePath, names: Iterable[RecordName], grid: ChunkGrid | None = None) -> list[RecordName]:
        asked = tuple(names)
        answer = self.request(Kind.MISSING, MissingRequest(path, asked, grid).pack())
        return [asked[number] for number in parse_numbers(answer, len(asked))]

    def begin(
        self,
        path: NodePath,
        names: Sequence[RecordName],
        *,
        salt: bytes,
        grid: ChunkGrid | None = None,
        grid_digests: ByPlace[RecordName, bytes] | None = None,
        resume_nodes: Iterable[int] = (),
        basis: Sequence[HeldRecord] = (),
        is_transient: bool = False,
        joint: JointName | None = None,
        ttl_s: float | None = None,
    ) -> AttachedTransaction:
        self._settle()
        named = tuple(
            (name, grid_digests[name] if grid_digests else grid_digest(self.spec, path, name.node, name.group, grid))
            for name in names
        )
        slots = tuple(record.slot for record in basis)
        request = BeginRequest(path, salt, named, tuple(resume_nodes), slots, is_transient, joint, ttl_s)
        answer = self.request(Kind.BEGIN, request.pack())
        begun = self._understood(lambda: Begun.parse(answer, self.spec, path, self._arena_bytes))
        records = tuple(TransactionRecord(r.name, r.layout, self._memory(r), r.header, r.slot) for r in begun.records)
        transaction = AttachedTransaction(self, path, begun, records, self._held_records(begun.held), joint)
        with self._lock:
            self._transactions[begun.number] = transaction
        self._opened(begun.number)
        if self._term.term != begun.term:
            # The term ended before anybody could tell this writer, and the owner waits to hear that it is still.
            transaction.expire(self.silence_reason)
        return transaction

    # Keeping and removing

    def pin(
        self, path: NodePath, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None, ttl_s: float | None = None
    ) -> Pin:
        raise UnavailableError("an attached process cannot pin; pin in the process that owns the pool, or hold a lease")

    def expire(self, path: NodePath, ttl_s: float | None, *, after_tokens: int | None = None) -> int:
        raise UnavailableError(
            "an attached process gives a prefix its time to live when it writes it (ttl_s=); change it in the process "
            "that owns the pool, or drop the prefix"
        )

    def evict(self, key: bytes, *, states_only: bool = False) -> int:
        self._settle()
        return parse_number(self.request(Kind.EVICT, pack_key(key, flag=states_only)), "EVICT")

    def evict_root(self, root: bytes, most: int = EVICT_ROOT_MOST) -> int:
        self._settle()
        return parse_number(self.request(Kind.EVICT_ROOT, pack_root(root, most)), "EVICT_ROOT")

    def condemn(self, key: bytes, *, is_state: bool, slot: Slot | None = None) -> None:
        parse_empty(self.request(Kind.CONDEMN, pack_key(key, flag=is_state, slot=slot)), "CONDEMN")

    # Changes

    def subscribe(self, listener: Callable[[], None]) -> None:
        with self._lock:
            self._listeners.append(listener)
            is_first = len(self._listeners) == 1
        if is_first:
            self._watch()

    def unsubscribe(self, listener: Callable[[], None]) -> None:
        with self._lock:
            had = bool(self._listeners)
            self._listeners = [known for known in self._listeners if known != listener]
            is_last = had and not self._listeners
        if is_last:
            with suppress(StoreClosedError):  # nothing is told any more as it is
                self._watch()

    def _watch(self) -> None:
        """Tell the owner whether anybody wants to know of changes; what it answers is as of now."""
        with self._watch_lock:
            wants = bool(self._listeners)
            self.post(Kind.WATCH, bytes([wants]))

    def changed(self) -> None:
        """For the connection's reader."""
        self._has_changed = True
        self._kick.set()

    def expired(self, term: int, reason: str) -> None:
        """For the connection's reader."""
        with self._lock:
            transactions = list(self._transactions.values())
            self._open.clear()
        for transaction in transactions:
            if transaction.term < term:
                transaction.expire(reason)

    def gone(self) -> None:
        """For the connection's reader."""
        self._has_changed = True
        self._kick.set()

    def _keep(self) -> None:
        """The keeper: signs of life, what finalizers left to do, and telling listeners.

        While nothing is to be done, it prepares the mapping.
        """
        last_beat_s = 0.0
        while True:
            mapping = self._mapping
            if mapping is not None and mapping.prepare_some():
                wait_s: float | None = 0.0
            else:
                wait_s = self._idle_wait_s()
            del mapping  # else it would outlive `close`
            self._kick.wait(wait_s)
            self._kick.clear()
            self._is_idle = False
            if self._has_changed:
                self._has_changed = False
                for listener in tuple(self._listeners):
                    listener()
            self._settle()
            if self.is_closed:
                self._dropped.clear()
                return
            if self._open and time.monotonic() - last_beat_s >= 0.9 * self.silence_s / BEATS_PER_SILENCE:
                last_beat_s = time.monotonic()
                with suppress(StoreClosedError):
                    self._beat()

    def _idle_wait_s(self) -> float | None:
        """Until the keeper looks again; None while nothing has been opened for a while, and whoever opens kicks it.

        Leases of a moment come one after another: waking a thread for each would cost more than they do.
        """
        was_busy, self._was_busy = self._was_busy, False
        if not was_busy:
            self._is_idle = True  # first, so that whoever opens something either is seen here or sees this
            if not (self._open or self._dropped):
                return None
        return self.silence_s / BEATS_PER_SILENCE

    def _beat(self) -> None:
        """One sign of life at a time; one that stays unanswered means that the owner is gone."""
        if self._beat_s is None:
            self._beat_s = time.monotonic()
            self._connection.ask(Kind.BEAT, b"", self._beaten, Deadline.after(self.deadline_s))
        elif time.monotonic() - self._beat_s > self.deadline_s:
            self._connection.lose(f"it gave no sign of life for {self.deadline_s:g} s: it is stopped, or overloaded")

    def _beaten(self, answer: memoryview | None, error: KVStoreError | None) -> None:
        del answer, error
        self._beat_s = None

    # The pool itself

    def explain(self, prompt: Prompt, *, shard: Shard = WHOLE, grid: ChunkGrid | None = None) -> Explanation:
        self._settle()
        answer = self.request(Kind.EXPLAIN, MatchRequest(prompt, shard, grid).pack())
        return self._understood(lambda: parse_explanation(answer))

    def watch(self, tell: Tell) -> Sequence[tuple[str, Changes]]:
        raise AttachError(
            "what is stored and removed is told where the index is; take events in the process that opened the store, "
            "or only kinds=(Hit, Missed) here, which are this process's own"
        )

    def statistics(self) -> PoolStatistics:
        self._settle()
        return parse_statistics(self.request(Kind.STATISTICS, b""))

    def check(self) -> None:
        self._settle()
        parse_empty(self.request(Kind.INSPECT, b""), "INSPECT")

    def close(self) -> None:
        """Detach. What this process holds or writes ends; the owner and other processes go on."""
        with self._lock:
            if self._is_closed or os.getpid() != self._pid:
                return
            self._is_closed = True
            transactions = list(self._transactions.values())
        is_still = all(transaction.come_to_rest(self.deadline_s) for transaction in transactions)
        if is_still and self._connection.gone is None:
            with suppress(OwnerGoneError):
                self._connection.post(Kind.BYE, b"", self.deadline_s)
        self._connection.close(self.deadline_s)
        # The memory stays mapped for as long as somebody views it.
        self._arena, self._mapping = memoryview(b""), None
        self._term.close()
        self._has_changed = True
        self._kick.set()
        if threading.current_thread() is not self._keeper:
            self._keeper.join(self.deadline_s)

    def close_in_child(self) -> None:
        self._is_closed = True
        self._lock = threading.Lock()
        self._watch_lock = threading.Lock()
        self._settle_lock = threading.Lock()
        self._kick = threading.Event()
        self._connection.close_in_child()
