"""One connection of an outgoing transfer: HELLO, OFFER, then pieces until COMMITTED."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import send_pieces
from kvstore.clock import Deadline
from kvstore.errors import (
    ChecksumError,
    KVStoreError,
    PeerClosingError,
    PeerGoneError,
    ProtocolError,
    TransferAbortedError,
    TransferError,
    TransferFullError,
    TransferTooLargeError,
)
from kvstore.limits import FRAME_PAYLOAD_BYTES_MAX, FRAME_PIECES_MAX, KIB, MIB
from kvstore.transfer.branch import Branch
from kvstore.transfer.frames import FLAG_REMOTE, PIECE_ROW_BYTES, Kind
from kvstore.transfer.greeting import check_takes
from kvstore.transfer.messages import (
    PIECE_ROW,
    Abort,
    AbortCode,
    Commit,
    Committed,
    Credit,
    Expose,
    Exposure,
    Lost,
    Seal,
    Want,
    WantStatus,
)
from kvstore.transfer.native import SEND_S
from kvstore.transfer.pieces import split_rows
from kvstore.transfer.settings import KEEPALIVE_FRACTION
from kvstore.transfer.snapshots import TransferState

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.transfer.connector import GreetedLink
    from kvstore.transfer.frames import FrameHeader
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.messages import Hello
    from kvstore.transfer.outgoing_transfer import OutgoingTransfer
    from kvstore.transfer.workers import Task

FRAME_BYTES = 4 * MIB
"""Bytes of pieces in one DATA frame of an unpaced transfer."""
PACED_FRAME_S = 0.025
"""A paced transfer's frames take about this long, so that pieces leave while others are computed."""
PACED_FRAME_BYTES_MAX = 1 * MIB
SEALS_PER_FRAME = 4096
EXPOSURES_PER_FRAME = 2048
ABORT_DEADLINE_S = 1.0
"""How long a side that gives up waits for ABORTED."""


class Attachment:
    """One attempt. `run` is called by the transfer's thread; a second thread reads what the peer says.

    Args:
        owner: the transfer.
        may_reuse: whether its connection may have served another transfer.

    Attributes:
        heard_s: when the peer was last heard of; None before its HELLO, or its first frame on a reused connection.
    """

    def __init__(self, owner: OutgoingTransfer, *, may_reuse: bool = True) -> None:
        self._owner = owner
        self._may_reuse = may_reuse
        self._greeted: GreetedLink | None = None
        self._link: FrameLink | None = None
        self._reader: Task | None = None
        self._progress_deadline_s = owner.settings.progress_deadline_s
        self._frame_bytes_max = FRAME_BYTES
        self._is_one_sided = False
        self._descriptors: dict[int, bytes] = {}
        # What the peer has said; guarded by the owner's condition.
        self._answer: tuple[FrameHeader, Want] | None = None
        self._again: list[Want] = []
        self._committed: Committed | None = None
        self._abort: Abort | None = None
        self._is_abort_acknowledged = False
        self._broken: KVStoreError | None = None
        self._granted_bytes = 0
        self._generation = 0
        self._is_commit_sent = False
        self._may_join = False
        self._is_closed = False
        self._branches: list[Branch] = []
        self._branches_begun = 0
        self._lost: list[Lost] = []

    @property
    def heard_s(self) -> float | None:
        greeted = self._greeted
        if greeted is None or self._reader is None:
            return None
        last_s = greeted.link.last_received_s
        return None if greeted.reused_s is not None and last_s < greeted.reused_s else last_s

    @property
    def may_have_been_dead(self) -> bool:
        """Whether its connection served another transfer, then broke, and this side first noticed by using it."""
        greeted = self._greeted
        if greeted is None or greeted.reused_s is None:
            return False
        return self.heard_s is None and self._silent_s() < self._progress_deadline_s

    def run(self) -> Committed:
        """Attach and send until the peer has committed.

        Raises:
            PeerGoneError, ProtocolError: this connection is over; the transfer may go on over another.
            TransferError: the transfer is over.
        """
        try:
            return self._run()
        except PeerGoneError as error:
            self._end_reader()
            with self._owner.changed:
                self._broken = self._broken or error
                if self._committed is not None:
                    return self._committed
                if self._abort is not None:
                    raise self._refused(self._abort) from error
            raise

    def _end_reader(self) -> None:
        """The connection is over. What the peer said before that counts, also where a send was the first to notice."""
        link, reader = self._link, self._reader
        if link is None or reader is None or self._abort is not None:
            return
        link.close()
        reader.wait(self._progress_deadline_s)

    def _run(self) -> Committed:
        owner = self._owner
        link = self._connect(Deadline.after(owner.settings.connect_deadline_s).earlier(owner.deadline))
        link.send(Kind.OFFER, owner.transfer, payload=owner.offer_payload)
        owner.state = TransferState.WAITING_FOR_SPACE
        with owner.changed:
            self._wait(lambda: self._answer is not None or self._committed is not None)
            if self._committed is not None:
                return self._committed
            assert self._answer is not None
            header, want = self._answer
            if want.status is WantStatus.FULL:
                raise TransferFullError(
                    f"{owner.address} has no room for the {owner.offer.total_bytes} bytes of transfer "
                    f"{owner.transfer}: {want.reason}; send it later, or elsewhere"
                )
            self._generation = header.generation
            self._granted_bytes = max(self._granted_bytes, want.granted_bytes)
            pieces = owner.outgoing.want(want.ranges, granted_bytes=self._granted_bytes, is_again=False)
        owner.wanted(pieces, is_again=False, is_one_sided=self._is_one_sided)
        owner.state = TransferState.MOVING
        self._branch_out(owner.path.begin(owner.outgoing.bytes_of(want.ranges), want.granted_bytes))
        return self._stream()

    def _branch_out(self, connections: int) -> None:
        """Open connections up to this number: they take pieces from the same state, a slow one fewer."""
        owner = self._owner
        if not self._may_join or owner.options.pacing_bytes_per_s is not None:
            return
        while self._branches_begun + 1 < connections:
            self._branches_begun += 1
            branch = Branch(owner, self._generation, self._frame_bytes_max, self._progress_deadline_s)
            self._branches.append(branch)
            branch.start()

    def _connect(self, deadline: Deadline) -> FrameLink:
        owner = self._owner
        greeted = owner.connector.connect(deadline, may_reuse=self._may_reuse)
        self._greeted = greeted
        self._link = link = greeted.link
        owner.path.opened(link.connection)
        self._progress_deadline_s = link.progress_deadline_s
        self._frame_bytes_max = self._frame_bytes(greeted.theirs)
        self._frame_pieces_ok(greeted.theirs)
        check_takes(owner.offer, greeted.theirs, owner.address)
        self._is_one_sided = greeted.is_one_sided
        self._may_join = greeted.may_join
        self._reader = owner.workers.run(self._read, f"kvstore-send-{owner.transfer.counter}-reader")
        return link

    def _frame_bytes(self, peer: Hello) -> int:
        """How many bytes of pieces go into one frame."""
        limit = min(peer.frame_payload_bytes_max, FRAME_PAYLOAD_BYTES_MAX) - FRAME_PIECES_MAX * PIECE_ROW_BYTES
        wanted = FRAME_BYTES
        pace = self._owner.options.pacing_bytes_per_s
        if pace is not None:
            wanted = min(max(round(pace * PACED_FRAME_S), 64 * KIB), PACED_FRAME_BYTES_MAX)
        return max(1, min(limit, wanted))

    def _frame_pieces_ok(self, peer: Hello) -> None:
        if peer.frame_pieces_max < FRAME_PIECES_MAX:
            raise ProtocolError(
                f"{self._owner.address} takes {peer.frame_pieces_max} pieces a frame; version 1 needs "
                f"{FRAME_PIECES_MAX}"
            )

    def _expose(self, records: list[int]) -> None:
        """Let the peer read these records, no byte beyond them, unless it may already."""
        link = self._need_link()
        exposures: list[Exposure] = []
        for record in records:
            if record in self._descriptors:
                continue
            source = self._owner.source.records[record]
            memory = source.memory[: source.layout.record_bytes]
            descriptor = link.connection.expose(memory)
            self._descriptors[record] = descriptor
            exposures.append(Exposure(record, memory.nbytes, descriptor))
        for start in range(0, len(exposures), EXPOSURES_PER_FRAME):
            payload = Expose(tuple(exposures[start : start + EXPOSURES_PER_FRAME])).pack()
            link.send(Kind.EXPOSE, self._owner.transfer, self._generation, payload)

    # Sending

    def _stream(self) -> Committed:
        owner = self._owner
        link = self._need_link()
        while True:
            with owner.changed:
                # What is set from here on concerns what this round does not look at any more.
                owner.stop.clear()
                self._check()
                if self._committed is not None:
                    owner.path.sample(is_last=True)
                    return self._committed
                seen = owner.change_count
                again, self._again = self._again, []
                repeated = sum(self._want_again(want) for want in again)
                lost, self._lost = self._lost, []
            for connection in lost:
                self._recover(connection)
            if repeated:
                owner.wanted(repeated, is_again=True, is_one_sided=self._is_one_sided)
            if self._is_commit_sent and not owner.check_source():
                continue  # what is sent again now is taken without another word from here
            has_sent = self._send_pieces()
            self._branch_out(owner.path.sample())
            if has_sent:
                continue
            with owner.changed:
                if owner.change_count != seen:
                    continue
                seals = owner.outgoing.next_seals(SEALS_PER_FRAME)
                commit = None if len(seals) else self._due_commit()
                if not len(seals) and commit is None:
                    self._wait_for_change()
                    continue
            if len(seals):
                link.send(Kind.SEAL, owner.transfer, self._generation, Seal(seals).pack())
            elif commit is not None and owner.check_source():
                link.send(Kind.COMMIT, owner.transfer, self._generation, commit.pack())

    def _want_again(self, want: Want) -> int:
        return self._owner.outgoing.want(want.ranges, granted_bytes=want.granted_bytes, is_again=True)

    def _recover(self, lost: Lost) -> None:
        """A further connection has ended at the receiver: send again what it took and did not deliver."""
        for branch in [branch for branch in self._branches if branch.number == lost.connection]:
            branch.close()
            self._branches.remove(branch)
        self._owner.outgoing.departures.lost(lost.connection, lost.frames)

    def _send_pieces(self) -> bool:
        """Send what is ready, for a while; False if nothing was."""
        link = self._need_link()
        owner = self._owner
        start_s = time.monotonic()
        if link.native is None:
            return self._send_frame(start_s)
        owner.is_native = True
        frames, first_s, rows, is_held = send_pieces(
            link.native,
            owner.outgoing.departures,
            *owner.transfer,
            self._generation,
            owner.path.frame_bytes(link.connection, self._frame_bytes_max),
            owner.path.unsent_bytes(link.connection),
            0,
            start_s + SEND_S,
            owner.observer is not None,
            owner.stop,
            owner.flow,
        )
        if is_held:
            self._keep_alive()
        if not frames:
            return is_held
        end_s = link.last_sent_s
        owner.sent(first_s, end_s)
        if rows:
            owner.observe(split_rows(np.frombuffer(rows, PIECE_ROW)), start_s, end_s)
        return True

    def _send_frame(self, start_s: float) -> bool:
        """Send one frame over a connection without a socket of its own, or name pieces that the peer gets."""
        link = self._need_link()
        owner = self._owner
        frame = owner.outgoing.next_frame(
            owner.transfer,
            self._generation,
            owner.path.frame_bytes(link.connection, self._frame_bytes_max),
            is_remote=self._is_one_sided,
        )
        if frame is None:
            return False
        try:
            if frame.header.flags & FLAG_REMOTE:
                self._expose([record for record, _ in frame.parts])
            link.send_frame(frame.header, frame.payload)
        except BaseException:
            owner.outgoing.unsent(frame)
            raise
        owner.outgoing.sent(frame)
        end_s = time.monotonic()
        owner.sent(end_s, end_s)
        owner.observe(frame.parts, start_s, end_s)
        return True

    def _due_commit(self) -> Commit | None:
        """COMMIT, once everything wanted has been sent and the producer has finished."""
        owner = self._owner
        if self._is_commit_sent or owner.producer_finished_s is None or owner.outgoing.has_left:
            return None
        self._is_commit_sent = True
        owner.state = TransferState.COMMITTING
        return Commit(owner.source.path.tokens, owner.handover)

    def _keep_alive(self) -> None:
        """While it is other transfers' turn the receiver hears PING, as it does while nothing is there to send."""
        link = self._need_link()
        if time.monotonic() >= link.last_sent_s + self._progress_deadline_s * KEEPALIVE_FRACTION:
            link.send(Kind.PING, self._owner.transfer, self._generation)

    # Waiting, with the owner's condition held

    def _wait_for_change(self) -> None:
        """Sleep until something happens; keep the connection alive meanwhile."""
        owner = self._owner
        link = self._need_link()
        now = time.monotonic()
        keepalive_s = link.last_sent_s + self._progress_deadline_s * KEEPALIVE_FRACTION - now
        if keepalive_s <= 0:
            # Nobody else sends on this link, so the condition may be left for a moment.
            owner.changed.release()
            try:
                link.send(Kind.PING, owner.transfer, self._generation)
            finally:
                owner.changed.acquire()
            return
        silence_s = self._progress_deadline_s - self._silent_s()
        owner.changed.wait(max(0.0, min(keepalive_s, silence_s, owner.deadline.remaining_s())))

    def _wait(self, is_there: Callable[[], bool]) -> None:
        while True:
            self._check()
            if is_there():
                return
            self._wait_for_change()

    def _check(self) -> None:
        """Raise what ends this attachment or the transfer."""
        owner = self._owner
        if self._committed is not None:
            return
        if self._abort is not None:
            raise self._refused(self._abort)
        ending = owner.ending()
        if ending is not None and self._broken is None:
            self._give_up(ending)
            raise owner.aborted(ending)
        if self._broken is not None:
            raise self._broken
        if self._silent_s() >= self._progress_deadline_s:
            raise PeerGoneError(
                f"{owner.address} was silent for {self._progress_deadline_s:g} s; it is stopped, or the network "
                "between is cut"
            )

    def _silent_s(self) -> float:
        """For how long nothing has been heard of the peer in this attachment."""
        assert self._greeted is not None
        since_s = max(self._greeted.link.last_received_s, self._greeted.reused_s or 0.0)
        return time.monotonic() - since_s

    def _refused(self, abort: Abort) -> KVStoreError:
        owner = self._owner
        if abort.code is AbortCode.STALE_GENERATION:
            return PeerGoneError(f"{owner.address} gave this connection up: {abort.reason}")
        if abort.code is AbortCode.TOO_LARGE:
            return TransferTooLargeError(
                f"{owner.address} can never have room for the {owner.offer.total_bytes} bytes of transfer "
                f"{owner.transfer}: {abort.reason}; send it elsewhere, or give that node more memory"
            )
        message = f"{owner.address} refused transfer {owner.transfer} ({abort.code.name}): {abort.reason}"
        if abort.code is AbortCode.CHECKSUM:
            return ChecksumTransferError(message)
        if abort.code is AbortCode.CLOSING:
            return PeerClosingError(f"{message}; send it elsewhere, or there later")
        if abort.code in (AbortCode.INVALID, AbortCode.UNSUPPORTED, AbortCode.LIMIT, AbortCode.UNKNOWN_TRANSFER):
            return TransferError(message)
        return TransferAbortedError(message)

    def _give_up(self, ending: Abort) -> None:
        """Tell the peer, and wait a little for its acknowledgement."""
        owner = self._owner
        link = self._need_link()
        owner.changed.release()
        try:
            link.send(Kind.ABORT, owner.transfer, self._generation, ending.pack())
        except (PeerGoneError, OSError):
            return  # The receiver gives up by itself once its resume window has passed.
        finally:
            owner.changed.acquire()
        owner.changed.wait_for(
            lambda: self._is_abort_acknowledged or self._broken is not None or self._abort is not None,
            min(ABORT_DEADLINE_S, self._progress_deadline_s),
        )

    def deliver_abort(self, ending: Abort) -> None:
        """Connect only to tell the receiver of an abort; without effect if it cannot be reached."""
        owner = self._owner
        try:
            link = self._connect(Deadline.after(ABORT_DEADLINE_S))
            link.send(Kind.ABORT, owner.transfer, 0, ending.pack())
            with owner.changed:
                owner.changed.wait_for(
                    lambda: self._is_abort_acknowledged or self._broken is not None,
                    min(ABORT_DEADLINE_S, self._progress_deadline_s),
                )
        except KVStoreError:
            return  # Out of reach: the receiver gives up by itself once its resume window has passed.
        finally:
            self.close()

    # Receiving, in the reader's thread

    def _read(self) -> None:
        link = self._need_link()
        owner = self._owner
        try:
            while self._committed is None:  # Nothing but PONG follows.
                header = link.receive_header(owner.deadline)
                self._take(header, link.receive_payload(header))
            return
        except KVStoreError as error:
            broken = error
        with owner.changed:
            self._broken = broken
            owner.stop.set()
            owner.notify()

    def _take(self, header: FrameHeader, payload: memoryview) -> None:
        owner = self._owner
        if header.transfer != owner.transfer and header.kind is not Kind.PONG:
            raise ProtocolError(f"{owner.address} answered for transfer {header.transfer}, which is not this one")
        with owner.changed:
            if header.kind is Kind.WANT:
                want = Want.parse(payload)
                if want.status is WantStatus.AGAIN:
                    self._again.append(want)
                    owner.stop.set()
                elif self._answer is None:
                    self._answer = (header, want)
                else:
                    raise ProtocolError(f"{owner.address} answered one offer twice")
            elif header.kind is Kind.CREDIT:
                self._granted_bytes = max(self._granted_bytes, Credit.parse(payload).granted_bytes)
                owner.outgoing.grant(self._granted_bytes)
            elif header.kind is Kind.LOST and self._may_join:
                self._lost.append(Lost.parse(payload))
                owner.stop.set()
            elif header.kind is Kind.COMMITTED:
                self._committed = Committed.parse(payload)
            elif header.kind is Kind.ABORT:
                self._abort = self._abort or Abort.parse(payload)
                owner.stop.set()
            elif header.kind is Kind.ABORTED:
                self._is_abort_acknowledged = True
            elif header.kind is not Kind.PONG:
                raise ProtocolError(f"{owner.address} sent {header.kind.name}, which a receiver never does")
            owner.notify()

    # Ending

    def close(self) -> None:
        """End its exposures and its reader, and the connection unless that may serve another transfer. Idempotent."""
        link, greeted = self._link, self._greeted
        if link is None or greeted is None or self._is_closed:
            return
        self._is_closed = True
        with self._owner.changed:
            is_committed = self._committed is not None and self._broken is None and self._abort is None
        if self._abort is not None:
            self._acknowledge(link)
        self._owner.connector.leave(self._generation)
        for branch in self._branches:
            branch.close(is_committed=is_committed)
        self._branches = []
        for descriptor in self._descriptors.values():
            try:
                link.connection.withdraw(descriptor)
            except PeerGoneError:
                break  # A closed connection has withdrawn everything.
        self._descriptors = {}
        self._owner.path.closed(link.connection)
        if not is_committed:
            link.close()
        if self._reader is not None:
            self._reader.wait(self._progress_deadline_s)
        if is_committed:
            self._owner.connector.give_back(greeted)

    def _acknowledge(self, link: FrameLink) -> None:
        try:
            link.send(Kind.ABORTED, self._owner.transfer, self._generation)
        except (PeerGoneError, OSError):
            return  # The peer has ended the connection already: it does not wait.

    def _need_link(self) -> FrameLink:
        if self._link is None:
            raise PeerGoneError(f"there is no connection to {self._owner.address}")
        return self._link


class ChecksumTransferError(TransferError, ChecksumError):
    """Pieces kept arriving damaged. Both a failed transfer and a checksum error."""
