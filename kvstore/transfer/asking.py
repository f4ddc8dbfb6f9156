"""Asking over a connection: QUERY and its answer, FETCH and its answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kvstore.clock import Deadline
from kvstore.errors import (
    DeadlineError,
    KVStoreError,
    PeerClosingError,
    PeerGoneError,
    ProtocolError,
    TransferAbortedError,
    TransferError,
)
from kvstore.transfer.frames import Kind
from kvstore.transfer.greeting import may_match
from kvstore.transfer.messages import Abort, AbortCode
from kvstore.transfer.query import Candidates

if TYPE_CHECKING:
    from kvstore.transfer.connector import GreetedLink
    from kvstore.transfer.frames import FrameHeader, TransferId
    from kvstore.transfer.query import Fetch


class QuestionGoneError(TransferError):
    """The node does not know the question: it restarted, or what it led to has ended there. Ask again."""


class Asking:
    """Questions over one connection. One thread asks; any thread may end it by closing the link.

    Args:
        greeted: the connection.
        address: the node, for people.
        question: this side's name for what it asks.

    Raises:
        TransferError: the node's release cannot be asked.
    """

    def __init__(self, greeted: GreetedLink, address: str, question: TransferId) -> None:
        if not may_match(greeted.ours, greeted.theirs):
            raise TransferError(
                f"{address} cannot be asked what it has: its release of kvstore does not know remote match and fetch; "
                "use a newer one there"
            )
        self._link = greeted.link
        self._address = address
        self._question = question
        self.round_trip_s = 0.0
        """From the last question to its answer."""

    def query(self, packed: bytes, tokens: int, deadline: Deadline) -> Candidates:
        """What the node has of a prompt of `tokens` tokens.

        Raises:
            TransferError: it does not answer such questions. PeerGoneError, DeadlineError, ProtocolError: the
            connection is over.
        """
        start_s = time.monotonic()
        self._link.send(Kind.QUERY, self._question, payload=packed)
        header, payload = self._answer(deadline)
        self.round_trip_s = time.monotonic() - start_s
        if header.kind is not Kind.CANDIDATES:
            raise ProtocolError(f"{self._address} answered QUERY with {header.kind.name}")
        return self._candidates(payload, tokens)

    def fetch(self, fetch: Fetch, tokens: int, deadline: Deadline) -> Candidates | tuple[FrameHeader, memoryview]:
        """Ask for a candidate: the offer that answers, or what there is now if that candidate has gone.

        Raises:
            QuestionGoneError: the question must be asked anew. Otherwise as `query`.
        """
        self._link.send(Kind.FETCH, self._question, payload=fetch.pack())
        header, payload = self._answer(deadline)
        if header.kind is Kind.OFFER:
            return header, payload
        if header.kind is not Kind.CANDIDATES:
            raise ProtocolError(f"{self._address} answered FETCH with {header.kind.name}")
        return self._candidates(payload, tokens)

    def _answer(self, deadline: Deadline) -> tuple[FrameHeader, memoryview]:
        silence = Deadline(time.monotonic() + self._link.progress_deadline_s)
        try:
            header = self._link.receive_header(silence.earlier(deadline))
        except DeadlineError as error:
            if deadline.has_passed:
                raise
            raise PeerGoneError(
                f"{self._address} was silent for {self._link.progress_deadline_s:g} s; it is stopped, or the network "
                "between is cut"
            ) from error
        payload = self._link.receive_payload(header)
        if header.kind is Kind.OFFER:
            return header, payload
        if header.transfer != self._question:
            raise ProtocolError(f"{self._address} answered {header.transfer}, which was not asked")
        if header.kind is Kind.ABORT:
            raise self._refused(Abort.parse(payload))
        return header, payload

    def _candidates(self, payload: memoryview, tokens: int) -> Candidates:
        candidates = Candidates.parse(payload)
        if candidates.candidates and candidates.candidates[0].tokens >= tokens:
            raise ProtocolError(f"{self._address} claims a resume point past what was asked about")
        return candidates

    def _refused(self, abort: Abort) -> KVStoreError:
        if abort.code is AbortCode.UNKNOWN_TRANSFER:
            return QuestionGoneError(f"{self._address}: {abort.reason}")
        return refusal(self._address, abort)


def refusal(address: str, abort: Abort) -> KVStoreError:
    """What a node's ABORT means to who asked it."""
    message = f"{address} does not serve this ({abort.code.name}): {abort.reason}"
    if abort.code is AbortCode.CLOSING:
        return PeerClosingError(f"{message}; fetch it elsewhere, or there once it has started again")
    if abort.code in (AbortCode.CANCELLED, AbortCode.SOURCE, AbortCode.DEADLINE):
        return TransferAbortedError(message)
    return TransferError(message)
