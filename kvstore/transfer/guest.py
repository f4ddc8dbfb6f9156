"""What one connection asks of a node: its question, and the transfer that its fetch leads to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import LeaseGoneError, SpecError, StoreClosedError, TokenError
from kvstore.transfer.frames import Kind
from kvstore.transfer.inbox import OfferRefusedError
from kvstore.transfer.messages import Abort, AbortCode
from kvstore.transfer.query import Fetch, Query

if TYPE_CHECKING:
    from kvstore.transfer.callback import CallbackConnector, JoinCall
    from kvstore.transfer.connector import GreetedLink
    from kvstore.transfer.frames import FrameHeader, TransferId
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.serving import Question, Served, Serving

LEND_SLACK_S = 60.0
"""How much longer than a transfer's total deadline its connection may be lent, before the session takes it back."""
ADMIT_DEADLINE_S = 1.0
"""How long a further connection waits for its attachment to come for it: as long as WANT may take to be read."""


class Guest:
    """Answers one connection. Its session's thread calls.

    One question is kept, until the next one comes.
    """

    def __init__(self, serving: Serving, link: FrameLink) -> None:
        self._serving = serving
        self._link = link
        self._question: Question | None = None

    def query(self, question: TransferId, payload: memoryview) -> None:
        """Answer QUERY: CANDIDATES, or ABORT if it cannot be asked of this model.

        Raises:
            ProtocolError: it is none. PeerGoneError: the connection is over.
        """
        asked = Query.parse(payload)
        self._question = None
        try:
            self._question = self._serving.understand(question, asked)
            candidates = self._serving.candidates(self._question)
        except (SpecError, TokenError) as error:
            self._refuse(question, AbortCode.INVALID, str(error))
        except StoreClosedError as error:
            self._refuse(question, AbortCode.CLOSING, str(error))
        else:
            self._link.send(Kind.CANDIDATES, question, payload=candidates.pack())

    def fetch(self, question: TransferId, payload: memoryview, greeted: GreetedLink) -> bool:
        """Serve FETCH over this connection; True once the connection has been used up, False if it goes on.

        Raises:
            ProtocolError: it is none. PeerGoneError: the connection is over.
        """
        fetch = Fetch.parse(payload)
        served = self._serving.resume(question) or self._begin(question, fetch)
        if served is None:
            return False
        loan = served.connector.lend(greeted)
        if loan is None:
            self._refuse(
                question, AbortCode.UNKNOWN_TRANSFER, "the transfer of this question has just ended; ask again"
            )
            return False
        loan.ended.wait(served.transfer.deadline.remaining_s() + LEND_SLACK_S)
        return True

    def _begin(self, question: TransferId, fetch: Fetch) -> Served | None:
        """A new transfer; None if something else was answered."""
        asked = self._question
        if asked is None or asked.identity != question:
            self._refuse(question, AbortCode.UNKNOWN_TRANSFER, "FETCH for a question that is not known here; ask again")
            return None
        try:
            return self._serving.begin(asked, fetch, self._link.peer_address)
        except LeaseGoneError:
            # It was evicted since the answer: the requester chooses among what there is now.
            self._link.send(Kind.CANDIDATES, question, payload=self._serving.candidates(asked).pack())
        except OfferRefusedError as error:
            self._refuse(question, error.code, str(error))
        except StoreClosedError as error:
            self._refuse(question, AbortCode.CLOSING, str(error))
        return None

    def _refuse(self, question: TransferId, code: AbortCode, reason: str) -> None:
        self._link.send(Kind.ABORT, question, payload=Abort(code, reason).pack())


class Joining:
    """A further connection that a requester opened, lent to the transfer that it fetches.

    Args:
        connector, call: where it belongs.
    """

    def __init__(self, connector: CallbackConnector, call: JoinCall) -> None:
        self._connector = connector
        self._call = call

    @classmethod
    def admit(cls, serving: Serving, header: FrameHeader, peer_epoch: int) -> Joining | None:
        """A place for the connection whose HELLO this is; None if nobody comes for it."""
        place = serving.admit(peer_epoch, header.transfer, header.generation, Deadline.after(ADMIT_DEADLINE_S))
        return None if place is None else cls(*place)

    @property
    def number(self) -> int:
        """Of the connection within its attachment, from 1."""
        return self._call.number

    def lend(self, greeted: GreetedLink, deadline_s: float) -> None:
        """Let the transfer use the connection, and wait until the attachment has ended."""
        self._connector.fill(self._call, greeted)
        self._call.ended.wait(deadline_s)

    def withdraw(self) -> None:
        """Without the connection after all."""
        self._connector.withdraw(self._call)
