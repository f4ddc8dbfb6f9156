"""The asking side of a store: what other nodes have, and pulling it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from itertools import count
from typing import TYPE_CHECKING

from kvstore.abc import TransportOptions
from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, KVStoreError, StoreClosedError, TransferError
from kvstore.handle import Handle
from kvstore.limits import TRANSFER_PRIORITY_DEFAULT
from kvstore.registry import transport_for
from kvstore.spec import WHOLE
from kvstore.transfer.asking import Asking
from kvstore.transfer.connector import Dialer
from kvstore.transfer.fetching import Fetching, Means, Wanted
from kvstore.transfer.flights import Flights
from kvstore.transfer.frames import TransferId
from kvstore.transfer.inbox import Inbox
from kvstore.transfer.query import Query
from kvstore.transfer.remote import RemoteMatch
from kvstore.transfer.sender import CLOSE_DEADLINE_S, check_options
from kvstore.transfer.settings import TransferSettings, new_boot_epoch

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc import Transport
    from kvstore.pool import BasePool, Prompt
    from kvstore.spec import ChunkGrid, Shard
    from kvstore.transfer.remote import FetchReport
    from kvstore.transfer.report import TransferObserver

RATES_MAX = 1024
"""Nodes whose rate is remembered."""
RATE_WEIGHT = 0.5
"""Of the newest fetch in a node's rate."""


class Fetcher:
    """Asks other nodes and fetches from them into a pool. Any thread may call.

    A question has a thread while it is open, a fetch two or more.

    Args:
        pool: where what is fetched goes; not closed here.
        settings: deadlines and limits.
        boot_epoch: this run of the node; by default a new random one.
        find_transport: looks a transport up; for tests.
    """

    def __init__(
        self,
        pool: BasePool,
        *,
        settings: TransferSettings | None = None,
        boot_epoch: int | None = None,
        find_transport: Callable[[str], Transport] = transport_for,
    ) -> None:
        self.settings = settings or TransferSettings()
        self.boot_epoch = boot_epoch or new_boot_epoch()
        self._pool = pool
        self._find_transport = find_transport
        self._lock = threading.Lock()
        self._counter = count(1)
        self._inbox: Inbox | None = None
        self._flights = Flights()
        self._running: set[Fetching | _Asked] = set()
        self._rates: OrderedDict[str, float] = OrderedDict()
        self._is_closed = False

    def __enter__(self) -> Fetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def running_count(self) -> int:
        """Questions and fetches that are open now."""
        with self._lock:
            return len(self._running)

    def query(
        self,
        prompt: Prompt,
        address: str,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        deadline_s: float,
    ) -> Handle[RemoteMatch]:
        """Ask a node what it has of a prompt. Returns at once; nothing is held there.

        Returns:
            A handle that fails with `DeadlineError`, `PeerGoneError`, `PeerMismatchError` or another `TransferError`.

        Raises:
            TransferError: too much is open already, the question is too long, or an option has another type.
            StoreClosedError: closed. AddressError, UnavailableError: no transport for this address.
        """
        check_options(transport, TRANSFER_PRIORITY_DEFAULT, deadline_s, deadline_name="deadline_s")
        dialer = self._dialer(address, transport)
        asked = _Asked(self, dialer, prompt, shard, grid, Deadline.after(deadline_s))
        self._begin(asked)
        return asked.handle

    def fetch(
        self,
        prompt: Prompt,
        address: str,
        *,
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        tokens_max: int | None = None,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
    ) -> Handle[FetchReport]:
        """Get the deepest resume point of a prompt that a node has and this pool lacks. Returns at once.

        Args:
            tokens_max: nothing deeper than this.
            transport, total_deadline_s, priority, observer: as `Sender.send`.

        Returns:
            A handle that resolves when it is committed here, or when there is nothing to fetch. It fails with
            `TransferFullError` (no room here; `TransferTooLargeError` if there never will be), `PeerGoneError`,
            `PeerMismatchError`, `TransferAbortedError`, `ChecksumError` (pieces kept arriving damaged) or another
            `TransferError`. `cancel` aborts.

        Raises:
            As `query`.
        """
        check_options(transport, priority, total_deadline_s)
        dialer = self._dialer(address, transport)
        deepest = len(prompt) - 1
        wanted = Wanted(
            prompt,
            shard,
            grid,
            deepest if tokens_max is None else min(deepest, tokens_max),
            priority,
            total_deadline_s,
        )
        means = Means(self._pool, self._own_inbox(), self._flights, self.next_question, self._committed)
        fetching = Fetching(means, wanted, dialer, observer, self.ended)
        self._begin(fetching)
        return fetching.handle

    def next_question(self) -> TransferId:
        """A name for a question; never used twice."""
        return TransferId(self.boot_epoch, next(self._counter))

    def bytes_per_s(self, address: str) -> float | None:
        """What fetches from a node have reached; None before any."""
        with self._lock:
            return self._rates.get(address)

    def _dialer(self, address: str, transport: TransportOptions | None) -> Dialer:
        options = transport or TransportOptions()
        return Dialer(self._find_transport(address), address, options, self._pool.spec, self.boot_epoch, self.settings)

    def _own_inbox(self) -> Inbox:
        with self._lock:
            self._check_open()
            if self._inbox is None:
                self._inbox = Inbox(self._pool, self.settings, self.boot_epoch, None)
            return self._inbox

    def _begin(self, work: Fetching | _Asked) -> None:
        with self._lock:
            self._check_open()
            limit = self.settings.transfers_per_node_max
            if len(self._running) >= limit:
                raise TransferError(f"{limit} questions and fetches are open already, the most; wait for one to end")
            self._running.add(work)
            try:
                work.start()
            except BaseException:
                self._running.discard(work)
                raise

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreClosedError("this store's fetches were closed; open the store again")

    def ended(self, work: Fetching | _Asked) -> None:
        """Something is not running any more."""
        with self._lock:
            self._running.discard(work)

    def _committed(self, report: FetchReport) -> None:
        """Remember how fast it came."""
        if not report.received_bytes or not report.transfer_s:
            return
        rate = report.received_bytes / report.transfer_s
        with self._lock:
            known = self._rates.pop(report.address, rate)
            self._rates[report.address] = known + RATE_WEIGHT * (rate - known)
            while len(self._rates) > RATES_MAX:
                self._rates.popitem(last=False)

    def close(self) -> None:
        """Cancel what is running and wait until its threads have ended. Idempotent."""
        with self._lock:
            self._is_closed = True
            running = list(self._running)
            inbox, self._inbox = self._inbox, None
        for work in running:
            work.cancel("the store is closing")
        for work in running:
            work.join(CLOSE_DEADLINE_S)
        if inbox is not None:
            inbox.close()


class _Asked:
    """One question, with a thread of its own."""

    def __init__(
        self, owner: Fetcher, dialer: Dialer, prompt: Prompt, shard: Shard, grid: ChunkGrid | None, deadline: Deadline
    ) -> None:
        self._owner = owner
        self._dialer = dialer
        self._prompt = prompt
        self._shard = shard
        self._grid = grid
        self._deadline = deadline
        self._packed = Query.of(prompt, shard, grid).pack()
        self._question = owner.next_question()
        self._cancelled: str | None = None
        self._lock = threading.Lock()
        self._close: Callable[[], None] | None = None
        self.handle: Handle[RemoteMatch] = Handle(f"the answer of {dialer.address}", self.cancel)
        name = f"kvstore-query-{self._question.counter}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        try:
            self._thread.start()
        except RuntimeError as error:
            raise TransferError(
                f"no thread can be started to ask {self._dialer.address}: {error}; ask less at once, or raise the "
                "limit on threads"
            ) from error

    def join(self, deadline_s: float) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(deadline_s)

    def cancel(self, reason: str) -> None:
        with self._lock:
            self._cancelled = self._cancelled or reason
            close = self._close
        if close is not None:
            close()

    def _run(self) -> None:
        try:
            found = self._ask()
        except BaseException as error:
            self._owner.ended(self)
            self.handle.fail(self._as_told(error))
        else:
            self._owner.ended(self)
            self.handle.resolve(found)

    def _as_told(self, error: BaseException) -> BaseException:
        if self._cancelled is None or not isinstance(error, KVStoreError):
            return error
        return TransferError(f"the question to {self._dialer.address} was given up: {self._cancelled}")

    def _ask(self) -> RemoteMatch:
        address = self._dialer.address
        connect = Deadline.after(self._owner.settings.connect_deadline_s).earlier(self._deadline)
        greeted = self._dialer.connect(connect)
        try:
            with self._lock:
                self._close = greeted.link.close
                if self._cancelled is not None:
                    raise TransferError("cancelled")
            asking = Asking(greeted, address, self._question)
            try:
                found = asking.query(self._packed, len(self._prompt), self._deadline)
            except DeadlineError as error:
                raise DeadlineError(f"{address} did not answer within the deadline of the question") from error
        finally:
            greeted.link.close()
        rate = self._owner.bytes_per_s(address)
        return RemoteMatch(
            address,
            self._prompt,
            found.candidates,
            found.pending_tokens,
            asking.round_trip_s,
            rate,
            self._shard,
            self._grid,
        )
