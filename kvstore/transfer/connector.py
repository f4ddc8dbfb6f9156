"""Where a sender's connections to its receiver come from."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, PeerGoneError, ProtocolError
from kvstore.transfer.frames import NO_TRANSFER, Kind
from kvstore.transfer.greeting import check_hello, make_hello, may_join, may_rejoin, uses_get
from kvstore.transfer.link import FrameLink
from kvstore.transfer.messages import Hello

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc import Transport, TransportOptions
    from kvstore.spec import ModelSpec
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.idle_links import IdleLinks
    from kvstore.transfer.settings import TransferSettings

LOG = logging.getLogger("kvstore.transfer")


@dataclass(frozen=True, eq=False)
class GreetedLink:
    """A connection on which both sides have said HELLO, and fit.

    Attributes:
        link: the connection; its no-progress deadline is the one that both sides bear.
        ours, theirs: the two HELLOs.
        reused_s: when it was taken up again after an earlier transfer; None if it is new.
    """

    link: FrameLink
    ours: Hello
    theirs: Hello
    reused_s: float | None = None

    @property
    def is_one_sided(self) -> bool:
        """Whether pieces are got from exposed memory instead of being sent."""
        return uses_get(self.ours, self.theirs)

    @property
    def may_join(self) -> bool:
        """Whether further connections may carry pieces."""
        return may_join(self.ours, self.theirs)

    @property
    def may_rejoin(self) -> bool:
        """Whether this further connection may join another attachment once its own has ended."""
        return may_rejoin(self.ours, self.theirs)


@dataclass(frozen=True, eq=False)
class JoinedLink:
    """A further connection that the receiver has taken up.

    Attributes:
        greeted: the connection.
        number: of the connection within its attachment, from 1.
    """

    greeted: GreetedLink
    number: int


class Connector(ABC):
    """Makes the connections of one transfer. Any thread may call."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The receiver, for people."""

    @property
    def route_count(self) -> int:
        """How many ways there are to the receiver, each of which takes a connection."""
        return 1

    @abstractmethod
    def connect(self, deadline: Deadline, *, may_reuse: bool = True) -> GreetedLink:
        """A connection for a transfer's control frames; the caller closes its link, or gives it back.

        Args:
            may_reuse: it may have served another transfer, and have broken since without anybody's notice.

        Raises:
            PeerGoneError, TransportError, DeadlineError: there is none; another attempt may find one.
            PeerMismatchError: the receiver holds another model or speaks another version.
            ProtocolError: what answers is no kvstore node, or a damaged one.
        """

    @abstractmethod
    def join(
        self,
        transfer: TransferId,
        generation: int,
        progress_deadline_s: float,
        deadline: Deadline,
        opened: Callable[[FrameLink], None],
    ) -> JoinedLink | None:
        """A further connection for an attachment, or None if the receiver does not take one.

        Args:
            transfer, generation: the attachment.
            progress_deadline_s: the longest silence that both sides bear.
            deadline: for the connection and its HELLO.
            opened: gets the link before anything is waited for on it, so that another thread can end the wait by
                closing it. From then on the caller closes it, also when this raises.

        Raises:
            As `connect`.
        """

    def give_back(self, greeted: GreetedLink) -> None:
        """Take over a first connection whose transfer was committed, and on which nothing is under way."""
        greeted.link.close()

    def give_back_joined(self, joined: JoinedLink) -> None:
        """Take over a further connection whose attachment ended in a commit, and on which nothing is under way."""
        joined.greeted.link.close()

    def leave(self, generation: int) -> None:
        """An attachment has ended; whoever still waits in `join` for it is let go."""
        return


class Dialer(Connector):
    """Connects to an address where the receiver listens.

    Args:
        transport, address, options: how to get there.
        spec: the model that both sides must hold.
        boot_epoch: this run of this node.
        settings: deadlines and limits.
        idle: where connections wait between transfers; None closes each with its transfer.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        options: TransportOptions,
        spec: ModelSpec,
        boot_epoch: int,
        settings: TransferSettings,
        idle: IdleLinks | None = None,
    ) -> None:
        self._transport = transport
        self._address = address
        self._options = options
        self._spec = spec
        self._boot_epoch = boot_epoch
        self._settings = settings
        self._idle = idle
        self._routes = transport.routes(address, options)
        self._turn = count()
        self._key = (transport, address, options, spec.fingerprint)

    @property
    def address(self) -> str:
        return self._address

    @property
    def route_count(self) -> int:
        return len(self._routes)

    def connect(self, deadline: Deadline, *, may_reuse: bool = True) -> GreetedLink:
        if may_reuse and (kept := self._take(is_further=False)) is not None:
            return kept
        link = self._open_any(self._settings.progress_deadline_s, deadline)
        try:
            can_join = link.native is not None and self._settings.connections != 1
            ours = self._hello(link, can_join=can_join)
            link.send(Kind.HELLO, NO_TRANSFER, payload=ours.pack())
            try:
                header = link.receive_header(deadline)
            except DeadlineError as error:
                raise PeerGoneError(
                    f"{self._address} accepted a connection and said nothing within the connect deadline; it is "
                    "stopped, or no kvstore node"
                ) from error
            if header.kind is not Kind.HELLO:
                raise ProtocolError(f"{self._address} began with {header.kind.name} instead of HELLO")
            theirs = Hello.parse(link.receive_payload(header))
            check_hello(ours, theirs, self._address)
        except BaseException:
            link.close()
            raise
        link.progress_deadline_s = min(link.progress_deadline_s, theirs.progress_deadline_ms / 1000)
        return GreetedLink(link, ours, theirs)

    def join(
        self,
        transfer: TransferId,
        generation: int,
        progress_deadline_s: float,
        deadline: Deadline,
        opened: Callable[[FrameLink], None],
    ) -> JoinedLink | None:
        kept = self._take(is_further=True)
        link = kept.link if kept is not None else self._open(progress_deadline_s, deadline)
        opened(link)
        link.progress_deadline_s = progress_deadline_s
        hello = self._hello(link, can_join=True)
        link.send(Kind.HELLO, transfer, generation, hello.pack())
        header = link.receive_header(deadline)
        if header.kind is not Kind.HELLO or header.transfer != transfer:
            raise ProtocolError(f"{self._address} answered a further connection with {header.kind.name}")
        theirs = Hello.parse(link.receive_payload(header))
        check_hello(hello, theirs, self._address)
        is_taken = header.generation != 0 and link.native is not None
        return JoinedLink(GreetedLink(link, hello, theirs), header.generation) if is_taken else None

    def give_back(self, greeted: GreetedLink) -> None:
        self._keep(greeted, is_further=False)

    def give_back_joined(self, joined: JoinedLink) -> None:
        if joined.greeted.may_rejoin:
            self._keep(joined.greeted, is_further=True)
        else:
            joined.greeted.link.close()

    def _take(self, *, is_further: bool) -> GreetedLink | None:
        kept = self._idle.take((self._key, is_further)) if self._idle is not None else None
        if kept is None:
            return None
        next(self._turn)  # It takes one of the ways.
        return replace(kept, reused_s=time.monotonic())

    def _keep(self, greeted: GreetedLink, *, is_further: bool) -> None:
        if self._idle is not None:
            self._idle.keep((self._key, is_further), greeted)
        else:
            greeted.link.close()

    def _open_any(self, progress_deadline_s: float, deadline: Deadline) -> FrameLink:
        """A connection by the first way that works; each gets its share of the time that is left."""
        for left in range(len(self._routes), 1, -1):
            try:
                share = Deadline.after(deadline.remaining_s() / left)
                return self._open(progress_deadline_s, share)
            except PeerGoneError as error:
                LOG.info("one way to %s does not work: %s", self._address, error)
        return self._open(progress_deadline_s, deadline)

    def _open(self, progress_deadline_s: float, deadline: Deadline) -> FrameLink:
        address, options = self._routes[next(self._turn) % len(self._routes)]
        connection = self._transport.connect(address, options, deadline)
        try:
            return FrameLink(connection, progress_deadline_s)
        except BaseException:
            connection.close()
            raise

    def _hello(self, link: FrameLink, *, can_join: bool) -> Hello:
        return make_hello(self._spec, self._boot_epoch, self._settings, link.connection, can_join=can_join)
