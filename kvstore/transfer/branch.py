"""A further connection of an outgoing transfer: it takes pieces from the same state as the first, and sends them."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

import numpy as np

from kvstore._native import StopFlag, send_pieces
from kvstore.clock import Deadline
from kvstore.errors import KVStoreError, PeerGoneError
from kvstore.transfer.frames import Kind
from kvstore.transfer.messages import PIECE_ROW
from kvstore.transfer.native import SEND_S
from kvstore.transfer.pieces import split_rows
from kvstore.transfer.settings import KEEPALIVE_FRACTION

if TYPE_CHECKING:
    from kvstore.transfer.connector import JoinedLink
    from kvstore.transfer.link import FrameLink
    from kvstore.transfer.outgoing_transfer import OutgoingTransfer
    from kvstore.transfer.workers import Task

LOG = logging.getLogger("kvstore.transfer")


class Branch:
    """One further connection, with a thread that ends with it. What it loses, the receiver names by LOST.

    Args:
        owner: the transfer.
        generation: of the attachment that it joins.
        frame_bytes_max: bytes of pieces in one frame.
        progress_deadline_s: the longest silence that both sides bear.
    """

    def __init__(
        self, owner: OutgoingTransfer, generation: int, frame_bytes_max: int, progress_deadline_s: float
    ) -> None:
        self._owner = owner
        self._generation = generation
        self._frame_bytes_max = frame_bytes_max
        self._progress_deadline_s = progress_deadline_s
        self._lock = threading.Lock()
        self._link: FrameLink | None = None
        self._stop = StopFlag()
        self._may_give_back = False
        self.number = 0
        """Which further connection of the attachment it is, from 1; 0 until the receiver has said so."""
        self._task: Task | None = None

    def start(self) -> None:
        """Connect and send, in a thread of its own. Without one, the first connection does all."""
        try:
            self._task = self._owner.workers.run(self._run, f"kvstore-send-{self._owner.transfer.counter}-branch")
        except RuntimeError as error:
            LOG.warning("transfer %s goes on over one connection: %s", self._owner.transfer, error)

    def close(self, *, is_committed: bool = False) -> None:
        """End the thread and the connection, or give that back if everything was `is_committed`. Idempotent.

        One that is still connecting is not waited for: it carries nothing, and ends when its connect does.
        """
        with self._lock:
            self._stop.set()
            link = self._link
            self._may_give_back = is_committed and self.number != 0
            is_kept = self._may_give_back
        if link is not None and not is_kept:
            link.close()
        with self._owner.changed:
            self._owner.notify()
        if link is not None and self._task is not None:
            self._task.wait(self._progress_deadline_s)

    def _run(self) -> None:
        owner = self._owner
        joined: JoinedLink | None = None
        is_broken = True
        try:
            joined = self._join()
            if joined is not None:
                self._send(joined.greeted.link)
            is_broken = False
        except KVStoreError as error:
            LOG.debug("a further connection of transfer %s to %s ended: %s", owner.transfer, owner.address, error)
        finally:
            with self._lock:
                self._stop.set()
                link = self._link
                may_give_back = self._may_give_back and not is_broken
            if link is not None:
                owner.path.closed(link.connection)
            if joined is not None and may_give_back:
                owner.connector.give_back_joined(joined)
            elif link is not None:
                link.close()
            with owner.changed:
                owner.notify()

    def _join(self) -> JoinedLink | None:
        """Connect and say which transfer this is for; None if the receiver does not take it."""
        owner = self._owner
        deadline = Deadline.after(owner.settings.connect_deadline_s).earlier(owner.deadline)
        joined = owner.connector.join(
            owner.transfer, self._generation, self._progress_deadline_s, deadline, self._opened
        )
        if joined is not None:
            with self._lock:
                self.number = joined.number
            owner.path.opened(joined.greeted.link.connection)
        return joined

    def _opened(self, link: FrameLink) -> None:
        with self._lock:
            self._link = link
            if self._stop.is_set:
                raise PeerGoneError(f"the attachment that a connection to {self._owner.address} was for has ended")

    def _send(self, link: FrameLink) -> None:
        owner = self._owner
        assert link.native is not None
        while not self._stop.is_set:
            with owner.changed:
                seen = owner.change_count
            start_s = time.monotonic()
            frames, first_s, rows, is_held = send_pieces(
                link.native,
                owner.outgoing.departures,
                *owner.transfer,
                self._generation,
                owner.path.frame_bytes(link.connection, self._frame_bytes_max),
                owner.path.unsent_bytes(link.connection),
                self.number,
                start_s + SEND_S,
                owner.observer is not None,
                self._stop,
                owner.flow,
            )
            if frames:
                owner.sent(first_s, link.last_sent_s)
                if rows:
                    owner.observe(split_rows(np.frombuffer(rows, PIECE_ROW)), start_s, link.last_sent_s)
                with owner.changed:
                    owner.notify()  # What was under way has left, and COMMIT may be due.
                continue
            keepalive_s = link.last_sent_s + self._progress_deadline_s * KEEPALIVE_FRACTION - time.monotonic()
            if keepalive_s <= 0:
                link.send(Kind.PING, owner.transfer, self._generation)
                continue
            if is_held:
                continue
            with owner.changed:
                if owner.change_count == seen and not self._stop.is_set:
                    owner.changed.wait(keepalive_s)
