"""What a store does with other nodes: receive, send, ask, fetch."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from kvstore.errors import TransferError
from kvstore.limits import CONNECT_DEADLINE_S, QUERY_DEADLINE_S, TRANSFER_PRIORITY_DEFAULT
from kvstore.spec import WHOLE
from kvstore.store.arguments import check_position

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvstore.abc import TransportOptions
    from kvstore.handle import Handle
    from kvstore.keys import ExtraInput
    from kvstore.pool import BasePool, HandOver, Match, Prompt
    from kvstore.spec import ChunkGrid, Shard
    from kvstore.store.lease import Lease
    from kvstore.transfer import (
        Endpoint,
        Fetcher,
        FetchReport,
        LinkSnapshot,
        RemoteMatch,
        Sender,
        TransferObserver,
        TransferReport,
        TransferSettings,
    )
    from kvstore.transfer.egress import Egress


class NodeOperations(ABC):
    """The part of a store that other nodes have to do with. What it needs is begun on use. Any thread may call."""

    def __init__(self, pool: BasePool) -> None:
        self.pool = pool
        self._nodes_lock = threading.Lock()
        # Its own thread keeps an open endpoint alive; one that was closed need not be remembered.
        self._endpoints: weakref.WeakSet[Endpoint] = weakref.WeakSet()
        self._sender: Sender | None = None
        self._egress: Egress | None = None
        self._fetcher: Fetcher | None = None
        self._is_closing = False

    @abstractmethod
    def check_open(self) -> None:
        """Raise `StoreClosedError` if the store was closed, or belongs to the parent of a fork."""

    @abstractmethod
    def read(self, match: Match) -> Lease:
        """Pin the records of a match."""

    @abstractmethod
    def _as_prompt(self, prompt: Any, salt: bytes, adapter: str, extras: Iterable[ExtraInput]) -> Prompt:
        """The prompt that a caller means."""

    def listen(
        self,
        address: str,
        *,
        transport: TransportOptions | None = None,
        settings: TransferSettings | None = None,
        observer: TransferObserver | None = None,
        serves: bool = False,
    ) -> Endpoint:
        """Receive transfers from other nodes: `listen("tcp://0.0.0.0:7400")`. Closed with the store.

        Args:
            address: `tcp://host:port`; port 0 lets the system choose, and the endpoint's `address` says which.
            transport: pacing and congestion control of the connections.
            settings: deadlines and limits.
            observer: told of each layer's bytes as they arrive.
            serves: let every peer that may connect ask what this store holds, and fetch it: `query` and `fetch` there.
                A salt that a peer does not present exactly is a miss.

        Raises:
            AddressError: the address is malformed, in use, or names no transport. UnavailableError: the transport
            does not work here, or cannot do what `transport` asks. TransferError: an option of another type.
            StoreClosedError: closed.
        """
        from kvstore.transfer import Endpoint

        with self._nodes_lock:
            self.check_open()
            endpoint = Endpoint(
                self.pool,
                address,
                transport=transport,
                settings=settings,
                observer=observer,
                serves=serves,
                egress=self._shared_egress() if serves else None,
            )
            self._endpoints.add(endpoint)
            return endpoint

    def send(
        self,
        match: Match,
        address: str,
        *,
        handover: HandOver | None = None,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
        resume: tuple[int, int] | None = None,
    ) -> Handle[TransferReport]:
        """Send a resume point to another node; only what is missing there crosses.

        The handle resolves when the other node has committed it. `cancel()` aborts on both sides.

        Args:
            match: what to send: the whole resume point.
            address: where the receiver listens, `tcp://host:port`.
            handover: makes it a hand-over: a process there decodes on, after `accept`.
            transport: pacing and congestion control of the connections.
            total_deadline_s: when to give up, at most an hour; by default from the bytes and the least rate.
            priority: 0 (first) to 255, for receivers that queue.
            observer: told of each layer's bytes as they leave.
            resume: `PeerGoneError.transfer` of an earlier, otherwise equal call: what has arrived since does not cross
                again, while the other node keeps it (10 s by default; `TransferAbortedError` says that it has not).

        Raises:
            LeaseGoneError: it was evicted since it was matched. LeaseError: the match is a miss.
            AddressError, UnavailableError: no transport for this address. TransferError: an option that is out of its
            limits, or of another type; too many transfers. The handle fails as that of `kvstore.transfer.Sender.send`.
        """
        from kvstore.transfer import send_lease

        sender = self.own_sender()
        return send_lease(
            self.read(match),
            address,
            handover=handover,
            transport=transport,
            total_deadline_s=total_deadline_s,
            priority=priority,
            observer=observer,
            resume=resume,
            sender=sender,
        )

    def links(self) -> tuple[LinkSnapshot, ...]:
        """How the links to the peers that this store has sent to are doing: values for a scheduler. Any thread."""
        with self._nodes_lock:
            egress = self._egress
        return () if egress is None else egress.links.snapshot()

    def query(
        self,
        prompt: Any,
        address: str,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        deadline_s: float = QUERY_DEADLINE_S,
    ) -> RemoteMatch:
        """Ask another node how much of a prompt it has; a falsy answer is a miss. Blocks; see `ask`.

        The prompt itself goes there, and the node computes its keys. It must listen with `serves=True`. Asked is what
        is whole: a prompt's coverage does not count.

        Args:
            prompt, salt, adapter, extras, shard, grid: as `match`.
            address: where the node listens, `tcp://host:port`.
            transport: congestion control of the connection.
            deadline_s: for connecting and the answer.

        Raises:
            DeadlineError, PeerGoneError: no answer. PeerMismatchError: it holds another model. TransferError: it does
            not answer such questions (the message says which switch or release it lacks), or an option is of another
            type. AddressError, UnavailableError: no transport for this address. Otherwise as `match`.
        """
        handle = self.ask(
            prompt,
            address,
            salt=salt,
            adapter=adapter,
            extras=extras,
            shard=shard,
            grid=grid,
            transport=transport,
            deadline_s=deadline_s,
        )
        # The work holds the deadline itself, and says more about what it waited for.
        return handle.result(deadline_s + CONNECT_DEADLINE_S)

    def ask(
        self,
        prompt: Any,
        address: str,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        deadline_s: float = QUERY_DEADLINE_S,
    ) -> Handle[RemoteMatch]:
        """As `query`, without blocking: the handle resolves with the answer, or fails as `query` raises."""
        check_position(shard, grid)
        target = self._as_prompt(prompt, salt, adapter, extras)
        return self._own_fetcher().query(
            target.exact, address, shard=shard, grid=grid, transport=transport, deadline_s=deadline_s
        )

    def fetch(
        self,
        prompt: Any,
        address: str | None = None,
        *,
        salt: bytes = b"",
        adapter: str = "",
        extras: Iterable[ExtraInput] = (),
        shard: Shard = WHOLE,
        grid: ChunkGrid | None = None,
        transport: TransportOptions | None = None,
        total_deadline_s: float | None = None,
        priority: int = TRANSFER_PRIORITY_DEFAULT,
        observer: TransferObserver | None = None,
    ) -> Handle[FetchReport]:
        """Get from another node what it has of a prompt and this store lacks; only that crosses.

        The handle resolves when it is committed here, so that `match` finds it; a miss there is no error, and nothing
        is asked if no more could be had than is here. Fetches of one prefix share one transfer. `cancel()` aborts.

        Args:
            prompt: token ids, a `Prompt`, or what `query` returned (then all else about it is said, and nothing deeper
                is fetched than that answer, or what its `at` left of it).
            address: where the node listens, `tcp://host:port`; it must listen with `serves=True`.
            salt, adapter, extras, shard, grid: as `match`.
            transport: congestion control of the connections.
            total_deadline_s: when to give up, at most an hour; by default from the bytes and the least rate.
            priority: 0 (first) to 255, at both nodes.
            observer: told of each layer's bytes as they arrive.

        Raises:
            TransferError: no address, an option that is out of its limits or of another type, too many fetches.
            AddressError, UnavailableError: no transport for this address. Otherwise as `match`. The handle fails as
            that of `kvstore.transfer.Fetcher.fetch`.
        """
        from kvstore.transfer import RemoteMatch

        tokens_max: int | None = None
        if isinstance(prompt, RemoteMatch):
            if salt or adapter or tuple(extras) or shard != WHOLE or grid is not None:
                raise TransferError("a RemoteMatch says what was asked already; pass these to Store.query only")
            tokens_max, shard, grid = prompt.tokens, prompt.shard, prompt.grid
            address = prompt.address if address is None else address
            prompt = prompt.prompt
        if address is None:
            raise TransferError("address= is needed: where the node listens that is to be asked, 'tcp://host:port'")
        check_position(shard, grid)
        return self._own_fetcher().fetch(
            self._as_prompt(prompt, salt, adapter, extras).exact,
            address,
            shard=shard,
            grid=grid,
            tokens_max=tokens_max,
            transport=transport,
            total_deadline_s=total_deadline_s,
            priority=priority,
            observer=observer,
        )

    def _own_fetcher(self) -> Fetcher:
        from kvstore.transfer import Fetcher

        with self._nodes_lock:
            self.check_open()
            if self._fetcher is None:
                self._fetcher = Fetcher(self.pool)
            return self._fetcher

    def own_sender(self) -> Sender:
        """For `Writer`: who sends for this store; begun when it is first asked for."""
        from kvstore.transfer import Sender

        with self._nodes_lock:
            self.check_open()
            if self._sender is None:
                self._sender = Sender(egress=self._shared_egress())
            return self._sender

    def _shared_egress(self) -> Egress:
        """What all that leaves this store shares. Call with the lock held."""
        from kvstore.transfer.egress import Egress

        if self._egress is None:
            self._egress = Egress()
        return self._egress

    @property
    def sender(self) -> Sender | None:
        """Who sends for this store; None as long as nothing was sent."""
        return self._sender

    def _end_transfers(self) -> list[Callable[[], None]]:
        """Forget what was begun here; how each of it is closed, in order."""
        with self._nodes_lock:
            self._is_closing = True  # What would begin from here on, nobody would close.
            endpoints, self._endpoints = list(self._endpoints), weakref.WeakSet()
            sender, self._sender = self._sender, None
            fetcher, self._fetcher = self._fetcher, None
        ends: list[Callable[[], None]] = [] if fetcher is None else [fetcher.close]
        if sender is not None:
            ends.append(sender.close)
        return ends + [endpoint.close for endpoint in reversed(endpoints)]

    def _forget_transfers(self) -> None:
        """In a forked child, which has none of the threads."""
        self._nodes_lock = threading.Lock()
        self._endpoints = weakref.WeakSet()
        self._sender = self._egress = self._fetcher = None
