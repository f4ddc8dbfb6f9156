"""A further connection of a transfer at its receiving end: it brings pieces, and nothing else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import DeadlineError, ProtocolError, StoreClosedError, WriteError
from kvstore.transfer.frames import Kind, parse_header
from kvstore.transfer.native import Arrival, receive

if TYPE_CHECKING:
    from kvstore._native import StopFlag, Stream
    from kvstore.transfer.frames import FrameHeader
    from kvstore.transfer.incoming import Attached
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.session import Session


@dataclass(frozen=True)
class Joined:
    """What a further connection belongs to.

    Attributes:
        primary: the session of the transfer's first connection, which all control frames use.
        control: that connection's stream.
        attached: the attachment; the further connection ends with it.
        number: of the connection within the attachment, from 1.
        frames_before: DATA frames that the connection had carried before, for other attachments.
    """

    primary: Session
    control: Stream
    attached: Attached
    number: int
    frames_before: int

    def serve(self, link: FrameLink, stop: StopFlag, *, is_observed: bool) -> FrameHeader | None:
        """Receive until the connection or the attachment ends.

        Returns:
            HELLO for another attachment after this one was committed, its payload unread; or None: the connection is
            to end.

        Raises:
            PeerGoneError, DeadlineError, ProtocolError, TransportError: the connection is over.
        """
        stream = link.native
        assert stream is not None, "only connections with a socket join"
        while True:
            silence = Deadline(link.last_received_s + link.progress_deadline_s)
            if not stream.wait_readable(silence.at_s):
                raise DeadlineError(f"{link.peer_address} was silent for {link.progress_deadline_s:g} s")
            if not self.primary.is_attached(self.attached):
                header = link.receive_header(silence)
            else:
                start_s = time.monotonic()
                incoming, generation = self.attached.incoming, self.attached.generation
                try:
                    received = receive(stream, self.control, incoming, generation, stop, is_observed=is_observed)
                except (WriteError, StoreClosedError):
                    if self.primary.is_attached(self.attached):
                        return None  # The first connection says so.
                    continue
                if received.event is Arrival.STOPPED:
                    return None
                if received.event is not Arrival.CONTROL:
                    self.primary.follow_up(received, self.attached, start_s)
                    if received.unread_bytes:
                        return None  # The transfer was given up.
                    continue
                header = parse_header(received.header)
            if header.kind is Kind.HELLO and not self.primary.is_attached(self.attached):
                return header
            if header.kind is not Kind.PING:
                raise ProtocolError(f"{header.kind.name} of generation {header.generation} on a further connection")
