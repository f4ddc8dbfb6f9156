"""Where a sender's connections to its receiver come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.errors import DeadlineError, PeerGoneError, ProtocolError
from kvstore.transfer.frames import NO_TRANSFER, Kind
from kvstore.transfer.greeting import check_hello, make_hello, may_join, uses_get
from kvstore.transfer.link import FrameLink
from kvstore.transfer.messages import Hello

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.abc import Transport, TransportOptions
    from kvstore.clock import Deadline
    from kvstore.spec import ModelSpec
    from kvstore.transfer.frames import TransferId
    from kvstore.transfer.settings import TransferSettings


@dataclass(frozen=True, eq=False)
class GreetedLink:
    """A connection on which both sides have said HELLO, and fit.

    Attributes:
        link: the connection; its no-progress deadline is the one that both sides bear.
        ours, theirs: the two HELLOs.
    """

    link: FrameLink
    ours: Hello
    theirs: Hello

    @property
    def is_one_sided(self) -> bool:
        """Whether pieces are got from exposed memory instead of being sent."""
        return uses_get(self.ours, self.theirs)

    @property
    def may_join(self) -> bool:
        """Whether further connections may carry pieces."""
        return may_join(self.ours, self.theirs)


@dataclass(frozen=True, eq=False)
class JoinedLink:
    """A further connection that the receiver has taken up.

    Attributes:
        link: the connection.
        number: of the connection within its attachment, from 1.
    """

    link: FrameLink
    number: int


class Connector(ABC):
    """Makes the connections of one transfer. Any thread may call."""

    @property
    @abstractmethod
    def address(self) -> str:
        """The receiver, for people."""

    @abstractmethod
    def connect(self, deadline: Deadline) -> GreetedLink:
        """A connection for a transfer's control frames; the caller closes its link.

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


class Dialer(Connector):
    """Connects to an address where the receiver listens.

    Args:
        transport, address, options: how to get there.
        spec: the model that both sides must hold.
        boot_epoch: this run of this node.
        settings: deadlines and limits.
    """

    def __init__(
        self,
        transport: Transport,
        address: str,
        options: TransportOptions,
        spec: ModelSpec,
        boot_epoch: int,
        settings: TransferSettings,
    ) -> None:
        self._transport = transport
        self._address = address
        self._options = options
        self._spec = spec
        self._boot_epoch = boot_epoch
        self._settings = settings

    @property
    def address(self) -> str:
        return self._address

    def connect(self, deadline: Deadline) -> GreetedLink:
        link = self._open(self._settings.progress_deadline_s, deadline)
        try:
            can_join = link.native is not None and self._settings.connections > 1
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
        link = self._open(progress_deadline_s, deadline)
        opened(link)
        hello = self._hello(link, can_join=True)
        link.send(Kind.HELLO, transfer, generation, hello.pack())
        header = link.receive_header(deadline)
        if header.kind is not Kind.HELLO or header.transfer != transfer:
            raise ProtocolError(f"{self._address} answered a further connection with {header.kind.name}")
        check_hello(hello, Hello.parse(link.receive_payload(header)), self._address)
        is_taken = header.generation != 0 and link.native is not None
        return JoinedLink(link, header.generation) if is_taken else None

    def _open(self, progress_deadline_s: float, deadline: Deadline) -> FrameLink:
        connection = self._transport.connect(self._address, self._options, deadline)
        try:
            return FrameLink(connection, progress_deadline_s)
        except BaseException:
            connection.close()
            raise

    def _hello(self, link: FrameLink, *, can_join: bool) -> Hello:
        return make_hello(self._spec, self._boot_epoch, self._settings, link.connection, can_join=can_join)
